"""Are the block sizes that the code has the fastest here? Each varied alone, the others as they are: time and memory.

    python benchmarks/block_sizes.py [--device cuda] [--shapes 512x128 16384x768] [--repeats 7] [--only BLOCK_BYTES]

What is measured is what reads the size: the output projection fused with the objective, forward and backward (a shape
is V x D); the objective given logits, forward and backward; or the draw of a reverse step, all rows wanted. All values
take turns in one process; times are also given as multiples of that of the value in the code. On a GPU, where values
of a kernel's are compiled first, a size may do nothing at one width and much at another: --shapes 4096x512 adds rows
that registers hold. The JSON lands beside this file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from types import ModuleType

import torch
from measuring import images_of, machine, measure, objective, parser_of, prepare, show

from xdlm_image.files import write_json
from xdlm_image.objective import head, nelbo_eager, xdlm_head_nelbo, xdlm_nelbo
from xdlm_image.schedulers import XDLMProcess, row_draw

MIB = 1 << 20
Works = dict[str, Callable[[], object]]


def sizes_of(device: str) -> list[tuple[ModuleType, str, str, list[int]]]:
    """Module, its constant, the work that reads it, and values to try."""
    if device == "cpu":
        return [
            (head, "BLOCK_BYTES", "head", [mib * MIB for mib in (3, 6, 12, 24, 48, 96)]),
            (nelbo_eager, "BLOCK_ELEMENTS_CPU", "loss, plain torch", [1 << n for n in range(14, 21)]),
            (row_draw, "BLOCK_ELEMENTS_CPU", "draw", [1 << n for n in range(15, 22)]),
        ]
    from xdlm_image.objective import nelbo_triton
    from xdlm_image.schedulers import row_draw_triton

    return [
        (head, "BLOCK_BYTES", "head", [mib * MIB for mib in (6, 12, 24, 48, 96, 192)]),
        (nelbo_triton, "ROW_IN_REGISTERS", "head", [1 << n for n in range(11, 15)]),
        (nelbo_triton, "ROW_IN_REGISTERS", "loss", [1 << n for n in range(11, 15)]),
        (nelbo_triton, "BLOCK", "head", [1 << n for n in range(9, 14)]),
        (nelbo_triton, "BLOCK", "loss", [1 << n for n in range(9, 14)]),
        (nelbo_triton, "LOGITS_A_THREAD", "loss", [4, 8, 16, 32]),
        (nelbo_triton, "LOGITS_A_THREAD_OF_BLOCKS", "head", [2, 4, 8, 16]),
        (nelbo_triton, "LOGITS_A_THREAD_OF_BLOCKS", "loss", [2, 4, 8, 16]),
        (nelbo_triton, "ROW_BYTES_IN_CACHE", "loss", [0, 1 << 15, 1 << 20]),
        (row_draw_triton, "ROW_IN_REGISTERS", "draw", [1 << n for n in range(11, 16)]),
        (row_draw_triton, "BLOCK", "draw", [1 << n for n in range(10, 15)]),
        (row_draw_triton, "LOGITS_A_THREAD", "draw", [4, 8, 16, 32]),
    ]


def works_at(width: int, features: int, rows: int, arguments: argparse.Namespace) -> Works:
    process, (batch, length) = XDLMProcess(0.1, width), images_of(rows)
    device, dtype = torch.device(arguments.device), arguments.dtype
    x = torch.randint(width, (batch, length))
    t = torch.linspace(0.02, 0.98, batch)
    z = process.noise(x, *process.alpha_beta(t)).to(device)
    given = (z, x.to(device), process, *(value.to(device) for value in process.alpha_beta(t)))
    hidden = torch.randn(batch, length, features, device=device, requires_grad=True)
    weight = (torch.randn(width, features, device=device) / features**0.5).requires_grad_()
    bias = torch.zeros(width, device=device, requires_grad=True)
    logits = torch.randn(batch, length, width, device=device).to(dtype).requires_grad_()
    wanted = torch.ones(rows, dtype=torch.bool, device=device)
    uniforms = torch.rand(rows, dtype=torch.float64).to(device)

    def fused() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            mean = xdlm_head_nelbo(hidden, weight, bias, *given).mean
        mean.backward()
        hidden.grad = weight.grad = bias.grad = None  # a call leaves nothing behind

    def loss(backend: str) -> Callable[[], None]:
        def once() -> None:
            xdlm_nelbo(logits, *given, backend=backend).mean().backward()
            logits.grad = None

        return once

    def draw() -> object:
        return row_draw.draw_rows(logits.detach().view(rows, width), wanted, z.flatten(), uniforms)

    return {"head": fused, "loss": loss("auto"), "loss, plain torch": loss("eager"), "draw": draw}


def with_size(module: ModuleType, name: str, value: int, work: Callable[[], object]) -> Callable[[], object]:
    def once() -> object:
        own = getattr(module, name)
        setattr(module, name, value)
        try:
            return work()
        finally:
            setattr(module, name, own)

    return once


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--shapes", nargs="+", default=["512x128", "16384x768"], help="V x D each")
    parser.add_argument("--only", nargs="+", help="names of constants; default: all that this device has")
    arguments = parser.parse_args()
    prepare(arguments)
    kind = torch.device(arguments.device).type
    sizes = sizes_of(kind)
    names = {name for _, name, _, _ in sizes}
    if not {*(arguments.only or [])} <= names:
        parser.error(f"--only {' '.join(arguments.only)}: {kind} has {', '.join(sorted(names))}")
    sizes = [size for size in sizes if not arguments.only or size[1] in arguments.only]
    result = machine(arguments) | objective(arguments) | {"memory_unit": "bytes of the logits", "sizes": []}
    for shape in arguments.shapes:
        width, features = (int(side) for side in shape.split("x"))
        rows = math.prod(images_of(arguments.rows or arguments.elements // width))
        unit = rows * width * arguments.dtype.itemsize
        works = works_at(width, features, rows, arguments)
        for module, name, work, values in sizes:
            own, place = getattr(module, name), f"{module.__name__.rpartition('.')[2]}.{name}"
            candidates = {f"{v:,}": with_size(module, name, v, works[work]) for v in sorted({own, *values})}
            measured = measure(candidates, arguments.device, arguments.repeats, unit)
            what = {"constant": place, "value": own, "work": work, "shape": shape, "rows": rows}
            result["sizes"].append(what | {"candidates": measured})
            show(f"{place}, in the code {own:,}; {work}, {rows} x {shape}", measured, f"{own:,}", "logits")
    write_json(arguments.output, result)
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
