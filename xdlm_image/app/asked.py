"""What the page asks for: a call of a pipeline from the values of its controls, its results, and its command.

This file owns what the controls mean; it knows no gradio.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xdlm_image.drawing.grids import grid_labels
from xdlm_image.drawing.opening import beginning_at, class_names, is_conditional
from xdlm_image.drawing.pictures import save_picture
from xdlm_image.drawing.sampler_settings import SamplerSettings, call_arguments, check_settings, nfe, with_scheduler
from xdlm_image.drawing.trace import record
from xdlm_image.drawing.trace_pictures import MAX_IMAGES, save_gif
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.seeds import check_seed

AS_SAVED = "as saved"
MOST_IMAGES = 64
EASY_TO_PAINT = 448  # pixels of a side
Models = Mapping[str, tuple[str, XDLMPipeline]]  # name -> folder and pipeline


@dataclass(frozen=True)
class Asked:
    """One call, as the page asks for it.

    Attributes:
        folder: Of the pipeline.
        pipeline: What draws: with a picture, one that begins at it.
        ids: Classes; [0] of an unconditional pipeline.
        settings: How it is called.
        labels: Class of each image.
        seed: Of the set, in which image i has its own generator.
    """

    folder: str
    pipeline: XDLMPipeline
    ids: list[int]
    settings: SamplerSettings
    labels: list[int]
    seed: int

    @classmethod
    def of(
        cls, models: Models, name: str, classes: list[int], per_class: int, steps: int, hot: float, cold: float,
        early: float, late: float, sampler: str, grid: str, seed: float | None, editor: dict[str, Any] | None,
        strength: float,
    ) -> Asked:  # fmt: skip
        """From the values of the page's controls, in their order.

        Raises:
            ValueError: What the pipeline refuses, or more images than the page shows.
        """
        folder, pipeline = models[name]
        everything = range(pipeline.transformer.config.num_classes or 1)
        per_class = int(per_class)
        ids = classes or list(everything)[: max(1, MOST_IMAGES // per_class)]
        labels = grid_labels(ids, per_class)
        if len(labels) > MOST_IMAGES:
            raise ValueError(
                f"{len(labels)} images: at most {MOST_IMAGES} are shown; choose fewer classes, or images of each"
            )
        seed = int(seed) if seed is not None and float(seed).is_integer() else seed
        check_seed(seed)  # type: ignore[arg-type]
        start: dict[str, Any] = {}
        image, mask = picture_and_mask(editor)
        if image is not None:
            pipeline, start = beginning_at(pipeline, image, mask, strength)
        settings = SamplerSettings(
            int(steps),
            guidance_scale=early if early == late else (early, late),
            temperature=hot if hot == cold else (hot, cold),
            time_grid=None if grid == AS_SAVED else grid,
            sampler=None if sampler == AS_SAVED else sampler,
            start=start,
        )
        check_settings(pipeline, settings)
        return cls(folder, pipeline, ids, settings, labels, int(seed))  # type: ignore[arg-type]

    def draw(self, progress: Any) -> list[Image.Image]:
        """The images; `progress` is called with (steps done, steps in all)."""
        steps = self.settings.num_steps

        def tell(_: XDLMPipeline, i: int, *__: Any) -> dict:
            progress((i + 1, steps), unit="steps")
            return {}

        images: list[Image.Image] = self._caller()(
            **self._arguments(len(self.labels)), callback_on_step_end=tell
        ).images
        return images

    def film(self, folder: Path) -> str:
        """A GIF in the folder of how they come about, the first 32 of them."""
        count = min(len(self.labels), MAX_IMAGES)
        return str(save_gif(record(self._caller(), **self._arguments(count)), folder / "states.gif"))

    def _caller(self) -> XDLMPipeline:
        return with_scheduler(self.pipeline, self.settings)

    def _arguments(self, count: int) -> dict[str, Any]:
        return call_arguments(self.pipeline, self.labels[:count], range(count), self.seed, self.settings)

    def captions(self) -> list[str]:
        """The class of each image."""
        names = class_names(self.pipeline)
        return [names[i] if names else "" for i in self.labels]

    def cost(self) -> str:
        """What the images took."""
        evaluations = nfe(self.pipeline, self.settings)
        return f"{len(self.labels)} images, {evaluations} evaluations of the network each"

    def save_start(self, folder: Path) -> list[str]:
        """The files that the command names, written into the folder."""
        files = {"PICTURE.png": "image", "MASK.png": "mask_image"}
        found = {name: self.settings.start[key] for name, key in files.items() if key in self.settings.start}
        return [str(save_picture(folder / name, picture)) for name, picture in found.items()]

    def command(self) -> str:
        """`xdlm-image sample` with the options that draw these images."""
        settings, conditional = self.settings, is_conditional(self.pipeline)
        options: dict[str, Any] = {"pipeline": self.folder} | ({"class_labels": self.ids} if conditional else {})
        options["images_per_class"] = len(self.labels) // len(self.ids)
        options |= {name: getattr(settings, name) for name in ("num_steps", "guidance_scale", "temperature")}
        options |= {name: getattr(settings, name) for name in ("sampler", "time_grid") if getattr(settings, name)}
        if settings.start:
            options |= {"image": "PICTURE.png", "strength": settings.start["strength"]}
            options |= {"mask": "MASK.png"} if "mask_image" in settings.start else {}
        options |= {"seed": self.seed, "output": "grid.png"}
        texts = {name: str([*value] if isinstance(value, tuple) else value) for name, value in options.items()}
        return " ".join(["xdlm-image sample", *(f"--{name} {shlex.quote(text)}" for name, text in texts.items())])


def picture_and_mask(editor: dict[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture in the editor, RGB on white, and white where it was painted over; None where there is none.

    Raises:
        ValueError: The picture is empty or too large.
    """
    if editor is None or editor["background"] is None:
        return None, None
    picture = editor["background"]
    if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"the picture has {picture.width} x {picture.height} pixels: upload a smaller one")
    opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if np.asarray(opaque).min() == 255:  # an empty canvas that was painted on comes so
        raise ValueError("the picture to begin at is empty: upload one, or take one, or clear the canvas")
    painted = np.zeros((picture.height, picture.width), dtype=bool)
    for layer in editor["layers"]:
        painted |= np.asarray(layer.resize(picture.size, Image.Resampling.NEAREST).getchannel("A")) > 0
    return opaque, Image.fromarray(painted.astype(np.uint8) * 255) if painted.any() else None


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture with each pixel a square, so that a brush hits some and not all of it."""
    factor = max(1, EASY_TO_PAINT // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
