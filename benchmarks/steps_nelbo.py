"""What do few steps cost in bits? The NELBO of N reverse steps, as a sampler takes them, by model, time grid and N.

    python benchmarks/steps_nelbo.py runs/training_seeds/codes

N steps of a grid are a model of their own, that draws all codes of a step without regard to each other. Its NELBO is
the sum over its steps of KL(q(z_s | z_t, x) || q(z_s | z_t, p)), at the network's own p (temperature 1); less the NELBO
of infinitely many steps (that of `xdlm-image nelbo`, here on the same images) it is what taking only N costs. Measured
on the first test images of a seed with one noise an image and time, the same for all models and grids; 95 % intervals
are over images. Beside the named grids stands the one of the lowest NELBO among multiples of 1/32, which dynamic
programming (arXiv 2106.03802) finds on validation images. The folder holds the codes of the shipped tokenizer, as
shipped/training_seed.sh leaves them. It takes about an hour on two cores.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from xdlm_image import XDLMPipeline
from xdlm_image.data.code_cache import CodeCache
from xdlm_image.devices import best_device
from xdlm_image.drawing.opening import open_pipeline, pipeline_hash
from xdlm_image.evaluation.nelbo_estimate import Interval, NelboEstimator
from xdlm_image.files import write_json
from xdlm_image.objective import XDLMLoss, discrete_kl
from xdlm_image.schedulers import XDLMScheduler
from xdlm_image.schedulers.scheduling_xdlm import TIME_GRIDS

ROOT = Path(__file__).resolve().parents[1]
FINE = 32  # of whose multiples the lowest grid is made
BATCH = 250  # images that the network sees at once
Step = tuple[float, float]  # t, s


def steps_of(times: Iterable[float]) -> list[Step]:
    """The steps of falling times, the last of which ends at 0."""
    times = [*times]
    return [*zip(times, [*times[1:], 0.0])]


def named_grid(grid: str, count: int) -> list[float]:
    """The times at which `count` steps of a named grid begin."""
    scheduler = XDLMScheduler(time_grid=grid)
    scheduler.set_timesteps(count)
    times: list[float] = scheduler.timesteps.tolist()
    return times


@torch.no_grad()
def bits_of_steps(
    pipe: XDLMPipeline, codes: torch.Tensor, labels: torch.Tensor, steps: Iterable[Step], seed: int, name: str
) -> dict[Step, torch.Tensor]:
    """Bits a token of each step, (images,): the KL of one draw of z_t, whose random numbers are those of every t."""
    process, found = pipe.scheduler.process, {}
    by_start: dict[float, list[float]] = {}
    for t, s in sorted({*steps}):
        by_start.setdefault(t, []).append(s)
    bar = tqdm(total=sum(map(len, by_start.values())), desc=name, unit="step", leave=False)
    for t, ends in by_start.items():
        alpha, beta = process.alpha_beta(torch.full((len(codes),), t, dtype=torch.float64))
        z = process.noise(codes, alpha, beta, torch.Generator().manual_seed(seed))
        parts: dict[float, list[torch.Tensor]] = {s: [] for s in ends}
        for at in torch.arange(len(codes)).split(BATCH):
            own, x, rows = z[at].to(pipe.device), codes[at].to(pipe.device), labels[at].to(pipe.device)
            logits = pipe.transformer(own, timestep=beta[at].float().to(pipe.device), class_labels=rows).sample.double()
            for s in ends:
                to = process.alpha_beta(torch.full((len(at),), s, dtype=torch.float64))
                kl = discrete_kl(logits.cpu(), own.cpu(), x.cpu(), process, alpha[at], beta[at], *to)
                parts[s].append(kl.mean(1) / math.log(2.0))
        for s, values in parts.items():
            found[t, s] = torch.cat(values)
            bar.update()
    bar.close()
    return found


def lowest_grid(costs: dict[Step, float], count: int) -> list[float]:
    """The times of `count` steps whose costs have the lowest sum, among steps between multiples of 1 / FINE."""
    times = [i / FINE for i in range(FINE + 1)]
    best = {1.0: (0.0, [])}  # time reached -> lowest sum, and the times at which its steps began
    for _ in range(count):
        reached: dict[float, tuple[float, list[float]]] = {}
        for s in times:
            ways = [(total + costs[t, s], [*begun, t]) for t, (total, begun) in best.items() if t > s]
            if ways:
                reached[s] = min(ways)
        best = reached
    return best[0.0][1]


def rows_of(arguments: argparse.Namespace, name: str, caches: dict[str, CodeCache]) -> tuple[list[dict], dict]:
    """What a model's steps cost on every grid, and of each image the NELBO and the cost, by grid and step count."""
    pipe = open_pipeline(arguments.pipelines / name, best_device(arguments.device))
    drawn = {
        split: cache.batch(np.random.default_rng(arguments.seed).permutation(len(cache))[:count])
        for (split, cache), count in zip(caches.items(), (arguments.validation_images, arguments.num_images))
    }
    fine = [(i / FINE, j / FINE) for i in range(1, FINE + 1) for j in range(i)]
    trials = bits_of_steps(pipe, *drawn["validation"], fine, arguments.seed, f"{name}, validation")
    costs = {step: float(values.mean()) for step, values in trials.items()}
    grids = {(grid, n): named_grid(grid, n) for grid in TIME_GRIDS for n in arguments.num_steps}
    grids |= {("lowest", n): lowest_grid(costs, n) for n in arguments.num_steps if n < FINE}
    bits = bits_of_steps(
        pipe, *drawn["test"], (step for times in grids.values() for step in steps_of(times)), arguments.seed, name
    )
    model = XDLMLoss(pipe.transformer, pipe.scheduler.process)
    limit = NelboEstimator(model, *drawn["test"], arguments.seed, BATCH, pipe.device, name).estimate().images
    rows, images = [], {"limit": limit}
    for (grid, n), times in grids.items():
        total = torch.stack([bits[step] for step in steps_of(times)]).sum(0)  # (images,)
        images[grid, n] = total - limit
        row = {
            "model": name,
            "grid": grid,
            "num_steps": n,
            "times": times,
            "bits_per_token": asdict(Interval.of(total)),
        }
        rows.append(row | {"cost": asdict(Interval.of(total - limit))})
    return rows, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path, help="folder of the caches `validation` and `test`")
    parser.add_argument("--pipelines", type=Path, default=ROOT / "shipped" / "fashion_mnist" / "pipelines")
    names = ["mdlm", "xdlm-0.1", "xdlm-0.5", "udlm"]
    parser.add_argument("--names", nargs="+", default=names, help="models, the baseline first")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--num_images", type=int, default=2000, help="of the test split")
    parser.add_argument("--validation_images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="of the network; the sums are float64 on the CPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    caches = {split: CodeCache.open(arguments.codes / split) for split in ("validation", "test")}
    for name in arguments.names:
        pipe = open_pipeline(arguments.pipelines / name, torch.device("cpu"), f"--names {name}")
        for cache in caches.values():
            cache.check(tokenizer=pipe.vqvae)
    content: dict = {
        "protocol": {
            "codes": {split: cache.manifest.checksums for split, cache in caches.items()},
            "num_images": arguments.num_images,
            "validation_images": arguments.validation_images,
            "seed": arguments.seed,
            "lowest": f"of multiples of 1/{FINE}, on validation images",
        },
        "models": {},
        "limit": {},
        "results": [],
        "differences": [],
    }
    first: dict = {}
    for name in arguments.names:
        rows, images = rows_of(arguments, name, caches)
        first = first or images
        content["models"][name] = pipeline_hash(open_pipeline(arguments.pipelines / name, torch.device("cpu")))
        content["limit"][name] = asdict(Interval.of(images["limit"]))
        content["results"] += rows
        for row in rows:
            at, linear = (row["grid"], row["num_steps"]), ("linear", row["num_steps"])
            names = {"model": name, "grid": at[0], "num_steps": at[1]}
            for minus, other in ((f"{arguments.names[0]} {at[0]}", first[at]), (f"{name} linear", images[linear])):
                if other is not images[at]:
                    cost = asdict(Interval.of(images[at] - other))
                    content["differences"].append(names | {"minus": minus, "cost": cost})
        write_json(arguments.output, content)
        show(content, name)
    print(arguments.output)


def show(content: dict, name: str) -> None:
    limit = content["limit"][name]
    print(f"{name}: NELBO {limit['mean']:.3f} [{limit['low']:.3f}, {limit['high']:.3f}] bits a token")
    for row in content["results"]:
        if row["model"] == name:
            cost, bits = row["cost"], row["bits_per_token"]["mean"]
            times = " ".join(f"{t:.3f}" for t in row["times"]) if row["grid"] == "lowest" else ""
            place = f"{name:9} {row['grid']:7} {row['num_steps']:3} steps"
            print(f"{place}  {bits:.3f}, costs {cost['mean']:.3f} [{cost['low']:.3f}, {cost['high']:.3f}]  {times}")
    for row in content["differences"]:
        if row["model"] == name:
            cost = row["cost"]
            place = f"{name:9} {row['grid']:7} {row['num_steps']:3} steps, cost minus that of {row['minus']}"
            print(f"{place}: {cost['mean']:+.3f} [{cost['low']:+.3f}, {cost['high']:+.3f}]", flush=True)


if __name__ == "__main__":
    main()
