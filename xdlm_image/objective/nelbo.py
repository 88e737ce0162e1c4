"""The XDLM objective for training: loss and gradient from a few scalars per token.

Owns `xdlm_nelbo` and its place in autograd. It reads the process and never an inference scheduler; nothing as wide as
the vocabulary outlives a block of rows but the logits and their gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from xdlm_image.objective import operators
from xdlm_image.objective.backends import backend_for, check_name, passes_for
from xdlm_image.objective.row_scalars import Rows, RowScalars
from xdlm_image.schedulers import XDLMProcess
from xdlm_image.schedulers.process_xdlm import check_shares

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def xdlm_nelbo(
    logits: torch.Tensor,
    z: torch.Tensor,
    x: torch.Tensor,
    process: XDLMProcess,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    *,
    in_place: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """The NELBO's density l(x, z, alpha) per token; NELBO = E_x integral of -alpha'(t) E_z[l] dt (nats a token).

    Args:
        logits: (B, L, V), V = `process.logits_width`; float64, float32, bfloat16 or float16 (the last two are read in
            float32). Definition B excludes the mask's column, whose gradient is 0.
        z: Noisy codes, int64 (B, L), drawn by `process.noise`.
        x: Clean codes, int64 (B, L), in 0..K-1.
        process: The noise process.
        alpha: Signal kept, in [0, 1]: (B,) or (B, 1) or (B, L). It and beta get no gradient.
        beta: 1 - alpha, computed from t and not from alpha; same shape.
        in_place: The backward pass writes the gradient over the logits, which saves their size in memory and destroys
            them: read them before. Autograd refuses a second backward pass, and any other use of the logits that comes
            later than this one in the backward pass. torch.compile plans such memory itself, so it does nothing there.
        backend: Who reads the logits: `"triton"` (float32 arithmetic on CUDA, or on the CPU under Triton's
            interpreter), `"cpp"` (the same on the CPU, not for float16; takes a C++ compiler), `"eager"` (plain torch,
            everywhere), or `"auto"`: Triton on CUDA and C++ on the CPU where they work, else eager. torch.compile takes
            each as one operator of its graph.

    Returns:
        (B, L), float32 (float64 for float64 logits). Rounding may make a loss negative, by 5e-6 times the larger of 1
        and the largest loss at most. Finite for alpha and beta in [0, 1] and finite logits, unless it passes float32's
        range. At beta = 0 a z other than x has no probability; its loss then stands for infinity.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, ids, alpha or beta are out of range (looked for on the CPU
            only), the backend is unknown, or `in_place` would overwrite a leaf of autograd, such as a parameter, or
            logits that overlap in memory.
        RuntimeError: If a transform of torch.func calls it, or its gradient is to be differentiated again.

        While torch.compile traces with fullgraph=True, these stand at the end of an error of its own.
    """
    in_place = in_place and not torch.compiler.is_compiling()  # which plans memory itself
    if in_place and logits.requires_grad:
        owner = logits if logits._base is None else logits._base
        if owner.is_leaf or logits.is_leaf:
            raise ValueError(
                "in_place=True: the logits are a leaf or a view of one, which the gradient would overwrite"
            )
    rows = rows_of("logits", logits, z, x, process, alpha, beta)
    if logits.shape[-1] != process.logits_width:
        raise ValueError(f"logits: width {logits.shape[-1]}, but the process has logits_width={process.logits_width}")
    wide = logits.resolve_neg().reshape(-1, logits.shape[-1])
    wide = wide if wide.stride(1) == 1 else wide.contiguous()
    if in_place and wide.stride(0) < wide.shape[1]:
        raise ValueError("in_place=True: rows of the logits share memory; give it logits.contiguous()")
    check_name(backend)
    if operators.are_needed(logits):
        passes: Any = operators.Operators(backend)
    else:
        passes = passes_for(logits.device, logits.dtype, backend_for(backend, logits))
    return _XDLMNelbo.apply(wide, *rows, process, passes, in_place).view(x.shape)


def rows_of(
    name: str,
    wide: torch.Tensor,
    z: torch.Tensor,
    x: torch.Tensor,
    process: XDLMProcess,
    alpha: torch.Tensor,
    beta: torch.Tensor,
) -> Rows:
    """z, x, alpha, beta, c of the tokens of `wide` (B, L, V), which errors call `name`: checked and flattened."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("the objective takes no torch.func transforms; take objective.reference_nelbo for them")
    if hasattr(wide, "device_mesh"):
        raise ValueError(f"{name}: a DTensor, whose parts the objective cannot read; gather it with full_tensor()")
    if wide.ndim != 3 or wide.shape[:2] != x.shape or z.shape != x.shape:
        shapes = f"{name} {tuple(wide.shape)}, z {tuple(z.shape)}, x {tuple(x.shape)}"
        raise ValueError(f"{shapes}: need (B, L, V), (B, L), (B, L)")
    if wide.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {wide.dtype}, must be one of {', '.join(map(str, DTYPES))}")
    for ids_name, ids, end in (("x", x, process.num_codes), ("z", z, process.num_ids)):
        process.check_ids(ids_name, ids, end)
        if ids.device != wide.device:
            raise ValueError(f"{ids_name}: on {ids.device}, must be on {wide.device}, where the {name} are")
    dtype = torch.float64 if wide.dtype == torch.float64 else torch.float32
    alpha, beta = (_per_token(*given, x, dtype) for given in (("alpha", alpha), ("beta", beta)))
    check_shares(alpha, beta)
    rows = (z, x, alpha, beta, process.signal_ratio(alpha, beta))
    return Rows(*(value.contiguous().view(-1) for value in rows))


def _per_token(name: str, value: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """alpha or beta for each token: (B, L)."""
    shapes = f"need (B,), (B, 1) or (B, L) for B, L = {tuple(x.shape)}"
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}={value!r}: no tensor; {shapes}")
    if value.device != x.device:
        raise ValueError(f"{name}: on {value.device}, must be on {x.device}, where the codes are")
    try:
        return value.detach().to(dtype).reshape(value.shape + (1,) * (x.ndim - value.ndim)).expand(x.shape)
    except RuntimeError:
        raise ValueError(f"{name} {tuple(value.shape)}: {shapes}") from None


class _XDLMNelbo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, z, x, alpha, beta, c, process, passes, in_place):  # (R, V), then (R,) each
        rows = Rows(z, x, alpha, beta, c)
        loss, scalars = passes.forward(logits, rows, process)
        ctx.save_for_backward(logits, *rows, *scalars)
        ctx.settings = (process, passes, in_place)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):  # (R,)
        if not torch.compiler.is_compiling():
            operators.refuse_second_derivative()
        process, passes, in_place = ctx.settings
        logits, z, x, alpha, beta, c, *scalars = ctx.saved_tensors
        rows, scalars = Rows(z, x, alpha, beta, c), RowScalars(*scalars)
        logits = logits.detach()
        out = logits if in_place else torch.empty_like(logits)
        passes.backward(logits, rows, scalars, grad_loss, process, out)
        if in_place:
            torch.autograd.graph.increment_version(out)  # autograd now refuses whoever saved the logits
        return out, *(None,) * 8
