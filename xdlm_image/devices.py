"""Which device a verb runs on, how a CPU computes fast, and where a verb steps around compiled code."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch


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
        raise ValueError(f"device={str(device)!r}: not to be had here ({reason}); leave it out for the best") from error


def fast_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """On a CPU with units for bfloat16's matrix products bfloat16, else float32."""
    if device.type != "cpu":
        return "float32"
    units: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions cannot be asked
    return "bfloat16" if units.get("amx_bf16") or units.get("avx512_bf16") else "float32"


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
