"""What a sweep leaves to read: `fid.json`, `fid.csv`, `fid.md` and the page `report.html`.

This file owns their layout; the numbers come from `sweep`, the tables from `tables`, the pictures from `plots` and
`drawing.grids`. Every file is written atomically.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import jinja2

from xdlm_image.evaluation.plots import PLOTS
from xdlm_image.evaluation.tables import Content, Table, fid_table, measured_layers, reference_text, tables, text
from xdlm_image.files import write_json, write_text

WHOLE_PROTOCOL = "The whole protocol is in `fid.json`."


def write_report(output_dir: str | Path, content: Content) -> None:
    """Write `fid.json`, `fid.csv` and `fid.md` of what is measured so far."""
    output = Path(output_dir)
    write_json(output / "fid.json", content)
    write_text(output / "fid.csv", tidy(content))
    write_text(output / "fid.md", markdown(content))


def markdown(content: Content) -> str:
    """The Markdown page: the tables, floors beneath each, the protocol last."""
    lines = ["# Image quality over sampling steps", "", content["metric"] + ".", ""]
    for warning in content["warnings"]:
        lines += [f"> **Warning:** {warning}", ""]
    for table in tables(content):
        lines += [f"## {table.title}", "", *table.markdown(), ""]
        lines += [table.note, ""] if table.note else []
    lines += ["## Protocol", "", f"{protocol_text(content)} {WHOLE_PROTOCOL}", ""]
    return "\n".join(lines)


def protocol_text(content: Content) -> str:
    """The protocol in a paragraph."""
    protocol = content["protocol"]
    reference, sampler, extractor = protocol["reference"], protocol["sampler"], protocol["extractor"]
    guided = sampler.get("guidance_interval", [None])
    parts = []
    if content["cells"]:
        parts += [
            f"{protocol['num_samples']} images a cell"
            + (f", {protocol['samples_per_class']} a class" if protocol["samples_per_class"] else ""),
            f"seeds {', '.join(map(str, protocol['seeds']))}",
            f"guidance {_listed(sampler['guidance_scale'])}, temperature {_listed(sampler['temperature'])}, time grid "
            f"{_listed(sampler['time_grid'])}, sampler {_listed(sampler.get('sampler', [None]))}"
            + ("" if guided == [None] else f", guided in t from {_listed(guided, 'all')}"),
            "NFE = steps, a guided one counted twice",
            f"network in {sampler['dtype']}{' (compiled)' if sampler['compile'] else ''}",
        ]
    parts += [
        f"reference: {reference_text(reference)}, fingerprint {reference['fingerprint'][:12]}",
        f"extractor {extractor['name']} {extractor['weights_sha256'][:12]}",
        f"uint8: {protocol['uint8_rule']}",
    ]
    return "; ".join(parts) + "."


def _listed(values: list, none: str = "as saved") -> str:
    return ", ".join(text(value, none) for value in values)


# -- csv --------------------------------------------------------------------------------------------------------------


def tidy(content: Content) -> str:
    """CSV with a row a cell or set of images and a column a setting or number; empty where there is none."""
    lines = [
        _flat({"pipeline": None, **found, "schema_version": content["schema_version"]}) for found in _found(content)
    ]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return written.getvalue()


def _found(content: Content) -> list[Content]:
    return [*content["cells"], *({"num_samples": of["num_images"], **of} for of in content["image_sets"])]


def _flat(found: Content, prefix: str = "") -> dict[str, Any]:
    """Nested numbers as columns `outer.inner`; what is no setting and no result stays in `fid.json`."""
    flat: dict[str, Any] = {}
    for name, value in found.items():
        if name in ("versions", "kid_of_classes", "drawn_by"):
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = text(value) if isinstance(value, list | tuple) else value
    return flat


# -- html -------------------------------------------------------------------------------------------------------------


def write_html(output_dir: str | Path, content: Content) -> Path:
    """Write `report.html`: tables, plots and grids in one file that a browser shows offline.

    Pictures are taken from `output_dir`; those that are not there are left out.
    """
    output = Path(output_dir)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xdlm_image.evaluation", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    models = []
    for name, about in content["protocol"]["pipelines"].items():
        pictures = [_embedded(output / f"{kind}_{name}.png") for kind in ("grid", "strip", "neighbours")]
        models.append(
            {"name": name, "about": about, "pictures": [p for p in pictures if p], "table": _of(content, name)}
        )
    plots = [_embedded(output / name) for name in PLOTS]
    page = environment.get_template("report.html.jinja").render(
        content=content,
        tables=tables(content),
        plots=[plot for plot in plots if plot],
        models=models,
        protocol_text=protocol_text(content),
        protocol=json.dumps(content["protocol"], indent=2, ensure_ascii=False),
    )
    return write_text(output / "report.html", page)


def _of(content: Content, name: str) -> Table:
    """The main FID of one pipeline, for the place beside its pictures."""
    layer = measured_layers(content)[0]
    table = fid_table(content, layer)
    own = [row for row in table.rows if row[0] == name or row[0].startswith(f"{name}, ")]
    return Table(f"FID, features {layer}", table.header, own)


def _embedded(picture: Path) -> dict[str, str] | None:
    if not picture.is_file():
        return None
    return {"name": picture.name, "data": base64.b64encode(picture.read_bytes()).decode()}
