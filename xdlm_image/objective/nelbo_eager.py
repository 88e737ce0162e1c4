"""The objective's passes over the logits in plain torch, by blocks of rows that stay in a processor's cache.

Owns the sums over the vocabulary and the gradient's elementwise pass, for any device and dtype; what happens per row
is `row_scalars.py`'s. Two work buffers of one block are all the memory they take.
"""

from __future__ import annotations

import torch

from xdlm_image.objective.row_scalars import Rows, RowScalars, RowSums, columns_of, gradient_factors, loss_and_scalars
from xdlm_image.schedulers import XDLMProcess

BLOCK_ELEMENTS_CPU = 1 << 17  # logits a thread and block: two work buffers of 0.5 MiB, and the logits themselves
BLOCK_ELEMENTS_DEVICE = 1 << 24


def forward(logits: torch.Tensor, rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, RowScalars]:
    """Loss (R,) of logits (R, V), and what `backward` needs to know of the rows."""
    columns, is_wrong = columns_of(rows, process)
    picked = torch.empty(len(logits), 2, dtype=rows.c.dtype, device=logits.device)  # exp(logit - top) at the columns
    top, rest, norm, log_terms, damped = torch.empty(5, len(logits), dtype=rows.c.dtype, device=logits.device)
    step, e, d = _workspace(logits, rows.c.dtype)
    exact = not _may_wait(logits.device)
    per_row = (columns, is_wrong, rows.c, picked, top, rest, norm, log_terms, damped)
    for block, at, wrong, c, e_at, tops, rests, norms, logs, damps in zip(*(v.split(step) for v in (logits, *per_row))):
        e, d = e[: len(block)], d[: len(block)]
        scores = block if block.dtype == d.dtype else d.copy_(block)
        _top(scores, process.excluded_column, out=tops)
        _exp(scores, tops[:, None], process.excluded_column, out=e)
        torch.gather(e, 1, at, out=e_at)
        e_at[:, 1].mul_(wrong)
        torch.sum(e.scatter_(1, at, 0.0), 1, out=rests)  # by halves; torch.softmax adds one by one
        torch.sum(e_at, 1, out=norms).add_(rests)
        if process.k > 0.0:
            torch.mul(e, (c / norms)[:, None], out=d)  # c p_j
            if exact:
                torch.sum(d.log1p(), 1, out=logs)
            torch.sum(e.div_(d.add_(1.0)), 1, out=damps)
            if not exact:
                torch.sum(d.log_(), 1, out=logs)
    if process.k == 0.0:
        log_terms = logits.gather(1, columns[:, :1])[:, 0].to(top.dtype) - top - norm.log()  # log p_x
    elif not exact:
        # L(c p) as the log of the rounded 1 + c p errs by V 2^-24 / (beta c) = 2^-24 k / alpha of the loss at most
        few = (rows.alpha < process.k / 16).nonzero()[:, 0]
        for some in few.split(step):
            e = torch.empty(len(some), logits.shape[1], dtype=top.dtype, device=logits.device)
            _exp(logits[some].to(top.dtype), top[some, None], process.excluded_column, out=e)
            e.scatter_(1, columns[some], 0.0).mul_((rows.c / norm)[some, None])
            log_terms[some] = e.log1p_().sum(1)
    p_x, p_z = (picked / norm[:, None]).unbind(1)
    return loss_and_scalars(RowSums(top, norm, p_x, p_z, rest / norm, log_terms, damped / norm), rows, process)


def backward(
    logits: torch.Tensor,
    rows: Rows,
    scalars: RowScalars,
    grad_loss: torch.Tensor,
    process: XDLMProcess,
    out: torch.Tensor,
) -> None:
    """Write the gradient (R, V) into `out`, which may be the logits themselves.

    Args:
        logits: (R, V).
        rows: z, x, alpha, beta, c.
        scalars: Of `forward`.
        grad_loss: (R,), the gradient of what is minimised with respect to the loss of each row.
        process: The noise process.
        out: (R, V), the logits' dtype.
    """
    step, e, d = _workspace(logits, rows.c.dtype)
    wide = (value[:, None] for value in gradient_factors(rows, scalars, grad_loss))
    for block, out_rows, top, one, c, kappa, kappa_1, g in zip(*(v.split(step) for v in (logits, out, *wide))):
        e, d = e[: len(block)], d[: len(block)]
        _exp(block if block.dtype == d.dtype else d.copy_(block), top, process.excluded_column, out=e)
        grad = out_rows if out_rows.dtype == e.dtype else torch.empty_like(e)
        if process.k == 0.0:
            torch.mul(e, g, out=grad)
        else:
            torch.mul(e, c, out=d)  # c p_j, and so on
            torch.mul(d, kappa_1, out=grad).add_(kappa)
            grad.div_(d.add_(one)).mul_(e)
        if grad is not out_rows:
            out_rows.copy_(grad)
    write_grads_at(rows, scalars, grad_loss, process, out)


def forward_backward(logits: torch.Tensor, rows: Rows, grad_loss: torch.Tensor, process: XDLMProcess) -> torch.Tensor:
    """Both passes, for whoever knows beforehand what is minimised.

    Args:
        logits: (R, V); the gradient takes their place.
        rows, grad_loss, process: As in `backward`.

    Returns:
        Loss (R,).
    """
    loss, scalars = forward(logits, rows, process)
    backward(logits, rows, scalars, grad_loss, process, out=logits)
    return loss


def write_grads_at(
    rows: Rows, scalars: RowScalars, grad_loss: torch.Tensor, process: XDLMProcess, out: torch.Tensor
) -> None:
    """Write the gradient where it follows other equations: at x, and at z where it is a wrong code."""
    columns, _ = columns_of(rows, process)
    grads_at = torch.stack([scalars.grad_x, scalars.grad_z], 1) * grad_loss[:, None]
    places = torch.arange(len(out), device=out.device)[:, None]
    out.index_put_((places, columns), grads_at.to(out.dtype))  # scatter_ of half precision on a CPU copies all of out


def _may_wait(device: torch.device) -> bool:
    """Whether asking which rows need exact logarithms waits for no accelerator; where it would, all rows take them."""
    return device.type == "cpu"


def _workspace(logits: torch.Tensor, dtype: torch.dtype) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Rows of a block, and two buffers of one."""
    rows, width = logits.shape
    on_cpu = logits.device.type == "cpu"
    elements = BLOCK_ELEMENTS_CPU * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS_DEVICE
    step = max(1, min(rows, elements // width))
    e, d = torch.empty(2, step, width, dtype=dtype, device=logits.device)
    return step, e, d


def _top(scores: torch.Tensor, excluded: int | None, out: torch.Tensor) -> None:
    """The largest score of each row (r, V), without a column that has no probability."""
    if excluded is None:
        torch.amax(scores, 1, out=out)
        return
    sides = [side for side in (scores[:, :excluded], scores[:, excluded + 1 :]) if side.shape[1] > 0]
    torch.amax(sides[0], 1, out=out)
    for side in sides[1:]:
        torch.maximum(out, side.amax(1), out=out)


def _exp(scores: torch.Tensor, top: torch.Tensor, excluded: int | None, out: torch.Tensor) -> None:
    """exp(scores - top), 0 in a column that has no probability."""
    torch.sub(scores, top, out=out).exp_()
    if excluded is not None:
        out[:, excluded] = 0.0
