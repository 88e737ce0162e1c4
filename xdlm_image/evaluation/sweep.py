"""The verb `evaluate`: FID of pipelines over step counts, checked first, resumable, with its whole protocol.

This file owns the order of a sweep and what `fid.json` holds. `plan` checks what is asked for, images come from
`drawing`, what the extractor saw of them from `measuring`, numbers from `comparing`, pages from `report`. No drawn
image is written to disk besides the grids, unless `images_dir` asks for it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from xdlm_image.data.labels import labels_of_folders
from xdlm_image.devices import uncompiled
from xdlm_image.drawing.draw import DrawnBatches, draw_all
from xdlm_image.drawing.drawn_codes import DrawnCodes
from xdlm_image.drawing.drawn_pictures import DrawnPictures
from xdlm_image.drawing.foreign_pipelines import ForeignPipeline
from xdlm_image.drawing.given_images import GivenImages
from xdlm_image.drawing.grids import class_grid, save_grid
from xdlm_image.drawing.opening import open_any_pipeline, refuse_changed
from xdlm_image.drawing.pictures import has_key
from xdlm_image.drawing.sampler_settings import SamplerSettings, nfe
from xdlm_image.evaluation.cells import read_cell
from xdlm_image.evaluation.comparing import distances, fids
from xdlm_image.evaluation.further_references import fids_further, floors_further
from xdlm_image.evaluation.measuring import Measured, cached_measure, measure, short_hash
from xdlm_image.evaluation.plan import Plan, check, device_name, metric_name, protocol, versions
from xdlm_image.evaluation.plots import write_plots
from xdlm_image.evaluation.references import Reference, make_reference
from xdlm_image.evaluation.report import write_html, write_report
from xdlm_image.evaluation.tables import SETTINGS, text
from xdlm_image.features.feature_set import FeatureSet
from xdlm_image.files import refuse_unwritable, write_json
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.processes import only_command
from xdlm_image.ranks import barrier, rank_and_world, sum_over_ranks
from xdlm_image.recipes import EvaluateRecipe
from xdlm_image.recipes.evaluation import FEATURE_METRICS, VARIED
from xdlm_image.seeds import SEED_RULE
from xdlm_image.tokenizer.codes import load_tokenizer

CELL_VERSION = 4  # raise it when what a cell means changes: older cells are then measured again
LATER_AXES = ("sampler", "guidance_interval")
GRID_STEPS = 8
GRID_CLASSES = 10
GRID_IMAGES = 8


def evaluate(recipe: EvaluateRecipe) -> Path:
    """Measure every pipeline at every step count and seed; write numbers, pages, plots and grids (see `report`).

    Each finished cell is a file in `output_dir/cells`, named after a hash of everything that decides its numbers, and
    the codes of its images lie in `output_dir/codes`: a killed sweep resumes there, and what belongs to another
    protocol is never taken for this one. Several processes (`accelerate launch`, torchrun) share the images of each
    cell and draw the same.

    Returns:
        The path of `fid.json`.

    Raises:
        FileNotFoundError, ValueError: A pipeline, the extractor or the data do not exist or do not fit, or another
            command is at work in `output_dir`; before anything is drawn.
    """
    plan = check(recipe)
    output = Path(recipe.output_dir)
    if recipe.images_dir is not None:
        refuse_unwritable(recipe.images_dir, "images_dir")
    with only_command(output, rank_and_world()[0] == 0):
        _sweep(plan, output)
        barrier()
    return output / "fid.json"


def _sweep(plan: Plan, output: Path) -> None:
    recipe = plan.recipe
    reference = plan.reference or _measured_reference(plan, output)
    tokenizers = {name: about["tokenizer_hash"] for name, about in plan.pipelines.items()}
    if plan.shown is not None and recipe.feature_metrics:
        reference.images.kept = _features_of(plan.shown, plan, output)
    content: dict[str, Any] = {
        "schema_version": 8,
        "metric": metric_name(plan.extractor),
        "warnings": plan.warnings,
        "protocol": protocol(plan, reference),
        "floors": {
            **reference.floors(tokenizers, plan.num_samples, {len(given) for given in plan.given.values()}),
            **floors_further(reference, plan.further, tokenizers),
        },
        "image_sets": [_image_set(plan, name, reference) for name in plan.given],
    }
    main = rank_and_world()[0] == 0
    cells = [
        _cell(plan, name, SamplerSettings(num_steps, *variant), seed, reference)
        for name, variant, num_steps, seed in itertools.product(
            recipe.pipelines, recipe.variants, recipe.num_steps, recipe.seeds
        )
    ]
    done = sum(cell.result is not None for cell in cells)
    with tqdm(total=len(cells), initial=done, desc="cells", unit="cell", disable=not (main and cells)) as progress:
        for name in recipe.pipelines:
            left = [cell for cell in cells if cell.pipeline == name and cell.result is None]
            key = _key_of_pictures(plan, name)
            if not left and all(has_key(path, key) for path in _pictures_of(name, output)):
                continue
            refuse_changed(plan.pipelines[name], plan.device, f"pipelines.{name}")
            dtype = getattr(torch, recipe.dtype)
            pipeline = open_any_pipeline(plan.pipelines[name]["folder"], plan.device, f"pipelines.{name}", dtype)
            if recipe.compile:
                _denoiser(pipeline).compile(fullgraph=not isinstance(pipeline, ForeignPipeline))
            for cell in left:
                cell.result = _measured(cell, plan, pipeline, reference)
                content["cells"] = [cell.result for cell in cells if cell.result is not None]
                if main:
                    write_report(output, content)
                progress.update()
            if main:
                with uncompiled(recipe.compile):
                    _draw_pictures(plan, pipeline, name, output, key)
    content["cells"] = [cell.result for cell in cells]
    if main:
        write_report(output, content)
        write_plots(output, content)
        write_html(output, content)


def _measured_reference(plan: Plan, output: Path) -> Reference:
    """The reference images measured, with the reconstructions of every tokenizer among the pipelines."""
    assert plan.images is not None
    folders = {
        about["tokenizer_hash"]: Path(about["folder"]) / "vqvae"
        for about in plan.pipelines.values()
        if about["tokenizer_hash"] is not None
    }
    tokenizers = {tokenizer: load_tokenizer(folder, plan.device) for tokenizer, folder in folders.items()}
    recipe = plan.recipe
    return make_reference(
        output / "reference",
        str(recipe.data.name),
        *plan.images,
        plan.extractor,
        tokenizers,
        [plan.num_samples],
        recipe.batch_size,
        recipe.feature_metrics,
    )


def _features_of(shown: GivenImages, plan: Plan, output: Path) -> FeatureSet | None:
    """Features of the images in a reference file: real ones for precision, recall and KID, as ADM takes them."""
    return cached_measure(
        output / "reference",
        "images-in-reference",
        shown.describe(),
        plan.extractor,
        lambda: shown.batches(plan.recipe.batch_size),
        len(shown),
        features=output / "reference",
    ).kept


def _image_set(plan: Plan, name: str, reference: Reference) -> dict[str, Any]:
    """Images that are already drawn: from its file if they were measured against this reference, else now."""
    given = plan.given[name]
    key = {"cell_version": CELL_VERSION, **given.describe(), **_judged_by(plan, reference)}
    path = Path(plan.recipe.output_dir) / "cells" / f"{name}-{short_hash(key)}.json"
    done = read_cell(path, key, "fid")
    if done is not None:
        return {**done, "name": name}
    main, world = rank_and_world()[0] == 0, rank_and_world()[1]
    with tqdm(total=-(-len(given) // world), desc=name, unit="image", disable=not main) as bar:
        batches, keep = given.batches(plan.recipe.batch_size), len(given) if plan.keeps_features else None
        measured = measure(plan.extractor, batches, None, bar, keep)
    result = {
        "name": name,
        **given.describe(),
        **distances(measured, reference.images, plan.device, plan.recipe.feature_metrics),
        **fids_further(measured, plan.further),
        "class_accuracy": measured.class_accuracy if (given.labels >= 0).all() else None,
    }
    if main:
        write_json(path, {"key": key, "result": result})
    barrier()
    return result


def _judged_by(plan: Plan, reference: Reference) -> dict[str, Any]:
    left_out = sorted(set(FEATURE_METRICS) - set(plan.recipe.feature_metrics))
    further = {name: other.images.hashes for name, other in plan.further.items()}
    return {
        **({"feature_metrics_left_out": left_out} if left_out else {}),
        **({"further_references": further} if further else {}),
        "reference": reference.about["images"],
        "reference_statistics": reference.images.hashes,
        "extractor": plan.extractor.weights_hash,
        "class_accuracy": plan.extractor.judge.weights_hash if plan.extractor.judge else plan.extractor.judges_classes,
    }


@dataclass
class _Cell:
    """One pipeline at one step count and seed."""

    pipeline: str
    settings: SamplerSettings
    seed: int
    label: str
    drawn: dict[str, Any]  # what decides its images
    key: dict[str, Any]  # what decides its numbers
    path: Path
    pictures: DrawnPictures | None
    result: dict[str, Any] | None  # None: to be measured


def _axes(settings: SamplerSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("num_steps", *VARIED)}


def _cell(plan: Plan, name: str, settings: SamplerSettings, seed: int, reference: Reference) -> _Cell:
    """A cell, with its result if it was measured under this protocol and its images are where they are asked for."""
    recipe = plan.recipe
    conditional = plan.pipelines[name]["conditional"]
    reconstructions = reference.reconstructions.get(plan.pipelines[name]["tokenizer_hash"])
    axes = _axes(settings)
    drawn = {
        "pipeline_weights": plan.pipelines[name]["weights_hash"],
        # what is not chosen is no key: cells from before there was the choice stay good
        **{axis: value for axis, value in axes.items() if axis not in LATER_AXES or value is not None},
        "dtype": recipe.dtype,
        "compile": recipe.compile,
        "seed": seed,
        "seed_rule": SEED_RULE,
        # our own networks' weights tell it
        **({"num_classes": len(plan.class_names)} if "class" in plan.pipelines[name] else {}),
    }
    key = {
        "cell_version": CELL_VERSION,
        **drawn,
        "num_samples": plan.num_samples,
        "reconstructions": None if reconstructions is None else reconstructions.hashes,
        **_judged_by(plan, reference),
        **({} if conditional else {"conditional": False}),
    }
    variant = "".join(
        f"-{short}{'to'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for short, value, usual in (
            ("guidance", settings.guidance_scale, 1),
            ("temperature", settings.temperature, 1),
            ("", settings.time_grid, None),
            ("", settings.sampler, None),
            ("guided", settings.guidance_interval, None),
        )
        if value != usual
    )
    label = f"{name}-steps{settings.num_steps}{variant}-seed{seed}"
    path = Path(recipe.output_dir) / "cells" / f"{label}-{short_hash(key)}.json"
    pictures = None
    if recipe.images_dir is not None:
        folders = plan.class_names if conditional else None
        pictures = DrawnPictures(Path(recipe.images_dir) / label, drawn, plan.num_samples, folders)
    done, result = read_cell(path, key, "fid"), None
    lacks = done is None or (pictures is not None and not pictures.is_whole())
    if sum_over_ranks(lacks, plan.device) == 0:  # of all ranks: none has written a cell before all have read theirs
        assert done is not None
        if pictures is not None and recipe.images_npz:
            pictures.pack()
        known = {"pipeline": name, **axes}  # a pair is a tuple, in a file it was a list
        result = {**known, **{key: value for key, value in done.items() if key not in known}}
    return _Cell(name, settings, seed, label, drawn, key, path, pictures, result)


def _measured(cell: _Cell, plan: Plan, pipeline: Any, reference: Reference) -> dict[str, Any]:
    """Draw a cell's images, measure them and keep the numbers in its file."""
    recipe, label, settings, pictures = plan.recipe, cell.label, cell.settings, cell.pictures
    conditional = plan.pipelines[cell.pipeline]["conditional"]
    reconstructions = reference.reconstructions.get(plan.pipelines[cell.pipeline]["tokenizer_hash"])
    main, world = rank_and_world()[0] == 0, rank_and_world()[1]
    now: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "processes": world,
        "device": device_name(plan.device),
        "versions": versions(),
    }
    if main:
        others = set(cell.path.parent.glob(f"{label}-" + "?" * 12 + ".json")) - {cell.path}
        if others:
            tqdm.write(f"{label}: {len(others)} result(s) of another protocol are left aside; measuring again")
    store = num_codes = None
    if isinstance(pipeline, XDLMPipeline):
        num_codes = int(pipeline.vqvae.config.num_vq_embeddings)
        codes_folder = Path(recipe.output_dir) / "codes" / f"{label}-{short_hash(cell.drawn)}"
        store = DrawnCodes(codes_folder, cell.drawn, plan.num_samples, pipeline.transformer.grid, num_codes, now)
    num_classes = len(plan.class_names)
    batches = DrawnBatches(pipeline, plan.num_samples, num_classes, cell.seed, settings, recipe.batch_size, store)
    rows_before = 0 if store else pipeline.rows
    with tqdm(total=-(-plan.num_samples // world), desc=label, unit="image", leave=False, disable=not main) as bar:
        kept = batches if pictures is None else pictures.keep(batches)
        measured = measure(plan.extractor, kept, num_codes, bar, plan.num_samples if plan.keeps_features else None)
    if pictures is not None and recipe.images_npz:
        pictures.pack()
    count = measured.statistics[plan.extractor.fid_layers[0]].count
    if count != plan.num_samples:
        raise RuntimeError(f"{label}: {count} images were measured, num_samples is {plan.num_samples}")
    drawn_by = store.drawn_by if store and store.drawn_by else [now]  # by an earlier start, maybe
    result = {
        "pipeline": cell.pipeline,
        **_axes(settings),
        "nfe": nfe(pipeline, settings) if store else (pipeline.rows - rows_before) / max(1, batches.called),
        "seed": cell.seed,
        "num_samples": count,
        **distances(measured, reference.images, plan.device, recipe.feature_metrics),
        **fids_further(measured, plan.further),
        **_against_reconstructions(measured, reconstructions),
        "class_accuracy": measured.class_accuracy if conditional else None,
        "sampling_seconds": round(batches.seconds(plan.device), 3),  # of all processes together
        "images_per_second": float(f"{batches.images_per_second(plan.device, drawn_by[0]['processes']):.4g}"),
        **drawn_by[0],
        **({"drawn_by": drawn_by} if len(drawn_by) > 1 else {}),
    }
    if main:
        write_json(cell.path, {"key": cell.key, "result": result})
    barrier()
    return result


def _denoiser(pipeline: XDLMPipeline | ForeignPipeline) -> torch.nn.Module:
    found: torch.nn.Module = pipeline.denoiser if isinstance(pipeline, ForeignPipeline) else pipeline.transformer
    return found


def _against_reconstructions(measured: Measured, reconstructions: Measured | None) -> dict[str, Any]:
    if reconstructions is None:
        return {"fid_against_reconstructions": None, "code_pair_total_variation": None}
    assert measured.pairs is not None and reconstructions.pairs is not None
    return {
        "fid_against_reconstructions": fids(measured, reconstructions),
        "code_pair_total_variation": measured.pairs.total_variation(reconstructions.pairs),
    }


def _pictures_of(name: str, output: Path) -> tuple[Path, Path]:
    return output / f"grid_{name}.png", output / f"strip_{name}.png"


def _key_of_pictures(plan: Plan, name: str) -> str:
    recipe = plan.recipe
    return short_hash(
        {
            "pipeline_weights": plan.pipelines[name]["weights_hash"],
            "settings": recipe.variants[0],
            "num_steps": sorted(recipe.num_steps),
            "seed": recipe.seeds[0],
            "seed_rule": SEED_RULE,
            "dtype": recipe.dtype,
            "classes": plan.class_names,
            "layout": [GRID_STEPS, GRID_CLASSES, GRID_IMAGES],
        }
    )


def _draw_pictures(plan: Plan, pipeline: Any, name: str, output: Path, key: str) -> None:
    """A class grid at 8 steps (or the nearest count), and the same seeds over all step counts; first settings."""
    recipe, seed = plan.recipe, plan.recipe.seeds[0]
    grid, strip = _pictures_of(name, output)
    if has_key(grid, key) and has_key(strip, key):
        return
    names = labels_of_folders(plan.class_names).id2label
    count = min(GRID_CLASSES, len(names))
    ids = [round(i * (len(names) - 1) / max(1, count - 1)) for i in range(count)]
    steps = min(recipe.num_steps, key=lambda n: (abs(np.log2(n / GRID_STEPS)), n))
    settings = SamplerSettings(steps, *recipe.variants[0])
    conditional = plan.pipelines[name]["conditional"]
    images = class_grid(pipeline, ids, GRID_IMAGES, seed, settings, recipe.batch_size)
    row_names = [names[i].partition(",")[0] for i in ids] if conditional else None
    chosen = {setting: getattr(settings, setting) for setting in SETTINGS}
    said = "".join(f", {SETTINGS[key]} {text(value)}" for key, value in chosen.items() if value not in (None, 1))
    save_grid(grid, images, row_names, title=f"{name}, {steps} steps{said}, seed {seed}", key=key)
    strips = [
        draw_all(pipeline, ids, seed, replace(settings, num_steps=num_steps), recipe.batch_size)
        for num_steps in sorted(recipe.num_steps)
    ]
    save_grid(
        strip,
        torch.stack(strips),
        [f"{num_steps} steps" if num_steps > 1 else "1 step" for num_steps in sorted(recipe.num_steps)],
        title=f"{name}{said}, seed {seed}: the same random numbers at every step count",
        key=key,
    )
