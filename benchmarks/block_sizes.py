"""Are the block sizes that the code has the fastest here? Each varied alone, the others as they are: time and memory.

    python benchmarks/block_sizes.py [--device cuda] [--shapes 512x128 16384x768] [--repeats 7] [--only BLOCK_BYTES]

What is measured is what reads the size: the output projection fused with the objective, forward and backward (a shape
is V x D); the objective given logits, forward and backward; or the draw of a reverse step, all rows wanted. All values
take turns in one process; times are also given as multiples of that of the value in the code. Values that do not run
are named and left out, and so are those that change nothing at a width. The JSON lands beside this file, anew after
each size.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from types import ModuleType

import torch
from measuring import images_of, machine, measure, objective, parser_of, prepare, show

from xdlm_image.files import write_json
from xdlm_image.objective import head, nelbo_eager, xdlm_head_nelbo, xdlm_nelbo
from xdlm_image.schedulers import XDLMProcess, row_draw

MIB = 1 << 20
SHAPES = {"cpu": ["512x128", "16384x768"], "cuda": ["512x128", "4096x512", "16384x768", "65536x768"]}
Works = dict[str, Callable[[], object]]
Size = tuple[ModuleType, str, str, list[int]]  # module, its constant, the work that reads it, values to try


def sizes_of(device: str, width: int) -> list[Size]:
    """What is read where rows are so wide."""
    if device == "cpu":
        return [
            (head, "BLOCK_BYTES", "head", [mib * MIB for mib in (3, 6, 12, 24, 48, 96)]),
            (nelbo_eager, "BLOCK_ELEMENTS_CPU", "loss, plain torch", [1 << n for n in range(14, 21)]),
            (row_draw, "BLOCK_ELEMENTS_CPU", "draw", [1 << n for n in range(15, 22)]),
        ]
    from xdlm_image.objective import nelbo_triton
    from xdlm_image.schedulers import row_draw_triton

    whole = 1 << (width - 1).bit_length()  # a row in registers, and the same row in blocks
    blocks = [1 << n for n in range(9, 14) if 1 << n < whole]
    threads = [4, 8, 16, 32]
    sizes: list[Size] = [(head, "BLOCK_BYTES", "head", [mib * MIB for mib in (6, 12, 24, 48, 96, 192)])]
    for work in ("head", "loss"):
        if whole <= 1 << 14:
            sizes.append((nelbo_triton, "ROW_IN_REGISTERS", work, [whole // 2, whole]))
        if width <= nelbo_triton.ROW_IN_REGISTERS:
            sizes.append((nelbo_triton, "LOGITS_A_THREAD", work, threads))
        else:
            sizes.append((nelbo_triton, "BLOCK", work, blocks))
            sizes.append((nelbo_triton, "LOGITS_A_THREAD_OF_BLOCKS", work, threads))
    if width > nelbo_triton.ROW_IN_REGISTERS:
        sizes.append((nelbo_triton, "ROW_BYTES_IN_CACHE", "loss", [0, 1 << 30]))
    if whole <= 1 << 15:
        sizes.append((row_draw_triton, "ROW_IN_REGISTERS", "draw", [whole // 2, whole]))
    if width > row_draw_triton.ROW_IN_REGISTERS:
        sizes.append((row_draw_triton, "BLOCK", "draw", [1 << n for n in range(10, 15)]))
    block = row_draw_triton.row_block(width, is_aligned=True)
    values = [n for n in threads if block // (32 * n) <= 32]  # else there are more warps than fit
    return [*sizes, (row_draw_triton, "LOGITS_A_THREAD", "draw", values)]


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


def that_run(candidates: Works, own: str) -> Works:
    """Those that run here; the rest with a line that says why. What the code has must run."""
    found = {}
    for name, candidate in candidates.items():
        try:
            candidate()
            found[name] = candidate
        except Exception as error:  # a kernel that has not the room it wants: the others go on
            if name == own:
                raise
            print(f"{name} does not run here: {error!r}"[:300])
    return found


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--shapes", nargs="+", help=f"V x D each; default: {SHAPES}")
    parser.add_argument("--only", nargs="+", help="names of constants; default: all that this device reads")
    arguments = parser.parse_args()
    prepare(arguments)
    kind = torch.device(arguments.device).type
    if kind not in SHAPES:
        parser.error(f"--device {arguments.device}: no sizes are known for {kind}; name one of {', '.join(SHAPES)}")
    shapes = arguments.shapes or SHAPES[kind]
    for shape in shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            parser.error(f"--shapes {shape}: must be V x D, as in 16384x768")
    sizes = [(shape, size) for shape in shapes for size in sizes_of(kind, int(shape.partition("x")[0]))]
    names = {size[1] for _, size in sizes}
    if not {*(arguments.only or [])} <= names:
        parser.error(f"--only {' '.join(arguments.only)}: what is read here is {', '.join(sorted(names))}")
    sizes = [(shape, size) for shape, size in sizes if not arguments.only or size[1] in arguments.only]
    result = machine(arguments) | objective(arguments) | {"memory_unit": "bytes of the logits", "sizes": []}
    before, works = "", {}
    for shape, (module, name, work, values) in sizes:
        width, features = map(int, shape.split("x"))
        rows = math.prod(images_of(arguments.rows or arguments.elements // width))
        if before != (before := shape):
            works = {}  # whose memory is needed
            works = works_at(width, features, rows, arguments)
        own, place = getattr(module, name), f"{module.__name__.rpartition('.')[2]}.{name}"
        candidates = {f"{v:,}": with_size(module, name, v, works[work]) for v in sorted({own, *values})}
        candidates = that_run(candidates, f"{own:,}")
        unit = rows * width * arguments.dtype.itemsize
        measured = measure(candidates, arguments.device, arguments.repeats, unit)
        what = {"constant": place, "value": own, "work": work, "shape": shape, "rows": rows}
        result["sizes"].append(what | {"candidates": measured})
        write_json(arguments.output, result)
        show(f"{place}, in the code {own:,}; {work}, {rows} x {shape}", measured, f"{own:,}", "logits")
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
