"""A training step of the size of network that `shipped/train.sh` trains on the device, forward and backward: plain,
compiled, and in bfloat16.

    python benchmarks/compiled_training.py [--device cuda] [--batch N] [--repeats 7] [--threads 1]

The ways are those of `xdlm-image train`: `--compile true`, `--mixed_precision bf16`, `--attention_backend`. All take
turns in one process; the JSON lands beside this file.
"""

import torch
from measuring import machine, measure, parser_of, prepare, show

from xdlm_image.files import write_json
from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.objective import XDLMLoss
from xdlm_image.schedulers import XDLMProcess

SMALL = {"sample_size": 7, "num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32}
LARGE = {"sample_size": 14, "num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}
WAYS = {  # dtype, compiled, attention
    "float32": (torch.float32, False, None),
    "float32, compiled": (torch.float32, True, None),
    "bfloat16": (torch.bfloat16, False, None),
    "bfloat16, compiled": (torch.bfloat16, True, None),
    "bfloat16, compiled, math attention": (torch.bfloat16, True, "_native_math"),
}


def step_of(dtype: torch.dtype, compiled: bool, attention: str | None, size: dict[str, int], arguments):
    device = torch.device(arguments.device)
    process = XDLMProcess(k=0.1, num_codes=512)
    torch.manual_seed(0)
    network = XDLMTransformer2DModel(num_embeds=513, out_channels=512, num_classes=10, **size).to(device)
    if attention is not None:
        network.set_attention_backend(attention)
    if compiled:
        network.compile(fullgraph=True)
    loss = XDLMLoss(network, process)
    x = torch.randint(512, (arguments.batch, size["sample_size"] ** 2))
    t = torch.rand(arguments.batch).clamp(min=1e-3)
    z = process.noise(x, *process.alpha_beta(t))
    inputs = [value.to(device) for value in (z, x, t, torch.randint(10, (arguments.batch,)))]

    def once():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss(*inputs).mean
        value.backward()
        network.zero_grad(set_to_none=True)

    return once


def main() -> None:
    parser = parser_of(__file__, __doc__, of_logits=False)
    parser.add_argument("--batch", type=int, help="images; default: 128 of 49 codes, on a GPU 256 of 196")
    arguments = parser.parse_args()
    prepare(arguments)
    on_gpu = torch.device(arguments.device).type == "cuda"
    size, batch = (LARGE, 256) if on_gpu else (SMALL, 128)
    arguments.batch = arguments.batch or batch
    ways = {name: step_of(*way, size, arguments) for name, way in WAYS.items()}
    measured = measure(ways, arguments.device, arguments.repeats, 2**20)
    show(f"{arguments.batch} images", measured, "float32", "MiB")
    result = machine(arguments) | {"batch": arguments.batch, "network": size, "memory_unit": "MiB", "ways": measured}
    write_json(arguments.output, result)
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
