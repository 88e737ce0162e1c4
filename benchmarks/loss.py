"""The objective given logits, forward and backward, against cross_entropy on the same logits: time and peak memory.

    python benchmarks/loss.py [--device cuda] [--widths 1024 16384] [--rows N] [--repeats 7] [--compile]

Beside `xdlm_nelbo` (compiled C++ on a CPU, Triton on a GPU; and in plain torch) stands the same objective as the paper
writes it down, dense and left to autograd; with --compile cross_entropy and that too as torch.compile makes them, and
`xdlm_nelbo` in a function that it compiles. All take turns in one process; the JSON lands beside this file. On Linux,
THP_MEM_ALLOC_ENABLE=1 in the environment gives every candidate's large tensors pages of 2 MiB.
"""

import math

import torch
from measuring import images_of, machine, measure, objective, parser_of, prepare, show

from xdlm_image.files import write_json
from xdlm_image.objective import backends, nelbo_eager, xdlm_nelbo
from xdlm_image.schedulers import XDLMProcess


def dense_nelbo(logits, z, x, process, alpha, beta):
    """The NELBO's density as a divergence of jump rates (arXiv 2602.01362), definition A, every id of every token:

    l = r(z)/alpha sum_e [f_p(e)/f_p(z) - f_x(e)/f_x(z) + f_x(e)/f_x(z) log((f_x(e)/f_x(z)) / (f_p(e)/f_p(z)))]
    with f_p = alpha p + beta r and f_x = alpha onehot(x) + beta r.
    """
    alpha, beta = alpha[:, None, None], beta[:, None, None]
    r = process.prior_probs(torch.float32).to(logits.device)
    p = torch.nn.functional.pad(torch.softmax(logits.float(), -1), (0, 1))
    f_p = alpha * p + beta * r
    f_x = alpha * torch.nn.functional.one_hot(x, process.num_ids) + beta * r
    ratio_p, ratio_x = (f / f.gather(-1, z[..., None]) for f in (f_p, f_x))
    terms = ratio_p - ratio_x + torch.xlogy(ratio_x, ratio_x) - torch.xlogy(ratio_x, ratio_p)
    return (r[z, None] / alpha * terms).sum(-1)


class Produced(torch.autograd.Function):
    """Logits that a layer has produced, for nothing: what may be written over."""

    @staticmethod
    def forward(ctx, anchor, buffer):
        return buffer.new_empty(0).set_(buffer)  # no view, which nobody may overwrite

    @staticmethod
    def backward(ctx, _):
        return torch.zeros(()), None


def candidates_at(width: int, rows: int, arguments) -> dict:
    process = XDLMProcess(arguments.k, width)
    batch, length = images_of(rows)
    logits = torch.randn(batch, length, width, device=arguments.device).to(arguments.dtype).requires_grad_()
    x = torch.randint(width, (batch, length))
    t = torch.linspace(0.02, 0.98, batch)  # later times, 1 in 160 of training at k = 0.1, take an exact logarithm more
    inputs = [value.to(arguments.device) for value in (process.noise(x, *process.alpha_beta(t)), x)]
    inputs += [process, *(value.to(arguments.device) for value in process.alpha_beta(t))]

    def run(loss):
        def once():
            loss(logits).backward()
            logits.grad = None  # a call leaves nothing behind

        return once

    def cross_entropy(a):
        return torch.nn.functional.cross_entropy(a.view(-1, width), inputs[1].view(-1))

    def dense(a):
        return dense_nelbo(a, *inputs).mean()

    def ours(a):
        return xdlm_nelbo(a, *inputs).mean()

    candidates = {
        "cross_entropy": run(cross_entropy),
        "as the paper writes it": run(dense),
        "xdlm_nelbo": run(ours),
        "... its forward pass": lambda: xdlm_nelbo(logits.detach(), *inputs),
    }
    if arguments.compile:
        candidates["cross_entropy, compiled"] = run(torch.compile(cross_entropy, dynamic=False))
        candidates["as the paper writes it, compiled"] = run(torch.compile(dense, dynamic=False))
        candidates["xdlm_nelbo, in a compiled function"] = run(torch.compile(ours, dynamic=False, fullgraph=True))
    anchor, buffer = torch.zeros((), requires_grad=True), logits.detach().clone()
    candidates["... in place"] = lambda: (
        xdlm_nelbo(Produced.apply(anchor, buffer), *inputs, in_place=True).mean().backward()
    )
    if backends.passes_for(logits.device, logits.dtype, "auto") is not nelbo_eager:
        candidates["xdlm_nelbo, plain torch"] = run(lambda a: xdlm_nelbo(a, *inputs, backend="eager").mean())
    candidates["the logits read (largest of each row)"] = lambda: logits.detach().amax(-1)
    candidates["the logits copied"] = lambda: logits.detach().clone()
    losses, paper = xdlm_nelbo(logits, *inputs).detach(), dense_nelbo(logits, *inputs).detach()
    assert torch.allclose(losses, paper, rtol=1e-2, atol=2e-2), (losses - paper).abs().max()  # the latter cancels
    return candidates


def main() -> None:
    parser = parser_of(__file__, __doc__)
    widths = [1024, 16384, 16387, 65536, 262144]  # 16,387: the paper's code's
    parser.add_argument("--widths", type=int, nargs="+", default=widths, help="vocabularies")
    parser.add_argument("--k", type=float, default=0.1)
    parser.add_argument("--compile", action="store_true", help="measure compiled code, too")
    arguments = parser.parse_args()
    prepare(arguments)
    result = (
        machine(arguments)
        | objective(arguments)
        | {"k": arguments.k, "memory_unit": "bytes of the logits", "widths": {}}
    )
    for width in arguments.widths:
        rows = math.prod(images_of(arguments.rows or arguments.elements // width))
        unit = rows * width * arguments.dtype.itemsize
        measured = measure(candidates_at(width, rows, arguments), arguments.device, arguments.repeats, unit)
        result["widths"][width] = {"rows": rows, "candidates": measured}
        show(f"V = {width}, {rows} rows", measured, "cross_entropy", "logits")
    write_json(arguments.output, result)
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
