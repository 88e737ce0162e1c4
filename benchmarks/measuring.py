"""What the benchmarks of the objective share: time and peak memory of candidates that take turns, and the machine."""

import argparse
import ctypes
import gc
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from xdlm_image.devices import best_device
from xdlm_image.objective.backends import passes_for

LEAST_SECONDS = 0.02  # that a time on a GPU is taken over


def parser_of(script: str, description: str, of_logits: bool = True) -> argparse.ArgumentParser:
    """The options that every such script has; those that say what the logits are only where there are any."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if of_logits:
        parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")
        parser.add_argument(
            "--rows",
            type=int,
            help="tokens; default: as many as give 2^25 logits (a GPU: 2^29); of one step at most 16,384",
        )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path, help="default: beside the script, named after the device")
    parser.set_defaults(script=Path(script))
    return parser


def prepare(arguments: argparse.Namespace) -> None:
    """Fill in the defaults that hang on the device, and settle torch."""
    try:
        device = best_device(arguments.device)
    except ValueError as error:
        raise SystemExit(f"--{error}") from None
    on_gpu = device.type != "cpu"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose memory and clock are read
    if "dtype" in arguments:
        arguments.dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    arguments.output = arguments.output or arguments.script.with_name(
        f"{arguments.script.stem}_{torch.device(arguments.device).type}.json"
    )
    arguments.elements = 1 << (29 if on_gpu else 25)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)


def images_of(rows: int) -> tuple[int, int]:
    """(B, L) with B L about `rows`, for images of 256 tokens or less."""
    return max(1, rows // 256), min(rows, 256)


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "liger-kernel", "cut-cross-entropy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    can = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "cpu_units": [unit for unit in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if can.get(unit)],
        "threads": arguments.threads,
        "huge_pages_for_all": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        **({"dtype": str(arguments.dtype)} if "dtype" in arguments else {}),
        "repeats": arguments.repeats,
        "versions": versions,
    }


def objective(arguments: argparse.Namespace) -> dict[str, str]:
    """Whose passes the objective takes here; on a GPU none but Triton's are worth measuring."""
    device = torch.device(arguments.device)
    passes = passes_for(device, arguments.dtype, "auto").__name__.rpartition(".")[2]
    if device.type == "cuda" and passes == "nelbo_eager":
        raise SystemExit("the objective's Triton kernels do not run here: what was measured would be plain torch")
    return {"objective": passes}


def measure(
    candidates: dict[str, Callable[[], Any]], device: str, repeats: int, unit: int
) -> dict[str, dict[str, float]]:
    """Run the candidates in turns: once to warm up and for memory, then `repeats` times, each time in another order
    (who comes after one that gives much memory back takes longer). On a GPU a time is that between two events with as
    many calls in between as take `LEAST_SECONDS`, so that the first launch is not waited for.

    Returns:
        For each: `seconds` a call (median), `low`, `high`, on a CPU `processor_seconds` (median, this process, all
        threads: what other load disturbs least) and `memory`: the peak above what was there before, in units of `unit`
        bytes (NaN where this platform does not tell). Candidates for which a GPU has no memory are named and left out.
    """
    on_gpu = torch.device(device).type == "cuda"
    memory: dict[str, float] = {}
    for name, candidate in candidates.items():
        try:
            candidate()
            memory[name] = peak_bytes(candidate, on_gpu) / unit
        except torch.OutOfMemoryError:
            print(f"{name}: not measured, {device} has no memory for it")
    candidates = {name: candidates[name] for name in memory}
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    processor: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    calls = {
        name: math.ceil(LEAST_SECONDS / _seconds_on_gpu(candidate, 1)) if on_gpu else 1
        for name, candidate in candidates.items()
    }
    for _ in range(repeats):
        for name, candidate in order.sample(list(candidates.items()), len(candidates)):
            if on_gpu:
                wall[name].append(_seconds_on_gpu(candidate, calls[name]))
                continue
            began = time.perf_counter(), time.process_time()
            candidate()
            wall[name].append(time.perf_counter() - began[0])
            processor[name].append(time.process_time() - began[1])
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "low": min(wall[name]),
            "high": max(wall[name]),
            **({} if on_gpu else {"processor_seconds": statistics.median(processor[name])}),
            "memory": memory[name],
        }
        for name in candidates
    }


def _seconds_on_gpu(candidate: Callable[[], Any], calls: int) -> float:
    """Seconds a call, of so many without a pause."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(calls):
        candidate()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1000 / calls


def peak_bytes(candidate: Callable[[], Any], on_gpu: bool) -> float:
    """Most memory in use during a call, less what was in use before."""
    gc.collect()
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        candidate()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what lies free in the heap would hide the same again
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
        before = _resident("VmRSS")
        candidate()
        return _resident("VmHWM") - before
    except OSError:
        return float("nan")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def show(title: str, results: dict[str, dict[str, float]], baseline: str, unit: str) -> None:
    """A table, times also as multiples of the baseline's."""
    base = results[baseline]
    of_processor = "   x processor" if "processor_seconds" in base else ""
    print(f"\n{title}\n{'':28}     ms  (low to high)      x{of_processor}   peak, {unit}")
    for name, row in results.items():
        ratio = f"{row['seconds'] / base['seconds']:6.2f}"
        if of_processor:
            ratio += f"{row['processor_seconds'] / base['processor_seconds']:12.2f}"
        times = f"{1e3 * row['seconds']:8.2f}  ({1e3 * row['low']:.2f} to {1e3 * row['high']:.2f})"
        print(f"{name:27}{times:28}{ratio}{row['memory']:10.2f}")
