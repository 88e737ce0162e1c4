"""Does XDLM beat MDLM in few steps (arXiv 2602.01362)? The answer of finished sweeps, with its confidence interval.

    python benchmarks/few_steps.py [shipped/fashion_mnist/evaluation/fid.json] [--output FILE.json]
    python benchmarks/few_steps.py FIRST/fid.json SECOND/fid.json ... [--output FILE.json]

For every measure that all cells hold (FID by layer and reference, precision, recall, coverage, share of images of the
class asked for) and step count: that of each pipeline minus that of the baseline at the same sampling seed, their mean
over seeds, and Student's 95 % interval of that mean. It holds for these weights: one training seed says nothing of how
much another training would differ. Of several sweeps each holds models trained with a seed of its own; what is
compared then are these means, one a training, and the interval is that of trainings.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from xdlm_image.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "shipped" / "fashion_mnist" / "evaluation" / "fid.json"
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 % points, 1 to 10 degrees
MOST = len(STUDENT) + 1
DISTANCES = {"fid": "FID against real images", "fid_against_reconstructions": "FID against reconstructions"}
HIGHER_IS_BETTER = ("precision", "recall", "coverage", "class_accuracy")


def interval(differences: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of 2 to 11 values."""
    half = STUDENT[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences) - half, statistics.mean(differences) + half


def opened(path: Path, baseline: str, parser: argparse.ArgumentParser) -> dict:
    """A sweep over step counts and seeds, and nothing else, that has the baseline."""
    if not path.is_file():
        parser.error(f"{path}: no such file; `xdlm-image evaluate` writes one")
    sweep = json.loads(path.read_text())
    sampler, pipelines = sweep["protocol"]["sampler"], sweep["protocol"]["pipelines"]
    several = [axis for axis, of in sampler.items() if axis != "num_steps" and isinstance(of, list) and len(of) > 1]
    if several:
        parser.error(f"{path}: sweeps over {', '.join(several)} too; compare at one value of each")
    if baseline not in pipelines:
        parser.error(f"--baseline {baseline}: {path} has {', '.join(pipelines)}")
    missing = len(pipelines) * len(sampler["num_steps"]) * len(sweep["protocol"]["seeds"]) - len(sweep["cells"])
    if missing:
        parser.error(f"{path}: {missing} cells are not measured yet; the same `xdlm-image evaluate` goes on")
    return sweep


def refuse_unlike(sweeps: list[dict], paths: list[Path], parser: argparse.ArgumentParser) -> None:
    """Trainings must be others, and all that they are judged by the same."""
    first, *rest = (sweep["protocol"] for sweep in sweeps)
    for path, protocol in zip(paths[1:], rest):
        for key in ("reference", "num_samples", "seeds", "extractor", "sampler"):
            ours, theirs = ({**p[key], "num_steps": None} if key == "sampler" else p[key] for p in (first, protocol))
            if ours != theirs:
                parser.error(f"{path}: its {key} is not that of {paths[0]}, so the two do not compare")
    for name in shared(sweeps, "pipelines"):
        if len({sweep["protocol"]["pipelines"][name]["weights_hash"] for sweep in sweeps}) < len(sweeps):
            parser.error(f"{name}: two of the sweeps hold the same weights; each must be of a training of its own")


def shared(sweeps: list[dict], key: str) -> list:
    """Pipelines, or step counts, that all sweeps have, in the first one's order."""
    held = [s["protocol"]["pipelines"] if key == "pipelines" else s["protocol"]["sampler"][key] for s in sweeps]
    return [value for value in held[0] if all(value in others for others in held)]


def measures_of(cell: dict) -> dict[str, float]:
    """What a cell measured, by the name it is printed under."""
    distances = {
        f"{of}, {layer} features": v for key, of in DISTANCES.items() for layer, v in (cell[key] or {}).items()
    }
    return distances | {key: cell[key] for key in HIGHER_IS_BETTER if cell.get(key) is not None}


def differences_of(sweeps: list[dict], baseline: str) -> Iterator[tuple[str, int, str, list[list[float]]]]:
    """Measure, step count, pipeline, and its differences: a list over sampling seeds for each sweep."""
    names = [name for name in shared(sweeps, "pipelines") if name != baseline]
    found = [{(c["pipeline"], c["num_steps"], c["seed"]): measures_of(c) for c in sweep["cells"]} for sweep in sweeps]
    every = [measures for of in found for measures in of.values()]
    measures = [measure for measure in every[0] if all(measure in others for others in every)]
    for measure, steps, name in product(measures, shared(sweeps, "num_steps"), names):
        pairs = [[(of[name, steps, s], of[baseline, steps, s]) for s in sweeps[0]["protocol"]["seeds"]] for of in found]
        yield measure, steps, name, [[own[measure] - base[measure] for own, base in of] for of in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "evaluations", type=Path, nargs="*", default=[SHIPPED], help="fid.json of `xdlm-image evaluate`"
    )
    parser.add_argument("--baseline", default="mdlm", help="pipeline that the others are compared with")
    parser.add_argument("--output", type=Path, help="default: few_steps.json, or few_steps_trainings.json, beside this")
    arguments = parser.parse_args()
    paths = arguments.evaluations
    sweeps = [opened(path, arguments.baseline, parser) for path in paths]
    seeds = sweeps[0]["protocol"]["seeds"]
    trainings = len(paths) > 1
    count, what = (len(paths), "trainings") if trainings else (len(seeds), "sampling seeds")
    if not 2 <= count <= MOST:
        parser.error(f"{count} {what}; 2 to {MOST} give an interval here")
    refuse_unlike(sweeps, paths, parser)
    rows, before = [], None
    for measure, steps, name, of_sweeps in differences_of(sweeps, arguments.baseline):
        if before != (before := measure):
            print(f"\n{measure}, minus that of {arguments.baseline}")
        differences = [statistics.mean(over_seeds) for over_seeds in of_sweeps] if trainings else of_sweeps[0]
        low, high = interval(differences)
        words = ("higher", "lower") if measure in HIGHER_IS_BETTER else ("worse", "better")
        verdict = words[0] if low > 0 else words[1] if high < 0 else "not told apart"
        row = {"measure": measure, "num_steps": steps, "pipeline": name}
        row |= {"differences": differences, "mean": statistics.mean(differences), "interval": [low, high]}
        rows.append(row | {"verdict": verdict})
        print(f"{steps:4} steps  {name:10} {row['mean']:+8.3f}  [{low:+.3f}, {high:+.3f}]  {verdict}")
    names = [p.relative_to(ROOT).as_posix() if p.is_relative_to(ROOT) else p.name for p in map(Path.resolve, paths)]
    result = {
        **({"trainings": names} if trainings else {"evaluation": names[0]}),
        "baseline": arguments.baseline,
        "confidence": 0.95,
        "seeds": seeds,
        "num_samples": sweeps[0]["protocol"]["num_samples"],
        "rows": rows,
    }
    output = arguments.output or ROOT / "benchmarks" / f"few_steps{'_trainings' * trainings}.json"
    write_json(output, result)
    print(f"\n{output}")


if __name__ == "__main__":
    main()
