"""Which device a verb runs on, and where it steps around compiled code."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def best_device(device: str | torch.device | None = None) -> torch.device:
    """The named torch device, or CUDA, MPS, CPU in this order of preference.

    Raises:
        ValueError: If the name is no device, or this machine has none of that kind.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r}: not to be had here ({reason}); leave it out for the best") from error


def uncompiled(is_compiled: bool) -> AbstractContextManager:
    """A context in which modules compiled by torch run as they were: other batches are not worth graphs.

    Args:
        is_compiled: Whether any is; asking torch loads its compiler, so that plain runs do not ask.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
