"""Do the time grids of the lowest NELBO draw better images? Plain ancestral samples on them, judged.

    python benchmarks/lowest_grid.py

steps_nelbo.json says which times have the lowest NELBO for each model and step count. The images of those times, 5,000
of each of the seeds that samplers.py measures, drawn (but not compiled) and judged as its plain ones are, stand against
its results on the linear and on the tuned grid, paired by seed. Killed, the same command goes on with the set that it
was at. It takes about half an hour on two cores.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from few_steps import interval
from samplers import ROOT, SEEDS
from tqdm import tqdm

from xdlm_image import XDLMPipeline
from xdlm_image.devices import best_device
from xdlm_image.drawing.draw import decode
from xdlm_image.drawing.opening import open_pipeline, pipeline_hash
from xdlm_image.evaluation.measuring import short_hash
from xdlm_image.evaluation.sweep import evaluate
from xdlm_image.files import write_atomic, write_json
from xdlm_image.recipes import EvaluateRecipe
from xdlm_image.seeds import image_generators

HERE = Path(__file__).parent
OTHERS = ("plain", "grid")  # samplers of samplers.json at temperature 1: the linear grid, and the tuned one
NUM_IMAGES, BATCH = 5000, 250


def draw(pipe: XDLMPipeline, times: list[float], seed: int, place: Path) -> None:
    """The set of a seed as `.npz`: images, and their classes."""
    labels = [i % pipe.transformer.config.num_classes for i in range(NUM_IMAGES)]
    images = []
    for start in tqdm(range(0, NUM_IMAGES, BATCH), desc=place.stem, unit="batch", leave=False):
        indices = range(start, start + BATCH)
        own = {"generator": image_generators(seed, indices), "timesteps": times}
        codes = pipe(labels[start : start + BATCH], output_type="latent", **own).images
        images.append(decode(pipe, codes).permute(0, 2, 3, 1).numpy())
    write_atomic(place, lambda path: np.savez(path, np.concatenate(images), labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "shipped" / "fashion_mnist", help="as shipped/train.sh's")
    parser.add_argument("--grids", type=Path, default=HERE / "steps_nelbo.json")
    parser.add_argument("--samplers", type=Path, default=HERE / "samplers.json", help="what it is compared with")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--folder", type=Path, default=Path("runs/lowest_grid"), help="images and partial results")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    grids, samplers = json.loads(arguments.grids.read_text()), json.loads(arguments.samplers.read_text())
    wanted = [
        row
        for row in grids["results"]
        if row["grid"] == "lowest" and row["num_steps"] in arguments.num_steps and row["model"] in samplers["models"]
    ]
    sets: dict[tuple[str, int, int], str] = {}  # model, step count, seed -> name
    places = {}
    for row in wanted:
        pipe = open_pipeline(arguments.models / "pipelines" / row["model"], best_device())
        if not pipeline_hash(pipe) == grids["models"][row["model"]] == samplers["models"][row["model"]]:
            parser.error(f"--models {arguments.models}: {row['model']} is another than that of the two files")
        decides = short_hash([row["times"], grids["models"][row["model"]]])
        for seed in SEEDS:
            place = arguments.folder / f"{row['model']}-{row['num_steps']}-seed{seed}-{decides}.npz"
            if not place.is_file():
                draw(pipe, row["times"], seed, place)
            places[place.stem] = str(place)
            sets[row["model"], row["num_steps"], seed] = place.stem
    recipe = EvaluateRecipe(
        output_dir=str(arguments.folder / "evaluation"),
        images=places,
        reference=str(arguments.models / "reference"),
        extractor=str(arguments.models / "extractor"),
    )
    found = {entry["name"]: entry for entry in json.loads(evaluate(recipe).read_text())["image_sets"]}
    results, differences = [], []
    for row in wanted:
        model, steps = row["model"], row["num_steps"]
        own = [found[sets[model, steps, seed]] for seed in SEEDS]
        fid = {layer: [entry["fid"][layer] for entry in own] for layer in own[0]["fid"]}
        names = {"model": model, "num_steps": steps}
        results.append(names | {"times": row["times"], "seeds": SEEDS, "fid": fid})
        for other in samplers["results"]:
            if (other["model"], other["num_steps"]) == (model, steps) and other["sampler"] in OTHERS:
                for layer, values in fid.items():
                    of = [a - b for a, b in zip(values, other["fid"][layer], strict=True)]
                    entry = names | {"minus": other["sampler"], "grid": other["value"], "layer": layer}
                    differences.append(entry | {"mean": statistics.mean(of), "interval": interval(of)})
    models = {row["model"]: grids["models"][row["model"]] for row in wanted}
    write_json(arguments.output, {"models": models, "results": results, "differences": differences})
    for row in results:
        fids = "  ".join(f"{k} {statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}" for k, v in row["fid"].items())
        print(f"{row['model']:9} {row['num_steps']} steps  {fids}")
    for row in differences:
        low, high = row["interval"]
        place = f"{row['model']:9} {row['num_steps']} steps {row['layer']:8} minus {row['minus']} {row['grid']}"
        print(f"{place} {row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")
    print(arguments.output)


if __name__ == "__main__":
    main()
