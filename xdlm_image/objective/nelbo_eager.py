"""The objective's passes over the logits in plain torch, by blocks of rows that stay in a processor's cache.

Owns the sums over the vocabulary and the gradient's elementwise pass, for any device and dtype; what happens per row
is `row_scalars.py`'s. Two work buffers of one block are all the memory they take.
"""

from __future__ import annotations

import torch

from ..schedulers import XDLMProcess
from .row_scalars import NormedScalars, Rows, RowScalars, RowSums, columns_of, loss_and_scalars

BLOCK_ELEMENTS_CPU = 1 << 17  # logits a thread and block: two work buffers of 0.5 MiB, and the logits themselves
BLOCK_ELEMENTS_DEVICE = 1 << 24


def forward(logits: torch.Tensor, rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, RowScalars]:
    """Loss (R,) of logits (R, V), and what `backward` needs to know of the rows."""
    columns, is_wrong = columns_of(rows, process)
    picked = torch.empty(len(logits), 2, dtype=rows.c.dtype, device=logits.device)  # p_x, p_z
    others, log_terms, damped = torch.empty(3, len(logits), dtype=rows.c.dtype, device=logits.device)
    # L(c p) as the log of the rounded 1 + c p errs by V 2^-24 / (beta c) = 2^-24 k / alpha of the loss at most
    rounded = rows.alpha >= process.k / 16
    step, p, d = _workspace(logits, rows.c.dtype)
    blocks = (v.split(step) for v in (logits, columns, rows.c, rounded, picked, others, log_terms, damped))
    for block, at, c, is_rounded, p_at, rest, logs, damps in zip(*blocks):
        p, d = p[: len(block)], d[: len(block)]
        scores = _scores(block, d, process)
        if process.k == 0.0:
            torch.log_softmax(scores, 1, out=p)
            torch.gather(p, 1, at[:, :1], out=logs[:, None])
            p.exp_()
        else:
            torch.softmax(scores, 1, out=p)
        torch.gather(p, 1, at, out=p_at)
        torch.sum(p.scatter_(1, at, 0.0), 1, out=rest)
        if process.k > 0.0:
            torch.mul(p, c[:, None], out=d)  # c p_j
            exact = (~is_rounded).nonzero()[:, 0]  # few rows, if any
            exact_logs = d[exact].log1p_().sum(1)
            p.div_(d.add_(1.0))
            torch.sum(d.log_(), 1, out=logs)
            logs[exact] = exact_logs
            torch.sum(p, 1, out=damps)
    p_x, p_z = picked.unbind(1)
    return loss_and_scalars(RowSums(p_x, p_z * is_wrong, others, log_terms, damped), rows, process)


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
    step, p, d = _workspace(logits, rows.c.dtype)
    wide = (v[:, None] for v in (rows.c, scalars.kappa, scalars.g * grad_loss))
    for block, out_rows, c, kappa, g in zip(*(v.split(step) for v in (logits, out, *wide))):
        p, d = p[: len(block)], d[: len(block)]
        torch.softmax(_scores(block, d, process), 1, out=p)
        grad = out_rows if out_rows.dtype == p.dtype else torch.empty_like(p)
        if process.k == 0.0:
            torch.mul(p, g, out=grad)
        else:
            torch.mul(p, c, out=d)  # c p_j
            torch.add(d, 1.0, out=grad)
            torch.addcdiv(kappa, d, grad, out=grad).mul_(p).mul_(g)
        if grad is not out_rows:
            out_rows.copy_(grad)
    write_grads_at(rows, scalars, grad_loss, process, out)


def write_grads_at(
    rows: Rows, scalars: RowScalars | NormedScalars, grad_loss: torch.Tensor, process: XDLMProcess, out: torch.Tensor
) -> None:
    """Write the gradient where it follows other equations: at x, and at z where it is a wrong code."""
    columns, _ = columns_of(rows, process)
    grads_at = torch.stack([scalars.grad_x, scalars.grad_z], 1) * grad_loss[:, None]
    out.scatter_(1, columns, grads_at.to(out.dtype))


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
