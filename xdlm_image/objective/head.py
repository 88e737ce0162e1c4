"""The output projection and the objective as one: the logits of a block of rows at a time, never all of them.

Owns `xdlm_head_nelbo`. The gradient of a mean is known up to a factor as soon as a row's loss is, so the forward pass
turns every block of logits into its share of the gradients on the spot and lets it go; backward multiplies. This takes
no product of matrices more than the plain layers do, and is why the mean is taken inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from xdlm_image.objective import operators
from xdlm_image.objective.backends import backend_for, check_name, passes_for
from xdlm_image.objective.nelbo import rows_of
from xdlm_image.objective.row_scalars import Rows
from xdlm_image.schedulers import XDLMProcess

BLOCK_BYTES = 24 << 20  # of logits; with fewer rows the weight gradient would be added up too often
ROW_BYTES = 64  # rows of logits are padded to a multiple of it: matrix products are slow on unaligned rows
SHARE_BYTES = 8 << 20  # of what a block adds to the weight gradient, where it cannot be added on the spot


class XDLMLossOutput(NamedTuple):
    """What training minimises, and what it looks at.

    Attributes:
        mean: () nats per token; the only one of the two with a gradient.
        per_token: (B, L) the loss of each token, before any weight.
    """

    mean: torch.Tensor
    per_token: torch.Tensor


def xdlm_head_nelbo(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor,
    x: torch.Tensor,
    process: XDLMProcess,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    *,
    token_weight: torch.Tensor | None = None,
    backend: str = "auto",
) -> XDLMLossOutput:
    """`xdlm_nelbo(linear(features, weight, bias), ...)` and its mean, without the (B, L, V) logits.

    Under autocast the products run in its dtype; loss and weight gradients add up in float32. A weight that other
    layers share (tied embeddings) gets its gradient as from any layer. In float16 a token's gradient, up to
    `token_weight` / beta, must stay below 65,504: it is taken before any scale of the mean is known.

    Args:
        features: (B, L, D) what the projection reads.
        weight: (V, D), V = `process.logits_width`.
        bias: (V,) or None.
        z, x, process, alpha, beta, backend: As in `xdlm_nelbo`.
        token_weight: (B, L), w of mean = sum(w l) / (B L); None is 1. It gets no gradient.

    Returns:
        `mean` and `per_token`, float32 (float64 where the products are).

    Raises:
        ValueError, RuntimeError: As `xdlm_nelbo`; or if the weights do not fit the features and the process.
    """
    rows = rows_of("features", features, z, x, process, alpha, beta)
    expected = (process.logits_width, features.shape[-1])
    if tuple(weight.shape) != expected or (bias is not None and bias.shape != expected[:1]):
        shapes = f"weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"{shapes}: need (V, D) = {expected} and (V,)")
    if token_weight is not None:
        if token_weight.shape != x.shape:
            raise ValueError(f"token_weight {tuple(token_weight.shape)}: need (B, L) = {tuple(x.shape)}")
        token_weight = token_weight.detach().to(rows.c.dtype).reshape(-1)
    device, dtype = features.device.type, features.dtype
    if not features.is_meta and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value.dtype != dtype:
                raise ValueError(f"{name}: dtype {value.dtype}, the features have {dtype}; cast one, or use autocast")
    flat = features.reshape(-1, features.shape[-1])
    wanted = [
        torch.is_grad_enabled() and value is not None and value.requires_grad for value in (features, weight, bias)
    ]
    check_name(backend)
    passes = None
    if not operators.are_needed(features, weight, bias):
        passes = passes_for(features.device, dtype, backend_for(backend, features, weight, bias))
    mean, loss = _XDLMHeadNelbo.apply(flat, weight, bias, token_weight, rows, (process, passes, backend, dtype, wanted))
    return XDLMLossOutput(mean, loss.view(x.shape))


class _XDLMHeadNelbo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, token_weight, rows: Rows, settings):  # (R, D), (V, D), (V,), (R,)
        process, passes, backend, dtype, wanted = settings
        if token_weight is None:
            token_weight = torch.ones_like(rows.c)
        given = (features, weight, bias, token_weight)
        if passes is None:
            constants = operators.constants_of(process)
            loss, *found = _head_operator(*given, *rows, backend, dtype, *wanted, *constants)
        else:
            loss, *found = _loss_and_gradients(*given, rows, process, passes, dtype, wanted)
        grads = iter(found)
        ctx.save_for_backward(*(next(grads) if is_wanted else None for is_wanted in wanted))
        ctx.rows = features.shape[0]
        ctx.dtypes = [None if value is None else value.dtype for value in (features, weight, bias)]
        ctx.mark_non_differentiable(loss)
        return (token_weight * loss).mean(), loss

    @staticmethod
    def backward(ctx, grad_mean, _):
        if torch.compiler.is_compiling():
            grad_mean = operators.first_derivative(grad_mean)
        else:
            operators.refuse_second_derivative()
        scale = grad_mean / max(1, ctx.rows)  # of no rows the mean is NaN, and the gradients are 0
        grads = [_scaled(*given, scale) for given in zip(ctx.saved_tensors, ctx.dtypes)]
        return *grads, None, None, None


def _loss_and_gradients(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_weight: torch.Tensor,
    rows: Rows,
    process: XDLMProcess,
    passes: Any,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    """Loss (R,), and those gradients of sum(token_weight loss) for features, weight and bias that are wanted."""
    wants_features, wants_weight, wants_bias = wanted
    loss = torch.empty_like(rows.c)
    grad_features = torch.empty_like(features, dtype=dtype) if wants_features else None
    grad_weight = torch.zeros_like(weight, dtype=rows.c.dtype) if wants_weight else None
    grad_bias = torch.zeros_like(bias, dtype=rows.c.dtype) if bias is not None and wants_bias else None
    with torch.autocast(features.device.type, enabled=False):
        matrix = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        stride = -(-len(weight) * dtype.itemsize // ROW_BYTES) * ROW_BYTES // dtype.itemsize
        blocks = row_blocks(len(features), stride * dtype.itemsize)
        buffer = features.new_empty(blocks[0].stop if blocks else 0, stride, dtype=dtype)[:, : len(weight)]
        for block in blocks:
            h = features[block].to(dtype)  # (r, D)
            logits = _project(h, matrix, offset, out=buffer[: len(h)])  # (r, V)
            if not any(wanted):
                loss[block], _ = passes.forward(logits, rows[block], process)
                continue
            loss[block] = passes.forward_backward(logits, rows[block], token_weight[block], process)
            if grad_features is not None:
                torch.mm(logits, matrix, out=grad_features[block])
            if grad_weight is not None:
                _add_product(logits, h, to=grad_weight)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=grad_bias.dtype)
    return [loss, *(grad for grad in (grad_features, grad_weight, grad_bias) if grad is not None)]


@torch.library.custom_op("xdlm_image::head_nelbo", mutates_args=())
def _head_operator(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, token_weight: torch.Tensor,
    z: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, c: torch.Tensor,
    backend: str, dtype: torch.dtype, wants_features: bool, wants_weight: bool, wants_bias: bool,
    k: float, num_codes: int, definition: str, vocab_size: int, mask_id: int,
) -> list[torch.Tensor]:  # fmt: skip
    """`_loss_and_gradients` for graphs of torch.compile, which need not unroll its blocks."""
    rows, process = operators.checked_rows(z, x, alpha, beta, c, (k, num_codes, definition, vocab_size, mask_id))
    wanted = (wants_features, wants_weight, wants_bias)
    passes = passes_for(features.device, dtype, backend)
    return _loss_and_gradients(features, weight, bias, token_weight, rows, process, passes, dtype, wanted)


@_head_operator.register_fake
def _(features, weight, bias, token_weight, z, x, alpha, beta, c, backend, dtype, *wants_and_constants):
    dtypes = zip((features, weight, bias), (dtype, c.dtype, c.dtype), wants_and_constants)
    return [torch.empty_like(c), *(torch.empty_like(value, dtype=kind) for value, kind, wanted in dtypes if wanted)]


def _scaled(grad: torch.Tensor | None, dtype: torch.dtype | None, scale: torch.Tensor) -> torch.Tensor | None:
    """grad times the scale (), in the dtype and without a copy in a third one."""
    if grad is None:
        return None
    scale = scale.view([1] * grad.ndim)  # one of no dimensions would be rounded to the gradient's dtype
    return torch.mul(grad, scale, out=grad.new_empty(grad.shape, dtype=dtype))


def _project(h: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """linear(h, matrix, offset) into memory that is already there: a block's worth of new pages takes its time."""
    return torch.mm(h, matrix.T, out=out) if offset is None else torch.addmm(offset, h, matrix.T, out=out)


def _add_product(grads: torch.Tensor, h: torch.Tensor, to: torch.Tensor) -> None:
    """to += grads.T @ h for grads (r, V), h (r, D) and `to` (V, D), which may have the wider dtype."""
    if grads.dtype == to.dtype:
        to.addmm_(grads.T, h)
        return
    is_nvidia = to.is_cuda and torch.version.cuda
    if is_nvidia and torch.cuda.get_device_capability(to.device) >= (8, 0):  # GPUs before Ampere have no such product
        torch.addmm(to, grads.T, h, out_dtype=to.dtype, out=to)
        return
    if grads.dtype == torch.float16:  # its range ends at 65,504, and no scale is known yet
        h = h.float()
        step = max(1, SHARE_BYTES // (4 * len(h)))
        for part, columns in zip(to.split(step), grads.split(step, 1)):
            part.addmm_(columns.float().T, h)
        return
    step = max(1, SHARE_BYTES // (h.shape[1] * h.element_size()))
    for part, columns in zip(to.split(step), grads.split(step, 1)):
        part += columns.T @ h


def row_blocks(count: int, row_bytes: int) -> list[slice]:
    """Slices of `BLOCK_BYTES` of logits that together are `count` rows."""
    step = max(1, BLOCK_BYTES // row_bytes)
    if step > 16:
        step -= step % 16  # blocks begin alike: Triton compiles again for rows that do not begin at 16 bytes
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
