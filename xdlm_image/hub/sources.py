"""What is known of a pipeline beside its weights: the files of its run, its tokenizer, its conversion, its evaluation.

This file owns finding and reading them, and that they belong to these weights. It never writes, and says nothing of
what it did not find.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from diffusers import VQModel

from xdlm_image.drawing.opening import pipeline_hash
from xdlm_image.evaluation.report import markdown
from xdlm_image.metric_lines import NAME, MetricLines
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.recipes.recipe_file import check_recipe_file
from xdlm_image.weights import weights_hash


@dataclass
class Sources:
    """What is known of a pipeline beside its weights; empty where nothing is.

    Attributes:
        recipe: The training run's resolved recipe.
        curve: Last value of every metric of the run, with the step it is of.
        codes: Manifest of the code cache it was trained on.
        tokenizer: Report of the tokenizer's training, and `tokenizer.json`.
        converted: Part -> its `provenance.json`.
        evaluation: `fid.json`, cut down to this pipeline.
        checked: Whether the evaluation is of these very weights, by their hash.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, tuple[int, float]] = field(default_factory=dict)
    codes: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    converted: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    checked: bool = True


def read_sources(
    pipeline: XDLMPipeline,
    evaluation: str | Path | None = None,
    row: str | None = None,
    tokenizer: str | Path | None = None,
) -> Sources:
    """Read what the pipeline's folder, its run, its tokenizer and its evaluation say. Arguments as of `write_card`."""
    sources = Sources()
    # the folder of a part is of this machine even where the pipeline came from a hub
    part = getattr(pipeline.transformer.config, "_name_or_path", None)
    folder = Path(part).resolve().parent if part and Path(part).is_dir() else None
    if folder is not None:
        if (folder / "provenance.json").is_file():
            sources.converted["pipeline"] = _json(folder / "provenance.json")
        run = folder.parent
        if folder.name == "pipeline" and (run / "recipe.yaml").is_file():
            sources.recipe = _recipe(run / "recipe.yaml")
            sources.curve = _last_values(run)
            codes = _json(_found(run, sources.recipe, "codes") / "manifest.json", missing={})
            if codes.get("tokenizer_hash") == weights_hash(pipeline.vqvae):  # else encoded again since
                sources.codes = codes
            if tokenizer is None:
                _read_tokenizer(sources, pipeline, _found(run, sources.recipe, "tokenizer"))
    if tokenizer is not None and not _read_tokenizer(sources, pipeline, Path(tokenizer)):
        raise ValueError(
            f"tokenizer={str(tokenizer)!r}: no tokenizer with the weights of this pipeline's; name the folder it was "
            "trained or converted to, or leave it out"
        )
    if evaluation is not None:
        _read_evaluation(sources, pipeline, folder, Path(evaluation), row)
    return sources


def _recipe(path: Path) -> dict[str, Any]:
    """A run's resolved recipe; ValueError where it is damaged, or holds what no recipe holds."""
    try:
        check_recipe_file(path)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as the run's recipe ({error}); restore it, or remove it") from error
    return dict(yaml.safe_load(path.read_text(encoding="utf-8-sig")))


def _json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); make it again, or remove it") from error


def _found(run: Path, recipe: Mapping[str, Any], key: str) -> Path:
    """A folder that a recipe names, seen from where the run was started, whatever the directory is now."""
    named, output = Path(str(recipe.get(key) or ".missing")), Path(str(recipe.get("output_dir") or "."))
    if output.parts and not output.is_absolute() and run.parts[-len(output.parts) :] == output.parts:
        return run.parents[len(output.parts) - 1] / named
    return named


def _last_values(run: Path) -> dict[str, tuple[int, float]]:
    last: dict[str, tuple[int, float]] = {}
    for line in MetricLines(run).read() if (run / NAME).is_file() else []:
        step = line.pop("step")
        last |= {name: (step, value) for name, value in line.items() if value is not None}
    return last


def _read_tokenizer(sources: Sources, pipeline: XDLMPipeline, folder: Path) -> bool:
    """Take a tokenizer's report and origin if its weights are the pipeline's; returns whether they are."""
    if not (folder / "config.json").is_file():
        return False
    try:
        vqvae = VQModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError):
        return False
    if weights_hash(vqvae) != weights_hash(pipeline.vqvae):
        return False
    sources.tokenizer = {**_json(folder / "report.json", missing={}), **_json(folder / "tokenizer.json", missing={})}
    if (folder / "provenance.json").is_file():
        sources.converted["tokenizer"] = _json(folder / "provenance.json")
    return True


def _read_evaluation(
    sources: Sources, pipeline: XDLMPipeline, folder: Path | None, path: Path, row: str | None
) -> None:
    """Take the part of `fid.json` that is about this pipeline."""
    if not path.is_file():
        raise FileNotFoundError(f"evaluation={str(path)!r}: no such file; `xdlm-image evaluate` writes fid.json")
    content = _json(path)
    try:
        pipelines = content["protocol"]["pipelines"]
        own = pipeline_hash(pipeline)
        by_hash = [name for name, about in pipelines.items() if about["weights_hash"] == own]
        by_folder = [name for name, about in pipelines.items() if Path(about["folder"]).resolve() == folder]
        named = [row] if row is not None else by_hash or by_folder
        if len(named) != 1 or named[0] not in pipelines:
            raise ValueError(
                f"evaluation={str(path)!r}: which row is of this pipeline? None has the hash of its weights; name one "
                f"with row: {', '.join(pipelines)}"
            )
        about = pipelines[named[0]]
        if about["tokenizer_hash"] != weights_hash(pipeline.vqvae):
            raise ValueError(f"row={named[0]!r} of {str(path)!r}: it was measured with another tokenizer's weights")
        content["protocol"]["pipelines"] = {named[0]: about}
        content["protocol"]["images"], content["image_sets"], content["floors"]["image_sets"] = {}, [], []
        content["cells"] = [cell for cell in content["cells"] if cell["pipeline"] == named[0]]
        for floor in content["floors"]["reconstruction"]:
            floor["pipelines"] = [name for name in floor["pipelines"] if name == named[0]]
        content["floors"]["reconstruction"] = [f for f in content["floors"]["reconstruction"] if f["pipelines"]]
        markdown(content)  # whether it can be shown
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"evaluation={str(path)!r}: is no fid.json of this version ({type(error).__name__}: {error}); run "
            "`xdlm-image evaluate` again"
        ) from error
    sources.evaluation, sources.checked = content, named[0] in by_hash
