"""The passes over the logits as custom torch operators, which torch.compile keeps whole in one graph with the rest.

Owns their registration, the shapes of their results, and how a process and rows become arguments of an operator. When
they run they choose a backend and compute as without torch.compile, and check the values, which a graph cannot.
`Operators` has the `forward` and `backward` of `nelbo_eager.py`; the head has an operator of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from xdlm_image.objective.backends import are_plain, passes_for
from xdlm_image.objective.row_scalars import Rows, RowScalars
from xdlm_image.schedulers import XDLMProcess
from xdlm_image.schedulers.process_xdlm import check_shares

Constants = tuple[float, int, str, int, int]  # of a process


def are_needed(*tensors: Tensor | None) -> bool:
    """Whether to call the operators instead of the passes: while torch.compile traces, on meta and on fake tensors."""
    if any(value is not None and (value.is_meta or isinstance(value, FakeTensor)) for value in tensors):
        return True
    return torch.compiler.is_compiling() and are_plain(*tensors)


def refuse_second_derivative() -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated again: its result would pass for a constant.

    `once_differentiable` sees it only where the gradient that comes in has one itself, and that of a mean has none.
    """
    if torch.is_grad_enabled():  # in a backward pass: create_graph=True
        raise RuntimeError(
            "the objective has no second derivative (create_graph=True); take objective.reference_nelbo for it"
        )


def constants_of(process: XDLMProcess) -> Constants:
    """What `XDLMProcess` was made of."""
    return process.k, process.num_codes, process.definition, process.num_ids, process.mask


def checked_rows(
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
        given = (logits, *rows, torch.stack(scalars), grad_loss, self.backend)
        _backward(*given, *constants_of(process), out)


@torch.library.custom_op("xdlm_image::nelbo_forward", mutates_args=())
def _forward(
    logits: Tensor, z: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, c: Tensor,
    backend: str, k: float, num_codes: int, definition: str, vocab_size: int, mask_id: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss (R,) and scalars (7, R) of logits (R, V)."""
    rows, process = checked_rows(z, x, alpha, beta, c, (k, num_codes, definition, vocab_size, mask_id))
    loss, scalars = passes_for(logits.device, logits.dtype, backend).forward(logits, rows, process)
    return loss, torch.stack(scalars)


@_forward.register_fake
def _(logits, z, x, alpha, beta, c, *constants):
    return torch.empty_like(c), c.new_empty(len(RowScalars._fields), *c.shape)


@torch.library.custom_op("xdlm_image::nelbo_backward", mutates_args=("out",))
def _backward(
    logits: Tensor, z: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, c: Tensor, scalars: Tensor, grad_loss: Tensor,
    backend: str, k: float, num_codes: int, definition: str, vocab_size: int, mask_id: int, out: Tensor,
) -> None:  # fmt: skip
    """Write the gradient (R, V) into `out`."""
    refuse_second_derivative()  # which cannot be asked while torch.compile traces
    process = XDLMProcess(k, num_codes, definition, vocab_size, mask_id)
    passes = passes_for(logits.device, logits.dtype, backend)
    passes.backward(logits, Rows(z, x, alpha, beta, c), RowScalars(*scalars), grad_loss, process, out)


@torch.library.custom_op("xdlm_image::first_derivative", mutates_args=())
def first_derivative(grad: Tensor) -> Tensor:
    """The gradient that comes in; for backward passes in graphs that have no other operator to refuse the second."""
    refuse_second_derivative()
    return grad.clone()


@first_derivative.register_fake
def _(grad):
    return torch.empty_like(grad)
