"""Plots of a sweep: FID against network evaluations, against time, and over k.

This file owns the pictures `PLOTS`; it reads `fid.json`'s content and nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xdlm_image.evaluation.tables import Content, floor_images, measured_layers, rows
from xdlm_image.files import write_atomic

PLOTS = ("fid.png", "fid_time.png", "fid_k.png", "fid_nelbo.png")
NELBO = "nelbo_bits_per_token"
Point = tuple[float, float, float]  # x, mean, standard deviation (nan of one value)


def write_plots(output_dir: str | Path, content: Content) -> list[Path]:
    """Write `fid.png` and `fid_time.png`; `fid_k.png` if pipelines differ in k, `fid_nelbo.png` if NELBO is known.

    Each has a panel for every feature layer. Without cells there is none. What an earlier sweep left under a name that
    is not written now is removed, so that no page shows it beside other numbers.
    """
    output = Path(output_dir)
    found = _written(output, content) if content["cells"] else []
    for name in PLOTS:
        if output / name not in found:
            (output / name).unlink(missing_ok=True)
    return found


def _written(output: Path, content: Content) -> list[Path]:
    lines = rows(content)
    found = [
        _panels(
            output / "fid.png",
            content,
            {name: _curve(cells, lambda cell: cell["nfe"]) for name, cells in lines.items()},
            "network evaluations an image (NFE)",
        ),
        _panels(
            output / "fid_time.png",
            content,
            {name: _curve(cells, lambda cell: 1000 / cell["images_per_second"]) for name, cells in lines.items()},
            f"milliseconds an image ({', '.join(dict.fromkeys(cell['device'] for cell in content['cells']))})",
        ),
    ]
    pipelines = content["protocol"]["pipelines"]
    k = {name: float(about["scheduler"]["k"]) for name, about in pipelines.items() if "k" in about["scheduler"]}
    if len(set(k.values())) > 1:
        found.append(
            _panels(output / "fid_k.png", content, _curves_over(content, k), "k (0: MDLM, 1: UDLM)", linear_x=True)
        )
    nelbo = {name: about[NELBO]["mean"] for name, about in pipelines.items() if NELBO in about}
    if nelbo:
        curves = _curves_over(content, nelbo)
        label = "NELBO on held-out codes, bits per token"
        found.append(_panels(output / "fid_nelbo.png", content, curves, label, linear_x=True, marks=nelbo))
    return found


Curve = Callable[[str], list[Point]]  # layer -> points


def _curve(cells: list[Content], x: Callable[[Content], float]) -> Curve:
    """A point a step count: mean over seeds of x and of FID."""

    def points(layer: str) -> list[Point]:
        found = []
        for steps in sorted({cell["num_steps"] for cell in cells}):
            of_steps = [cell for cell in cells if cell["num_steps"] == steps]
            found.append((statistics.fmean(map(x, of_steps)), *_mean_and_deviation(of_steps, layer)))
        return found

    return points


def _curves_over(content: Content, places: dict[str, float]) -> dict[str, Curve]:
    """A line a step count through the pipelines, each at its place, at the first of every other setting."""
    first = {axis: values[0] for axis, values in content["protocol"]["sampler"].items() if isinstance(values, list)}
    first.pop("num_steps")
    if first["guidance_scale"] == 1 and "guidance_interval" in first:
        first["guidance_interval"] = None  # without guidance there is none
    cells = [cell for cell in content["cells"] if all(cell[axis] == value for axis, value in first.items())]
    curves: dict[str, Curve] = {}
    for steps in content["protocol"]["sampler"]["num_steps"]:

        def points(layer: str, steps: int = steps) -> list[Point]:
            found = []
            for name, place in sorted(places.items(), key=lambda item: item[1]):
                own = [cell for cell in cells if cell["pipeline"] == name and cell["num_steps"] == steps]
                if own:
                    found.append((place, *_mean_and_deviation(own, layer)))
            return found

        curves[f"{steps} step{'s' if steps > 1 else ''}"] = points
    return curves


def _mean_and_deviation(cells: list[Content], layer: str) -> tuple[float, float]:
    values = [cell["fid"][layer] for cell in cells]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def _panels(
    path: Path,
    content: Content,
    curves: dict[str, Curve],
    x_label: str,
    linear_x: bool = False,
    marks: dict[str, float] | None = None,
) -> Path:
    """A panel for each feature layer: the curves with their spread over seeds, the floors as lines, names at places."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    protocol, floors = content["protocol"], content["floors"]
    layers = measured_layers(content)
    figure = Figure(figsize=(6.2 * len(layers), 4.6), layout="constrained")
    panels: list[Any] = figure.subplots(1, len(layers), squeeze=False)[0].tolist()
    for panel, layer in zip(panels, layers):
        places = set()
        for label, points in curves.items():
            found = points(layer)
            if found:
                x, means, deviations = zip(*found)
                panel.errorbar(x, means, yerr=deviations, marker="o", capsize=3, label=label)
                places |= set(x)
        for floor in floors["reconstruction"]:
            label = "reconstruction" if len(floors["reconstruction"]) == 1 else "rec. " + ", ".join(floor["pipelines"])
            panel.axhline(floor["fid"][layer], linestyle="--", color="grey", linewidth=1, label=label)
        train = floors["train_against_reference"]
        if train is not None:
            panel.axhline(train["fid"][layer], linestyle=":", color="black", linewidth=1, label=floor_images(content))
        for name, place in (marks or {}).items():
            panel.text(place, 0.02, f" {name}", transform=panel.get_xaxis_transform(), rotation=90, fontsize=8)
        if not linear_x:
            panel.set_xscale("log", base=2)
        if linear_x or len(places) <= 10:
            panel.xaxis.set_major_locator(FixedLocator(sorted(places)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(x_label)
        panel.set_ylabel(f"Fréchet distance, features {layer}")
        panel.set_title(f"{protocol['extractor']['name']}, {protocol['num_samples']} images", fontsize=10)
    return save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, atomically; each panel with a grid and a legend."""
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
