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

    `loss/...` is the mean over that bin's tokens; `share/...` is what the branch adds to the total, so the three
    shares sum to `loss`.
    """

    def __init__(self, mask_id: int, device: torch.device) -> None:
        self.mask_id = mask_id
        self.sums = torch.zeros(1 + ALPHA_BINS + len(BRANCHES), dtype=torch.float32, device=device)
        self.counts = torch.zeros_like(self.sums)

    @torch.no_grad()
    def update(self, loss: torch.Tensor, z: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> None:
        """Add tokens: loss, z, x (B, L); t (B,)."""
        loss = loss.detach().float()
        bins = ((1.0 - t) * ALPHA_BINS).long().clamp(0, ALPHA_BINS - 1).to(loss.device)
        branch = torch.where(z == self.mask_id, 0, torch.where(z == x, 2, 1))
        for index, values in (
            (torch.zeros_like(branch), loss),
            (1 + bins[:, None].expand_as(branch), loss),
            (1 + ALPHA_BINS + branch, loss),
        ):
            self.sums.index_add_(0, index.flatten(), values.flatten())
            self.counts.index_add_(0, index.flatten(), torch.ones_like(values).flatten())

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes since the last call, and start anew. Empty bins are left out."""
        totals = accelerator.reduce(torch.stack([self.sums, self.counts]), reduction="sum").cpu()
        self.sums.zero_()
        self.counts.zero_()
        sums, counts = totals.tolist()
        names = ["loss"]
        names += [f"loss_by_alpha/{i / ALPHA_BINS:.1f}-{(i + 1) / ALPHA_BINS:.1f}" for i in range(ALPHA_BINS)]
        names += [f"loss_by_branch/{name}" for name in BRANCHES]
        out = {name: s / n for name, s, n in zip(names, sums, counts) if n > 0}
        for name, s in zip(BRANCHES, sums[-len(BRANCHES) :]):
            out[f"share_by_branch/{name}"] = s / counts[0]
        return out
