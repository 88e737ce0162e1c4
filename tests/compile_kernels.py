"""Compile the Triton kernels for a Hopper GPU, on any machine, and see that their registers suffice: run by
`test_nelbo_backends.py`."""

import os
import re
import subprocess
import tempfile

os.environ["TRITON_INTERPRET"] = "0"  # before triton

import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from xdlm_image.objective import nelbo_triton  # noqa: E402
from xdlm_image.schedulers import row_draw_triton  # noqa: E402

TYPES = {
    "logits": "*bf16", "out": "*bf16", "z_ptr": "*i64", "x_ptr": "*i64", "wanted_ptr": "*u8", "drawn_ptr": "*i64",
    "v_ptr": "*fp64", "p_z_ptr": "*fp64", "totals_ptr": "*fp64", "N_OVER_K": "fp32", "inverse_temperature": "fp32",
}  # fmt: skip


def compile_kernel(kernel, warps, aligned=("stride", "out_stride", "V"), **constants) -> None:
    """`aligned` are the numbers that 16 divides: rows begin at 16 bytes, and end there."""
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    whole = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name in aligned]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in whole})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    by_one = re.findall(r"ld\.global\S*\.b16 ", compiled.asm["ptx"])
    if aligned and constants["BLOCK"] >= 8 * 32 * warps:
        assert len(by_one) <= 2 or "V" not in aligned, "more logits than those of x and z are read by one"
        for does in ["ld", "st"] if constants.get("GRADIENT", kernel is nelbo_triton._backward_kernel) else ["ld"]:
            assert re.search(rf"{does}\.global\S*\.v4\.b32 ", compiled.asm["ptx"]), f"{does}: not by 16 bytes"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, spilled = (int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("REG", "STACK"))
    rows = "" if "V" in aligned else ", rows that end anywhere" if aligned else ", rows that begin anywhere"
    print(f"{kernel.fn.__name__} {constants}{rows}: {registers} registers a thread, {spilled} bytes of stack")
    assert spilled == 0 and "LOCAL:0" in told, told


WIDE = 65536  # logits of a row that no registers hold


def forward_shape(width: int) -> dict:
    block = nelbo_triton.forward_block(width)
    whole = block >= width
    return {"ONE_BLOCK": whole, "BY_BLOCKS": False, "BLOCK": block, "warps": nelbo_triton.warps(block, width)}


def draw_shape(width: int, is_aligned: bool = True) -> dict:
    block = row_draw_triton.row_block(width, is_aligned)
    return {"ONE_BLOCK": block >= width, "BLOCK": block, "warps": row_draw_triton.warps(block)}


for process in ({"K_IS_ZERO": False, "EXCLUDED": None}, {"K_IS_ZERO": False}, {"K_IS_ZERO": True}):
    for shape in (
        {**forward_shape(4), "ONLINE": False},
        {**forward_shape(nelbo_triton.ROW_IN_REGISTERS), "ONLINE": False},
        {**forward_shape(WIDE), "ONLINE": False},
        {**forward_shape(WIDE), "ONLINE": True},
    ):
        for unused in ({"GRADIENT": False, "grad_loss_ptr": None}, {"GRADIENT": True, "scalars_ptr": None}):
            if shape["ONLINE"] and unused["GRADIENT"]:
                continue
            compile_kernel(nelbo_triton._forward_kernel, **process, **shape, **unused)
            anywhere = {**shape, "BY_BLOCKS": not shape["ONE_BLOCK"]}
            compile_kernel(nelbo_triton._forward_kernel, aligned=(), **process, **anywhere, **unused)
            if anywhere["BY_BLOCKS"]:
                compile_kernel(nelbo_triton._forward_kernel, aligned=("stride",), **process, **anywhere, **unused)
    backward = {**process, "BLOCK": nelbo_triton.BLOCK, "warps": nelbo_triton.warps(nelbo_triton.BLOCK, WIDE)}
    compile_kernel(nelbo_triton._backward_kernel, BY_BLOCKS=False, **backward)
    compile_kernel(nelbo_triton._backward_kernel, aligned=(), BY_BLOCKS=True, **backward)
for width in (1024, row_draw_triton.ROW_IN_REGISTERS, WIDE):
    for excluded in ({"EXCLUDED": None}, {}):
        compile_kernel(row_draw_triton._draw_kernel, GROUP=row_draw_triton.COLUMNS, **draw_shape(width), **excluded)
for width in (row_draw_triton.UNALIGNED_BLOCK, WIDE):
    shape = draw_shape(width, is_aligned=False)
    compile_kernel(row_draw_triton._draw_kernel, aligned=(), GROUP=row_draw_triton.COLUMNS, **shape)
