"""The verb `evaluate`: FID of pipelines over step counts, checked first, resumable, with its whole protocol.

This file owns the order of a sweep and what `fid.json` holds. Numbers come from `references` and `fid`, images from
`drawing`, pictures from `grids`, pages from `report`. No drawn image is written to disk besides the grids.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from xdlm_image.evaluation.batches import real_batches, reconstructed_batches
from xdlm_image.evaluation.drawing import (
    DrawnBatches,
    SamplerSettings,
    draw_all,
    open_pipeline,
)
from xdlm_image.evaluation.fid import fid_from_statistics
from xdlm_image.evaluation.grids import class_grid, save_grid
from xdlm_image.evaluation.plan import Plan, check, device_name, images_key, metric_name, protocol, versions
from xdlm_image.evaluation.references import Measured, barrier, cached_measure, measure, short_hash
from xdlm_image.evaluation.report import write_plot, write_report
from xdlm_image.evaluation.seeds import SEED_RULE
from xdlm_image.evaluation.statistics import rank_and_world
from xdlm_image.files import refuse_unwritable, write_json
from xdlm_image.processes import process_state
from xdlm_image.recipes import EvaluateRecipe

CELL_VERSION = 1  # raise it when what a cell means changes: older cells are then measured anew
GRID_STEPS = 8
GRID_CLASSES = 10
GRID_IMAGES = 8
TRAIN_SUBSET_SEED = 0


def evaluate(recipe: EvaluateRecipe) -> Path:
    """Measure every pipeline at every step count and seed; write `fid.json`, `fid.md`, `fid.png` and grids.

    Each finished cell is a file in `output_dir/cells`, named after a hash of everything that decides its numbers: a
    killed sweep goes on from there, and a cell of another protocol is never taken for this one. Several processes
    (`accelerate launch`, torchrun) share the images of each cell.

    Returns:
        The path of `fid.json`.

    Raises:
        FileNotFoundError, ValueError: A pipeline, the extractor or the data do not exist or do not fit; before
            anything is drawn.
    """
    process_state()
    plan = check(recipe)
    output = Path(recipe.output_dir)
    refuse_unwritable(output, "output_dir")

    reference = cached_measure(
        output / "statistics",
        f"reference-{recipe.reference_split}",
        images_key(plan, plan.reference),
        plan.extractor,
        lambda: real_batches(plan.reference, recipe.batch_size),
        len(plan.reference),
    )
    content: dict[str, Any] = {
        "schema_version": 1,
        "metric": metric_name(plan.extractor),
        "warnings": plan.warnings,
        "protocol": protocol(plan, reference.hashes),
        "floors": {
            "reference_class_accuracy": reference.class_accuracy,
            "train_against_reference": _train_floor(plan, reference),
            "reconstruction": [],
        },
        "cells": [],
    }
    reconstructions: dict[str, Measured] = {}  # tokenizer hash -> the reference images through this tokenizer
    main = rank_and_world()[0] == 0
    cells = len(recipe.pipelines) * len(recipe.num_steps) * len(recipe.seeds)
    with tqdm(total=cells, desc="cells", unit="cell", disable=not main) as progress:
        for name in recipe.pipelines:
            pipeline = open_pipeline(plan.pipelines[name]["folder"], plan.device, f"pipelines.{name}")
            tokenizer = plan.pipelines[name]["tokenizer_hash"]
            if tokenizer not in reconstructions:
                reconstructions[tokenizer], floor = _reconstructions(plan, pipeline, tokenizer, reference)
                content["floors"]["reconstruction"].append(floor)
            for num_steps in recipe.num_steps:
                settings = SamplerSettings(num_steps, recipe.guidance_scale, recipe.temperature)
                for seed in recipe.seeds:
                    cell = _cell(plan, pipeline, name, settings, seed, reference, reconstructions[tokenizer])
                    content["cells"].append(cell)
                    if main:
                        write_report(output, content)
                    progress.update()
            if main:
                _pictures(plan, pipeline, name, output)
    if main:
        write_report(output, content)
        write_plot(output, content)
    barrier()
    return output / "fid.json"


def _fids(a: Measured, b: Measured) -> dict[str, float]:
    return {layer: fid_from_statistics(a.statistics[layer], b.statistics[layer]) for layer in a.statistics}


def _train_subset(plan: Plan) -> tuple[list[int], dict[str, Any]]:
    """As many random images of `plan.train` as a cell has: their indices, and their key in the cache."""
    count = min(plan.recipe.num_samples, len(plan.train))
    chosen = np.random.default_rng(TRAIN_SUBSET_SEED).permutation(len(plan.train))[:count]
    key = {**images_key(plan, plan.train), "subset": count, "subset_seed": TRAIN_SUBSET_SEED}
    return sorted(chosen.tolist()), key


def _train_floor(plan: Plan, reference: Measured) -> dict[str, Any]:
    """FID of real training images against the reference: what a perfect generator would score.

    Where the training images are the reference, test images stand in for them: a subset of the reference would score
    too well.
    """
    indices, key = _train_subset(plan)
    measured = cached_measure(
        Path(plan.recipe.output_dir) / "statistics",
        plan.train.split,
        key,
        plan.extractor,
        lambda: real_batches(plan.train, plan.recipe.batch_size, indices),
        len(indices),
    )
    return {
        "split": plan.train.split,
        "num_images": len(indices),
        "subset_seed": TRAIN_SUBSET_SEED,
        "fingerprint": plan.train.fingerprint,
        "fid": _fids(measured, reference),
        "class_accuracy": measured.class_accuracy,
    }


def _reconstructions(plan: Plan, pipeline: Any, tokenizer: str, reference: Measured) -> tuple[Measured, dict[str, Any]]:
    """The reference images through a tokenizer, and what that floor and the training images beside it score."""
    folder, batch_size = Path(plan.recipe.output_dir) / "statistics", plan.recipe.batch_size
    num_codes = int(pipeline.vqvae.config.num_vq_embeddings)
    measured = cached_measure(
        folder,
        f"reconstructions-{plan.recipe.reference_split}",
        {**images_key(plan, plan.reference), "tokenizer": tokenizer},
        plan.extractor,
        lambda: reconstructed_batches(pipeline.vqvae, real_batches(plan.reference, batch_size)),
        len(plan.reference),
        num_codes,
    )
    indices, key = _train_subset(plan)
    train = cached_measure(
        folder,
        f"reconstructions-{plan.train.split}",
        {**key, "tokenizer": tokenizer},
        plan.extractor,
        lambda: reconstructed_batches(pipeline.vqvae, real_batches(plan.train, batch_size, indices)),
        len(indices),
        num_codes,
    )
    floor = {
        "tokenizer_hash": tokenizer,
        "pipelines": [n for n in plan.recipe.pipelines if plan.pipelines[n]["tokenizer_hash"] == tokenizer],
        "num_images": len(plan.reference),
        "fid": _fids(measured, reference),
        "class_accuracy": measured.class_accuracy,
        "statistics_sha256": measured.hashes,
        "train": {
            "num_images": len(indices),
            "fid_against_reconstructions": _fids(train, measured),
            "code_pair_total_variation": _total_variation(train, measured),
        },
    }
    return measured, floor


def _total_variation(a: Measured, b: Measured) -> dict[str, float]:
    assert a.pairs is not None and b.pairs is not None
    return a.pairs.total_variation(b.pairs)


def _cell(
    plan: Plan,
    pipeline: Any,
    name: str,
    settings: SamplerSettings,
    seed: int,
    reference: Measured,
    reconstructions: Measured,
) -> dict[str, Any]:
    """One pipeline at one step count and seed: from its file if it was measured under this protocol, else now."""
    recipe = plan.recipe
    num_classes = len(plan.reference.class_names)
    key = {
        "cell_version": CELL_VERSION,
        "pipeline_weights": plan.pipelines[name]["weights_hash"],
        "num_steps": settings.num_steps,
        "guidance_scale": settings.guidance_scale,
        "temperature": settings.temperature,
        "seed": seed,
        "seed_rule": SEED_RULE,
        "num_samples": recipe.num_samples,
        "reference": images_key(plan, plan.reference),
        "extractor": plan.extractor.weights_hash,
        "class_accuracy": plan.extractor.logits_layer is not None,
    }
    label = f"{name}-steps{settings.num_steps}-seed{seed}"
    path = Path(recipe.output_dir) / "cells" / f"{label}-{short_hash(key)}.json"
    done = _read_cell(path, key)
    if done is not None:
        return {**done, "pipeline": name}
    main = rank_and_world()[0] == 0
    if main:
        others = sorted(path.parent.glob(f"{label}-" + "?" * 12 + ".json"))
        if others:
            tqdm.write(f"{label}: {len(others)} result(s) of another protocol are left aside; measuring anew")
    batches = DrawnBatches(pipeline, recipe.num_samples, num_classes, seed, settings, recipe.batch_size)
    world = rank_and_world()[1]
    with tqdm(total=-(-recipe.num_samples // world), desc=label, unit="image", leave=False, disable=not main) as bar:
        measured = measure(plan.extractor, batches, int(pipeline.vqvae.config.num_vq_embeddings), bar)
    result = {
        "pipeline": name,
        "num_steps": settings.num_steps,
        "nfe": settings.nfe,
        "seed": seed,
        "num_samples": recipe.num_samples,
        "fid": _fids(measured, reference),
        "fid_against_reconstructions": _fids(measured, reconstructions),
        "code_pair_total_variation": _total_variation(measured, reconstructions),
        "class_accuracy": measured.class_accuracy if plan.pipelines[name]["conditional"] else None,
        "sampling_seconds": round(batches.seconds, 3),
        "images_per_second": round(recipe.num_samples / max(batches.seconds, 1e-9), 2),
        "batch_size": recipe.batch_size,
        "processes": world,
        "device": device_name(plan.device),
        "versions": versions(),
    }
    if main:
        write_json(path, {"key": key, "result": result})
    barrier()
    return result


def _read_cell(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is of another protocol")
        return dict(stored["result"])
    except (ValueError, KeyError, TypeError) as error:
        tqdm.write(f"{path}: this result cannot be used ({error}); measuring anew")
        return None


def _pictures(plan: Plan, pipeline: Any, name: str, output: Path) -> None:
    """A class grid at 8 steps (or the nearest count), and the same seeds over all step counts."""
    recipe, seed = plan.recipe, plan.recipe.seeds[0]
    names = list(plan.reference.class_names)
    count = min(GRID_CLASSES, len(names))
    ids = [round(i * (len(names) - 1) / max(1, count - 1)) for i in range(count)]
    steps = min(recipe.num_steps, key=lambda n: (abs(np.log2(n / GRID_STEPS)), n))
    settings = SamplerSettings(steps, recipe.guidance_scale, recipe.temperature)
    conditional = plan.pipelines[name]["conditional"]
    images = class_grid(pipeline, ids, GRID_IMAGES, seed, settings, recipe.batch_size)
    row_names = [names[i] for i in ids] if conditional else None
    save_grid(output / f"grid_{name}.png", images, row_names, title=f"{name}, {steps} steps, seed {seed}")
    strips = [
        draw_all(pipeline, ids, seed, replace(settings, num_steps=num_steps), recipe.batch_size)
        for num_steps in sorted(recipe.num_steps)
    ]
    save_grid(
        output / f"strip_{name}.png",
        torch.stack(strips),
        [f"{num_steps} steps" if num_steps > 1 else "1 step" for num_steps in sorted(recipe.num_steps)],
        title=f"{name}, seed {seed}: the same random numbers at every step count",
    )
