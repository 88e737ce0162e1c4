"""Training step of the Fashion-MNIST network, plain against torch.compile: seconds of forward and backward.

    python benchmarks/compiled_training.py [--threads 1] [--batch 128] [--repeats 9] [--output FILE.json]

Both run in turns in one process on the same tensors; medians, spread and their ratio go into the JSON beside this file.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch

from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.objective import XDLMLoss
from xdlm_image.schedulers import XDLMProcess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process = XDLMProcess(k=0.1, num_codes=512)
    size = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32}
    network = XDLMTransformer2DModel(sample_size=7, num_embeds=513, out_channels=512, num_classes=10, **size)
    loss = XDLMLoss(network.to(device), process)
    x = torch.randint(512, (arguments.batch, 49))
    t = torch.rand(arguments.batch).clamp(min=1e-3)
    z = process.noise(x, *process.alpha_beta(t))
    inputs = [value.to(device) for value in (z, x, t, torch.randint(10, (arguments.batch,)))]

    def seconds(stance: str) -> float:
        network.zero_grad(set_to_none=True)
        with torch.compiler.set_stance(stance):
            start = time.perf_counter()
            loss(*inputs).mean.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

    network.compile(fullgraph=True)
    stances = {"plain": "force_eager", "compiled": "default"}
    first = {name: seconds(stance) for name, stance in stances.items()}
    times = {name: [] for name in stances}
    for _ in range(arguments.repeats):
        for name, stance in stances.items():
            times[name].append(seconds(stance))
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": arguments.threads,
        "batch": arguments.batch,
        "parameters": sum(p.numel() for p in network.parameters()),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "diffusers")}},
        "first_step_seconds": first,
        "median_seconds": medians,
        "spread_seconds": {name: [min(values), max(values)] for name, values in times.items()},
        "compiled_over_plain": medians["compiled"] / medians["plain"],
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for name in stances:
        low, high = result["spread_seconds"][name]
        print(f"{name:9} {medians[name]:.3f} s ({low:.3f} to {high:.3f}), first step {first[name]:.1f} s")
    print(f"compiled / plain = {result['compiled_over_plain']:.2f}; {arguments.output}")


if __name__ == "__main__":
    main()
