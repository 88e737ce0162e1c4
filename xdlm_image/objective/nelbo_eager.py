"""The objective's passes over the logits in plain torch, by blocks of rows that stay in a processor's cache.

Owns the sums over the vocabulary and the gradient's elementwise pass, for any device and dtype; what happens per row
is `row_scalars.py`'s. Two work buffers of one block are all the memory they take.
"""

from __future__ import annotations

import torch

from ..schedulers import XDLMProcess
from .row_scalars import Rows, RowScalars, RowSums, columns_of, loss_and_scalars

BLOCK_ELEMENTS_CPU = 1 << 17  # logits a thread and block: two work buffers of 0.5 MiB, and the logits themselves
BLOCK_ELEMENTS_DEVICE = 1 << 24


def forward(logits: torch.Tensor, rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, RowScalars]:
    """Loss (R,) and the scalars of logits (R, V)."""
    columns, is_wrong = columns_of(rows, process)
    picked = logits.gather(1, columns).to(rows.c.dtype)
    step, p, d = _workspace(logits, rows.c.dtype)
    sums = RowSums(*torch.empty(5, len(logits), dtype=rows.c.dtype, device=logits.device))
    # L(c p) as the log of the rounded 1 + c p errs by V 2^-24 / (beta c) = 2^-24 k / alpha of the loss at most
    rounded = rows.alpha >= process.k / 16
    blocks = (value.split(step) for value in (logits, columns, picked, is_wrong, rows.c, rounded, *sums))
    for block, at, picked_rows, wrong, c, is_rounded, top, norm, others, log_terms, damped in zip(*blocks):
        p, d = p[: len(block)], d[: len(block)]
        scores = _scores(block, p, process)
        torch.amax(scores, 1, out=top)
        torch.sub(scores, top[:, None], out=p).exp_()
        p.scatter_(1, at, 0.0)
        torch.sum(p, 1, out=others)
        at_x, at_z = (picked_rows - top[:, None]).exp_().unbind(1)
        torch.add(others, at_x, out=norm).add_(at_z * wrong)
        if process.k > 0.0:
            torch.mul(p, (c / norm)[:, None], out=d)  # c p_j
            if bool(is_rounded.all()):
                p.div_(d.add_(1.0))
                torch.sum(d.log_(), 1, out=log_terms)
            else:
                torch.sum(d.log1p(), 1, out=log_terms)
                p.div_(d.add_(1.0))
            torch.sum(p, 1, out=damped)
    return loss_and_scalars(sums, picked, rows, is_wrong, process)


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
    columns, _ = columns_of(rows, process)
    weight = scalars.g * scalars.inverse_norm * grad_loss
    picked_grads = (torch.stack([scalars.grad_x, scalars.grad_z], 1) * grad_loss[:, None]).to(out.dtype)
    step, p, d = _workspace(logits, rows.c.dtype)
    wide = (scalars.top, rows.c * scalars.inverse_norm, scalars.kappa, weight)
    blocks = (value.split(step) for value in (logits, out, columns, picked_grads, *(v[:, None] for v in wide)))
    for block, out_rows, at, grads, top, c, kappa, g in zip(*blocks):
        p, d = p[: len(block)], d[: len(block)]
        torch.sub(_scores(block, p, process), top, out=p).exp_()
        grad = out_rows if out_rows.dtype == p.dtype else torch.empty_like(p)
        if process.k == 0.0:
            torch.mul(p, g, out=grad)
        else:
            torch.mul(p, c, out=d)  # c p_j
            torch.add(d, 1.0, out=grad)
            torch.addcdiv(kappa, d, grad, out=grad).mul_(p).mul_(g)
        if grad is not out_rows:
            out_rows.copy_(grad)
        out_rows.scatter_(1, at, grads)


def _workspace(logits: torch.Tensor, dtype: torch.dtype) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Rows of a block, and two buffers of one."""
    rows, width = logits.shape
    on_cpu = logits.device.type == "cpu"
    elements = BLOCK_ELEMENTS_CPU * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS_DEVICE
    step = max(1, min(rows, elements // width))
    p, d = torch.empty(2, step, width, dtype=dtype, device=logits.device)
    return step, p, d


def _scores(block: torch.Tensor, buffer: torch.Tensor, process: XDLMProcess) -> torch.Tensor:
    """The logits in the dtype of the arithmetic, -inf where the softmax leaves a column out; `buffer` if need be."""
    if block.dtype == buffer.dtype and process.excluded_column is None:
        return block
    buffer.copy_(block)
    if process.excluded_column is not None:
        buffer[:, process.excluded_column] = -torch.inf
    return buffer
