"""Pictures of many images with names at rows and columns.

This file owns the layout of grids and which classes their rows are; the images come from `draw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from xdlm_image.drawing.draw import draw_all
from xdlm_image.drawing.foreign_pipelines import ForeignPipeline
from xdlm_image.drawing.pictures import save_picture, to_picture
from xdlm_image.drawing.sampler_settings import SamplerSettings
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.seeds import MAX_IMAGES

GAP = 2  # white pixels between images
MOST_ROWS, ROWS_OF_MANY = 20, 10  # with more classes than the first, a grid for which none is named has the second
SMALLEST_SIDE = 56  # smaller images are enlarged by a whole factor, each pixel a square


def save_grid(
    path: str | Path,
    images: torch.Tensor,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    title: str | None = None,
    key: str = "",
) -> Path:
    """Write one picture of rows of images, atomically.

    Args:
        path: PNG file.
        images: uint8 (rows, columns, C, S, S), C = 1 or 3.
        row_names: A name for each row, left of it; None for none.
        column_names: A name for each column, above it; None for none.
        title: A line above everything; None for none.
        key: Of what decided the images, kept in the file (`pictures.has_key`).

    Raises:
        ValueError: Wrong shape or dtype, or a wrong number of names.
    """
    if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[2] not in (1, 3):
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)}, expected uint8 (rows, columns, 1 or 3, S, S)")
    rows, columns, _, height, width = images.shape
    for argument, names, count in (("row_names", row_names, rows), ("column_names", column_names, columns)):
        if names is not None and len(names) != count:
            raise ValueError(f"{argument}: {len(names)} names for {count} rows or columns of images")
    row_names, column_names = (names and [" ".join(n.split()) for n in names] for names in (row_names, column_names))
    factor = max(1, -(-SMALLEST_SIDE // height))
    cell_height, cell_width = height * factor, width * factor
    letters = max(12, min(28, cell_height // 4))  # pixels
    font = ImageFont.load_default(size=letters)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    line = int(letters * 1.5)
    left = int(max((measure.textlength(name, font=font) for name in row_names), default=0)) + 12 if row_names else GAP
    title_height = line if title else 0
    top = title_height + (line if column_names else 0) + GAP
    picture_width = left + columns * (cell_width + GAP)
    if title:
        picture_width = max(picture_width, int(measure.textlength(title, font=font)) + 12)
    picture = Image.new("RGB", (picture_width, top + rows * (cell_height + GAP)), "white")
    pen = ImageDraw.Draw(picture)
    if title:
        pen.text((6, 2), title, fill="black", font=font)
    for column, name in enumerate(column_names or []):
        middle = left + column * (cell_width + GAP) + cell_width // 2
        pen.text((middle, title_height + line // 2), name, fill="black", font=font, anchor="mm")
    for row in range(rows):
        y = top + row * (cell_height + GAP)
        if row_names:
            pen.text((left - 6, y + cell_height // 2), row_names[row], fill="black", font=font, anchor="rm")
        for column in range(columns):
            x = left + column * (cell_width + GAP)
            cell = to_picture(images[row, column]).convert("RGB")
            picture.paste(cell.resize((cell_width, cell_height), Image.Resampling.NEAREST), (x, y))
    return save_picture(path, picture, key)


def class_ids(pipeline: XDLMPipeline, class_labels: Sequence[str | int] | str | int | None) -> list[int]:
    """Ids of the grid's rows: labels as the pipeline takes them; [0] for an unconditional one.

    None is all classes, or the first ten where there are more than 20, which is printed: a picture of a row for each of
    ImageNet's would be 258,000 pixels high.

    Raises:
        ValueError: A label that the pipeline refuses.
    """
    num_classes = pipeline.transformer.config.num_classes
    if class_labels is None:
        if num_classes is not None and num_classes > MOST_ROWS:
            print(f"class_labels=None: the first {ROWS_OF_MANY} of {num_classes} classes; name others to see them")
            return list(range(ROWS_OF_MANY))
        return list(range(num_classes or 1))
    try:
        return pipeline.get_label_ids(class_labels)
    except ValueError as error:
        if isinstance(class_labels, str) and "," in class_labels:  # names may have commas, too
            raise ValueError(f"{error}; several stand in brackets, as in '[{class_labels}]'") from error
        raise


def grid_labels(ids: Sequence[int], per_class: int) -> list[int]:
    """The class of every image of a grid, row by row. Raises ValueError if they are more than one seed draws."""
    if len(ids) * per_class > MAX_IMAGES:
        raise ValueError(
            f"images_per_class={per_class}: of {len(ids)} classes; at most {MAX_IMAGES} images are drawn from one "
            "seed, so that no two share random numbers"
        )
    return [label for label in ids for _ in range(per_class)]


def class_grid(
    pipeline: XDLMPipeline | ForeignPipeline,
    ids: Sequence[int],
    per_class: int,
    seed: int,
    settings: SamplerSettings,
    batch_size: int,
) -> torch.Tensor:
    """uint8 (len(ids), per_class, C, S, S): row r holds images of class ids[r]; image i counts row by row."""
    labels = grid_labels(ids, per_class)
    images = draw_all(pipeline, labels, seed, settings, batch_size)
    return images.unflatten(0, (len(ids), per_class))
