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


for process in ({"K_IS_ZERO": False, "EXCLUDED": None}, {"K_IS_ZERO": False}, {"K_IS_ZERO": True}):
    for shape in (
        {"ONE_BLOCK": True, "ONLINE": False, "BY_BLOCKS": False, "BLOCK": 4, "warps": 1},
        {"ONE_BLOCK": True, "ONLINE": False, "BY_BLOCKS": False, "BLOCK": 4096, "warps": 8},
        {"ONE_BLOCK": False, "ONLINE": False, "BY_BLOCKS": False, "BLOCK": 1024, "warps": 4},
        {"ONE_BLOCK": False, "ONLINE": True, "BY_BLOCKS": False, "BLOCK": 1024, "warps": 4},
    ):
        for unused in ({"GRADIENT": False, "grad_loss_ptr": None}, {"GRADIENT": True, "scalars_ptr": None}):
            if shape["ONLINE"] and unused["GRADIENT"]:
                continue
            compile_kernel(nelbo_triton._forward_kernel, **process, **shape, **unused)
            anywhere = {**shape, "BY_BLOCKS": not shape["ONE_BLOCK"]}
            compile_kernel(nelbo_triton._forward_kernel, aligned=(), **process, **anywhere, **unused)
            if anywhere["BY_BLOCKS"]:
                compile_kernel(nelbo_triton._forward_kernel, aligned=("stride",), **process, **anywhere, **unused)
    compile_kernel(nelbo_triton._backward_kernel, **process, BY_BLOCKS=False, BLOCK=1024, warps=4)
    compile_kernel(nelbo_triton._backward_kernel, aligned=(), **process, BY_BLOCKS=True, BLOCK=1024, warps=4)
for shape in (
    {"ONE_BLOCK": True, "BLOCK": 1024, "warps": 2},
    {"ONE_BLOCK": True, "BLOCK": 16384, "warps": 32},
    {"ONE_BLOCK": False, "BLOCK": 4096, "warps": 8},
):
    for excluded in ({"EXCLUDED": None}, {}):
        compile_kernel(row_draw_triton._draw_kernel, GROUP=64, **shape, **excluded)
for shape in ({"ONE_BLOCK": True, "BLOCK": 2048, "warps": 4}, {"ONE_BLOCK": False, "BLOCK": 2048, "warps": 4}):
    compile_kernel(row_draw_triton._draw_kernel, aligned=(), GROUP=64, **shape)
