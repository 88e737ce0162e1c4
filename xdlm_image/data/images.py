"""Real images as tensors: Fashion-MNIST and any folder of class folders, resized, cropped, in [-1, 1].

This file owns decoding and resizing, the files of Fashion-MNIST, and the fingerprint of what they hold; which files of
a folder are of which split and class, `folders` knows. It never batches, never augments colour, and never writes
anything but torchvision's own download.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.transforms.v2 import functional as tv

from xdlm_image.data.folders import find_split
from xdlm_image.pipelines.init_images import (
    DECODING_ERRORS,
    cannot_be_read,
    covering,
    floating_point,
    middle,
    refuse_bomb,
    refuse_strip,
    to_8_bits,
    values_of_16_bits,
)
from xdlm_image.processes import main_process_first
from xdlm_image.ranks import on_first_rank
from xdlm_image.recipes import DataOptions

SPLITS = ("train", "validation", "test")
UINT8_RULE = "round to nearest, cut off at 0 and 255: clamp(round((x + 1) * 127.5)), x in [-1, 1]"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_VALIDATION = 5_000  # the last images of the training file


def normalise(raw: torch.Tensor) -> torch.Tensor:
    """uint8 pixels in [0, 255] -> float32 in [-1, 1], any shape."""
    return raw.to(torch.float32) / 127.5 - 1


def in_colour(images: torch.Tensor) -> torch.Tensor:
    """Grey (B, 1, H, W) -> (B, 3, H, W); colour as it is."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [-1, 1] -> uint8, rounded to nearest, values outside the range cut off (as a PNG does)."""
    return ((images.to(torch.float32) + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


class ImageSet(Dataset):
    """One split of an image set; a torch `Dataset` whose item i is `(float32 (C, S, S) in [-1, 1], int label)`.

    Attributes:
        class_names: Name of each label.
        labels: int64 array (N,).
        fingerprint: sha256 over what the images are (array bytes, or file names and sizes) and the split.
        touched: SHA-256 over when each file was last written, which `fingerprint` does not see; "" for an array's
            images.
        cut: How the split was cut off a folder's training images (`folders.FolderSplit`); empty where it was not.
        split, image_size, channels, crop: How they were opened; only `train` crops at random.
    """

    def __init__(
        self,
        data: DataOptions,
        split: str,
        labels: np.ndarray,
        class_names: list[str],
        fingerprint: str,
        array: np.ndarray | None = None,
        paths: Sequence[str] | None = None,
        touched: str = "",
        cut: dict[str, Any] | None = None,
    ):
        self.split = split
        self.image_size = data.image_size
        self.channels = data.channels
        self.crop = data.crop if split == "train" else "center"
        self.labels = labels
        self.class_names = class_names
        self.fingerprint = fingerprint
        self.touched = touched
        self.cut = cut or {}
        self._array = array  # (N, H, W) uint8
        # one array of bytes: a loader's workers share its memory, where counting references would copy each string
        self._paths = None if paths is None else np.array([os.fsencode(path) for path in paths], dtype=bytes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def paths(self) -> list[str]:
        """The images' files, in order; empty where they lie in one array."""
        return [] if self._paths is None else [os.fsdecode(path) for path in self._paths]

    def raw(self, index: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Image `index` as uint8 (C, S, S) after resize and crop.

        Args:
            index: In [0, N).
            generator: Draws the place of a random crop; None draws it from torch's global generator.

        Raises:
            ValueError: The file is broken, or of a kind that has no 8-bit meaning; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: {self.split} has {len(self)} images")
        if self._array is not None:
            image = torch.from_numpy(self._array[index])[None]  # (1, H, W)
            if self.channels == 3:
                image = image.expand(3, -1, -1)
            if self.image_size in image.shape[-2:] and image.shape[-1] == image.shape[-2]:
                return image.clone()
            return self._resize_and_crop(image, generator, "image")
        assert self._paths is not None
        path = os.fsdecode(self._paths[index])
        return self._resize_and_crop(read_image(path, self.channels), generator, _named(path))

    def _resize_and_crop(
        self, image: Image.Image | torch.Tensor, generator: torch.Generator | None, name: str
    ) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        height, width = tv.get_size(image)
        scaled = covering((height, width), size)
        if self.crop == "random":
            top = int(torch.randint(scaled[0] - size[0] + 1, (), generator=generator))
            left = int(torch.randint(scaled[1] - size[1] + 1, (), generator=generator))
        else:
            top, left = middle(scaled, size)
        refuse_strip(scaled, name)
        image = tv.resize(image, list(scaled), interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
        image = tv.crop(image, top, left, *size)
        return tv.pil_to_tensor(image) if isinstance(image, Image.Image) else image

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = normalise(self.raw(index))
        return image, int(self.labels[index])


def read_image(path: str | os.PathLike, channels: int) -> Image.Image:
    """Decode one file to an upright `L` (channels 1) or `RGB` (channels 3) picture of its full size (`to_8_bits`).

    Raises:
        ValueError: The file cannot be decoded (broken, truncated, a decompression bomb) or has no 8-bit meaning.
    """
    name = _named(path)
    with _opened(path) as image:
        return to_8_bits(image, channels, name)


def check_image(path: str | os.PathLike) -> int:
    """Raise the ValueError that `read_image` would raise, at less cost: JPEG is decoded at an eighth of its size.

    Returns:
        The shorter side in pixels.
    """
    name = _named(path)
    with _opened(path) as image:
        side = min(image.size)
        try:
            image.draft(None, (1, 1))  # every coefficient is still read, so a truncated file is seen
            image.load()
        except DECODING_ERRORS as error:
            raise ValueError(cannot_be_read(name, error)) from error
        if image.mode.startswith("I"):
            values_of_16_bits(image, name)
        elif image.mode == "F":
            raise ValueError(floating_point(name))
    return side


def _opened(path: str | os.PathLike) -> Image.Image:
    """The file's picture, not decoded yet, and small enough to be."""
    try:
        image = Image.open(path)
    except DECODING_ERRORS as error:
        raise ValueError(cannot_be_read(_named(path), error)) from error
    try:
        refuse_bomb(image.size, _named(path))
    except ValueError:
        image.close()
        raise
    return image


def _named(path: str | os.PathLike) -> str:
    return f"image {str(path)!r}"


class Uint8Images(Dataset[tuple[torch.Tensor, int]]):
    """An image set before it is made float: item = (uint8 (C, S, S) after resize and crop, label).

    Args:
        images: The set.
        indices: Which images, in this order; None takes all.
    """

    def __init__(self, images: ImageSet, indices: Sequence[int] | None = None) -> None:
        self.images = images
        self.indices = range(len(images)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        index = int(self.indices[item])
        return self.images.raw(index), int(self.images.labels[index])


def open_images(data: DataOptions, split: str) -> ImageSet:
    """Open one split.

    Fashion-MNIST: `validation` is the last 5,000 training images, `train` the first 55,000, `test` the 10,000.

    Folder: `root/train`, `root/val` (or `validation`), `root/test` where they exist. With `val` but no `test`, as in
    ImageNet, `val` *is* the test split. A split that has no folder is cut from `train` (or from a flat folder of class
    folders) by the hash of class and file name: `data.validation_fraction`, and 5 % for test. A line says how many
    images the split holds, why, and of which classes. What is hidden (a leading dot, `__MACOSX`, `@eaDir`) is passed
    over.

    Args:
        data: Which images.
        split: `train`, `validation` or `test`.

    Raises:
        ValueError, FileNotFoundError: Unknown split; missing root; a class folder without images; folders called like
            splits where none or another is taken; a link to a folder above itself; an empty split, or one that
            validation_fraction = 0 does away with.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
    if data.name == "fashion-mnist":
        return _open_fashion_mnist(data, split)
    found = on_first_rank(lambda: find_split(data, split))  # millions of files are asked for their sizes
    return ImageSet(
        data,
        split,
        found.labels,
        found.class_names,
        found.fingerprint,
        paths=found.paths,
        touched=found.touched,
        cut=found.cut,
    )


# ---------------------------------------------------------------------------------------------- Fashion-MNIST


def _open_fashion_mnist(data: DataOptions, split: str) -> ImageSet:
    prefix = "t10k" if split == "test" else "train"
    folder = _fashion_mnist_folder(data)
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", read_image_file)  # (N, 28, 28) uint8
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", read_label_file)  # (N,) int64
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels: fetch the files again")
    if split != "test":
        cut = len(images) - FASHION_MNIST_VALIDATION
        if cut <= 0:
            raise ValueError(f"{folder}: {len(images)} training images are too few: fetch the files again")
        part = slice(None, cut) if split == "train" else slice(cut, None)
        images, labels = images[part], labels[part]
    images, labels = np.ascontiguousarray(images), np.ascontiguousarray(labels)
    digest = hashlib.sha256(f"fashion-mnist {split} {images.shape}".encode())
    digest.update(images.tobytes())
    digest.update(labels.astype("<i8").tobytes())
    return ImageSet(data, split, labels, list(FashionMNIST.classes), digest.hexdigest(), array=images)


def _fashion_mnist_folder(data: DataOptions) -> Path:
    """The folder of the four files, downloaded if need be: by one process first, the others then find them."""
    with main_process_first():
        return _find_or_download_fashion_mnist(data)


def _find_or_download_fashion_mnist(data: DataOptions) -> Path:
    cache = Path.home() / ".cache" / "xdlm_image"
    root = Path(data.root).expanduser() if data.root is not None else cache
    candidates = [root / "FashionMNIST" / "raw", root]
    if data.root is None:
        candidates.insert(0, DEBIAN_FASHION_MNIST)
    for folder in candidates:
        if all(_idx_file(folder, f"{p}-{k}-ubyte") for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")):
            return folder
    if data.root is not None and _holds_images(root):
        raise ValueError(
            f"data.name='fashion-mnist', data.root={data.root!r}: no Fashion-MNIST there, but images of yours, and "
            "nothing is downloaded among them; for these images set data.name: folder, for Fashion-MNIST leave "
            "data.root out"
        )
    if not data.download:
        raise FileNotFoundError(
            f"data.root={data.root!r}: no Fashion-MNIST in {', '.join(map(str, candidates))}; install Debian's "
            "dataset-fashion-mnist, or set data.download: true"
        )
    try:
        FashionMNIST(str(root), download=True)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"data.root={data.root!r}: Fashion-MNIST is not there and its download failed ({error}); install Debian's "
            "dataset-fashion-mnist, or put the four idx files (.gz or not) into a folder and name it in data.root"
        ) from error
    return root / "FashionMNIST" / "raw"


def _holds_images(root: Path) -> bool:
    """Whether an image lies in the folder, or one or two folders below it."""
    found = itertools.chain.from_iterable(root.glob(pattern) for pattern in ("*", "*/*", "*/*/*"))
    return any(path.suffix.lower() in IMG_EXTENSIONS for path in found)


def _idx_file(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _read_idx(folder: Path, name: str, reader: Callable[[str], torch.Tensor]) -> np.ndarray:
    path = _idx_file(folder, name)
    assert path is not None  # the caller found it
    try:
        if path.suffix != ".gz":
            return reader(str(path)).numpy()
        with tempfile.TemporaryDirectory(prefix="xdlm_image_") as scratch:  # torchvision's reader takes a plain file
            plain = os.path.join(scratch, name)
            with gzip.open(path, "rb") as packed, open(plain, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            return reader(plain).numpy()
    except (OSError, EOFError, ValueError, RuntimeError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): fetch it again") from error
