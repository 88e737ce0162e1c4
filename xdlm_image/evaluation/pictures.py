"""Image tensors as Pillow pictures, and PNG files written atomically; no layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from xdlm_image.files import write_atomic


def save_picture(path: str | Path, picture: Image.Image) -> Path:
    """Write a PNG file atomically."""
    return write_atomic(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_images(folder: str | Path, names: Sequence[str], images: torch.Tensor) -> None:
    """Write uint8 images (N, C, H, W) as PNG files below a folder, `images[i]` as `names[i]`, each atomically."""
    for name, image in zip(names, images, strict=True):
        save_picture(Path(folder) / name, to_picture(image))


def to_picture(image: torch.Tensor) -> Image.Image:
    """uint8 (C, H, W) -> a Pillow picture, grey for C = 1."""
    array = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
