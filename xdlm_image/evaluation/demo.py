"""The verb `demo`: the models that come with a checkout, drawn and judged on this machine.

This file owns what a visitor reads at the end; drawing and judging are `sweep`'s.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xdlm_image.devices import best_device, fast_dtype, why_not_compiled
from xdlm_image.evaluation.sweep import evaluate
from xdlm_image.evaluation.tables import fid_table
from xdlm_image.recipes import DemoRecipe, EvaluateRecipe
from xdlm_image.shipped_models import models_folder, shipped_pipelines

QUICK = {"num_samples": 1000, "num_steps": [1, 2, 4, 8, 16], "seeds": [0], "feature_metrics": []}
FULL = {"num_samples": 5000, "num_steps": [1, 2, 4, 8, 16, 32, 64], "seeds": [0, 1, 2]}


def demo(recipe: DemoRecipe) -> str:
    """Draw and judge every shipped pipeline.

    Returns:
        The table, the committed one beside it, and where the files are.

    Raises:
        FileNotFoundError: There are no shipped models; the error says where to get them.
    """
    folder = models_folder(recipe.models)
    pipelines = shipped_pipelines(folder)
    protocol: dict[str, Any] = FULL if recipe.full else QUICK
    device = best_device(recipe.device)
    path = evaluate(
        EvaluateRecipe(
            pipelines={name: str(place) for name, place in pipelines.items()},
            output_dir=recipe.output_dir,
            reference=str(folder / "reference"),
            extractor=str(folder / "extractor"),
            batch_size=recipe.batch_size,
            dtype=recipe.dtype or fast_dtype(device),
            compile=_compiled(device) if recipe.compile is None else recipe.compile,
            device=recipe.device,
            **protocol,
        )
    )
    return "\n".join(_summary(path, folder, recipe.full))


def _compiled(device: torch.device) -> bool:
    """Whether to compile; on a CPU that cannot, the visitor is told what it costs."""
    reason = why_not_compiled(device)
    if reason is not None and device.type == "cpu":
        tqdm.write(f"torch.compile does not work here ({reason}): drawing takes about twice as long", file=sys.stderr)
    return reason is None


def _summary(path: Path, folder: Path, full: bool) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    layer = content["protocol"]["extractor"]["fid_layers"][0]
    lines = ["", content["metric"] + ".", ""]
    lines += [f"This machine, {content['protocol']['num_samples']} images a cell" + ("" if full else " (indicative)")]
    lines += ["", *fid_table(content, layer).markdown(), ""]
    committed = folder / "evaluation" / "fid.json"
    if committed.is_file():
        theirs = json.loads(committed.read_text(encoding="utf-8"))
        seeds = len(theirs["protocol"]["seeds"])
        lines += [f"Committed table, {theirs['protocol']['num_samples']} images a cell, {seeds} sampling seeds", ""]
        lines += [*fid_table(theirs, layer).markdown(), ""]
    output = path.parent
    lines += [f"{output / 'report.html'}   every table, plot and grid, with floors and protocol"]
    lines += [f"{output / f'grid_{name}.png'}   a row of images a class" for name in content["protocol"]["pipelines"]]
    return [*lines, str(path)]
