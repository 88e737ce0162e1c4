"""The passes over the logits as operators of torch's: torch.compile takes each whole, into one graph with the rest.

Owns their registration, what their results look like, and how a process and rows become what an operator may be given.
When they run they choose a backend and compute as without torch.compile; so do the checks of values, which a graph
cannot hold. Called as the modules of passes are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xdlm_image.objective.backends import are_plain, passes_for
from xdlm_image.objective.row_scalars import Rows, RowScalars
from xdlm_image.schedulers import XDLMProcess
from xdlm_image.schedulers.process_xdlm import check_shares

Constants = tuple[float, int, str, int, int]  # of a process


def are_needed(*tensors: Tensor | None) -> bool:
    """Whether operators stand for the passes: torch.compile traces plain tensors, or they hold nothing."""
    on_meta = any(value is not None and value.is_meta for value in tensors)
    return (on_meta or torch.compiler.is_compiling()) and are_plain(*tensors)


def constants_of(process: XDLMProcess) -> Constants:
    """What `XDLMProcess` was made of."""
    return process.k, process.num_codes, process.definition, process.num_ids, process.mask


def checked(
    z: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, c: Tensor, constants: Constants
) -> tuple[Rows, XDLMProcess]:
    """The rows, with values that are looked at now, and their process. Raises ValueError as `xdlm_nelbo`."""
    process = XDLMProcess(*constants)
    process.check_ids("x", x, process.num_codes)
    process.check_ids("z", z, process.num_ids)
    check_shares(alpha, beta)
    return Rows(z, x, alpha, beta, c), process


@dataclass(frozen=True)
class Operators:
    """`forward` and `backward` as `nelbo_eager.py` has them, by operators.

    Args:
        backend: Who passes over the logits when they run.
    """

    backend: str

    def forward(self, logits: Tensor, rows: Rows, process: XDLMProcess) -> tuple[Tensor, RowScalars]:
        loss, scalars = _forward(logits, *rows, self.backend, *constants_of(process))
        return loss, RowScalars(*scalars.unbind())

    def backward(
        self, logits: Tensor, rows: Rows, scalars: RowScalars, grad_loss: Tensor, process: XDLMProcess, out: Tensor
    ) -> None:
        given = (*rows, torch.stack(scalars), grad_loss, self.backend, *constants_of(process))
        if out is logits:
            _backward_in_place(logits, *given)
        else:
            _backward(logits, *given, out)


@torch.library.custom_op("xdlm_image::nelbo_forward", mutates_args=())
def _forward(
    logits: Tensor, z: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, c: Tensor,
    backend: str, k: float, num_codes: int, definition: str, vocab_size: int, mask_id: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss (R,) and scalars (7, R) of logits (R, V)."""
    rows, process = checked(z, x, alpha, beta, c, (k, num_codes, definition, vocab_size, mask_id))
    loss, scalars = passes_for(logits.device, logits.dtype, backend).forward(logits, rows, process)
    return loss, torch.stack(scalars)


@_forward.register_fake
def _(logits, z, x, alpha, beta, c, *constants):
    return torch.empty_like(c), c.new_empty(len(RowScalars._fields), len(c))


@torch.library.custom_op("xdlm_image::nelbo_backward", mutates_args=("out",))
def _backward(
    logits: Tensor, z: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, c: Tensor, scalars: Tensor, grad_loss: Tensor,
    backend: str, k: float, num_codes: int, definition: str, vocab_size: int, mask_id: int, out: Tensor,
) -> None:  # fmt: skip
    """Write the gradient (R, V) into `out`."""
    process = XDLMProcess(k, num_codes, definition, vocab_size, mask_id)
    passes = passes_for(logits.device, logits.dtype, backend)
    passes.backward(logits, Rows(z, x, alpha, beta, c), RowScalars(*scalars), grad_loss, process, out)


@torch.library.custom_op("xdlm_image::nelbo_backward_in_place", mutates_args=("logits",))
def _backward_in_place(
    logits: Tensor, z: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, c: Tensor, scalars: Tensor, grad_loss: Tensor,
    backend: str, k: float, num_codes: int, definition: str, vocab_size: int, mask_id: int,
) -> None:  # fmt: skip
    """Write the gradient (R, V) over the logits."""
    process = XDLMProcess(k, num_codes, definition, vocab_size, mask_id)
    passes = passes_for(logits.device, logits.dtype, backend)
    passes.backward(logits, Rows(z, x, alpha, beta, c), RowScalars(*scalars), grad_loss, process, logits)
