"""Do samplers that suit a model suit it trained anew, and who leads then? Those of samplers.json on other trainings.

    torchrun --nproc-per-node 2 benchmarks/samplers_trainings.py RUNS/pipelines/seed1 RUNS/pipelines/seed2

Each folder holds the pipelines of another training, as shipped/training_seed.sh leaves them. Nothing is tuned: every
sampler that the trials of samplers.json chose for a model, with the number that they chose, draws 5,000 images of the
first sampling seed at each NFE that it was tuned at, against the test images; the first training is the one of
samplers.json, with the same seed. Written are the distances and recall by training, those of the sampler chosen at each
NFE minus the first model's, and Student's 95 % interval of that mean, which is one of trainings. Killed, the same
command goes on.
"""

import argparse
import json
import statistics
from pathlib import Path

from few_steps import MOST, interval
from samplers import METRICS, ROOT, cells, folder_of, hashes_of, output_of, settings_of, steps_of

from xdlm_image.files import write_json
from xdlm_image.ranks import rank_and_world

JUDGED_BY = ("reference", "num_samples", "samples_per_class", "seed_rule", "uint8_rule", "extractor")


def wanted(tuned: dict, models: list[str]) -> list[dict]:
    """The results of the first training that other trainings are compared with: of the models' chosen samplers."""
    chosen = {(row["model"], row["sampler"]) for row in tuned["chosen"] if row["model"] in models}
    return [row for row in tuned["results"] if (row["model"], row["sampler"]) in chosen]


def drawn(arguments: argparse.Namespace, tuned: dict, rows: list[dict]) -> list[dict]:
    """The results of one training for rows of one model, sampler and number: a cell for each of their step counts."""
    model, sampler, value = (rows[0][name] for name in ("model", "sampler", "value"))
    arguments.num_steps = [row["num_steps"] for row in rows]
    final = {"num_samples": tuned["protocol"]["num_samples"], "seeds": rows[0]["seeds"][:1]}
    final |= {"reference": str(arguments.models / "reference")}
    settings = settings_of(arguments, tuned["trials"], model, sampler, [value])
    folder = f"{model}-{sampler}"
    found = cells(arguments, folder, {model: folder_of(arguments, model, sampler, value)}, **final, **settings)
    refuse_otherwise(arguments, folder, tuned["protocol"])
    return sorted(found, key=lambda cell: cell["num_steps"])


def refuse_otherwise(arguments: argparse.Namespace, folder: str, protocol: dict) -> None:
    """What judged the images must be what judged those of the first training."""
    path = output_of(arguments, folder) / "fid.json"
    own = json.loads(path.read_text())["protocol"]
    other = [name for name in JUDGED_BY if own[name] != protocol[name]]
    if other:
        raise SystemExit(f"{path}: it has another {', '.join(other)} than {arguments.tuned}, so they do not compare")


def by_training(first: dict, cells_of: list[dict]) -> dict:
    """A row of the output: what the first training and the others have at one model, sampler and NFE."""
    row = {name: first[name] for name in ("model", "sampler", "value", "num_steps", "nfe")}
    row["fid"] = {
        layer: [values[0], *(cell["fid"][layer] for cell in cells_of)] for layer, values in first["fid"].items()
    }
    return row | {name: [first[name][0], *(cell[name] for cell in cells_of)] for name in METRICS}


def compared(tuned: dict, results: list[dict], models: list[str]) -> list[dict]:
    """The models' chosen samplers at each NFE against the first model's, paired by training."""
    rows = []
    for nfe in sorted({row["nfe"] for row in tuned["chosen"]}):
        of = {row["model"]: row["sampler"] for row in tuned["chosen"] if row["nfe"] == nfe}
        found = {row["model"]: row for row in results if row["nfe"] == nfe and row["sampler"] == of[row["model"]]}
        for model in models[1:]:
            own, base = found[model], found[models[0]]
            measures = {f"{layer} features": (own["fid"][layer], base["fid"][layer]) for layer in own["fid"]}
            measures |= {name: (own[name], base[name]) for name in METRICS}
            for measure, pair in measures.items():
                values = [a - b for a, b in zip(*pair)]
                row = {"nfe": nfe, "model": model, "measure": measure, "differences": values}
                rows.append(row | {"mean": statistics.mean(values), "interval": interval(values)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", type=Path, nargs="+", help="folders of pipelines, each of another training")
    parser.add_argument("--names", nargs="+", default=["mdlm", "xdlm-0.1"], help="models, the baseline first")
    parser.add_argument("--tuned", type=Path, default=ROOT / "benchmarks" / "samplers.json", help="of samplers.py")
    parser.add_argument("--models", type=Path, default=ROOT / "shipped" / "fashion_mnist", help="judge and reference")
    parser.add_argument("--folder", type=Path, default=Path("runs/samplers_trainings"), help="partial results")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    if not arguments.tuned.is_file():
        parser.error(f"--tuned {arguments.tuned}: no such file; benchmarks/samplers.py writes one")
    tuned = json.loads(arguments.tuned.read_text())
    unknown = [name for name in arguments.names if name not in tuned["models"]]
    if unknown:
        parser.error(f"--names {unknown[0]}: {arguments.tuned} has {', '.join(tuned['models'])}")
    for folder in arguments.trainings:
        for name in arguments.names:
            if not (folder / name / "model_index.json").is_file():
                parser.error(f"{folder}: no pipeline {name} in it; shipped/training_seed.sh leaves such folders")
    if len(arguments.trainings) >= MOST:
        parser.error(f"{len(arguments.trainings)} trainings beside the first; up to {MOST - 1} give an interval here")
    arguments.dtype = tuned["protocol"]["dtype"]
    root, first = arguments.folder, wanted(tuned, arguments.names)
    models = [{name: tuned["models"][name] for name in arguments.names}]
    found: list[list[dict]] = [[] for _ in first]
    for folder in arguments.trainings:
        arguments.pipelines, arguments.folder = folder, root / folder.name
        own = hashes_of(arguments)
        again = [name for name in own if any(other[name] == own[name] for other in models)]
        if again:
            parser.error(f"{folder}: its {again[0]} has the weights of another training; name it once")
        models.append(own)
        for trial in tuned["trials"]:
            same = [all(row[name] == trial[name] for name in ("model", "sampler", "value")) for row in first]
            places = [i for i, row in enumerate(first) if same[i] and row["num_steps"] in steps_of(trial)]
            if places:
                for place, cell in zip(places, drawn(arguments, tuned, [first[i] for i in places]), strict=True):
                    found[place].append(cell)
    results = [by_training(row, cells_of) for row, cells_of in zip(first, found)]
    if rank_and_world()[0] == 0:
        content = {
            "protocol": {name: tuned["protocol"][name] for name in (*JUDGED_BY, "dtype")},
            "models": models,
            "results": results,
            "differences": compared(tuned, results, arguments.names),
        }
        write_json(arguments.output, content)
        show(content, arguments.names[0])
        print(arguments.output)


def show(content: dict, baseline: str) -> None:
    for row in content["results"]:
        distances = "  ".join(f"{value:.2f}" for value in row["fid"]["pooled"])
        recall = "  ".join(f"{100 * value:.0f} %" for value in row["recall"])
        print(
            f"{row['nfe']:3} NFE {row['model']:9} {row['sampler']:18} {row['value']!s:7} {distances}   recall {recall}"
        )
    for row in content["differences"]:
        low, high = row["interval"]
        place = f"{row['nfe']:3} NFE {row['model']} - {baseline} {row['measure']:18}"
        print(f"{place} {row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
