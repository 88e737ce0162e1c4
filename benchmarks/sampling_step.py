"""A reverse step given logits, against softmax + multinomial on the same logits and against the network: time, memory.

    python benchmarks/sampling_step.py [--device cuda] [--widths 512 16384] [--rows N] [--repeats 7] [--threads 1]

The step is that in the middle of an 8-step grid at k = 0.1, on codes noised to its time, with a generator for every
image (on a GPU with one there, as multinomial has: a pipeline brings its images' numbers there ahead). "bare network"
is the official size of the transformer at that vocabulary (--layers 12 --dim 768), or smaller. With --run, and on a
GPU, also all 8 steps from noise to codes, against the network called 8 times. All take turns in one process; the JSON
lands beside this file.
"""

import math

import torch
from measuring import images_of, machine, measure, parser_of, prepare, show

from xdlm_image import XDLMScheduler
from xdlm_image.files import write_json
from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.schedulers import row_draw


def candidates_at(width: int, rows: int, arguments) -> dict:
    device = arguments.device
    batch, length = images_of(rows)
    scheduler = XDLMScheduler(k=arguments.k, num_codes=width)
    scheduler.set_timesteps(8)
    t = scheduler.timesteps[4]
    logits = (3 * torch.randn(batch, length, width, device=device)).to(arguments.dtype)
    x = torch.randint(width, (batch, length), device=device)
    z = scheduler.add_noise(x, t.expand(batch))
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    side = math.isqrt(length)
    network = XDLMTransformer2DModel(
        sample_size=[side, length // side],
        num_embeds=width + 1,
        out_channels=width,
        num_classes=10,
        num_layers=arguments.layers,
        num_attention_heads=arguments.dim // 64,
        attention_head_dim=64,
    )
    network = network.to(device, arguments.dtype).eval()
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    times = {t: torch.tensor(t, dtype=torch.float32, device=device) for t in scheduler.timesteps.tolist()}

    @torch.no_grad()
    def bare():
        return network(z, timestep=times[t.item()], class_labels=labels).sample

    on_gpu = torch.device(device).type == "cuda"
    source = torch.Generator(device).manual_seed(0) if on_gpu else generators

    def step():
        return scheduler.step(logits, t, z, source).prev_sample

    def plain_step():
        kernel = row_draw.FAST.pop(z.device.type, None)
        try:
            return step()
        finally:
            if kernel is not None:
                row_draw.FAST[z.device.type] = kernel

    def bare_run():
        for _ in scheduler.timesteps:
            bare()

    @torch.no_grad()
    def run():
        codes = scheduler.prior((batch, length), generators, device)
        numbers = scheduler.draw_ahead(generators, (batch, length), device)
        for t in scheduler.timesteps:
            predicted = network(codes, timestep=times[t.item()], class_labels=labels).sample
            codes = scheduler.step(predicted, t, codes, numbers).prev_sample
        return codes

    step()  # the first looks whether the kernel runs
    candidates = {
        "softmax + multinomial": lambda: torch.multinomial(logits.view(-1, width).float().softmax(-1), 1),
        "reverse step, plain torch": plain_step,
        "bare network": bare,
    }
    if torch.device(device).type in row_draw.FAST:
        candidates["reverse step, Triton"] = step
    if arguments.run or on_gpu:
        candidates["bare network, 8 times"] = bare_run
        candidates["8 steps"] = run
    return candidates


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 16384], help="vocabularies")
    parser.add_argument("--run", action="store_true", help="measure all 8 steps on a CPU, too")
    parser.add_argument("--k", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=768, help="width of the network, a multiple of 64")
    arguments = parser.parse_args()
    prepare(arguments)
    network = {"layers": arguments.layers, "dim": arguments.dim}
    result = machine(arguments) | {"k": arguments.k, "network": network, "memory_unit": "bytes of the logits"}
    result["widths"] = {}
    for width in arguments.widths:
        rows = math.prod(images_of(arguments.rows or min(arguments.elements // width, 1 << 14)))
        unit = rows * width * arguments.dtype.itemsize
        measured = measure(candidates_at(width, rows, arguments), arguments.device, arguments.repeats, unit)
        result["widths"][width] = {"rows": rows, "candidates": measured}
        show(f"V = {width}, {rows} rows", measured, "softmax + multinomial", "logits")
    write_json(arguments.output, result)
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
