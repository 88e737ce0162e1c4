"""The model card of a pipeline, from what `sources` found: data, recipe, FID with its protocol, origin, picture.

This file owns what a card says and that nothing private is in it: no path of this machine, no more of a recipe than
its numbers. What no file states is called unknown. It never measures anything; it draws only the picture.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from xdlm_image.data.images import read_image
from xdlm_image.drawing.grids import class_grid, save_grid
from xdlm_image.drawing.opening import class_names
from xdlm_image.drawing.sampler_settings import SamplerSettings
from xdlm_image.evaluation.report import WHOLE_PROTOCOL, markdown
from xdlm_image.evaluation.tables import rows
from xdlm_image.hub.sources import Sources, read_sources
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.pipelines.folder_check import PICTURE
from xdlm_image.pipelines.plain_card import PIPELINE_TAG, TAGS, how_to_load

STEPS, ROWS, COLUMNS = 8, 10, 8  # of the picture that is drawn where none is given
BATCH = 80
NO_PICTURE = "none"
HUB_DATASETS = {"fashion-mnist": "zalando-datasets/fashion_mnist"}  # name of `DataOptions` -> id on the hub
UNKNOWN = "not known"
# Settings that name a folder, or belong to one start and not to the training
PRIVATE = {
    "codes",
    "validation_codes",
    "init_from",
    "output_dir",
    "tokenizer",
    "folder",
    "root",
    "resume",
    "stop_after",
}
MARKUP = str.maketrans({"<": "&lt;", "[": "&#91;", "]": "&#93;", "`": "&#96;"})


def write_card(
    pipeline: XDLMPipeline,
    name: str,
    scratch: Path,
    evaluation: str | Path | None = None,
    row: str | None = None,
    tokenizer: str | Path | None = None,
    licence: str | None = None,
    dataset: str | None = None,
    picture: str | Path | None = None,
    seed: int = 0,
) -> tuple[str, dict[str, Path]]:
    """Write a model card, and make its picture.

    Args:
        pipeline: Loaded from its folder; the run is the folder above, `provenance.json` stands beside its weights.
        name: Of the model: a repository's id, or a folder.
        scratch: Folder for the picture.
        evaluation: `fid.json` of an evaluation of this pipeline.
        row: The pipeline's name in the evaluation; None finds it by the hash of its weights, or by its folder.
        tokenizer: Folder of the tokenizer, for its report and origin; None takes the one the run's recipe names.
        licence: Of the weights, as the hub calls it (`apache-2.0`).
        dataset: Id of the training data on the hub.
        picture: An image file to show; None draws one, `none` leaves it out.
        seed: Of the picture that is drawn.

    Returns:
        The text, and the files that go with it: name -> where.

    Raises:
        FileNotFoundError: A file that is named does not exist.
        ValueError: The evaluation has no such pipeline, the tokenizer is another, or a value cannot be used; before
            anything is drawn.
    """
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ValueError(f"licence={licence!r}: write it as the hub does, in small letters, as in apache-2.0")
    if dataset is not None and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", dataset):
        raise ValueError(f"dataset={dataset!r}: give the id of a data set on the hub, OWNER/NAME")
    if row is not None and evaluation is None:
        raise ValueError(f"row={row!r}: it names a row of evaluation, which is not given")
    if pipeline.vqvae is None:
        raise ValueError("vqvae is None: the card tells of the tokenizer and shows images; load it, or give card")
    sources = read_sources(pipeline, evaluation, row, tokenizer)
    sections = [
        how_to_load(pipeline, name),
        _data(sources),
        _training(sources),
        _quality(sources),
        _licence(sources, licence),
    ]
    header = _header(name, sources, licence, dataset).to_yaml(line_break="\n")
    files, caption = _picture(pipeline, scratch, picture, seed)
    shown = f"![Images of this model]({PICTURE})\n\n{caption}" if files else ""
    body = "\n\n".join(text.strip() for text in [f"# {name}", _summary(pipeline), shown, *sections] if text)
    return f"---\n{header}\n---\n\n{body}\n", files


# --- what the card says ---------------------------------------------------------------------------


def _header(name: str, sources: Sources, licence: str | None, dataset: str | None) -> ModelCardData:
    data_name = _data_name(sources)
    datasets = [dataset] if dataset else [HUB_DATASETS[data_name]] if data_name in HUB_DATASETS else None
    stated = sources.converted.get("pipeline", {}).get("licence")
    if licence is None and stated and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", stated):
        licence = stated
    results = _results(sources)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        license=licence,
        tags=TAGS,
        datasets=datasets,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _results(sources: Sources) -> list[EvalResult]:
    """The first feature layer's distances, one a step count, mean over seeds."""
    if not sources.evaluation:
        return []
    protocol = sources.evaluation["protocol"]
    extractor, reference = protocol["extractor"], protocol["reference"]
    layer = extractor["fid_layers"][0]
    metric = "FID" if extractor["is_inception"] else f"Fréchet distance of {extractor['name']}'s {layer} features"
    results = []
    first = next(iter(rows(sources.evaluation).values()))  # at the first of every setting
    for num_steps in sorted({cell["num_steps"] for cell in first}):
        values = [cell["fid"][layer] for cell in first if cell["num_steps"] == num_steps]
        results.append(
            EvalResult(
                task_type=PIPELINE_TAG,
                dataset_type=str(reference["name"]),
                dataset_name=str(reference["name"]),
                dataset_split=str(reference["split"]),
                metric_type="fid" if extractor["is_inception"] else "frechet-distance",
                metric_name=f"{metric}, {num_steps} step{'s' if num_steps > 1 else ''}",
                metric_value=round(statistics.fmean(values), 4),
            )
        )
    return results


def _summary(pipeline: XDLMPipeline) -> str:
    process, config = pipeline.scheduler.process, pipeline.transformer.config
    kind = {0.0: " (k = 0: MDLM)", 1.0: " (k = 1: UDLM)"}.get(process.k, "")
    rows, columns = pipeline.transformer.grid
    height, width = pipeline.image_size
    names = class_names(pipeline)
    if config.num_classes is None:
        classes = "The model is unconditional."
    else:
        shown = "; ".join(map(one_line, names[:12])) + ("; ..." if len(names) > 12 else "")
        classes = f"{len(names)} classes: {shown}."
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    return (
        "Images in few steps by discrete diffusion on VQ codes: XDLM, "
        "[arXiv 2602.01362](https://arxiv.org/abs/2602.01362).\n\n"
        f"- images of {height} x {width} pixels, {pipeline.vqvae.config.out_channels} channel(s)\n"
        f"- {rows} x {columns} codes out of {process.num_codes}\n"
        f"- noise: k = {process.k:g}{kind}, definition {process.definition}\n"
        f"- transformer: {parameters:,} parameters, {config.num_layers} blocks; guidance "
        f"{'possible' if pipeline.config.supports_guidance and config.num_classes is not None else 'not trained for'}\n"
        f"\n{classes}"
    )


def _data_name(sources: Sources) -> str | None:
    return (sources.tokenizer.get("data") or {}).get("name")


def _data(sources: Sources) -> str:
    name = _data_name(sources)
    shown = "a folder of images, not published with this card" if name == "folder" else name or UNKNOWN
    lines = ["## Data", "", f"Tokenizer trained on: {shown}."]
    codes, tokenizer = sources.codes, sources.tokenizer
    if codes:
        views = "plain and mirrored" if codes.get("num_views") == 2 else "plain"
        lines += [
            "",
            f"Transformer trained on the codes of {codes['num_images']:,} images of the split {codes['split']}, "
            f"{views}, {codes['image_size']} x {codes['image_size']} pixels, {codes['channels']} channel(s), crop "
            f"{codes['crop']}; fingerprint of the images {codes['data_fingerprint'][:12]}.",
        ]
    else:
        lines += ["", f"Images the transformer was trained on: {UNKNOWN}."]
    if "psnr" in tokenizer:
        lines += [
            "",
            f"Tokenizer, on {tokenizer['images']:,} images of the split {tokenizer['split']}: PSNR "
            f"{tokenizer['psnr']:.2f} dB, {tokenizer['codes_used']} of {tokenizer['num_codes']} codes used, perplexity "
            f"{tokenizer['perplexity']:.0f}{_rfid(tokenizer)}.",
        ]
    else:
        lines += ["", f"Quality of the tokenizer: {UNKNOWN}."]
    return "\n".join(lines)


def _rfid(report: Mapping[str, Any]) -> str:
    if not report.get("rfid"):
        return ""
    judge = report["rfid_extractor"]
    values = ", ".join(f"{value:.3f} ({layer} features)" for layer, value in report["rfid"].items())
    by = "" if judge["is_inception"] else f", by {judge['name']}, which is not Inception"
    return f"; Fréchet distance of its reconstructions (rFID) {values}{by}"


def _training(sources: Sources) -> str:
    if not sources.recipe:
        text = "The weights were converted, see below." if sources.converted.get("pipeline") else f"Recipe: {UNKNOWN}."
        return f"## Training\n\n{text}"
    lines = ["## Training", ""]
    loss, bits = sources.curve.get("train/loss"), sources.curve.get("validation/bits_per_token")
    error = sources.curve.get("validation/bits_per_token_stderr")
    lines += [f"- training loss: {loss[1]:.3f} nats a code at step {loss[0]:,}" if loss else f"- loss: {UNKNOWN}"]
    if bits:
        spread = f" ± {error[1]:.2f} (standard error)" if error else ""
        lines += [f"- validation NELBO: {bits[1]:.2f}{spread} bits a code at step {bits[0]:,}"]
    else:
        lines += [f"- validation NELBO: {UNKNOWN}"]
    if sources.curve.get("train/images"):
        lines += [f"- images seen: {sources.curve['train/images'][1]:,.0f}"]
    shown = yaml.safe_dump(_without_paths(sources.recipe), sort_keys=False, allow_unicode=True).strip()
    return "\n".join([*lines, "", "The whole recipe, folders left out:", "", "```yaml", shown, "```"])


def _without_paths(value: Any) -> Any:
    """Settings without the folders of somebody's machine: keys that name one, and every text that looks like one."""

    def is_path(item: Any) -> bool:
        return isinstance(item, str) and re.search(r"[/\\~]", item) is not None

    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items() if key not in PRIVATE and not is_path(item)}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value if not is_path(item)]
    return value


def _quality(sources: Sources) -> str:
    if not sources.evaluation:
        return f"## Quality\n\nDistances to real images: {UNKNOWN}."
    page = markdown(sources.evaluation).replace(WHOLE_PROTOCOL, "The whole protocol stands below.")
    title, _, body = page.partition("\n")
    body = re.sub(r"^#", "##", body, flags=re.MULTILINE)
    protocol = sources.evaluation["protocol"]
    name = next(iter(protocol["pipelines"]))
    note = (
        "" if sources.checked else f"\n> These numbers were measured under the name `{name}`. Whether of these very "
        "weights, their hash does not tell.\n"
    )  # fmt: skip
    machines = sorted({f"{c['device']}, batches of {c['batch_size']}" for c in sources.evaluation["cells"]})
    whole = json.dumps(_without_paths(protocol), indent=2, ensure_ascii=False)
    return (
        f"## {title.lstrip('# ')}\n{note}{body.rstrip()}\n\nDrawn on: {'; '.join(machines)}.\n\n"
        f"<details><summary>The whole protocol</summary>\n\n```json\n{whole}\n```\n\n</details>"
    )


def _licence(sources: Sources, licence: str | None) -> str:
    lines = ["## Licence and origin", "", "Code in this folder: Apache-2.0, of the package `xdlm-image`."]
    if licence is not None:
        lines += [f"Weights: {licence}, as stated by whoever exported them."]
    elif "pipeline" not in sources.converted:
        lines += ["Weights: no licence stated."]
    for part, about in sources.converted.items():
        what = "network" if part == "pipeline" else part
        said = {key: one_line(str(value)) for key, value in about.items() if value}
        lines += [
            "",
            f"The weights of the {what} were converted, not trained here:",
            "",
            f"- from `{said.get('source_file', UNKNOWN)}`, SHA-256 `{said.get('source_sha256', UNKNOWN)}`, "
            f"format {said.get('source_format', UNKNOWN)}",
            f"- published at: {said.get('url', UNKNOWN)}",
            f"- licence, as given at the conversion: {said.get('licence', 'not stated')}",
            f"- converted by {said.get('converted_by', UNKNOWN)}",
            *(f"- {one_line(note)}" for note in _notes(about)),
        ]
    if sources.recipe:
        begins = "random weights" if sources.recipe.get("init_from") is None else "the weights of another network"
        lines += ["", f"The transformer was trained from {begins} by the recipe above."]
    if "tokenizer" not in sources.converted:
        origin = "was trained with the same package" if sources.tokenizer else f"comes from: {UNKNOWN}"
        lines += ["", f"The tokenizer {origin}."]
    return "\n".join(lines)


def one_line(text: str) -> str:
    """A text of somebody else's (a class name, a note) in a line of the card: no new line, HTML, picture or link."""
    return " ".join(text.split()).translate(MARKUP)


def _notes(origin: Mapping[str, Any]) -> list[str]:
    notes = origin.get("notes") or []
    return [notes] if isinstance(notes, str) else [str(note) for note in notes]


# --- picture --------------------------------------------------------------------------------------


def _picture(
    pipeline: XDLMPipeline, scratch: Path, picture: str | Path | None, seed: int
) -> tuple[dict[str, Path], str]:
    """Files that go with the card, and the line below the picture."""
    path = scratch / PICTURE
    if picture == NO_PICTURE:
        return {}, ""
    if picture is not None:
        if not Path(picture).is_file():
            raise FileNotFoundError(f"picture={str(picture)!r}: no such file")
        try:
            pixels = np.asarray(read_image(picture, 3))  # the pixels alone: no camera, no place, no author
        except ValueError as error:
            raise ValueError(f"picture={str(picture)!r}: {error}") from error
        Image.fromarray(pixels).save(path, format="PNG")
        return {PICTURE: path}, ""
    names = class_names(pipeline)
    rows = min(ROWS, max(1, len(names)))
    ids = [round(i * (len(names) - 1) / max(1, rows - 1)) if names else 0 for i in range(rows)]
    images = class_grid(pipeline, ids, COLUMNS, seed, SamplerSettings(STEPS), BATCH)
    save_grid(path, images, [names[i] for i in ids] if names else None)
    return {PICTURE: path}, f"Drawn with {STEPS} steps, no guidance, seed {seed}; none was picked out."
