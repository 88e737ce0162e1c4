"""Recipes of what draws images: the verbs `sample` and `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import require
from .data import DataOptions


@dataclass
class SampleRecipe:
    """Draw images from a saved pipeline as a class grid (one row a class), and each image if asked.

    Attributes:
        pipeline: Folder of the saved pipeline.
        output: Path of the grid picture (PNG).
        class_labels: Ids or names of the classes; None draws every class.
        images_per_class: Images a row.
        num_steps: Reverse steps.
        guidance_scale: 1 is no guidance; each guided step runs the network on twice the batch.
        temperature: Divides the logits.
        seed: Image i of the grid has its own generator, made of (seed, i), whatever the batch.
        images_dir: Also write each image there as PNG; None writes the grid only.
        batch_size: Images drawn at once.
        device: torch device; None picks the best there is.
    """

    pipeline: str
    output: str
    class_labels: list[int | str] | int | str | None = None
    images_per_class: int = 8
    num_steps: int = 8
    guidance_scale: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    images_dir: str | None = None
    batch_size: int = 100
    device: str | None = None

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1 step")
        require(self.images_per_class >= 1, "images_per_class", self.images_per_class, "at least 1 image")


@dataclass
class EvaluateRecipe:
    """FID of one or more pipelines over step counts: JSON with the whole protocol, table, plot and class grids.

    Attributes:
        pipelines: Name of each pipeline in the table -> its folder.
        output_dir: Folder for `fid.json`, `fid.md`, `fid.png` and `grid_*.png`; a killed sweep goes on from there.
        data: The reference images.
        extractor: `inception` (torch-fidelity's, needs its weights) or the folder of a trained extractor.
        reference_split: Split whose images are the reference.
        num_steps: Step counts of the sweep.
        num_samples: Images a cell; a multiple of the class count, so that classes are balanced.
        guidance_scale: 1 is no guidance.
        temperature: Divides the logits.
        seeds: Sampling seeds; each gives its own set of images, and the table shows their mean and spread.
        batch_size: Images drawn at once.
        device: torch device; None picks the best there is.
    """

    pipelines: dict[str, str]
    output_dir: str
    data: DataOptions = field(default_factory=DataOptions)
    extractor: str = "inception"
    reference_split: Literal["train", "validation", "test"] = "test"
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    num_samples: int = 5000
    guidance_scale: float = 1.0
    temperature: float = 1.0
    seeds: list[int] = field(default_factory=lambda: [0])
    batch_size: int = 250
    device: str | None = None

    def __post_init__(self) -> None:
        require(len(self.pipelines) > 0, "pipelines", self.pipelines, "name at least one, as NAME: FOLDER")
        for name in ("num_steps", "seeds"):
            values = getattr(self, name)
            require(
                len(values) > 0 and len(set(values)) == len(values), name, values, "name at least one, each only once"
            )
        require(all(n >= 1 for n in self.num_steps), "num_steps", self.num_steps, "every step count is at least 1")
        require(
            self.num_samples >= 2,
            "num_samples",
            self.num_samples,
            "at least 2 images, and far more for numbers that mean much",
        )
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
