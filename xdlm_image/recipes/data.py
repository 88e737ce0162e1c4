"""Recipes of images: which images, and how the verb `encode` turns them into codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from xdlm_image.recipes.checks import require, require_at_least

ImageSetName = Literal["fashion-mnist", "folder"]
Channels = Literal[1, 3]
Crop = Literal["center", "random"]
# Options that decide nothing of what is trained on images whose fingerprint is known.
WHERE_IMAGES_ARE = ("root", "download", "validation_fraction")


@dataclass
class DataOptions:
    """Which images.

    Attributes:
        name: `fashion-mnist` (28x28 grey, 10 classes) or `folder` (a folder of class folders; `root/train` and
            `root/val` where they exist; images without class folders are one class). None: `folder` if root is given,
            else `fashion-mnist`.
        root: Folder of your images; with the name `fashion-mnist`, where its files are or are downloaded to. None:
            Debian's package `dataset-fashion-mnist` if installed, else `~/.cache/xdlm_image`.
        image_size: Side of the square image in pixels after resize and crop. A folder needs it; Fashion-MNIST has 28.
        channels: 1 (grey) or 3 (RGB). None: 3 of a folder, 1 of Fashion-MNIST.
        crop: `center` (shorter side resized, middle cut out), or `random` (training of tokenizers only).
        validation_fraction: Share of the training images that is cut off for validation, by file name, where a folder
            has no validation images of its own (`root/val` without `root/test` is the test split). 0: none, and there
            is no validation split. Where there are no test images, 5 % are cut off for them, whatever this is. Tell
            every verb the same.
        download: Fetch Fashion-MNIST through torchvision when no local copy is found.
    """

    name: ImageSetName | None = None
    root: str | None = None
    image_size: int = None  # type: ignore[assignment]  # as is channels, None only until the name is known
    channels: Channels = None  # type: ignore[assignment]
    crop: Crop = "center"
    validation_fraction: float = 0.05
    download: bool = True

    def __post_init__(self) -> None:
        if self.name is None and self.root is None:
            for name, own in (("image_size", 28), ("channels", 1)):
                require(
                    getattr(self, name) in (None, own),
                    f"data.{name}",
                    getattr(self, name),
                    "of which images? Name your folder with data.root, or say data.name=fashion-mnist (beside a "
                    "reference leave all of data out)",
                )
        if self.name is None:  # what is written down anywhere is the name that it stands for
            self.name = "fashion-mnist" if self.root is None else "folder"
        require(self.name != "folder" or self.root is not None, "data.root", self.root, "name the image folder")
        is_folder = self.name == "folder"
        if self.image_size is None and not is_folder:
            self.image_size = 28
        if self.channels is None:
            self.channels = 3 if is_folder else 1
        wanted = "say which square the images of your folder become, the same to every verb, as --data.image_size 64"
        require(self.image_size is not None, "data.image_size", None, wanted)
        for name, kind in (("name", ImageSetName), ("channels", Channels), ("crop", Crop)):
            value, choices = getattr(self, name), get_args(kind)
            require(value in choices, f"data.{name}", value, f"must be one of {choices}")
        require(isinstance(self.image_size, int), "data.image_size", self.image_size, "must be a whole number")
        require_at_least(self, 8, "image_size", group="data.")
        require(
            0 <= self.validation_fraction <= 0.5,
            "data.validation_fraction",
            self.validation_fraction,
            "must lie in [0, 0.5]",
        )
        require(
            self.name == "folder" or self.validation_fraction == 0.05,
            "data.validation_fraction",
            self.validation_fraction,
            "does nothing for fashion-mnist, whose last 5,000 training images are for validation; leave it out",
        )


@dataclass
class EncodeRecipe:
    """Encode images to a memory-mapped code cache, plain and mirrored, with a manifest, a report and a picture.

    Attributes:
        tokenizer: Folder of the tokenizer (a saved diffusers `VQModel`).
        output_dir: Folder for one cache a split: `output_dir/train`, ...
        data: Which images.
        splits: Which splits.
        flip: Store the mirrored view too.
        batch_size: Images encoded at once.
        num_workers: Data loading processes; None is up to 8 for a folder of images where there are more than 4 cores,
            else 0.
        device: torch device; None picks the best there is.
        overwrite: Replace the caches that are there, also those of splits that a killed call had finished. Without it,
            those of this very recipe are kept, and any other is an error.
    """

    tokenizer: str
    output_dir: str
    data: DataOptions = field(default_factory=DataOptions)
    splits: list[Literal["train", "validation", "test"]] = field(
        default_factory=lambda: ["train", "validation", "test"]
    )
    flip: bool = True
    batch_size: int = 250
    num_workers: int | None = None
    device: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(
            len(self.splits) > 0 and len(set(self.splits)) == len(self.splits),
            "splits",
            self.splits,
            "name each split once",
        )
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 0, "num_workers")
