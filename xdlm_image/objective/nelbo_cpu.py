"""The objective's passes over the logits compiled for this processor, float32 inside.

Owns the compiler's call and the two functions of `nelbo_cpu.cpp`, which does what `nelbo_eager.py` does with a row at a
time and fewer passes; what happens per row is `row_scalars.py`'s. Nothing compiled is kept: a process takes seconds for
it when it first needs it, and no other machine's instructions can come back from a cache.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from xdlm_image.objective import nelbo_eager
from xdlm_image.objective.row_scalars import Rows, RowScalars, RowSums, columns_of, gradient_factors, loss_and_scalars
from xdlm_image.schedulers import XDLMProcess

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++17", "-O3", "-fopenmp-simd", "-shared", "-fPIC", "-pthread"]
ARITHMETIC = ["-fno-fast-math", "-fno-math-errno", "-fno-trapping-math"]  # sums in lanes, and else as it is written
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # and what the library's functions call them
PLAIN = (torch.Tensor, torch.nn.Parameter)  # classes whose address is where their numbers are
LEAST_ELEMENTS = 1 << 16  # logits that are worth a thread


def forward(logits: torch.Tensor, rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, RowScalars]:
    """Loss (R,) of logits (R, V), whose rows are contiguous, and what `backward` needs to know of the rows."""
    columns, is_wrong = columns_of(rows, process)
    picked = rows.c.new_empty(len(logits), 2)  # exp(logit - top) at the columns
    sums = rows.c.new_zeros(5, len(logits))
    scratch = rows.c.new_empty(_threads(logits), logits.shape[1])  # a row a thread
    _call("forward", logits, process, columns, is_wrong, rows.c, picked, sums, scratch)
    top, rest, norm, log_terms, damped = sums
    if process.k == 0.0:
        log_terms = logits.gather(1, columns[:, :1])[:, 0].float() - top - norm.log()  # log p_x
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
    """Write the gradient (R, V) into `out`, which may be the logits themselves; arguments as in `nelbo_eager`."""
    _call("backward", logits, process, torch.stack(gradient_factors(rows, scalars, grad_loss)), out=out)
    nelbo_eager.write_grads_at(rows, scalars, grad_loss, process, out)


def forward_backward(logits: torch.Tensor, rows: Rows, grad_loss: torch.Tensor, process: XDLMProcess) -> torch.Tensor:
    """Both passes, the gradient over the logits; arguments and result as in `nelbo_eager`."""
    loss, scalars = forward(logits, rows, process)
    backward(logits, rows, scalars, grad_loss, process, out=logits)
    return loss


@functools.cache
def self_check() -> None:
    """Compile, and compare a few rows with plain torch, once a process; raises what stands in the way."""
    process, width = XDLMProcess(0.1, 1500), 1500
    column = torch.arange(width, device="cpu")
    for dtype in DTYPES:
        logits = torch.stack([4.0 * (column * step).float().sin() for step in (1, 2, 3)]).to(dtype)
        ids = column[:3] + 7
        half = torch.full_like(logits[:, 0], 0.5, dtype=torch.float32)
        rows = Rows(torch.where(ids > 8, process.mask, ids), ids, half, half, process.signal_ratio(half, half))
        found = []
        for forward_of, backward_of in ((nelbo_eager.forward, nelbo_eager.backward), (forward, backward)):
            loss, scalars = forward_of(logits, rows, process)
            backward_of(logits, rows, scalars, half, process, out := torch.empty_like(logits))
            found += [loss, out.float()]
        near = torch.allclose(found[0], found[2], rtol=1e-5) and torch.allclose(found[1], found[3], 1e-2, 1e-7)
        if not near:
            raise RuntimeError(f"{_compiler()[0]}: what it compiled computes something else")


def _call(
    name: str, logits: torch.Tensor, process: XDLMProcess, *given: torch.Tensor, out: torch.Tensor | None = None
) -> None:
    """`name` of the library on every row: logits, `out` beside them, V, what is special, then the other tensors."""
    count, width = logits.shape
    matrices = [value for matrix in (logits, out) if matrix is not None for value in _matrix(matrix, logits.dtype)]
    tensors = [value.contiguous() for value in given]  # alive during the call
    for value in tensors:  # the library takes addresses, and their word for what lies there
        assert type(value) in PLAIN and value.device.type == "cpu", value
        assert value.dtype in (torch.float32, torch.int64, torch.bool), value
    excluded = -1 if process.excluded_column is None else process.excluded_column
    getattr(library(), f"{name}_{DTYPES[logits.dtype]}")(
        *matrices,
        *(ctypes.c_int64(value) for value in (count, width, excluded, process.k == 0.0)),
        *(ctypes.c_void_p(value.data_ptr()) for value in tensors),
        ctypes.c_int64(_threads(logits)),
    )


def _matrix(value: torch.Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """Address, and elements from row to row."""
    if type(value) not in PLAIN or value.device.type != "cpu":
        raise ValueError(f"backend='cpp': reads plain tensors on the CPU, not {type(value).__name__}; use 'eager'")
    assert value.dtype == dtype and (value.stride(1) == 1 or value.shape[1] == 1)
    return ctypes.c_void_p(value.data_ptr()), ctypes.c_int64(value.stride(0))


def _threads(logits: torch.Tensor) -> int:
    return max(1, min(torch.get_num_threads(), len(logits), logits.numel() // LEAST_ELEMENTS))


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions. Raises OSError, ValueError or RuntimeError where they cannot be had."""
    native = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
    # GCC and Clang keep to half of AVX-512's registers unless told; the loss takes less time with all of them
    wide = ["-mprefer-vector-width=512"] if platform.machine().lower() in ("x86_64", "amd64") else []
    with tempfile.TemporaryDirectory(prefix="xdlm_image_", ignore_cleanup_errors=True) as folder:
        target = Path(folder) / "nelbo_cpu.so"
        command = [*_compiler(), *FLAGS, *ARITHMETIC, native, *wide, str(SOURCE), "-o", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise OSError(f"{error}; install a C++ compiler, or name one in CXX") from error
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed ({done.stderr.strip()[:500]}); name another compiler in CXX")
        try:
            return ctypes.CDLL(str(target))
        except OSError as error:
            raise OSError(f"{error}; name a folder in TMPDIR from which libraries can be loaded") from error


def _compiler() -> list[str]:
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise ValueError(f"CXX={os.environ['CXX']!r}: {error}") from error
