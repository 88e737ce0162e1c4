"""`row_draw.draw_rows` as one Triton kernel: a row is read once, and neither softmax nor CDF is ever written.

Owns the kernel and its place in `row_draw.FAST`. Rows wider than 16,384 are read three times, from the cache; so are
those wider than 2,048 that do not all begin at 16 bytes, whose logits are read one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .row_draw import COLUMNS

ROW_IN_REGISTERS = 16384  # widest row that is read once
BLOCK = 4096  # of wider rows
LOGITS_A_THREAD = 16  # of a block, which 32 warps of 32 threads share at most
UNALIGNED_BLOCK = 2048  # in the place of both where rows are not aligned: each logit then takes more registers
BELOW_ONE = tl.constexpr(1.0 - 2.0**-53)


def draw_rows(
    logits: torch.Tensor,
    wanted: torch.Tensor,
    z: torch.Tensor,
    v: torch.Tensor,
    temperature: float = 1.0,
    excluded: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `row_draw.draw_rows`, of which it takes the arguments and gives the results; it waits for nothing."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    count, width = logits.shape
    wanted = wanted.contiguous().view(torch.uint8)
    drawn, p_z = torch.empty_like(z), torch.empty(count, dtype=torch.float64, device=logits.device)
    totals = torch.empty_like(p_z)
    if count:
        is_aligned = width % 16 == 0 and logits.stride(0) % 16 == 0  # as Triton tells them apart
        block = row_block(width, is_aligned)
        with torch.cuda.device_of(logits):
            _draw_kernel[(count,)](
                logits, logits.stride(0), wanted, z.contiguous(), v.to(torch.float64).contiguous(), drawn, p_z, totals,
                width, excluded, 1.0 / float(temperature),
                ONE_BLOCK=block >= width, BLOCK=block, GROUP=COLUMNS,
                num_warps=warps(block),
            )  # fmt: skip
    return drawn, p_z.to(v.dtype), torch.isfinite(totals).all()


def row_block(width: int, is_aligned: bool) -> int:
    """Logits that are read at once of a row so wide: all of it where registers hold that."""
    widest, block = (ROW_IN_REGISTERS, BLOCK) if is_aligned else (UNALIGNED_BLOCK, UNALIGNED_BLOCK)
    return max(triton.next_power_of_2(width), COLUMNS) if width <= widest else block


def warps(block: int) -> int:
    """Of 32 threads each; a multiprocessor has room for 32."""
    return min(32, max(1, block // (32 * LOGITS_A_THREAD)))


@triton.jit
def _scores(logits, columns, V, EXCLUDED, inverse_temperature):
    """Scores at the columns in float32, -inf where there is no column or it is left out."""
    # a mask that could change within 16 bytes would have them read one by one
    scores = tl.load(logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32) * inverse_temperature
    if EXCLUDED is not None:
        scores = tl.where(columns == EXCLUDED, -float("inf"), scores)
    return scores


@triton.jit
def _group_sums(e, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    return tl.sum(tl.reshape(e, [BLOCK // GROUP, GROUP]), axis=1).to(tl.float64)


@triton.jit
def _find(e, before, target, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The first column of the block whose CDF exceeds target, `before` being the CDF in front of the block."""
    sums = _group_sums(e, BLOCK, GROUP)
    cdf = before + tl.cumsum(sums, axis=0)
    groups = tl.arange(0, BLOCK // GROUP)
    group = tl.minimum(tl.sum((cdf <= target).to(tl.int32), axis=0), BLOCK // GROUP - 1)
    left = target - before - tl.sum(tl.where(groups < group, sums, 0.0), axis=0)
    chosen = tl.where(groups[:, None] == group, tl.reshape(e, [BLOCK // GROUP, GROUP]), 0.0)
    inner = tl.cumsum(tl.sum(chosen, axis=0).to(tl.float64), axis=0)  # (GROUP,)
    left = tl.minimum(left, tl.max(inner, axis=0) * BELOW_ONE)
    column = tl.minimum(tl.sum((inner <= left).to(tl.int32), axis=0), GROUP - 1)
    return group * GROUP + column


@triton.jit
def _draw_kernel(
    logits, stride, wanted_ptr, z_ptr, v_ptr, drawn_ptr, p_z_ptr, totals_ptr, V, EXCLUDED, inverse_temperature,
    ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    z = tl.load(z_ptr + place)
    if tl.load(wanted_ptr + place) == 0:
        tl.store(drawn_ptr + place, z)
        tl.store(p_z_ptr + place, 0.0)
        tl.store(totals_ptr + place, 1.0)
        return
    logits += place * stride
    columns = tl.arange(0, BLOCK)
    scores = _scores(logits, columns, V, EXCLUDED, inverse_temperature)
    top = tl.max(scores, axis=0)
    if ONE_BLOCK:
        e = tl.exp(scores - top)
        total = tl.sum(_group_sums(e, BLOCK, GROUP), axis=0)
        target = tl.minimum(tl.load(v_ptr + place) * total, total * BELOW_ONE)
        drawn = _find(e, 0.0, target, BLOCK, GROUP)
    else:
        for start in range(BLOCK, V, BLOCK):
            scores = _scores(logits, start + columns, V, EXCLUDED, inverse_temperature)
            top = tl.maximum(top, tl.max(scores, axis=0))
        total = top.to(tl.float64) * 0.0
        for start in range(0, V, BLOCK):
            scores = _scores(logits, start + columns, V, EXCLUDED, inverse_temperature)
            total += tl.sum(_group_sums(tl.exp(scores - top), BLOCK, GROUP), axis=0)
        target = tl.minimum(tl.load(v_ptr + place) * total, total * BELOW_ONE)
        before = total * 0.0
        drawn = tl.full([], 0, tl.int32)
        for start in range(0, V, BLOCK):
            e = tl.exp(_scores(logits, start + columns, V, EXCLUDED, inverse_temperature) - top)
            after = before + tl.sum(_group_sums(e, BLOCK, GROUP), axis=0)
            here = (before <= target) & (target < after)
            drawn = tl.where(here, start + _find(e, before, target, BLOCK, GROUP), drawn)
            before = after
    score_z = _scores(logits, z, V, EXCLUDED, inverse_temperature)
    p_z = tl.where(z < V, tl.exp(score_z - top).to(tl.float64) / total, 0.0)
    tl.store(drawn_ptr + place, tl.minimum(drawn, V - 1).to(tl.int64))  # sums in another order may end an ulp apart
    tl.store(p_z_ptr + place, p_z)
    tl.store(totals_ptr + place, total)
