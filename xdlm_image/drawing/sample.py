"""The verb `sample`: a class grid, single images, pictures of their making; at a picture's place instead of noise too.

This file owns the order of things and what may already lie in the folder of single images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from xdlm_image.data.folders import is_hidden
from xdlm_image.data.images import read_image
from xdlm_image.devices import best_device
from xdlm_image.drawing.grids import class_grid, class_ids, grid_labels, save_grid
from xdlm_image.drawing.opening import beginning_at, class_names, folder_names, open_pipeline
from xdlm_image.drawing.pictures import class_folders, numbered_images, numbered_names, save_images
from xdlm_image.drawing.sampler_settings import SamplerSettings, check_settings
from xdlm_image.drawing.trace_pictures import check_trace, write_trace
from xdlm_image.files import refuse_unwritable
from xdlm_image.recipes import SampleRecipe


def sample(recipe: SampleRecipe) -> Path:
    """Draw a class grid, one row a class, and write it; with `images_dir` each image too, with `trace` their making.

    Returns:
        The grid's path.

    Raises:
        FileNotFoundError, ValueError: No such pipeline, unknown class, a picture that cannot be read, or a setting
            that the pipeline does not take.
        OSError: Nothing can be written to the folder of `output` or to `images_dir`; before anything is drawn.
    """
    if Path(recipe.output).suffix.lower() != ".png":
        raise ValueError(f"output={recipe.output!r}: name a .png file")
    pipeline = open_pipeline(recipe.pipeline, best_device(recipe.device), dtype=getattr(torch, recipe.dtype))
    ids = class_ids(pipeline, recipe.class_labels)
    start: dict[str, Any] = {}
    for name in ("image", "mask"):
        file = getattr(recipe, name)
        if file is not None and not Path(file).is_file():
            what = "a folder, not a file" if Path(file).is_dir() else "no such file"
            raise FileNotFoundError(f"{name}={file!r}: {what}; name a picture")
    if recipe.image is not None:
        image, mask = read_image(recipe.image, pipeline.vqvae.config.in_channels), None
        if recipe.mask is not None:
            read_image(recipe.mask, 1)  # refuses files by name
            mask = Image.open(recipe.mask)
        pipeline, start = beginning_at(pipeline, image, mask, recipe.strength)
    settings = SamplerSettings.of(recipe, start)
    check_settings(pipeline, settings)
    check_trace(recipe, len(ids))
    labels = grid_labels(ids, recipe.images_per_class)
    refuse_unwritable(Path(recipe.output).parent, "the folder of output")
    folders = class_folders(folder_names(pipeline))
    numbered = numbered_names(folders, labels)
    if recipe.images_dir is not None:
        refuse_unwritable(recipe.images_dir, "images_dir")
        _refuse_others(recipe.images_dir, numbered, folders)
    images = class_grid(pipeline, ids, recipe.images_per_class, recipe.seed, settings, recipe.batch_size)
    if recipe.images_dir is not None:
        save_images(recipe.images_dir, numbered, images.flatten(0, 1))
    for path in write_trace(recipe, pipeline, ids, settings):
        print(path)
    names = class_names(pipeline)
    return save_grid(recipe.output, images, [names[i] for i in ids] if names else None)


def _refuse_others(folder: str, names: Sequence[str], classes: Sequence[str]) -> None:
    """Images that an earlier call left and this one would not replace, or a folder of something else, a run's say: a
    folder is judged as one set."""
    others = numbered_images(folder) - set(names)
    if others:
        raise ValueError(
            f"images_dir={folder!r}: holds {min(others)} and {len(others) - 1} more images of another call; move them "
            "away, or name another folder"
        )
    found = sorted(path.name for path in Path(folder).iterdir() if path.is_dir() and not is_hidden(path.name))
    if strange := [name for name in found if name not in classes]:
        raise ValueError(
            f"images_dir={folder!r}: holds the folder {strange[0]!r}, which is no class of the pipeline; name a folder "
            "that holds nothing else"
        )
