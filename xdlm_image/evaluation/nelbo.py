"""The verb `nelbo`: NELBO of pipelines on held-out codes, checked first, resumable, with its whole protocol.

This file owns the order of things and what `nelbo.json` holds. The estimate is `nelbo_estimate`'s, pages and pictures
`nelbo_report`'s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdlm_image.data.code_cache import CodeCache
from xdlm_image.data.labels import Labels, same_classes
from xdlm_image.drawing.opening import open_pipeline, pipeline_hash, refuse_changed
from xdlm_image.evaluation.cells import read_cell, refuse_name
from xdlm_image.evaluation.measuring import short_hash
from xdlm_image.evaluation.nelbo_estimate import (
    FLAT_SHARE,
    NUM_STRATA,
    PILOT_IMAGES,
    POWER,
    SEED_RULE,
    Interval,
    NelboEstimator,
    TimeProposal,
    end_terms,
)
from xdlm_image.evaluation.nelbo_report import write_curves, write_plot, write_report
from xdlm_image.evaluation.plan import device_name, versions
from xdlm_image.files import write_json
from xdlm_image.metric_lines import MetricLines
from xdlm_image.objective import XDLMLoss
from xdlm_image.processes import only_command, own_device
from xdlm_image.ranks import barrier, rank_and_world
from xdlm_image.recipes import NelboRecipe

CELL_VERSION = 1  # raise it when what a cell means changes: older cells are then measured again
BITS = "validation/bits_per_token"


@dataclass
class NelboPlan:
    """A measurement whose parts are known to fit.

    Attributes:
        recipe: What was asked for.
        device: Where it runs.
        cache: The held-out codes.
        num_images: How many of them.
        pipelines: Name -> folder, hashes and settings, as the protocol records them.
        curves: Name of a run -> its points: step, bits per token and their standard error.
        warnings: What a reader of the numbers must know.
    """

    recipe: NelboRecipe
    device: torch.device
    cache: CodeCache
    num_images: int
    pipelines: dict[str, dict[str, Any]]
    curves: dict[str, list[dict[str, float]]]
    warnings: list[str]


def nelbo(recipe: NelboRecipe) -> Path:
    """Measure every pipeline; write `nelbo.json`, `nelbo.md`, `nelbo.csv`, `nelbo.png`, and curves of training runs.

    A finished pipeline is a file in `output_dir/cells`, named after a hash of everything that decides its numbers: a
    killed run goes on from there. Several processes (`accelerate launch`, torchrun) share the images.

    Returns:
        The path of `nelbo.json`.

    Raises:
        FileNotFoundError, ValueError: A pipeline, the codes or a run do not exist or do not fit, or another command is
            at work in `output_dir`; before anything is measured.
    """
    plan = check(recipe)
    output = Path(recipe.output_dir)
    with only_command(output, rank_and_world()[0] == 0):
        _measure(plan, output)
        barrier()
    return output / "nelbo.json"


def _measure(plan: NelboPlan, output: Path) -> None:
    recipe, main = plan.recipe, rank_and_world()[0] == 0
    content: dict[str, Any] = {
        "schema_version": 1,
        "metric": "NELBO in bits per token: an upper bound of -log2 p(codes | class) / tokens",
        "warnings": plan.warnings,
        "protocol": _protocol(plan),
        "results": [],
        "differences": [],
    }
    if main:
        write_curves(output, plan.curves)
    images: list[torch.Tensor] = []
    for name in recipe.pipelines:
        cell = _cell(plan, name)
        images.append(torch.tensor(cell.pop("bits_of_images"), dtype=torch.float64))
        content["results"].append(cell)
        if len(images) > 1:  # the same images: their difficulty cancels
            difference = asdict(Interval.of(images[-1] - images[0]))
            content["differences"].append({"pipeline": name, "minus": next(iter(recipe.pipelines)), **difference})
        if main:
            write_report(output, content)
    if main:
        write_plot(output, content)


def check(recipe: NelboRecipe) -> NelboPlan:
    """Open everything that is needed and see that it fits; nothing is measured.

    Raises:
        FileNotFoundError, ValueError: Names the argument, its value and the remedy.
    """
    for argument, names in (("pipelines", recipe.pipelines), ("runs", recipe.runs)):
        for name in names:
            refuse_name(argument, name)
    device = own_device(recipe.device)
    cache = CodeCache.open(recipe.codes)
    num_images = len(cache) if recipe.num_images is None else recipe.num_images
    if not 2 <= num_images <= len(cache):
        raise ValueError(
            f"num_images={recipe.num_images!r}: {recipe.codes!r} holds {len(cache)} images, and an interval takes at "
            "least 2; name at most as many as it holds, or leave it out for all"
        )
    curves = {name: read_curve(name, folder) for name, folder in recipe.runs.items()}
    pipelines = {name: _check_pipeline(name, folder, cache, device) for name, folder in recipe.pipelines.items()}
    cache.verify()
    notes = []
    if cache.manifest.split == "train":
        notes.append("the codes are of the split 'train': where a pipeline learned them, this is no held-out NELBO")
    return NelboPlan(recipe, device, cache, num_images, pipelines, curves, notes)


def _check_pipeline(name: str, folder: str, cache: CodeCache, device: torch.device) -> dict[str, Any]:
    argument, held = f"pipelines.{name}={folder!r}", cache.manifest
    pipeline = open_pipeline(folder, device, f"pipelines.{name}")
    try:
        cache.check(tokenizer=pipeline.vqvae)
        ends = end_terms(pipeline.scheduler.process)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    process, num_classes = pipeline.scheduler.process, pipeline.transformer.config.num_classes
    if list(pipeline.transformer.grid) != held.grid or process.num_codes != held.num_codes:
        raise ValueError(
            f"{argument}: it has a grid of {list(pipeline.transformer.grid)} out of {process.num_codes} codes, "
            f"{str(cache.path)!r} one of {held.grid} out of {held.num_codes}; encode images of the pipeline's size"
        )
    names = held.class_names
    labels = Labels(pipeline.id2label, pipeline.id2synset)
    if num_classes is not None and (num_classes != len(names) or not same_classes(labels, names)):
        raise ValueError(
            f"{argument}: its {num_classes} classes are not the {len(names)} of {str(cache.path)!r} "
            f"({', '.join(names[:5])}, ...); the ids would not mean the same"
        )
    return {
        "folder": folder,
        "weights_hash": pipeline_hash(pipeline),
        "process": {**asdict(process), "alpha": "log-linear, a_t = 1 - t", "end_terms": ends},
        "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
        "conditional": num_classes is not None,
    }


def read_curve(name: str, folder: str) -> list[dict[str, float]]:
    """Validation NELBO of a training run over its steps, from `metrics.jsonl`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No validation in it, or a line that cannot be read.
    """
    try:
        lines = MetricLines(folder).read()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"runs.{name}={folder!r}: no metrics.jsonl there; name the output_dir of a training"
        ) from error
    except ValueError as error:
        raise ValueError(f"runs.{name}={folder!r}: {error}") from error
    points = [
        {"step": line["step"], "bits_per_token": line[BITS], "stderr": line[f"{BITS}_stderr"]}
        for line in lines
        if BITS in line and None not in (line[BITS], line.get(f"{BITS}_stderr"))  # null: it was no finite number
    ]
    if not points:
        raise ValueError(f"runs.{name}={folder!r}: it logged no validation; train with validation_codes")
    return points


def _protocol(plan: NelboPlan) -> dict[str, Any]:
    recipe, held = plan.recipe, plan.cache.manifest
    return {
        "codes": {
            "folder": recipe.codes,
            "sha256": held.checksums,
            "data_fingerprint": held.data_fingerprint,
            "split": held.split,
            "tokenizer_hash": held.tokenizer_hash,
            "grid": held.grid,
            "num_codes": held.num_codes,
            "num_images": held.num_images,
        },
        "num_images": plan.num_images,
        "images": "the first of numpy's default_rng(seed).permutation(images of the cache), plain view",
        "num_times": recipe.num_times,
        "t_min": recipe.t_min,
        "times": {
            "proposal": f"t = s^{POWER}; s of constant density on equal strata, by the root mean square of dt/ds l",
            "strata": NUM_STRATA,
            "pilot_images": min(PILOT_IMAGES, plan.num_images),
            "flat_share": FLAT_SHARE,
            "stratified": "over the quantiles of the proposal, within each image",
        },
        "interval": "95 %, normal, over images as independent units; each image's noise levels are one cluster",
        "seed": recipe.seed,
        "seed_rule": SEED_RULE,
        "dtype": recipe.dtype,
        "batch_size": recipe.batch_size,
        "processes": rank_and_world()[1],
        "pipelines": plan.pipelines,
        "device": device_name(plan.device),
        "versions": versions(),
    }


def _cell(plan: NelboPlan, name: str) -> dict[str, Any]:
    """One pipeline: from its file if it was measured under this protocol, else now."""
    recipe, about, held = plan.recipe, plan.pipelines[name], plan.cache.manifest
    key = {
        "cell_version": CELL_VERSION,
        "pipeline_weights": about["weights_hash"],
        "codes": held.checksums,
        "num_images": plan.num_images,
        "num_times": recipe.num_times,
        "t_min": recipe.t_min,
        "seed": recipe.seed,
        "seed_rule": SEED_RULE,
        "strata": [POWER, NUM_STRATA, PILOT_IMAGES, FLAT_SHARE],
        "dtype": recipe.dtype,
    }
    path = Path(recipe.output_dir) / "cells" / f"{name}-{short_hash(key)}.json"
    done = read_cell(path, key, "bits_per_token")
    if done is not None:
        return {**done, "pipeline": name}
    refuse_changed(about, plan.device, f"pipelines.{name}")
    pipeline = open_pipeline(about["folder"], plan.device, f"pipelines.{name}", getattr(torch, recipe.dtype))
    rows = np.random.default_rng(recipe.seed).permutation(len(plan.cache))[: plan.num_images]
    codes, labels = plan.cache.batch(rows)
    process = pipeline.scheduler.process
    estimate = NelboEstimator(
        XDLMLoss(pipeline.transformer, process),
        codes,
        labels if about["conditional"] else None,
        recipe.seed,
        recipe.batch_size,
        plan.device,
        name,
    ).estimate(recipe.num_times, recipe.t_min)
    bits, below = estimate.bits_per_token, estimate.bits_below
    result = {
        "pipeline": name,
        "k": process.k,
        "definition": process.definition,
        "tokens": codes.shape[1],
        "bits_per_token": asdict(bits),
        "bits_per_image": {end: codes.shape[1] * value for end, value in asdict(bits).items()},
        "bits_per_token_below_t_min": asdict(below),
        "share_below_t_min": below.mean / bits.mean if bits.mean else 0.0,
        "density": _density(estimate.proposal, estimate.density),
        "bits_of_images": estimate.images.tolist(),
    }
    if rank_and_world()[0] == 0:
        write_json(path, {"key": key, "result": result})
    barrier()
    return result


def _density(proposal: TimeProposal, density: torch.Tensor) -> dict[str, list[float]]:
    return {
        "edges": proposal.edges.tolist(),
        "bits_per_token": density.tolist(),
        "proposal_probs": proposal.probs.tolist(),
    }
