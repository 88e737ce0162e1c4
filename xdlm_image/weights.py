"""What identifies a module: a hash of its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over every weight's name, shape and float32 value; the order and dtype of the weights do not matter."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False))
    return digest.hexdigest()
