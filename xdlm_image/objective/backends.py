"""Who passes over the logits: Triton kernels or compiled C++ where they run, plain torch elsewhere.

Owns the choice between `nelbo_triton.py`, `nelbo_cpu.py` and `nelbo_eager.py`, whose functions are called alike, and
what is told where one that is faster cannot run.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch

from xdlm_image.objective import nelbo_cpu, nelbo_eager

BACKENDS = ("auto", "eager", "cpp", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def are_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether none is a tensor subclass, whose address our kernels cannot use."""
    return all(value is None or type(value) in nelbo_cpu.PLAIN for value in tensors)


def backend_for(backend: str, *tensors: torch.Tensor | None) -> str:
    """`"eager"` in the place of `"auto"` for tensor subclasses."""
    return backend if backend != "auto" or are_plain(*tensors) else "eager"


def passes_for(device: torch.device, dtype: torch.dtype, backend: str) -> Any:
    """The module whose `forward`, `backward` and `forward_backward` pass over logits of this dtype on this device."""
    check_name(backend)
    if backend == "auto":
        backend = _fastest(device, dtype)
    if backend == "eager":
        return nelbo_eager
    dtypes, where = (nelbo_cpu.DTYPES, ("cpu",)) if backend == "cpp" else (TRITON_DTYPES, ("cuda", "cpu"))
    if dtype not in dtypes or device.type not in where:
        raise ValueError(
            f"backend={backend!r}: reads {', '.join(map(str, dtypes))} on {' or '.join(where)}, the logits are {dtype} "
            f"on {device.type}; use 'eager'"
        )
    if backend == "cpp":
        nelbo_cpu.self_check()
        return nelbo_cpu
    from xdlm_image.objective import nelbo_triton

    return nelbo_triton


def check_name(backend: str) -> None:
    """Raise ValueError if there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for logits of this dtype on this device."""
    if device.type == "cpu" and dtype in nelbo_cpu.DTYPES and _cpp_runs():
        return "cpp"
    return "triton" if _triton_runs(device, dtype) else "eager"


@functools.cache
def _cpp_runs() -> bool:
    """Whether the passes in C++ can be compiled here; asked once, by compiling and trying them."""
    try:
        nelbo_cpu.self_check()
        return True
    except Exception as error:  # no compiler, no place to compile: whatever it is, plain torch does without
        warnings.warn(
            f"{error}: the objective's C++ cannot run here, it takes slower passes in plain torch", stacklevel=5
        )
        return False


@functools.cache
def _triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels work on the device; asked once, by running one."""
    if device.type != "cuda" or dtype not in TRITON_DTYPES or importlib.util.find_spec("triton") is None:
        return False
    try:
        from xdlm_image.objective import nelbo_triton

        nelbo_triton.self_check(device, dtype)
        return True
    except Exception as error:  # a missing compiler, an old GPU: whatever it is, the other passes do without
        warnings.warn(
            f"{error}: the objective's Triton kernels cannot run here, it takes slower passes in plain torch",
            stacklevel=5,
        )
        return False
