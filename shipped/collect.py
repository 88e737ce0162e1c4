"""Put what `shipped/train.sh` trained into a folder of models, as `xdlm-image demo` takes it.

    python shipped/collect.py RUNS MODELS [--evaluation]

Weights go in as float16 (they load as float32); recipes, curves and reports of every training lie beside them.
With --evaluation the finished tables are added.
"""

import argparse
import os
import shutil
from pathlib import Path

import matplotlib
import torch

from xdlm_image import XDLMPipeline
from xdlm_image.evaluation.nelbo import read_curve
from xdlm_image.files import replace_folder, share_permissions, write_atomic

NAMES = ("mdlm", "xdlm-0.1", "xdlm-0.5", "udlm")
BITS = "validation/bits_per_token"


def collect_models(runs: Path, models: Path) -> None:
    """Pipelines, and what is known of how they came about."""
    for name in NAMES:
        pipeline = XDLMPipeline.from_pretrained(runs / name / "pipeline")
        pipeline.transformer.to(torch.float16)
        pipeline.vqvae.to(torch.float16)
        partial = models / "pipelines" / f".{name}.{os.getpid()}"
        pipeline.save_pretrained(partial)
        replace_folder(partial, models / "pipelines" / name)
        copy(runs / name, models / "training" / name, ("recipe.yaml", "metrics.jsonl"))
    copy(runs / "perceptual", models / "training" / "perceptual", ("config.json", "report.json"))
    copy(runs / "tokenizer", models / "training" / "tokenizer", ("report.json", "metrics.jsonl", "reconstructions.png"))
    plot_curves(runs, models / "training" / "curves.png")


def collect_evaluation(runs: Path, models: Path) -> None:
    """Numbers, tables, plots and grids."""
    pictures = [file.name for file in sorted((runs / "evaluation").glob("*.png"))]
    copy(runs / "evaluation", models / "evaluation", ("fid.json", "fid.csv", "fid.md", "report.html", *pictures))
    copy(runs / "nelbo", models / "evaluation", ("nelbo.json", "nelbo.csv", "nelbo.md", "nelbo.png"))
    copy(runs / "independent", models / "training" / "independent", ("config.json", "report.json"))


def copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_atomic(target / name, lambda temporary, name=name: shutil.copyfile(source / name, temporary))
    share_permissions(target)


def plot_curves(runs: Path, path: Path) -> None:
    """Validation NELBO over training images, one line for each k."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in NAMES:
        points = read_curve(name, str(runs / name))
        steps, bits = ([point[axis] for point in points] for axis in ("step", "bits_per_token"))
        axes.plot(steps, bits, marker="o", markersize=3, label=name)
    axes.set(xlabel="training step", ylabel="validation NELBO, bits per code", title="Averaged weights, 2,000 images")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120))
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--evaluation", action="store_true", help="add the finished tables")
    arguments = parser.parse_args()
    (collect_evaluation if arguments.evaluation else collect_models)(arguments.runs, arguments.models)


if __name__ == "__main__":
    main()
