"""Image tensors as Pillow pictures, and PNG files in folders of their classes, written atomically; no layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xdlm_image.files import write_atomic

KEY = "xdlm_image.key"  # of a PNG's texts


def save_picture(path: str | Path, picture: Image.Image, key: str = "") -> Path:
    """Write a PNG file atomically, which keeps the `key` of what decided it."""
    texts = PngInfo()
    if key:
        texts.add_text(KEY, key)
    return write_atomic(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=texts))


def has_key(path: str | Path, key: str) -> bool:
    """Whether `path` is a picture of this key."""
    try:
        with Image.open(path) as picture:
            return picture.info.get(KEY) == key
    except OSError:
        return False


def class_folders(class_names: Sequence[str]) -> list[str]:
    """What folders of these classes are called: their names, with `_` for what no file system takes, all different."""
    safe = [re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", name).strip(". ") or "_" for name in class_names]
    while len(set(safe)) < len(safe):
        safe = [f"{name}_{i}" if safe.count(name) > 1 else name for i, name in enumerate(safe)]
    return safe


def numbered_names(folders: Sequence[str], labels: Iterable[int]) -> list[str]:
    """`CLASS/IIIIIII.png` of every image of a set, by the place of its class among the folders."""
    return [f"{folders[label]}/{i:07d}.png" for i, label in enumerate(labels)]


def numbered_images(folder: str | Path) -> set[str]:
    """Those of such names that are in a folder."""
    found = Path(folder).glob("*/" + 7 * "[0-9]" + ".png")
    return {path.relative_to(folder).as_posix() for path in found}


def save_images(folder: str | Path, names: Sequence[str], images: torch.Tensor) -> None:
    """Write uint8 images (N, C, H, W) as PNG files below a folder, `images[i]` as `names[i]`, each atomically."""
    for name, image in zip(names, images, strict=True):
        save_picture(Path(folder) / name, to_picture(image))


def to_picture(image: torch.Tensor) -> Image.Image:
    """uint8 (C, H, W) -> a Pillow picture, grey for C = 1."""
    array = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
