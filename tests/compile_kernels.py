"""Compile the Triton kernels for a Hopper GPU, on any machine: run by `test_nelbo_backends.py`."""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before triton

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from xdlm_image.objective import nelbo_triton  # noqa: E402
from xdlm_image.schedulers import row_draw_triton  # noqa: E402

TYPES = {
    "logits": "*bf16", "out": "*bf16", "z_ptr": "*i64", "x_ptr": "*i64", "rows_ptr": "*i64", "drawn_ptr": "*i64",
    "v_ptr": "*fp64", "p_z_ptr": "*fp64", "totals_ptr": "*fp64", "N_OVER_K": "fp32", "inverse_temperature": "fp32",
}  # fmt: skip


def compile_kernel(kernel, **constants) -> None:
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"], kernel


compile_kernel(nelbo_triton._forward_kernel, K_IS_ZERO=False, ONE_BLOCK=True, BLOCK=1024)
compile_kernel(nelbo_triton._forward_kernel, K_IS_ZERO=True, ONE_BLOCK=False, BLOCK=1024)
compile_kernel(nelbo_triton._backward_kernel, K_IS_ZERO=False, BLOCK=1024)
compile_kernel(row_draw_triton._draw_kernel, ONE_BLOCK=True, BLOCK=1024, GROUP=64)
compile_kernel(row_draw_triton._draw_kernel, ONE_BLOCK=False, BLOCK=1024, GROUP=64)
