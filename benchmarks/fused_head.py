"""Output projection and objective as one, forward and backward, against the layers apart and against others' kernels.

    python benchmarks/fused_head.py [--device cuda] [--shapes 512x128 16384x768x16384] [--repeats 7] [--compile]

A shape is V x D, or V x D x tokens. Liger's and Apple's fused linear cross-entropy are measured where they are
installed and there is a GPU; they compute another, simpler loss (on a CPU, Apple's is the compiled plain layers).
Weights are float32 and products run under autocast unless --dtype float32. Logits are those of random weights; Apple's
saves work where most probabilities are small, as a trained language model's are.
"""

import inspect
import math
from functools import partial

import torch
from measuring import images_of, machine, measure, objective, parser_of, prepare, show

from xdlm_image.files import write_json
from xdlm_image.objective import xdlm_head_nelbo, xdlm_nelbo
from xdlm_image.schedulers import XDLMProcess


def others_on_gpu(dtype: torch.dtype) -> dict:
    """name -> loss of (features, weight, bias, targets), of the libraries that are here."""
    found = {}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        def fused(loss):
            return lambda h, w, b, x: loss(w.to(dtype), h.flatten(0, 1).to(dtype), x.flatten(), b.to(dtype))

        found["Liger"] = fused(LigerFusedLinearCrossEntropyLoss())
        if "accum_dtype" in inspect.signature(LigerFusedLinearCrossEntropyLoss).parameters:  # as ours adds up
            found["Liger, sums in float32"] = fused(LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32))
    except ImportError:
        print("Liger is not installed: not measured")
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        if "bias" in inspect.signature(cut).parameters:
            found["cut-cross-entropy"] = lambda h, w, b, x: cut(h.to(dtype), w.to(dtype), x, bias=b.to(dtype))
        else:  # as released on PyPI
            found["cut-cross-entropy, no bias"] = lambda h, w, b, x: cut(h.to(dtype), w.to(dtype), x)
    except ImportError:
        print("cut-cross-entropy is not installed: not measured")
    return found


def that_run(candidates: dict, expected: float) -> dict:
    """Those of others' candidates that run here and give the loss they should; the rest with a line that says why."""
    sound = {}
    for name, candidate in candidates.items():
        try:
            value = candidate()
        except Exception as error:  # another library's kernel in versions it may not know: the others go on
            print(f"{name} fails here, not measured: {error!r}"[:500])
            continue
        if math.isclose(value, expected, rel_tol=1e-2):
            sound[name] = candidate
        else:
            print(f"{name}: a loss of {value}, cross_entropy's is {expected}: not measured")
    return sound


def candidates_at(width: int, features: int, rows: int, arguments) -> dict:
    process = XDLMProcess(0.1, width)
    (batch, length), device = images_of(rows), torch.device(arguments.device)
    hidden = torch.randn(batch, length, features, device=device, requires_grad=True)
    weight = (torch.randn(width, features, device=device) / features**0.5).requires_grad_()
    bias = torch.zeros(width, device=device, requires_grad=True)
    x = torch.randint(width, (batch, length))
    t = torch.linspace(0.02, 0.98, batch)
    z = process.noise(x, *process.alpha_beta(t)).to(device)
    x = x.to(device)
    rest = (z, x, process, *(value.to(device) for value in process.alpha_beta(t)))

    def run(loss):
        def once():
            with torch.autocast(device.type, arguments.dtype, enabled=arguments.dtype != torch.float32):
                value = loss(hidden, weight, bias)
            value.backward()
            hidden.grad = weight.grad = bias.grad = None  # a call leaves nothing behind
            return value.detach()

        return once

    def cross_entropy(h, w, b):
        logits = torch.nn.functional.linear(h, w, b)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten())

    def ours(h, w, b):
        return xdlm_head_nelbo(h, w, b, *rest).mean

    candidates = {
        "linear + cross_entropy": run(cross_entropy),
        "linear + xdlm_nelbo": run(lambda h, w, b: xdlm_nelbo(torch.nn.functional.linear(h, w, b), *rest).mean()),
        "xdlm_head_nelbo": run(ours),
    }
    if arguments.compile:
        candidates["linear + cross_entropy, compiled"] = run(torch.compile(cross_entropy, dynamic=False))
        candidates["xdlm_head_nelbo, in a compiled function"] = run(torch.compile(ours, dynamic=False, fullgraph=True))
    if device.type == "cuda":
        others = others_on_gpu(arguments.dtype)
        others = {name: run(partial(lambda loss, h, w, b: loss(h, w, b, x), loss)) for name, loss in others.items()}
        candidates |= that_run(others, candidates["linear + cross_entropy"]().item())
    return candidates


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=["512x128", "1024x256", "16384x768", "16387x768"], help="V x D (x tokens) each"
    )
    parser.add_argument("--compile", action="store_true", help="measure compiled code, too")
    arguments = parser.parse_args()
    prepare(arguments)
    result = machine(arguments) | objective(arguments) | {"memory_unit": "bytes of the logits", "shapes": {}}
    for shape in arguments.shapes:
        width, features, *tokens = (int(side) for side in shape.split("x"))
        rows = math.prod(images_of(tokens[0] if tokens else arguments.rows or arguments.elements // width))
        unit = rows * width * arguments.dtype.itemsize
        measured = measure(candidates_at(width, features, rows, arguments), arguments.device, arguments.repeats, unit)
        result["shapes"][shape] = {"rows": rows, "candidates": measured}
        show(f"V x D = {shape}, {rows} rows", measured, "linear + cross_entropy", "logits")
    write_json(arguments.output, result)
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
