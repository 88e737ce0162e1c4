"""One code from each of some rows of logits, by one uniform number a row.

Owns the categorical draw of the reverse step: softmax and inverse CDF in blocks of rows that stay in cache, without a
CDF of the whole row. It knows no noise and no time.

This file travels to the Hub beside weights: it imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

COLUMNS = 64  # the CDF is summed over so many columns at once, and looked into only where the draw falls
BLOCK_ELEMENTS = {"cpu": 1 << 18}  # logits a block of rows: 1 MiB of float32 stays in a core's cache
BLOCK_ELEMENTS_DEVICE = 1 << 26
FAST: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {}  # kind of device -> a kernel in our place


def draw_rows(
    logits: torch.Tensor,
    rows: torch.Tensor,
    z: torch.Tensor,
    v: torch.Tensor,
    temperature: float = 1.0,
    excluded: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from p = softmax(logits / temperature) of chosen rows.

    The CDF is float64 over sums of 64 columns in float32, and within the 64 columns of the draw, so that codes rarer
    than float32's lattice of 2^-24 are drawn as often as they should.

    Args:
        logits: (N, V), any float type; read in float32.
        rows: Which rows, int64 (R,).
        z: A code for each of them, int64 (R,), whose probability is wanted too; ids of V and more have none.
        v: Uniform numbers in [0, 1), (R,) float64 (float32 on devices without it).
        temperature: Above 0.
        excluded: A column that has no probability.

    Returns:
        Codes (R,) int64, the first whose CDF exceeds v, and p of z (R,) of v's type.

    Raises:
        ValueError: If a row holds NaN or infinities.
    """
    if logits.device.type in FAST and logits.dtype != torch.float64:
        return FAST[logits.device.type](logits, rows, z, v, temperature, excluded)
    drawn, p_z = torch.empty_like(rows), torch.empty_like(v)
    step = max(1, BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS_DEVICE) // logits.shape[-1])
    finite = torch.ones((), dtype=torch.bool, device=logits.device)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        weights = logits.index_select(0, rows[block]).float()  # (r, V)
        if temperature != 1.0:
            weights /= temperature
        if excluded is not None:
            weights[:, excluded] = -torch.inf
        weights -= weights.amax(-1, keepdim=True)
        weights.exp_()  # the largest is 1
        drawn[block], total = _inverse_cdf(weights, v[block, None])
        finite &= torch.isfinite(total).all()
        of_z = weights.gather(1, z[block, None].clamp(max=weights.shape[1] - 1))
        p_z[block] = torch.where(z[block] < weights.shape[1], (of_z / total)[:, 0].to(v.dtype), 0.0)
    if not bool(finite):
        raise ValueError("model_output: holds NaN or infinities; the network diverged, or overflowed in half precision")
    return drawn, p_z


def _inverse_cdf(weights: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (r,) from weights (r, V) that need not sum to 1, by v (r, 1); and the sums (r, 1) of v's type."""
    width = weights.shape[1]
    whole = width // COLUMNS * COLUMNS
    sums = weights[:, :whole].unflatten(1, (-1, COLUMNS)).sum(-1)  # (r, V // 64)
    if whole < width:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    cdf = sums.to(v.dtype).cumsum(1)
    total = cdf[:, -1:]
    target = _below(v * total, total)
    group = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)  # (r, 1)
    target = target - torch.where(group > 0, cdf.gather(1, (group - 1).clamp(min=0)), 0.0)
    columns = group * COLUMNS + torch.arange(COLUMNS, device=weights.device)  # (r, 64)
    inner = weights.gather(1, columns.clamp(max=width - 1)).to(v.dtype)
    cdf = torch.where(columns < width, inner, 0.0).cumsum(1)
    column = torch.searchsorted(cdf, _below(target, cdf[:, -1:]), right=True).clamp_(max=COLUMNS - 1)
    return (group * COLUMNS + column)[:, 0], total


def _below(target: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """target, or the largest number below end: a draw never falls behind the last code that has probability."""
    return torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
