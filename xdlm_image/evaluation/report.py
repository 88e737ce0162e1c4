"""What a sweep leaves to read: `fid.json`, the table `fid.md` and the plot `fid.png`.

This file owns their layout; the numbers come from `sweep`. Every file is written atomically.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xdlm_image.files import write_atomic, write_json, write_text

Content = dict[str, Any]  # fid.json, see `sweep.evaluate`
SETTINGS = {"guidance_scale": "guidance", "temperature": "temperature", "time_grid": "grid"}  # axes beside the steps


def _mean_kid(cell: Content) -> float | None:
    return None if cell["kid"] is None else 1000 * cell["kid"]["mean"]


def _mean_score(cell: Content) -> float | None:
    return None if cell["inception_score"] is None else cell["inception_score"]["mean"]


def _fid(layer: str, found: Content) -> float:
    return found["fid"][layer]


def _worst_class(cell: Content) -> float | None:
    return None if not cell["kid_of_classes"] else 1000 * max(cell["kid_of_classes"].values())


FEATURE_TABLES: list[tuple[str, str, Callable[[Content], float | None]]] = [
    ("KID x 1000", "Unbiased MMD, mean of subsets of 1,000 images.", _mean_kid),
    ("KID x 1000 of the worst class", "The class whose images are farthest from the real ones of it.", _worst_class),
    (
        "Precision (%)",
        "Share of samples inside the manifold of real images (k = 3).",
        lambda c: _percent(c["precision"]),
    ),
    ("Recall (%)", "Share of real images in the manifold of samples (k = 3).", lambda c: _percent(c["recall"])),
    ("Coverage (%)", "Share of real images that have a sample near (k = 3).", lambda c: _percent(c["coverage"])),
]


def write_report(output_dir: str | Path, content: Content) -> None:
    """Write `fid.json` and `fid.md` of what is measured so far."""
    write_json(Path(output_dir) / "fid.json", content)
    write_text(Path(output_dir) / "fid.md", markdown(content))


def mean_and_spread(values: list[float]) -> str:
    """`12.34`, or `12.34 ± 0.560` (standard deviation, n - 1) of several; a dash for none."""
    if not values:
        return "–"
    mean = number(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {number(statistics.stdev(values))}"


def number(value: float) -> str:
    """Three decimals below 10, two below 100, one above: distances of small classifiers can be small."""
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"


def markdown(content: Content) -> str:
    """The Markdown page: one table for each feature layer and reference, floors beneath, the protocol last."""
    protocol, floors = content["protocol"], content["floors"]
    extractor = protocol["extractor"]
    lines = ["# Image quality over sampling steps", "", content["metric"] + ".", ""]
    for warning in content["warnings"]:
        lines += [f"> **Warning:** {warning}", ""]
    if content["image_sets"]:
        lines += ["## Sets of images", "", *_image_sets(content), ""]
    for layer in extractor["fid_layers"] if content["cells"] else []:
        lines += [f"## Features `{layer}`, against the real images", ""]
        lines += metric_table(content, "fid", layer)
        lines += ["", "Floors: " + "; ".join(_floors(content, functools.partial(_fid, layer))) + ".", ""]
        lines += [f"## Features `{layer}`, against reconstructions of the real images", ""]
        lines += metric_table(content, "fid_against_reconstructions", layer)
        lines += [
            "",
            "The tokenizer's own error is out of this table. Floors: "
            + "; ".join(
                f"reconstructed {_floor_images(content)} ({_users(floor)}) "
                f"{number(floor['train']['fid_against_reconstructions'][layer])}"
                for floor in _with_train(floors)
            )
            + ".",
            "",
        ]
    for title, explanation, value in FEATURE_TABLES:
        if any(value(cell) is not None for cell in content["cells"]):
            lines += [
                f"## {title}, features `{extractor['fid_layers'][0]}`",
                "",
                *_table(content, value),
                "",
                explanation,
            ]
            lines[-1] += " Floors: " + "; ".join(_floors(content, value)) + "."
            lines += [""]
    for distance, where in (("near", "neighbouring positions"), ("far", "positions half a grid apart")):
        if not content["cells"]:
            break
        lines += [f"## Pairs of codes at {where}: total variation to held-out images (%)", ""]
        lines += _table(content, lambda cell: _percent((cell["code_pair_total_variation"] or {}).get(distance)))  # noqa: B023
        lines += ["", "Needs no extractor; falls as codes drawn together fit each other. Floors: "]
        lines[-1] += "; ".join(
            f"{floor['train']['num_images']} {_floor_images(content)} ({_users(floor)}) "
            f"{number(100 * floor['train']['code_pair_total_variation'][distance])}"
            for floor in _with_train(floors)
        )
        lines += [""]
    if any(cell["class_accuracy"] is not None for cell in content["cells"]):
        lines += ["## Class accuracy (%), judged by the extractor's own classifier", ""]
        lines += _table(content, lambda cell: _percent(cell["class_accuracy"]))
        real = floors["reference_class_accuracy"]
        lines += ["", f"The same classifier on the real reference images: {100 * real:.2f} %.", ""]
    if content["cells"]:
        lines += ["## Images per second", "", *_table(content, lambda cell: cell["images_per_second"]), ""]
    reference, sampler = protocol["reference"], protocol["sampler"]
    lines += [
        "## Protocol",
        "",
        f"{protocol['num_samples']} images a cell, {protocol['samples_per_class']} a class; "
        f"seeds {', '.join(map(str, protocol['seeds']))}; "
        f"guidance {_listed(sampler['guidance_scale'])}, temperature {_listed(sampler['temperature'])}, time grid "
        f"{_listed(sampler['time_grid'])}; NFE = steps, twice that with guidance; network in "
        f"{sampler['dtype']}{' (compiled)' if sampler['compile'] else ''}; "
        f"reference: {reference['num_images']} images, split {reference['split']} of {reference['name']}, "
        f"{reference['channels']} x {reference['image_size']} x {reference['image_size']}, fingerprint "
        f"{reference['fingerprint'][:12]}; extractor {extractor['name']} "
        f"{extractor['weights_sha256'][:12]}; uint8: {protocol['uint8_rule']}. "
        "The whole protocol is in `fid.json`.",
        "",
    ]
    return "\n".join(lines)


def _image_sets(content: Content) -> list[str]:
    """A row a set of images, a column a metric that any of them has."""
    layers = content["protocol"]["extractor"]["fid_layers"]
    columns: list[tuple[str, Callable[[Content], float | None]]] = []
    for layer in layers:
        columns.append((f"FID `{layer}`", functools.partial(_fid, layer)))
    columns += [(title, value) for title, _, value in FEATURE_TABLES]
    columns += [("class accuracy (%)", lambda found: _percent(found["class_accuracy"]))]
    columns = [(title, value) for title, value in columns if any(value(of) is not None for of in content["image_sets"])]
    lines = ["| | images | " + " | ".join(title for title, _ in columns) + " |", "|---|---:|" + "---:|" * len(columns)]
    for found in content["image_sets"]:
        values = [value(found) for _, value in columns]
        texts = ["–" if value is None else number(value) for value in values]
        lines.append(f"| {found['name']} | {found['num_images']} | " + " | ".join(texts) + " |")
    return lines


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _with_train(floors: Content) -> list[Content]:
    """Floors of tokenizers for which as many real images as a cell has were measured."""
    return [floor for floor in floors["reconstruction"] if floor["train"] is not None]


def _users(floor: Content) -> str:
    return ", ".join(floor["pipelines"])


def _floor_images(content: Content) -> str:
    """What the images of the floor are: `training images`, or those of the split that stands in for them."""
    split = (content["floors"]["train_against_reference"] or {}).get("split", "train")
    return "training images" if split == "train" else f"{split} images"


def _floors(content: Content, value: Callable[[Content], float | None]) -> list[str]:
    floors, texts = content["floors"], []
    for floor in floors["reconstruction"]:
        if (found := value(floor)) is not None:
            texts.append(f"reconstruction of {_users(floor)} {number(found)}")
    train = floors["train_against_reference"]
    if train is not None and (found := value(train)) is not None:
        texts.append(f"{train['num_images']} {_floor_images(content)} against the reference {number(found)}")
    return texts


def metric_table(content: Content, metric: str, layer: str) -> list[str]:
    """Lines of one Markdown table: a row a pipeline, a column a step count, mean and spread over seeds.

    Args:
        content: Of a `fid.json`.
        metric: `fid` or `fid_against_reconstructions`.
        layer: Feature layer.
    """
    return _table(content, lambda cell: (cell[metric] or {}).get(layer))


def _table(content: Content, value: Callable[[Content], float | None]) -> list[str]:
    """A row a pipeline, a column a step count; a dash where no cell has a value."""
    protocol = content["protocol"]
    steps = protocol["sampler"]["num_steps"]
    lines = [
        "| pipeline | " + " | ".join(f"{n} step{'s' if n > 1 else ''}" for n in steps) + " |",
        "|---|" + "---:|" * len(steps),
    ]
    for label, cells in rows(content).items():
        texts = []
        for num_steps in steps:
            values = [value(cell) for cell in cells if cell["num_steps"] == num_steps]
            texts.append(mean_and_spread([v for v in values if v is not None]))
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    return lines


def rows(content: Content) -> dict[str, list[Content]]:
    """Label -> cells of every pipeline at every setting but the step count; what does not vary is not in the label."""
    sampler = content["protocol"]["sampler"]
    axes = [name for name in SETTINGS if len(sampler[name]) > 1]
    found = {}
    for pipeline in content["protocol"]["pipelines"]:
        for values in itertools.product(*(sampler[name] for name in axes)):
            wanted = {"pipeline": pipeline, **dict(zip(axes, values))}
            label = ", ".join([pipeline, *(f"{SETTINGS[name]} {_text(value)}" for name, value in zip(axes, values))])
            found[label] = [c for c in content["cells"] if all(c[name] == value for name, value in wanted.items())]
    return found


def _text(value: float | str | None) -> str:
    return "as saved" if value is None else value if isinstance(value, str) else f"{value:g}"


def _listed(values: list) -> str:
    return ", ".join(map(_text, values))


def write_plot(output_dir: str | Path, content: Content) -> Path:
    """Write `fid.png`: FID against network evaluations, a panel for each feature layer, spread over seeds as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    protocol, floors = content["protocol"], content["floors"]
    layers = protocol["extractor"]["fid_layers"]
    figure = Figure(figsize=(6.2 * len(layers), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    all_panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for panel, layer in zip(all_panels, layers):
        for name, of_row in rows(content).items():
            nfe, means, spreads = [], [], []
            for num_steps in sorted(protocol["sampler"]["num_steps"]):
                cells = [cell for cell in of_row if cell["num_steps"] == num_steps]
                if cells:
                    values = [cell["fid"][layer] for cell in cells]
                    nfe.append(cells[0]["nfe"])
                    means.append(statistics.fmean(values))
                    spreads.append(statistics.stdev(values) if len(values) > 1 else math.nan)
            panel.errorbar(nfe, means, yerr=spreads, marker="o", capsize=3, label=name)
        for floor in floors["reconstruction"]:
            label = "reconstruction" if len(floors["reconstruction"]) == 1 else "rec. " + ", ".join(floor["pipelines"])
            panel.axhline(floor["fid"][layer], linestyle="--", color="grey", linewidth=1, label=label)
        train = floors["train_against_reference"]
        if train is not None:
            panel.axhline(train["fid"][layer], linestyle=":", color="black", linewidth=1, label=_floor_images(content))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(FixedLocator(sorted({cell["nfe"] for cell in content["cells"]})))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("network evaluations an image (NFE)")
        panel.set_ylabel(f"Fréchet distance, features {layer}")
        panel.set_title(f"{protocol['extractor']['name']}, {protocol['num_samples']} images", fontsize=10)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    path = Path(output_dir) / "fid.png"
    return write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
