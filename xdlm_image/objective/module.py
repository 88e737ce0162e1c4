"""The network and its loss as one module, so that DDP, FSDP and autocast see a single forward.

Owns the step from clean codes' noisy version to loss per token; the maths is `nelbo.py`'s, the network the caller's.
"""

from __future__ import annotations

import torch
from torch import nn

from ..schedulers import XDLMProcess
from .nelbo import xdlm_nelbo


class XDLMLoss(nn.Module):
    """NELBO density per token of a denoising transformer.

    Args:
        transformer: Called as `transformer(z, timestep=t, class_labels=labels).sample` -> logits (B, L, V).
        process: The noise process.
    """

    def __init__(self, transformer: nn.Module, process: XDLMProcess) -> None:
        super().__init__()
        self.transformer = transformer
        self.process = process

    def forward(
        self, z: torch.Tensor, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss l in nats per token and unit of -alpha'(t), float32.

        Args:
            z: Noisy codes (B, L) int64.
            x: Clean codes (B, L) int64.
            t: Times (B,) in (0, 1], float32 or float64.
            class_labels: (B,) int64; the null class is the number of classes. None for unconditional networks.

        Returns:
            (B, L).
        """
        logits = self.transformer(z, timestep=t.float(), class_labels=class_labels).sample  # (B, L, V)
        alpha, beta = self.process.alpha_beta(t)
        return xdlm_nelbo(logits, z, x, self.process, alpha, beta)
