"""The tables of a sweep: which there are, their rows and columns, and what stands beneath them.

This file owns how numbers are put together and written; `report` turns tables into pages. It reads `fid.json`'s content
and nothing else.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Content = dict[str, Any]  # fid.json, see `sweep.evaluate`
Value = Callable[[Content], float | None]  # of a cell, a set of images or a floor
SPEED = (
    "Drawing and decoding, all processes of a cell together, by the median over batches; other work on the machine "
    "shows in it."
)
SETTINGS = {  # axes beside the steps
    "guidance_scale": "guidance",
    "temperature": "temperature",
    "time_grid": "grid",
    "sampler": "sampler",  # from schema_version 6
    "guidance_interval": "guided in t",  # from schema_version 7
}

NONE = dict.fromkeys(SETTINGS, "as saved") | {"guidance_interval": "all"}  # what None means


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        title: Its heading.
        header: Names of the columns, the first that of the rows.
        rows: Texts, as many in each row as in the header.
        note: A paragraph beneath, or nothing.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> list[str]:
        """Lines of the table alone, in Markdown."""
        lines = ["| " + " | ".join(self.header) + " |", "|---|" + "---:|" * (len(self.header) - 1)]
        return lines + ["| " + " | ".join(row) + " |" for row in self.rows]


def mean_and_spread(values: list[float]) -> str:
    """`12.34`, or `12.34 ± 0.560` (standard deviation, n - 1) of several; a dash for none."""
    if not values:
        return "–"
    mean = number(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {number(statistics.stdev(values))}"


def number(value: float) -> str:
    """Three decimals below 10, two below 100, one above: distances of small classifiers can be small."""
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"


def tables(content: Content) -> list[Table]:
    """Every table that the content has numbers for, in the order of the page."""
    found = [_image_sets(content)] if content["image_sets"] else []
    if content["cells"]:
        found += [*_frechet_tables(content), *_feature_tables(content), *_pair_tables(content)]
        found += [*_accuracy_tables(content)]
        found.append(_table(content, "Images per second", lambda cell: cell["images_per_second"], SPEED))
    return found


def fid_table(content: Content, layer: str) -> Table:
    """FID by the features of a layer: a row a pipeline, a column a step count, mean and spread over seeds."""
    return _table(content, "fid", lambda cell: (cell["fid"] or {}).get(layer))


def rows(content: Content) -> dict[str, list[Content]]:
    """Label -> cells of every pipeline at every setting but the step count; what does not vary is not in the label."""
    sampler = content["protocol"]["sampler"]
    axes = [name for name in SETTINGS if len(sampler.get(name, [])) > 1]
    found = {}
    for pipeline in content["protocol"]["pipelines"]:
        for values in itertools.product(*(sampler[name] for name in axes)):
            wanted = {"pipeline": pipeline, **dict(zip(axes, values))}
            said = (f"{SETTINGS[name]} {text(value, NONE[name])}" for name, value in zip(axes, values))
            label = ", ".join([pipeline, *said])
            cells = [c for c in content["cells"] if all(c[name] == value for name, value in wanted.items())]
            if cells or not axes:  # no guidance has no guided interval
                found[label] = cells
    return found


def text(value: float | str | Sequence[float] | None, none: str = "as saved") -> str:
    """A setting as it is written; a pair that changes with time as `1 to 0.5`, None as `none`."""
    if isinstance(value, list | tuple):
        return " to ".join(map(text, value))
    return none if value is None else value if isinstance(value, str) else f"{value:g}"


def reference_text(reference: Content) -> str:
    """What a reference in the protocol is of, in a few words."""
    if reference["num_images"] is None:  # a file of statistics
        return str(reference["name"])
    size = f"{reference['channels']} x {reference['image_size']} x {reference['image_size']}"
    return f"{reference['num_images']} images, split {reference['split']} of {reference['name']}, {size}"


def floor_images(content: Content) -> str:
    """What the images of the floor are: `training images`, or those of the split that stands in for them."""
    return _floor_images(content["floors"]["train_against_reference"] or {})


def _floor_images(floor: Content) -> str:
    split = floor.get("split", "train")
    return "training images" if split == "train" else f"{split} images"


def measured_layers(content: Content) -> list[str]:
    """Feature layers that any row has a FID of, the main one first."""
    found = [*content["cells"], *content["image_sets"]]
    return [layer for layer in content["protocol"]["extractor"]["fid_layers"] if any(layer in c["fid"] for c in found)]


# -- values -----------------------------------------------------------------------------------------------------------


def _fid(layer: str, found: Content) -> float | None:
    return found["fid"].get(layer)


def _fid_further(reference: str, layer: str, found: Content) -> float | None:
    return found.get("fid_further", {}).get(reference, {}).get(layer)  # from schema_version 8


def _part(metric: str, part: str, factor: float, found: Content) -> float | None:
    return None if found[metric] is None else factor * found[metric][part]


def _percent(metric: str, found: Content) -> float | None:
    return None if found[metric] is None else 100 * found[metric]


def _worst_class(found: Content) -> float | None:
    return None if not found["kid_of_classes"] else 1000 * max(found["kid_of_classes"].values())


FEATURE_COLUMNS: list[tuple[str, str, Value]] = [  # of the main layer
    (
        "KID x 1000",
        "Unbiased MMD, mean of subsets of at most 1,000 images.",
        functools.partial(_part, "kid", "mean", 1000),
    ),
    ("KID x 1000 of the worst class", "The class whose images are farthest from the real ones of it.", _worst_class),
    (
        "Precision (%)",
        "Share of samples in the manifold of real images (k = 3).",
        functools.partial(_percent, "precision"),
    ),
    ("Recall (%)", "Share of real images in the manifold of samples (k = 3).", functools.partial(_percent, "recall")),
    ("Coverage (%)", "Share of real images that have a sample near (k = 3).", functools.partial(_percent, "coverage")),
    ("Inception Score", "Of the samples alone.", functools.partial(_part, "inception_score", "mean", 1)),
]


# -- tables -----------------------------------------------------------------------------------------------------------


def _table(content: Content, title: str, value: Value, note: str = "") -> Table:
    """A row a pipeline, a column a step count; a dash where no cell has a value."""
    steps = content["protocol"]["sampler"]["num_steps"]
    header = ["pipeline", *(f"{n} step{'s' if n > 1 else ''}" for n in steps)]
    lines = []
    for label, cells in rows(content).items():
        of_steps = [[value(cell) for cell in cells if cell["num_steps"] == num_steps] for num_steps in steps]
        lines.append([label, *(mean_and_spread([v for v in values if v is not None]) for values in of_steps)])
    return Table(title, header, lines, note)


def _frechet_tables(content: Content) -> Iterator[Table]:
    floors = content["floors"]
    for layer in measured_layers(content):
        value = functools.partial(_fid, layer)
        yield _table(content, f"FID, features `{layer}`, against the real images", value, _floors(content, value))
        trained = [
            f"reconstructed {floor_images(content)} ({_users(floor)}) "
            f"{number(floor['train']['fid_against_reconstructions'][layer])}"
            for floor in _with_train(floors)
        ]
        if any(cell["fid_against_reconstructions"] for cell in content["cells"]):
            against = functools.partial(_against_reconstructions, layer)
            note = " ".join(["The tokenizer's own error is out of this table.", _listed_floors(trained)]).strip()
            yield _table(content, f"FID, features `{layer}`, against reconstructions of the real images", against, note)

    for name, of_name in content["protocol"].get("further_references", {}).items():
        for layer in measured_layers(content):
            value = functools.partial(_fid_further, name, layer)
            if any(value(cell) is not None for cell in content["cells"]):
                note = f"{name} is {reference_text(of_name)}. {_floors_further(content, name, layer)}".strip()
                yield _table(content, f"FID, features `{layer}`, against {name}", value, note)


def _against_reconstructions(layer: str, cell: Content) -> float | None:
    return (cell["fid_against_reconstructions"] or {}).get(layer)


def _feature_tables(content: Content) -> Iterator[Table]:
    main = content["protocol"]["extractor"]["fid_layers"][0]
    for title, explanation, value in FEATURE_COLUMNS:
        if any(value(cell) is not None for cell in content["cells"]):
            note = f"{explanation} {_floors(content, value)}".strip()
            yield _table(content, f"{title}, features `{main}`", value, note)


def _pair_tables(content: Content) -> Iterator[Table]:
    for distance, where in (("near", "neighbouring positions"), ("far", "positions half a grid apart")):
        value = functools.partial(_part, "code_pair_total_variation", distance, 100)
        if all(value(cell) is None for cell in content["cells"]):
            continue
        trained = [
            f"{floor['train']['num_images']} {floor_images(content)} ({_users(floor)}) "
            f"{number(100 * floor['train']['code_pair_total_variation'][distance])}"
            for floor in _with_train(content["floors"])
        ]
        note = f"Needs no extractor; falls as codes drawn together fit each other. {_listed_floors(trained)}".strip()
        yield _table(content, f"Pairs of codes at {where}: total variation to held-out images (%)", value, note)


def _accuracy_tables(content: Content) -> Iterator[Table]:
    value = functools.partial(_percent, "class_accuracy")
    if any(value(cell) is not None for cell in content["cells"]):
        floors = content["floors"]
        real = floors["reference_class_accuracy"]
        note = "" if real is None else f"The same classifier on the real reference images: {100 * real:.2f} %."
        for floor in floors["reconstruction"]:
            if floor["class_accuracy"] is not None:
                note += f" On their reconstructions ({_users(floor)}): {100 * floor['class_accuracy']:.2f} %."
        judge = content["protocol"]["extractor"].get("classifier")
        by = judge["name"] if judge else "the extractor's own classifier"
        yield _table(content, f"Class accuracy (%), judged by {by}", value, note)


def _image_sets(content: Content) -> Table:
    """A row a set of images, a column a metric that any of them has."""
    columns: list[tuple[str, Value]] = [
        (f"FID `{layer}`", functools.partial(_fid, layer)) for layer in measured_layers(content)
    ]
    columns += [
        (f"FID `{layer}` against {name}", functools.partial(_fid_further, name, layer))
        for name in content["protocol"].get("further_references", {})
        for layer in measured_layers(content)
    ]
    columns += [(title, value) for title, _, value in FEATURE_COLUMNS]
    columns += [("class accuracy (%)", functools.partial(_percent, "class_accuracy"))]
    columns = [(title, value) for title, value in columns if any(value(of) is not None for of in content["image_sets"])]
    lines = []
    for found in content["image_sets"]:
        values = [value(found) for _, value in columns]
        texts = ["–" if value is None else number(value) for value in values]
        lines.append([found["name"], str(found["num_images"]), *texts])
    floors = []
    for floor in content["floors"]["image_sets"]:
        told = [f"{title} {number(of)}" for title, value in columns if (of := value(floor)) is not None]
        floors.append(f"{floor['num_images']} {_floor_images(floor)} against the reference: {', '.join(told)}")
    return Table(
        "Sets of images", ["images", "number", *(title for title, _ in columns)], lines, _listed_floors(floors)
    )


# -- floors -----------------------------------------------------------------------------------------------------------


def _floors(content: Content, value: Value) -> str:
    floors, found = content["floors"], []
    for floor in floors["reconstruction"]:
        if (of := value(floor)) is not None:
            found.append(f"reconstruction of {_users(floor)} {number(of)}")
    train = floors["train_against_reference"]
    if train is not None and (of := value(train)) is not None:
        found.append(f"{train['num_images']} {floor_images(content)} against the reference {number(of)}")
    return _listed_floors(found)


def _floors_further(content: Content, name: str, layer: str) -> str:
    floors = content["floors"]["further"][name]
    found = [
        f"reconstruction of {_users(floor)} {number(floor['fid'][layer])}"
        for floor in floors["reconstruction"]
        if layer in floor["fid"]
    ]
    if layer in floors["reference"]["fid"]:
        found.append(f"the real images {number(floors['reference']['fid'][layer])}")
    return _listed_floors(found)


def _listed_floors(floors: list[str]) -> str:
    return f"Floors: {'; '.join(floors)}." if floors else ""


def _with_train(floors: Content) -> list[Content]:
    """Floors of tokenizers for which as many real images as a cell has were measured."""
    return [floor for floor in floors["reconstruction"] if floor["train"] is not None]


def _users(floor: Content) -> str:
    return ", ".join(floor["pipelines"])
