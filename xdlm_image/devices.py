"""Which device a verb runs on, how a CPU computes fast, where a verb steps around compiled code, and how long processes
wait for one another."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from accelerate.utils import InitProcessGroupKwargs

LONGEST_WAIT = timedelta(hours=3)  # of processes for one that draws, measures or writes; NCCL alone waits 10 minutes
UNITS = {"bfloat16": ("amx_bf16", "avx512_bf16"), "float16": ("amx_fp16", "avx512_fp16")}  # for matrix products, on x86


def best_device(device: str | torch.device | None = None) -> torch.device:
    """The named torch device, or CUDA, MPS, CPU in this order of preference.

    Raises:
        ValueError: If the name is no device, or this machine has none of that kind.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r}: not available here ({reason}); leave it out for the best") from error


def fast_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """On a CPU with units for bfloat16's matrix products bfloat16, else float32."""
    return "bfloat16" if device.type == "cpu" and _has_units("bfloat16") else "float32"


def warn_if_slow(device: torch.device, dtype: torch.dtype, argument: str) -> None:
    """A warning where a CPU is known to have no units for a short `dtype`, which then takes far longer than float32.

    Args:
        device: Where it will be computed in.
        dtype: What was asked for.
        argument: By which argument, with its value.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and name in UNITS and _has_units(name) is False:
        warnings.warn(
            f"{argument}: this processor has no units for {name} and will take several times as long as in float32, "
            "which is the default",
            stacklevel=3,
        )


def _has_units(dtype: str) -> bool | None:
    """Whether this CPU has units for matrix products of the dtype; None if that cannot be told."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions cannot be asked
    told = [bool(capabilities[unit]) for unit in UNITS[dtype] if unit in capabilities]
    return any(told) if told else None


def why_not_compiled(device: torch.device) -> str | None:
    """None if torch.compile pays and works here, else the reason: a small function is compiled to see.

    It pays on a CPU, where eager code passes through memory once an operation; it needs a C++ compiler and Python's
    headers there.
    """
    if device.type != "cpu":
        return f"it pays on CPUs only, this is {device.type}"
    try:
        if not torch.compile(lambda x: x + torch.compiler.is_compiling())(torch.zeros(4)).all():
            return "it is switched off"
    except Exception as error:  # whatever compilers, linkers and file systems raise
        return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return None


def uncompiled(is_compiled: bool) -> AbstractContextManager:
    """A context in which modules compiled by torch run as they were: other batches are not worth graphs.

    Args:
        is_compiled: Whether any is; asking torch loads its compiler, so that plain runs do not ask.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def process_group_timeout() -> InitProcessGroupKwargs:
    """For `PartialState(**it.to_kwargs())`: processes wait `LONGEST_WAIT` for one that has more to do.

    The group of processes is made once, by whoever asks first for accelerate's state, and keeps its timeout.
    """
    from accelerate.utils import InitProcessGroupKwargs

    return InitProcessGroupKwargs(timeout=LONGEST_WAIT)
