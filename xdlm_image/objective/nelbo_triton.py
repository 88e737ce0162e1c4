"""The objective's passes over the logits as Triton kernels, float32 inside.

Owns one kernel a pass. Forward reads a row, sums over it as `nelbo_eager.py` does and turns the sums into loss and
scalars with the equations of `row_scalars.py`; backward is elementwise. Together they move 12 bytes a float32 logit:
read, read and write. Where what is minimised is known beforehand the first kernel does the second's work, too: 8 bytes.
A row that registers do not hold is read three times forward. In `forward_backward` the rereads hit the cache, since its
caller passes blocks that fit there; else rows wider than 32 KiB take an online softmax, which needs two reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xdlm_image.objective.row_scalars import TINY as TINY_NUMBER
from xdlm_image.objective.row_scalars import Rows, RowScalars
from xdlm_image.schedulers import XDLMProcess

ROW_IN_REGISTERS = 4096  # widest row that forward reads once; wider ones leave a multiprocessor registers for one
BLOCK = 1024  # of wider rows, and of the backward pass
LOGITS_A_THREAD = 16  # of a block that holds the row
LOGITS_A_THREAD_OF_BLOCKS = 8  # of others, as sums of each are carried along
ROW_BYTES_IN_CACHE = 1 << 15  # of a row; 8 on each of 132 multiprocessors leave room in the 50 MB of an H100
FOUR_FIT = tl.constexpr(1e9)  # c below which the product of four 1 + c p_j, whose p_j sum to 1 at most, is finite
TINY = tl.constexpr(TINY_NUMBER)
LOWEST = tl.constexpr(-3e38)


def forward(logits: torch.Tensor, rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, RowScalars]:
    """Loss (R,) of logits (R, V), whose rows are contiguous, and what `backward` needs to know of the rows."""
    scalars = torch.empty(len(RowScalars._fields), len(logits), dtype=torch.float32, device=logits.device)
    return _forward(logits, rows, process, scalars=scalars), RowScalars(*scalars)


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
                grad_loss.contiguous(), width, process.mask, process.excluded_column,
                K_IS_ZERO=process.k == 0.0, BY_BLOCKS=block < width and width % 16 > 0, BLOCK=block,
                num_warps=warps(block, width),
            )  # fmt: skip


def forward_backward(logits: torch.Tensor, rows: Rows, grad_loss: torch.Tensor, process: XDLMProcess) -> torch.Tensor:
    """Both passes, the gradient over the logits; arguments and result as in `nelbo_eager`."""
    return _forward(logits, rows, process, grad_loss=grad_loss.contiguous())


def _forward(
    logits: torch.Tensor,
    rows: Rows,
    process: XDLMProcess,
    scalars: torch.Tensor | None = None,
    grad_loss: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss (R,); fills the scalars (7, R), or writes the gradient over the logits."""
    count, width = logits.shape
    loss = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count:
        block = forward_block(width)
        with torch.cuda.device_of(logits):
            _forward_kernel[(count,)](
                logits, logits.stride(0), *rows, loss, scalars, grad_loss, count, width, process.mask,
                process.excluded_column, process.num_uniform / process.k if process.k > 0 else 0.0,
                K_IS_ZERO=process.k == 0.0, GRADIENT=grad_loss is not None, ONE_BLOCK=block >= width,
                ONLINE=grad_loss is None and width * logits.element_size() > ROW_BYTES_IN_CACHE,
                BY_BLOCKS=block < width and width % 16 > 0, BLOCK=block, num_warps=warps(block, width),
            )  # fmt: skip
    return loss


def self_check(device: torch.device, dtype: torch.dtype) -> None:
    """Run each kernel on one row; raises whatever stands in their way."""
    one = torch.ones(1, device=device)
    code = torch.zeros(1, dtype=torch.int64, device=device)
    logits = torch.zeros(1, 2, dtype=dtype, device=device)
    rows, process = Rows(code, code, one, one, one), XDLMProcess(1.0, 2)
    _, scalars = forward(logits, rows, process)
    backward(logits, rows, scalars, one, process, out=torch.empty_like(logits))
    forward_backward(logits, rows, one, process).item()  # waits, so that what fails on the way fails here


def forward_block(width: int) -> int:
    """Logits that the forward kernel reads at once of a row so wide: all of it where registers hold that."""
    return max(4, triton.next_power_of_2(width)) if width <= ROW_IN_REGISTERS else BLOCK


def warps(block: int, width: int) -> int:
    """Of 32 threads each, for blocks of a row so wide."""
    return max(1, block // (32 * (LOGITS_A_THREAD if block >= width else LOGITS_A_THREAD_OF_BLOCKS)))


@triton.jit
def _scores(logits, start, V, EXCLUDED, BY_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of a block in float32, -inf where there is no column or the softmax leaves it out.

    A mask that could change within 16 bytes has them read one by one. V does so unless 16 divides it, and BY_BLOCKS
    says that none is needed but in the last block.
    """
    columns = start + tl.arange(0, BLOCK)
    if BY_BLOCKS:
        if start + BLOCK <= V:
            scores = tl.load(logits + columns).to(tl.float32)
        else:
            scores = tl.load(logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    else:
        scores = tl.load(logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    if EXCLUDED is not None:
        scores = tl.where(columns == EXCLUDED, -float("inf"), scores)
    return scores


@triton.jit
def _exp(a):
    """e^a for a <= 0, 0 below 1e-38, which `tl.exp` takes care of and nobody here reads."""
    return tl.exp2(a * 1.4426950408889634)


@triton.jit
def _inverse(w):
    """1 / w for w >= 1e-35, by a step of Newton's from the hardware's rough root: a division takes longer code."""
    root = tl.rsqrt(w)
    rough = root * root
    return rough * (2.0 - w * rough)


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
def _logs(cp, c, BLOCK: tl.constexpr):
    """Terms (BLOCK / 4,) whose sum is that of L(c p_j): one for any four, as (1 + a)(1 + b) = 1 + (a + b + ab)."""
    if c < FOUR_FIT:
        a, b = tl.split(tl.reshape(cp, [BLOCK // 2, 2]))
        a, b = tl.split(tl.reshape(a + b + a * b, [BLOCK // 4, 2]))
        logs = _log1p(a + b + a * b)
    else:
        logs = tl.sum(tl.reshape(_log1p(cp), [BLOCK // 4, 4]), axis=1)
    return logs


@triton.jit
def _holds(start, x, z_column, BLOCK: tl.constexpr):
    """Whether x or z is one of the block's columns, the same for all threads."""
    return ((x >= start) & (x < start + BLOCK)) | ((z_column >= start) & (z_column < start + BLOCK))


@triton.jit
def _store_gradient(
    out, start, V, x, z_column, e, one, c_one, inverse, factor, kappa, kappa_1, at_x, at_z,
    K_IS_ZERO: tl.constexpr, BY_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factor e (kappa + kappa_1 c p) / (1 + c p), but at x and z; `inverse` is 1 / (one + c_one e)."""
    columns = start + tl.arange(0, BLOCK)
    if K_IS_ZERO:
        grad = e * factor
    else:
        grad = e * (kappa * one * factor + kappa_1 * factor * c_one * e) * inverse
    if _holds(start, x, z_column, BLOCK):
        grad = tl.where(columns == x, at_x, tl.where(columns == z_column, at_z, grad))
    grad = grad.to(out.dtype.element_ty)
    if BY_BLOCKS:  # as `_scores`
        if start + BLOCK <= V:
            tl.store(out + columns, grad)
        else:
            tl.store(out + columns, grad, mask=columns < V)
    else:
        tl.store(out + columns, grad, mask=columns < V)


@triton.jit
def _forward_kernel(
    logits, stride, z_ptr, x_ptr, alpha_ptr, beta_ptr, c_ptr, loss_ptr, scalars_ptr, grad_loss_ptr, R, V, MASK,
    EXCLUDED, N_OVER_K, K_IS_ZERO: tl.constexpr, GRADIENT: tl.constexpr, ONE_BLOCK: tl.constexpr,
    ONLINE: tl.constexpr, BY_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    z, x = tl.load(z_ptr + row).to(tl.int32), tl.load(x_ptr + row).to(tl.int32)
    c = tl.load(c_ptr + row)
    is_right = z == x
    is_wrong = (z != MASK) & (z != x)
    z_column = tl.where(is_wrong, z, x)
    columns = tl.arange(0, BLOCK)
    # read before the sums, for which all threads wait, so that no gradient is there yet
    score_x = tl.load(logits + x).to(tl.float32)
    score_z = tl.load(logits + z_column).to(tl.float32)

    # the sums over the row; a wide one comes from the cache each time
    scores = _scores(logits, 0, V, EXCLUDED, BY_BLOCKS, BLOCK)
    if ONE_BLOCK:
        top = tl.max(scores)
        e = _exp(scores - top)
        norm = tl.sum(e)
    elif ONLINE:  # Milakov and Gimelshein, arXiv 1805.02867, for each thread's columns
        largest = tl.maximum(scores, LOWEST)  # finite where a column has none
        sum_e = _exp(scores - largest)
        for start in range(BLOCK, V, BLOCK):
            scores = _scores(logits, start, V, EXCLUDED, BY_BLOCKS, BLOCK)
            before = largest
            largest = tl.maximum(before, scores)
            sum_e = sum_e * _exp(before - largest) + _exp(scores - largest)
        top = tl.max(largest)
        norm = tl.sum(sum_e * _exp(largest - top))
    else:
        for start in range(BLOCK, V, BLOCK):
            scores = tl.maximum(scores, _scores(logits, start, V, EXCLUDED, BY_BLOCKS, BLOCK))
        top = tl.max(scores)
        sum_e = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            sum_e += _exp(_scores(logits, start, V, EXCLUDED, BY_BLOCKS, BLOCK) - top)
        norm = tl.sum(sum_e)
    inverse_norm = 1.0 / norm
    scale = c * inverse_norm
    one = 1.0 / tl.maximum(c, 1.0)  # 1 / (1 + c p_j) is one / (one + c_one e_j): finite where c is large
    c_one = scale * one
    if ONE_BLOCK:
        e = tl.where((columns == x) | (columns == z_column), 0.0, e)
        inverse = _inverse(one + c_one * e)
        sum_e = e
        sum_damps = e * inverse
        sum_logs = _logs(e * scale, c, BLOCK)
    else:
        sum_e = tl.zeros([BLOCK], tl.float32)
        sum_damps = tl.zeros([BLOCK], tl.float32)
        sum_logs = tl.zeros([BLOCK // 4], tl.float32)
        for start in range(0, V, BLOCK):
            at = start + columns
            e = _exp(_scores(logits, start, V, EXCLUDED, BY_BLOCKS, BLOCK) - top)
            if _holds(start, x, z_column, BLOCK):
                e = tl.where((at == x) | (at == z_column), 0.0, e)
            sum_e += e
            if not K_IS_ZERO:
                sum_damps += e * _inverse(one + c_one * e)
                sum_logs += _logs(e * scale, c, BLOCK)
    others = tl.sum(sum_e) * inverse_norm

    # loss and scalars: `row_scalars.loss_and_scalars`
    p_x = _exp(score_x - top) * inverse_norm
    p_z = tl.where(is_wrong, _exp(score_z - top) * inverse_norm, 0.0)
    q = others + p_z
    alpha, beta = tl.load(alpha_ptr + row), tl.load(beta_ptr + row)
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
        S = (A - tl.sum(sum_logs) - _log1p(u)) / tl.maximum(c, TINY)
        one_over_alpha = 1.0 / tl.maximum(alpha, TINY)
        g = tl.where(is_right, 1.0 / (beta + alpha * N_OVER_K), one_over_beta)
        loss = g * (A + S + tl.where(is_right, _w_minus_log1p(w), _log1p_minus_ratio(u)) * one_over_alpha)
        h = tl.where(is_right, w * one_over_alpha, 0.0)
        one_less_ratio = 1.0 / (1.0 + u)
        ratio = u * one_less_ratio
        az = one_over_alpha * ratio * ratio
        one_less_az = tl.where(is_wrong, (one_less_ratio * (2.0 - one_less_ratio) - beta) * one_over_alpha, 1.0)
        damped = tl.sum(sum_damps) * one * inverse_norm + p_z * one_less_ratio
        common = damped - q * saturation
        common_1 = damped + p_x * (1.0 + c) * saturation
        kappa = common + r * h - az
        kappa_1 = tl.where(u > 1.0, common + one_less_az, common_1 + r * h - az)
        grad_x = g * (p_x * (common - az) - r * q * (1.0 + h))
        grad_z = g * (p_z * (common + common_1 * u) * one_less_ratio + az * (others + p_x))
        grad_z = tl.where(is_wrong, grad_z, grad_x)
    tl.store(loss_ptr + row, loss)
    if not GRADIENT:
        tl.store(scalars_ptr + row, top)
        tl.store(scalars_ptr + R + row, inverse_norm)
        tl.store(scalars_ptr + 2 * R + row, g)
        tl.store(scalars_ptr + 3 * R + row, kappa)
        tl.store(scalars_ptr + 4 * R + row, kappa_1)
        tl.store(scalars_ptr + 5 * R + row, grad_x)
        tl.store(scalars_ptr + 6 * R + row, grad_z)
    else:
        grad_loss = tl.load(grad_loss_ptr + row)
        factor, at_x, at_z = grad_loss * g * inverse_norm, grad_loss * grad_x, grad_loss * grad_z
        if ONE_BLOCK:
            _store_gradient(
                logits, 0, V, x, z_column, e, one, c_one, inverse, factor, kappa, kappa_1, at_x, at_z, K_IS_ZERO,
                BY_BLOCKS, BLOCK,
            )  # fmt: skip
        else:
            for start in range(0, V, BLOCK):
                e = _exp(_scores(logits, start, V, EXCLUDED, BY_BLOCKS, BLOCK) - top)
                _store_gradient(
                    logits, start, V, x, z_column, e, one, c_one, _inverse(one + c_one * e), factor, kappa, kappa_1,
                    at_x, at_z, K_IS_ZERO, BY_BLOCKS, BLOCK,
                )  # fmt: skip


@triton.jit
def _backward_kernel(
    logits, stride, out, out_stride, z_ptr, x_ptr, c_ptr, top_ptr, inverse_norm_ptr, g_ptr, kappa_ptr, kappa_1_ptr,
    grad_x_ptr, grad_z_ptr, grad_loss_ptr, V, MASK, EXCLUDED, K_IS_ZERO: tl.constexpr, BY_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    z, x, c = tl.load(z_ptr + row).to(tl.int32), tl.load(x_ptr + row).to(tl.int32), tl.load(c_ptr + row)
    inverse_norm, grad_loss = tl.load(inverse_norm_ptr + row), tl.load(grad_loss_ptr + row)
    one = 1.0 / tl.maximum(c, 1.0)
    c_one = c * inverse_norm * one
    scores = _scores(logits + row * stride, start, V, EXCLUDED, BY_BLOCKS, BLOCK)
    e = _exp(scores - tl.load(top_ptr + row))
    _store_gradient(
        out + row * out_stride, start, V, x, tl.where(z == MASK, x, z), e, one, c_one, _inverse(one + c_one * e),
        grad_loss * tl.load(g_ptr + row) * inverse_norm, tl.load(kappa_ptr + row), tl.load(kappa_1_ptr + row),
        grad_loss * tl.load(grad_x_ptr + row), grad_loss * tl.load(grad_z_ptr + row), K_IS_ZERO, BY_BLOCKS, BLOCK,
    )  # fmt: skip
