"""The network and its loss as one module, so that DDP, FSDP and autocast see a single forward.

Owns the step from clean codes' noisy version to the loss; the maths is `nelbo.py`'s and `head.py`'s, the network the
caller's.
"""

from __future__ import annotations

import torch
from torch import nn

from ..models import XDLMTransformer2DModel
from ..schedulers import XDLMProcess
from .head import XDLMLossOutput, xdlm_head_nelbo
from .nelbo import xdlm_nelbo


class XDLMLoss(nn.Module):
    """NELBO of a denoising transformer.

    The logits of an `XDLMTransformer2DModel` never exist as a whole: its output projection runs by blocks inside the
    loss, unless something (an adapter, a wrapper, a hook) has taken the place of the plain linear layer.

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
    ) -> XDLMLossOutput:
        """Loss l in nats per token and unit of -alpha'(t), float32: `mean` () to minimise and `per_token` (B, L).

        Args:
            z: Noisy codes (B, L) int64.
            x: Clean codes (B, L) int64.
            t: Times (B,) in (0, 1], float32 or float64.
            class_labels: (B,) int64; the null class is the number of classes. None for unconditional networks.

        Raises:
            ValueError: If t is of a shorter type: FSDP's mixed precision casts what comes in unless told not to.
        """
        if t.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"t: dtype {t.dtype}, in which times of a batch fall together; give float32 (with FSDP's mixed "
                "precision: cast_forward_inputs=False)"
            )
        alpha, beta = self.process.alpha_beta(t)
        inputs = {"timestep": t.float(), "class_labels": class_labels}
        head = _plain_head(self.transformer)
        if head is None:
            logits = self.transformer(z, **inputs).sample  # (B, L, V)
            loss = xdlm_nelbo(logits, z, x, self.process, alpha, beta)
            return XDLMLossOutput(loss.mean(), loss.detach())
        features = self.transformer(z, **inputs, project=False).sample  # (B, L, D)
        weights = (head.weight, head.bias)
        return xdlm_head_nelbo(features, *weights, z, x, self.process, alpha, beta)


def _plain_head(transformer: nn.Module) -> nn.Linear | None:
    """The output projection, if it is a linear layer and nothing else."""
    head = transformer.proj_out if isinstance(transformer, XDLMTransformer2DModel) else None
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or head._backward_hooks:
        return None
    is_sharded = hasattr(head.weight, "device_mesh")  # `fully_shard` of the network alone gathers it for its own call
    return None if is_sharded else head
