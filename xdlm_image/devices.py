"""Which device a verb runs on."""

from __future__ import annotations

import torch


def best_device(device: str | torch.device | None = None) -> torch.device:
    """The named torch device, or CUDA, MPS, CPU in this order of preference."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
