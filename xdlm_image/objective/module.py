"""The network and its loss as one module, so that DDP, FSDP and autocast see a single forward.

Owns the step from clean codes' noisy version to the loss; the maths is `nelbo.py`'s and `head.py`'s, the network the
caller's.
"""

from __future__ import annotations

import torch
from torch import nn

from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.objective.head import XDLMLossOutput, row_blocks, xdlm_head_nelbo
from xdlm_image.objective.nelbo import xdlm_nelbo
from xdlm_image.schedulers import XDLMProcess


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
        head, output = self._run(z, t, class_labels)
        return self._loss(head, output, z, x, t)

    @torch.no_grad()
    def loss_and_guesses(
        self,
        z: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor | None,
        where: torch.Tensor,
    ) -> tuple[XDLMLossOutput, torch.Tensor]:
        """The loss without gradients, and the likeliest code of p at some places, from one pass of the network.

        Args:
            z, x, t, class_labels: As of `forward`.
            where: (B, L) bool, the places.

        Returns:
            What `forward` returns, and (places,) int64 in raster order; never the mask. Logits of few rows at a time.
        """
        head, output = self._run(z, t, class_labels)
        rows = output[where]  # (places, D or V)
        guesses = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        for block in row_blocks(len(rows), self.process.logits_width * rows.element_size()):
            logits = rows[block] if head is None else head(rows[block])  # (r, V)
            if (column := self.process.excluded_column) is not None:
                logits = logits.index_fill(1, torch.tensor([column], device=logits.device), -torch.inf)
            guesses[block] = logits.argmax(1)
        return self._loss(head, output, z, x, t), guesses

    def _run(
        self, z: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[nn.Linear | None, torch.Tensor]:
        """The output projection and what it reads (B, L, D); or None and the logits (B, L, V)."""
        if t.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"t: dtype {t.dtype}, in which times of a batch fall together; give float32 (with FSDP's mixed "
                "precision: cast_forward_inputs=False)"
            )
        inputs = {"timestep": t.float(), "class_labels": class_labels}
        head = _plain_head(self.transformer)
        if head is None:
            return None, self.transformer(z, **inputs).sample
        return head, self.transformer(z, **inputs, project=False).sample

    def _loss(
        self, head: nn.Linear | None, output: torch.Tensor, z: torch.Tensor, x: torch.Tensor, t: torch.Tensor
    ) -> XDLMLossOutput:
        alpha, beta = self.process.alpha_beta(t)
        if head is None:
            loss = xdlm_nelbo(output, z, x, self.process, alpha, beta)
            return XDLMLossOutput(loss.mean(), loss.detach())
        return xdlm_head_nelbo(output, head.weight, head.bias, z, x, self.process, alpha, beta)


def _plain_head(transformer: nn.Module) -> nn.Linear | None:
    """The output projection, if it is a linear layer and nothing else."""
    head = transformer.proj_out if isinstance(transformer, XDLMTransformer2DModel) else None
    if type(head) is not nn.Linear or "forward" in vars(head):  # accelerate's and diffusers' hooks put another there
        return None
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return None
    is_sharded = hasattr(head.weight, "device_mesh")  # `fully_shard` of the network alone gathers it for its own call
    return None if is_sharded else head
