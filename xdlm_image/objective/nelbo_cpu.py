"""The objective's passes over the logits compiled for this processor, float32 inside.

Owns the compiler's call and the two functions of `nelbo_cpu.cpp`, which does what `nelbo_eager.py` does with a row at a
time and fewer passes; what happens per row is `row_scalars.py`'s. Nothing compiled is kept: a process takes about two
seconds for it, once, and no other machine's instructions can come back from a cache.
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

from ..schedulers import XDLMProcess
from .nelbo_eager import write_grads_at
from .row_scalars import Rows, RowScalars, RowSums, columns_of, gradient_factors, loss_and_scalars

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread"]
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LEAST_ELEMENTS = 1 << 16  # logits that are worth a thread


def forward(logits: torch.Tensor, rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, RowScalars]:
    """Loss (R,) of logits (R, V), whose rows are contiguous, and what `backward` needs to know of the rows."""
    columns, is_wrong = columns_of(rows, process)
    picked = torch.empty(len(logits), 2)  # exp(logit - top) at the columns
    sums = torch.zeros(5, len(logits))
    _call("forward", logits, process, columns, is_wrong, rows.c, picked, sums)
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
    write_grads_at(rows, scalars, grad_loss, process, out)


def _call(
    name: str, logits: torch.Tensor, process: XDLMProcess, *given: torch.Tensor, out: torch.Tensor | None = None
) -> None:
    """`name` of the library on every row: logits, `out` beside them, V, what is special, then the other tensors."""
    count, width = logits.shape
    matrices = [value for matrix in (logits, out) if matrix is not None for value in _matrix(matrix)]
    tensors = [value.contiguous() for value in given]  # alive during the call
    excluded = -1 if process.excluded_column is None else process.excluded_column
    threads = max(1, min(torch.get_num_threads(), logits.numel() // LEAST_ELEMENTS))
    getattr(library(), f"{name}_{TYPES[logits.dtype]}")(
        *matrices,
        *(ctypes.c_int64(value) for value in (count, width, excluded, process.k == 0.0)),
        *(ctypes.c_void_p(value.data_ptr()) for value in tensors),
        ctypes.c_int64(threads),
    )


def _matrix(value: torch.Tensor) -> tuple[Any, Any]:
    assert value.stride(1) == 1 or value.shape[1] == 1
    return ctypes.c_void_p(value.data_ptr()), ctypes.c_int64(value.stride(0))


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions. Raises OSError or RuntimeError where there is no compiler, or it cannot do it."""
    native = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory(prefix="xdlm_image_") as folder:
        target = Path(folder) / "nelbo_cpu.so"
        command = [*compiler, *FLAGS, native, *_widest_vectors(), str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command[:1])} failed: {done.stderr.strip()[:500]}")
        return ctypes.CDLL(str(target))


def _widest_vectors() -> list[str]:
    """GCC and Clang keep to half of AVX-512's registers unless told; the loss takes less time with all of them."""
    return ["-mprefer-vector-width=512"] if platform.machine().lower() in ("x86_64", "amd64") else []
