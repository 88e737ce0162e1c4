"""Where the loss sits: means over bins of alpha and over the three branches (z mask / z wrong / z right).

Owns sums and counts on the device; it never touches the loss that is trained on.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

ALPHA_BINS = 10
BRANCHES = ("mask", "wrong", "right")


class LossMeter:
    """Running sums of the loss per token, overall, by alpha bin and by branch.

    `loss_by_...` is the mean over the tokens there; `share_by_branch/...` is what a branch adds, so the three
    shares sum to `loss`.
    """

    def __init__(self, mask_id: int, device: torch.device) -> None:
        self.mask_id = mask_id
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(1 + ALPHA_BINS + len(BRANCHES), dtype=exact, device=device)
        self.counts = torch.zeros(len(self.sums), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, loss: torch.Tensor, z: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> None:
        """Add tokens: loss, z, x (B, L); t (B,)."""
        loss = loss.detach().to(self.sums.dtype)
        bins = ((1.0 - t) * ALPHA_BINS).long().clamp(0, ALPHA_BINS - 1).to(loss.device)
        branch = torch.where(z == self.mask_id, 0, torch.where(z == x, 2, 1))
        for index, values in (
            (torch.zeros_like(branch), loss),
            (1 + bins[:, None].expand_as(branch), loss),
            (1 + ALPHA_BINS + branch, loss),
        ):
            self.sums.index_add_(0, index.flatten(), values.flatten())
            self.counts.index_add_(0, index.flatten(), torch.ones_like(index).flatten())

    def totals(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Sums and counts over all processes, for a checkpoint; every process must call it."""
        return {
            "sums": accelerator.reduce(self.sums.clone(), reduction="sum").cpu(),
            "counts": accelerator.reduce(self.counts.clone(), reduction="sum").cpu(),
        }

    def restore(self, totals: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
        """Go on from a checkpoint's totals, which the main process then holds for all."""
        if accelerator.is_main_process:
            self.sums.copy_(totals["sums"])
            self.counts.copy_(totals["counts"])

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes since the last call, and start afresh. Empty bins are left out."""
        totals = self.totals(accelerator)
        self.sums.zero_()
        self.counts.zero_()
        sums, counts = totals["sums"].tolist(), totals["counts"].tolist()
        names = ["loss"]
        names += [f"loss_by_alpha/{i / ALPHA_BINS:.1f}-{(i + 1) / ALPHA_BINS:.1f}" for i in range(ALPHA_BINS)]
        names += [f"loss_by_branch/{name}" for name in BRANCHES]
        out = {name: s / n for name, s, n in zip(names, sums, counts) if n > 0}
        for name, s in zip(BRANCHES, sums[-len(BRANCHES) :]):
            out[f"share_by_branch/{name}"] = s / counts[0]
        return out
