"""What the verb `nelbo` leaves to read: JSON, the table, CSV and plots.

This file owns their layout; the numbers come from `nelbo`. Every file is written atomically.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdlm_image.evaluation.nelbo_estimate import NORMAL_95
from xdlm_image.evaluation.plots import save_figure
from xdlm_image.files import write_json, write_text

Content = dict[str, Any]  # nelbo.json, see `nelbo.nelbo`
HEADER = (
    *("pipeline", "k", "definition", "bits_per_token", "stderr", "ci95_low", "ci95_high", "tokens", "bits_per_image"),
    *("bits_per_token_below_t_min", "share_below_t_min", "t_min", "num_images", "num_times"),
)


def write_report(output_dir: str | Path, content: Content) -> None:
    """Write `nelbo.json`, `nelbo.md` and `nelbo.csv` of what is measured so far."""
    output, protocol = Path(output_dir), content["protocol"]
    write_json(output / "nelbo.json", content)
    write_text(output / "nelbo.md", markdown(content))
    _write_csv(
        output / "nelbo.csv",
        HEADER,
        (
            (
                *(result[name] for name in ("pipeline", "k", "definition")),
                *(result["bits_per_token"][name] for name in ("mean", "stderr", "low", "high")),
                result["tokens"],
                result["bits_per_image"]["mean"],
                result["bits_per_token_below_t_min"]["mean"],
                result["share_below_t_min"],
                *(protocol[name] for name in ("t_min", "num_images", "num_times")),
            )
            for result in content["results"]
        ),
    )


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _interval(interval: Content, digits: int) -> str:
    return f"[{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def markdown(content: Content) -> str:
    """The Markdown page: the table, paired differences, and what the numbers mean."""
    protocol, codes = content["protocol"], content["protocol"]["codes"]
    t_min = f"{protocol['t_min']:g}"
    lines = ["# NELBO of held-out codes", ""]
    for warning in content["warnings"]:
        lines += [f"> **Warning:** {warning}", ""]
    lines += [
        f"| pipeline | k | bits per token | 95 % interval | bits per image | 95 % interval | of it at t < {t_min} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in content["results"]:
        token, image = result["bits_per_token"], result["bits_per_image"]
        lines.append(
            f"| {result['pipeline']} | {result['k']:g} | {token['mean']:.4f} | {_interval(token, 4)} | "
            f"{image['mean']:.2f} | {_interval(image, 2)} | {100 * result['share_below_t_min']:.3f} % |"
        )
    lines += [""]
    if content["differences"]:
        lines += ["## Differences on the same images, bits per token", ""]
        lines += ["| | difference | 95 % interval |", "|---|---:|---:|"]
        for found in content["differences"]:
            lines.append(f"| {found['pipeline']} - {found['minus']} | {found['mean']:+.4f} | {_interval(found, 4)} |")
        lines += ["", "Narrower than the intervals above suggest: how hard an image is cancels.", ""]
    lines += [
        "## Protocol",
        "",
        f"An upper bound of -log2 p(codes | class), over all of t in (0, 1]; training sees t >= {t_min}. The terms at "
        "the ends, KL(q(z_1 | x) || r) and the reconstruction from z_0, are exactly 0. "
        f"{protocol['num_images']} of {codes['num_images']} images of the split {codes['split']}, each of "
        f"{codes['grid'][0]} x {codes['grid'][1]} codes out of {codes['num_codes']}, at {protocol['num_times']} times "
        f"each; seed {protocol['seed']}; network in {protocol['dtype']}. Intervals: {protocol['interval']}. Codes were "
        f"made by tokenizer {codes['tokenizer_hash'][:12]}: numbers of different tokenizers do not compare. "
        "The whole protocol is in `nelbo.json`.",
        "",
    ]
    return "\n".join(lines)


def write_plot(output_dir: str | Path, content: Content) -> Path:
    """Write `nelbo.png`: bits per token over k with 95 % intervals, and where over t the loss sits."""
    figure = _figure(11.5)
    over_k, over_t = figure.subplots(1, 2)
    for result in content["results"]:
        bits, density = result["bits_per_token"], result["density"]
        errors = [[bits["mean"] - bits["low"]], [bits["high"] - bits["mean"]]]
        over_k.errorbar([result["k"]], [bits["mean"]], yerr=errors, marker="o", capsize=4, label=result["pipeline"])
        over_t.stairs(density["bits_per_token"], density["edges"], baseline=None, label=result["pipeline"])
    over_k.set(xlabel="k, weight of uniform noise", ylabel="NELBO, bits per token", xlim=(-0.05, 1.05))
    over_k.set_title(f"{content['protocol']['num_images']} held-out images, 95 % intervals", fontsize=10)
    over_t.set_xscale("function", functions=(np.cbrt, lambda s: s**3))
    over_t.set(xlim=(0, 1), xticks=[0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1], ylim=(0, None))
    over_t.set(xlabel="t, share of noise (axis in its cube root)", ylabel="loss density, bits per token and unit of t")
    over_t.axvline(content["protocol"]["t_min"], linestyle=":", color="grey", linewidth=1, label="t_min of training")
    return save_figure(figure, Path(output_dir) / "nelbo.png")


def write_curves(output_dir: str | Path, curves: dict[str, list[dict[str, float]]]) -> None:
    """Write `nelbo_training.csv` and `nelbo_training.png` of validation curves, from `nelbo.read_curve`; without any,
    remove what an earlier run left there."""
    output = Path(output_dir)
    if not curves:
        for name in ("nelbo_training.csv", "nelbo_training.png"):
            (output / name).unlink(missing_ok=True)
        return
    rows = [
        (name, p["step"], p["bits_per_token"], p["stderr"], *_ends(p))
        for name, points in curves.items()
        for p in points
    ]
    header = ("run", "step", "bits_per_token", "stderr", "ci95_low", "ci95_high")
    _write_csv(output / "nelbo_training.csv", header, rows)
    figure = _figure(6.2)
    panel = figure.subplots()
    for name, points in curves.items():
        steps = [p["step"] for p in points]
        panel.plot(steps, [p["bits_per_token"] for p in points], marker="o", markersize=3, label=name)
        panel.fill_between(steps, *zip(*map(_ends, points)), alpha=0.2)
    panel.set(xlabel="training step", ylabel="validation NELBO, bits per token")
    panel.set_title("averaged weights, 95 % intervals over images", fontsize=10)
    save_figure(figure, output / "nelbo_training.png")


def _ends(point: dict[str, float]) -> tuple[float, float]:
    reach = NORMAL_95 * point["stderr"]
    return point["bits_per_token"] - reach, point["bits_per_token"] + reach


def _figure(width: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4.4), layout="constrained")
