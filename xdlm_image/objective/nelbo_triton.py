"""The objective's passes over the logits as Triton kernels, float32 inside.

Owns one kernel a pass. Forward reads a row (a second time, from the cache, where the vocabulary is wider than a
block), sums over it as `nelbo_eager.py` does and turns the sums into loss and scalars with the equations of
`row_scalars.py`; backward is elementwise. Together they move 12 bytes a float32 logit: read, read and write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..schedulers import XDLMProcess
from .row_scalars import TINY as TINY_NUMBER
from .row_scalars import Rows, RowScalars

ROW_IN_REGISTERS = 16384  # widest row that the forward pass reads once
BLOCK = 4096  # of wider rows, and of the backward pass
NO_COLUMN = -1
TINY = tl.constexpr(TINY_NUMBER)


def forward(logits: torch.Tensor, rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, RowScalars]:
    """Loss (R,) of logits (R, V), whose rows are contiguous, and what `backward` needs to know of the rows."""
    count, width = logits.shape
    loss = torch.empty(count, dtype=torch.float32, device=logits.device)
    scalars = torch.empty(len(RowScalars._fields), count, dtype=torch.float32, device=logits.device)
    if count:
        block = triton.next_power_of_2(width) if width <= ROW_IN_REGISTERS else BLOCK
        with torch.cuda.device_of(logits):
            _forward_kernel[(count,)](
                logits, logits.stride(0), *rows, loss, scalars, count, width, process.mask, _excluded(process),
                process.num_uniform / process.k if process.k > 0 else 0.0,
                K_IS_ZERO=process.k == 0.0, ONE_BLOCK=block >= width, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return loss, RowScalars(*scalars)


def backward(
    logits: torch.Tensor,
    rows: Rows,
    scalars: RowScalars,
    grad_loss: torch.Tensor,
    process: XDLMProcess,
    out: torch.Tensor,
) -> None:
    """Write the gradient (R, V) into `out`, which may be the logits themselves; arguments as in `nelbo_eager`."""
    count, width = logits.shape
    if count:
        block = min(triton.next_power_of_2(width), BLOCK)
        with torch.cuda.device_of(logits):
            _backward_kernel[(count, triton.cdiv(width, block))](
                logits, logits.stride(0), out, out.stride(0), rows.z, rows.x, rows.c, *scalars,
                grad_loss.contiguous(), width, process.mask, _excluded(process),
                K_IS_ZERO=process.k == 0.0, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip


def self_check(device: str, dtype: torch.dtype) -> None:
    """Run the forward kernel on one row; raises whatever stands in its way."""
    one = torch.ones(1, device=device)
    code = torch.zeros(1, dtype=torch.int64, device=device)
    forward(torch.zeros(1, 2, dtype=dtype, device=device), Rows(code, code, one, one, one), XDLMProcess(1.0, 2))


def _excluded(process: XDLMProcess) -> int:
    return NO_COLUMN if process.excluded_column is None else process.excluded_column


def _warps(block: int) -> int:
    return min(32, max(1, block // 512))  # 16 logits a thread, 32 at most


@triton.jit
def _scores(logits, columns, V, EXCLUDED):
    """Logits at the columns in float32, -inf where there is no column or the softmax leaves it out."""
    return tl.load(logits + columns, mask=(columns < V) & (columns != EXCLUDED), other=-float("inf")).to(tl.float32)


@triton.jit
def _log1p(y):
    """log(1 + y) for y >= 0, its power series at small y: the hardware's logarithm is not exact enough near 1."""
    series = y * (1 - y * (1 / 2 - y * (1 / 3 - y * (1 / 4 - y * (1 / 5 - y * (1 / 6 - y * (1 / 7 - y / 8)))))))
    return tl.where(y < 0.125, series, tl.log(1.0 + y))


@triton.jit
def _log1p_minus_ratio(u):
    """L(u) - u/(1+u) = sum_{n>=2} (-1)^n (n-1)/n u^n."""
    series = u * u * (1 / 2 - u * (2 / 3 - u * (3 / 4 - u * (4 / 5 - u * (5 / 6 - u * (6 / 7 - u * 7 / 8))))))
    return tl.where(u < 0.1, series, _log1p(u) - u / (1.0 + u))


@triton.jit
def _w_minus_log1p(w):
    """w - L(w) = sum_{n>=2} (-1)^n w^n / n."""
    series = w * w * (1 / 2 - w * (1 / 3 - w * (1 / 4 - w * (1 / 5 - w * (1 / 6 - w * (1 / 7 - w / 8))))))
    return tl.where(w < 0.1, series, w - _log1p(w))


@triton.jit
def _terms(scores, columns, x, z, top, scale):
    """e_j, L(c p_j) and e_j / (1 + c p_j) of the ids that are neither x nor z, else 0; c p_j = e_j scale."""
    e = tl.where((columns == x) | (columns == z), 0.0, tl.exp(scores - top))
    cp = e * scale
    return e, _log1p(cp), e / (1.0 + cp)


@triton.jit
def _forward_kernel(
    logits, stride, z_ptr, x_ptr, alpha_ptr, beta_ptr, c_ptr, loss_ptr, scalars_ptr, R, V, MASK, EXCLUDED, N_OVER_K,
    K_IS_ZERO: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    z, x = tl.load(z_ptr + row), tl.load(x_ptr + row)
    alpha, beta, c = tl.load(alpha_ptr + row), tl.load(beta_ptr + row), tl.load(c_ptr + row)
    is_right = z == x
    is_wrong = (z != MASK) & (z != x)
    z_column = tl.where(is_wrong, z, x)
    columns = tl.arange(0, BLOCK)

    # the sums over the row
    scores = _scores(logits, columns, V, EXCLUDED)
    top = tl.max(scores)
    norm = tl.sum(tl.exp(scores - top))
    if not ONE_BLOCK:
        for start in range(BLOCK, V, BLOCK):
            scores = _scores(logits, start + columns, V, EXCLUDED)
            higher = tl.maximum(top, tl.max(scores))
            norm = norm * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher))
            top = higher
    inverse_norm = 1.0 / norm
    if ONE_BLOCK:
        e, logs, damps = _terms(scores, columns, x, z_column, top, c * inverse_norm)
    else:
        e = tl.zeros([BLOCK], tl.float32)
        logs = tl.zeros([BLOCK], tl.float32)
        damps = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            scores = _scores(logits, start + columns, V, EXCLUDED)
            e_more, logs_more, damps_more = _terms(scores, start + columns, x, z_column, top, c * inverse_norm)
            e += e_more
            logs += logs_more
            damps += damps_more
    others = tl.sum(e) * inverse_norm

    # loss and scalars: `row_scalars.loss_and_scalars`
    score_x = tl.load(logits + x).to(tl.float32)
    p_x = tl.exp(score_x - top) * inverse_norm
    p_z = tl.where(is_wrong, tl.exp(tl.load(logits + z_column).to(tl.float32) - top) * inverse_norm, 0.0)
    q = others + p_z
    one_over_beta = 1.0 / tl.maximum(beta, TINY)
    if K_IS_ZERO:
        g = tl.where(z == MASK, one_over_beta, 0.0)
        nll = tl.where(q < 0.5, _log1p(q / tl.maximum(p_x, 0.25)), top - score_x + tl.log(norm))
        loss = tl.where(z == MASK, g * nll, 0.0)
        kappa = 0.0
        kappa_1 = 0.0
        grad_x = -g * q
        grad_z = grad_x
    else:
        u = c * p_z
        saturation = 1.0 / (1.0 + c * p_x)
        r = c * p_x * saturation
        w = c * q * saturation
        A = _log1p(w)
        S = tl.where(c > 0, (A - tl.sum(logs) - _log1p(u)) / tl.maximum(c, TINY), 0.0)
        one_over_alpha = tl.where(alpha > 0, 1.0 / tl.maximum(alpha, TINY), 0.0)
        g = tl.where(is_right, 1.0 / (beta + alpha * N_OVER_K), one_over_beta)
        loss = g * (A + S + tl.where(is_right, _w_minus_log1p(w), _log1p_minus_ratio(u)) * one_over_alpha)
        h = tl.where(is_right, w * one_over_alpha, 0.0)
        one_less_ratio = 1.0 / (1.0 + u)
        ratio = u * one_less_ratio
        az = one_over_alpha * ratio * ratio
        one_less_az = tl.where(is_wrong, (one_less_ratio * (2.0 - one_less_ratio) - beta) * one_over_alpha, 1.0)
        damped = tl.sum(damps) * inverse_norm + p_z * one_less_ratio
        common = damped - q * saturation
        common_1 = damped + p_x * (1.0 + c) * saturation
        kappa = common + r * h - az
        kappa_1 = tl.where(u > 1.0, common + one_less_az, common_1 + r * h - az)
        grad_x = g * (p_x * (common - az) - r * q * (1.0 + h))
        at_z = p_z * (common + common_1 * u) * one_less_ratio + az * (others + p_x)
        grad_z = tl.where(is_wrong, g * at_z, grad_x)
    tl.store(loss_ptr + row, loss)
    tl.store(scalars_ptr + row, top)
    tl.store(scalars_ptr + R + row, inverse_norm)
    tl.store(scalars_ptr + 2 * R + row, g)
    tl.store(scalars_ptr + 3 * R + row, kappa)
    tl.store(scalars_ptr + 4 * R + row, kappa_1)
    tl.store(scalars_ptr + 5 * R + row, grad_x)
    tl.store(scalars_ptr + 6 * R + row, grad_z)


@triton.jit
def _backward_kernel(
    logits, stride, out, out_stride, z_ptr, x_ptr, c_ptr, top_ptr, inverse_norm_ptr, g_ptr, kappa_ptr, kappa_1_ptr,
    grad_x_ptr, grad_z_ptr, grad_loss_ptr, V, MASK, EXCLUDED, K_IS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z, x = tl.load(z_ptr + row), tl.load(x_ptr + row)
    scores = _scores(logits + row * stride, columns, V, EXCLUDED)
    p = tl.exp(scores - tl.load(top_ptr + row)) * tl.load(inverse_norm_ptr + row)
    grad = tl.load(g_ptr + row) * p
    if not K_IS_ZERO:
        c = tl.load(c_ptr + row)
        one = 1.0 / tl.maximum(c, 1.0)  # numerator and denominator by c, where it is large: kappa_1 c overflows
        cp = p * (c * one)
        grad *= (tl.load(kappa_ptr + row) * one + tl.load(kappa_1_ptr + row) * cp) / (one + cp)
    grad = tl.where((columns == z) & (z != MASK), tl.load(grad_z_ptr + row), grad)
    grad = tl.where(columns == x, tl.load(grad_x_ptr + row), grad) * tl.load(grad_loss_ptr + row)
    tl.store(out + row * out_stride + columns, grad.to(out.dtype.element_ty), mask=columns < V)
