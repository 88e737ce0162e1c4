"""One code from each of some rows of logits, by one uniform number a row.

Owns the categorical draw of the reverse step: softmax and inverse CDF in blocks of rows that stay in cache, without a
CDF of the whole row. It knows no noise and no time.

This file travels to the Hub beside weights: it imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

COLUMNS = 64  # the CDF is summed over so many columns at once, and looked into only where the draw falls
BLOCK_ELEMENTS_CPU = 1 << 19  # logits a block of rows, which stays in cache: 2 MiB of float32
BLOCK_ELEMENTS_DEVICE = 1 << 26
Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FAST: dict[str, Callable[..., Drawn]] = {}  # kind of device -> a kernel in our place


def draw_rows(
    logits: torch.Tensor,
    wanted: torch.Tensor,
    z: torch.Tensor,
    v: torch.Tensor,
    temperature: float = 1.0,
    excluded: int | None = None,
) -> Drawn:
    """Draw from p = softmax(logits / temperature) of some rows; the others are not read.

    The CDF is float64 over sums of 64 columns in float32, and within the 64 columns of the draw, so that codes rarer
    than float32's lattice of 2^-24 are drawn as often as they should.

    Args:
        logits: (N, V), any float type; read in float32.
        wanted: Which rows, bool (N,).
        z: A code a row, int64 (N,), whose probability is wanted too; ids of V and more have none.
        v: Uniform numbers in [0, 1), (N,) float64 (float32 on devices without it).
        temperature: Above 0.
        excluded: A column that has no probability.

    Returns:
        Codes (N,) int64, the first whose CDF exceeds v; p of z (N,) of v's type; and whether all logits that were read
        are finite, bool (), left on the device. Where no row is wanted the code is z and p is 0.
    """
    if logits.device.type in FAST and logits.dtype != torch.float64:
        return FAST[logits.device.type](logits, wanted, z, v, temperature, excluded)
    drawn, p_z = z.clone(), torch.zeros_like(v)
    elements = BLOCK_ELEMENTS_CPU if logits.device.type == "cpu" else BLOCK_ELEMENTS_DEVICE
    finite = torch.ones((), dtype=torch.bool, device=logits.device)
    for rows in wanted.nonzero()[:, 0].split(max(1, elements // logits.shape[-1])):
        weights = logits.index_select(0, rows).float()  # (r, V)
        if temperature != 1.0:
            weights /= temperature
        if excluded is not None:
            weights[:, excluded] = -torch.inf
        weights -= weights.amax(-1, keepdim=True)
        weights.exp_()  # the largest is 1
        z_rows = z[rows]
        drawn[rows], total = _inverse_cdf(weights, v[rows, None])
        finite &= torch.isfinite(total).all()
        of_z = weights.gather(1, z_rows[:, None].clamp(max=weights.shape[1] - 1))
        p_z[rows] = torch.where(z_rows < weights.shape[1], (of_z / total)[:, 0].to(v.dtype), 0.0)
    return drawn, p_z, finite


def _inverse_cdf(weights: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (r,) from weights (r, V) that need not sum to 1, by v (r, 1); and the sums (r, 1) of v's type."""
    width = weights.shape[1]
    whole = width // COLUMNS * COLUMNS
    sums = weights[:, :whole].unflatten(1, (-1, COLUMNS)).sum(-1)  # (r, V // 64)
    if whole < width:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    cdf = sums.to(v.dtype).cumsum(1)
    total = cdf[:, -1:]
    target = v * total  # below total: v is below 1 by half a unit of its last place or more
    group = torch.searchsorted(cdf, target, right=True)  # (r, 1)
    target = target - torch.where(group > 0, cdf.gather(1, (group - 1).clamp(min=0)), 0.0)
    columns = group * COLUMNS + torch.arange(COLUMNS, device=weights.device)  # (r, 64)
    inner = weights.gather(1, columns.clamp(max=width - 1)).to(v.dtype)
    cdf = torch.where(columns < width, inner, 0.0).cumsum(1)
    end = cdf[:, -1:]  # these sums are not those of the groups: a draw must not fall behind the last code of its group
    column = torch.searchsorted(cdf, target.minimum(torch.nextafter(end, torch.zeros_like(end))), right=True)
    return (group * COLUMNS + column)[:, 0].clamp_(max=width - 1), total  # a code even where NaN is drawn from
