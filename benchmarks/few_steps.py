"""Does XDLM beat MDLM in few steps (arXiv 2602.01362)? The answer of a finished sweep, with its confidence interval.

    python benchmarks/few_steps.py [shipped/fashion_mnist/evaluation/fid.json] [--output FILE.json]

For every step count, layer and reference: FID of each pipeline minus FID of the baseline at the same sampling seed,
their mean over seeds, and Student's 95 % interval of that mean. It holds for these weights: one training seed says
nothing of how much another training would differ.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "shipped" / "fashion_mnist" / "evaluation" / "fid.json"
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 % points, 1 to 10 degrees
REFERENCES = {"real images": "fid", "reconstructions": "fid_against_reconstructions"}


def interval(differences: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of 2 to 11 values."""
    half = STUDENT[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences) - half, statistics.mean(differences) + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, nargs="?", default=SHIPPED, help="fid.json of `xdlm-image evaluate`")
    parser.add_argument("--baseline", default="mdlm", help="pipeline that the others are compared with")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    if not arguments.evaluation.is_file():
        parser.error(f"{arguments.evaluation}: no such file; `xdlm-image evaluate` writes one")
    content = json.loads(arguments.evaluation.read_text())
    several = [
        axis
        for axis, values in content["protocol"]["sampler"].items()
        if axis != "num_steps" and isinstance(values, list) and len(values) > 1
    ]
    if several:
        parser.error(f"{arguments.evaluation}: sweeps over {', '.join(several)} too; compare at one value of each")
    cells = {(c["pipeline"], c["num_steps"], c["seed"]): c for c in content["cells"]}
    protocol = content["protocol"]
    seeds = protocol["seeds"]
    names = [name for name in protocol["pipelines"] if name != arguments.baseline]
    if arguments.baseline not in protocol["pipelines"]:
        parser.error(f"--baseline {arguments.baseline}: the sweep has {', '.join(protocol['pipelines'])}")
    if not 2 <= len(seeds) <= len(STUDENT) + 1:
        parser.error(
            f"{arguments.evaluation}: {len(seeds)} sampling seeds; 2 to {len(STUDENT) + 1} give an interval here"
        )
    rows = []
    for against, key in REFERENCES.items():
        for layer in protocol["extractor"]["fid_layers"]:
            print(f"\nFID ({layer} features) against {against}, minus that of {arguments.baseline}")
            for steps in protocol["sampler"]["num_steps"]:
                for name in names:
                    pairs = [(cells[name, steps, s][key], cells[arguments.baseline, steps, s][key]) for s in seeds]
                    differences = [ours[layer] - theirs[layer] for ours, theirs in pairs]
                    low, high = interval(differences)
                    verdict = "better" if high < 0 else "worse" if low > 0 else "not told apart"
                    row = {"against": against, "layer": layer, "num_steps": steps, "pipeline": name}
                    row |= {"differences": differences, "mean": statistics.mean(differences), "interval": [low, high]}
                    rows.append(row | {"verdict": verdict})
                    print(f"{steps:4} steps  {name:10} {row['mean']:+8.3f}  [{low:+.3f}, {high:+.3f}]  {verdict}")
    path = arguments.evaluation.resolve()
    result = {
        "evaluation": path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name,
        "baseline": arguments.baseline,
        "confidence": 0.95,
        "seeds": seeds,
        "num_samples": protocol["num_samples"],
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
