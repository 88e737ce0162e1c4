"""The objective's passes over the logits, each fused by torch.compile: on a CPU into vectorised C++.

Owns the same sums and the same gradient as `nelbo_eager.py`, written so that the forward pass goes over a block three
times and the backward pass once. It needs a C++ compiler and, for the first logits of a kind, some seconds; where
compiling is switched off, or PyTorch's limit on variants of a function is reached, it gives the same, slowly
and with more memory.
"""

from __future__ import annotations

from functools import partial

import torch

from ..schedulers import XDLMProcess
from .nelbo_eager import write_grads_at
from .row_scalars import NormedScalars, Rows, RowSums, columns_of, loss_and_scalars

BLOCK_ELEMENTS_CPU = 1 << 20  # logits a thread and block of the forward pass, whose exponentials are kept meanwhile
BLOCK_ELEMENTS_DEVICE = 1 << 24


def forward(logits: torch.Tensor, rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, NormedScalars]:
    """Loss (R,) of logits (R, V), and what `backward` needs to know of the rows."""
    count = len(logits)
    columns, is_wrong = columns_of(rows, process)
    rounded = rows.alpha >= process.k / 16  # see `nelbo_eager.forward`
    step = _block_rows(logits)
    sums_of = partial(_row_sums, excluded=process.excluded_column, k_is_zero=process.k == 0.0)
    sums = torch.empty(2 + len(RowSums._fields), count, dtype=rows.c.dtype, device=logits.device)
    for start in range(0, count, step):
        block = [value[start : start + step] for value in (logits, columns, is_wrong, rows.c)]
        here = sums[:, start : start + step]
        # copied, not kept: small tensors that stay would sit between the blocks' buffers and split the heap
        torch.stack(sums_of(*block, rounded=True), out=here)
        exact = (~rounded[start : start + step]).nonzero()[:, 0]  # few rows, if any
        if len(exact):
            here[:, exact] = torch.stack(sums_of(*(value[exact] for value in block), rounded=False))
    top, norm, *row_sums = sums
    loss, scalars = loss_and_scalars(RowSums(*row_sums), rows, process)
    return loss, NormedScalars(top, 1.0 / norm, *scalars)


def backward(
    logits: torch.Tensor,
    rows: Rows,
    scalars: NormedScalars,
    grad_loss: torch.Tensor,
    process: XDLMProcess,
    out: torch.Tensor,
) -> None:
    """Write the gradient (R, V) into `out`, as `nelbo_eager.backward`."""
    g = scalars.g * grad_loss
    values = (scalars.top, scalars.inverse_norm, rows.c, scalars.kappa, g)
    _write_gradient(out, logits, *values, k_is_zero=process.k == 0.0)
    if process.excluded_column is not None:
        out[:, process.excluded_column] = 0.0
    write_grads_at(rows, scalars, grad_loss, process, out)


def _block_rows(logits: torch.Tensor) -> int:
    on_cpu = logits.device.type == "cpu"
    elements = BLOCK_ELEMENTS_CPU * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS_DEVICE
    return max(1, min(len(logits), elements // logits.shape[1]))


@torch.compile(dynamic=True)
def _row_sums(
    logits: torch.Tensor,
    columns: torch.Tensor,
    is_wrong: torch.Tensor,
    c: torch.Tensor,
    *,
    excluded: int | None,
    k_is_zero: bool,
    rounded: bool,
) -> tuple[torch.Tensor, ...]:
    """Largest logit and norm of a block's rows, then the fields of `RowSums`; each (r,)."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    scores = logits.to(c.dtype)
    if excluded is not None:
        scores = torch.where(ids == excluded, -torch.inf, scores)
    top = scores.amax(1, keepdim=True)
    at = scores.gather(1, columns)  # (r, 2): of x, and of z where it is a wrong code
    e_x, e_z = torch.exp(at - top).unbind(1)
    e_z = torch.where(is_wrong, e_z, 0.0)
    is_other = (ids != columns[:, :1]) & (ids != columns[:, 1:])
    e = torch.where(is_other, torch.exp(scores - top), 0.0)
    others = e.sum(1)
    norm = others + e_x + e_z
    top = top[:, 0]
    if k_is_zero:
        log_terms, damped = at[:, 0] - top - norm.log(), torch.zeros_like(norm)
    else:
        d = e * (c / norm)[:, None]  # c p_j; 0 at x and z
        log_terms = ((1.0 + d).log() if rounded else d.log1p()).sum(1)
        damped = (e / (1.0 + d)).sum(1) / norm
    return top, norm, e_x / norm, e_z / norm, others / norm, log_terms, damped


@torch.compile(dynamic=True)
def _write_gradient(
    out: torch.Tensor,
    logits: torch.Tensor,
    top: torch.Tensor,
    inverse_norm: torch.Tensor,
    c: torch.Tensor,
    kappa: torch.Tensor,
    g: torch.Tensor,
    *,
    k_is_zero: bool,
) -> None:
    """Write g p_j (kappa + c p_j / (1 + c p_j)) into every column, also of those where something else belongs."""
    p = torch.exp(logits.to(c.dtype) - top[:, None]) * inverse_norm[:, None]
    if k_is_zero:
        out.copy_(p * g[:, None])
    else:
        d = p * c[:, None]
        out.copy_(g[:, None] * p * (kappa[:, None] + d / (1.0 + d)))
