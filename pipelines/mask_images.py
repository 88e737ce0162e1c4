"""Masks that users bring to say what of a picture is redrawn: how they are read and laid over it.

This file owns what is white and how a mask comes to the size of its picture. It never runs a network. It imports only
torch, Pillow, numpy, the standard library and its sibling, so that it can travel beside the weights.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

from .init_images import SIDEWAYS, covering, middle, refuse_strip, to_8_bits, to_pixels, turn_of, with_alpha


def read_masks(masks: Any) -> list[torch.Tensor]:
    """Masks at their full size, True where they are white: from the middle of [0, 1] upwards.

    Args:
        masks: One or several, as pictures may be given (`init_images.preprocess`), or of bool.

    Returns:
        bool (H, W) each.

    Raises:
        ValueError: No mask at all, a wrong shape, values out of range, colours, or transparency.
    """
    several = isinstance(masks, list | tuple)
    found: list[torch.Tensor] = []
    for i, mask in enumerate(masks if several else [masks]):
        name = f"mask_image[{i}]" if several else "mask_image"
        if isinstance(mask, Image.Image):
            mask = _opaque(mask, name)
        elif isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
            mask = mask.astype(np.float32)
        elif isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            mask = mask.float()
        pixels = to_pixels(mask, name)  # (n, c, H, W)
        if pixels.shape[1] == 3 and bool((pixels.amax(1) - pixels.amin(1) > 0.5).any()):
            raise ValueError(
                f"{name} has colours: make it black and white; several masks are (B, H, W, 1) as an array, "
                "(B, 1, H, W) as a tensor"
            )
        found += (pixels.mean(1) >= 0.5).unbind()
    if not found:
        raise ValueError("mask_image is empty: give at least one mask")
    return found


def _opaque(mask: Image.Image, name: str) -> np.ndarray:
    """The upright picture as an array, uint8."""
    grey = mask.mode in ("1", "L") and "transparency" not in mask.info
    pixels = np.array(to_8_bits(mask, 1 if grey else 3, name))
    deep = mask.mode.startswith("I") and "transparency" in mask.info  # of which Pillow makes no alpha
    if not grey and (deep or np.array(with_alpha(mask))[..., 3].min() < 255):
        raise ValueError(f"{name} is transparent in places: make it black (kept) and white (redrawn)")
    return pixels


def sizes(images: Any) -> list[tuple[int, int]]:
    """Height and width of each of the pictures that `init_images.preprocess` takes, as they stand upright."""
    found: list[tuple[int, int]] = []
    for image in images if isinstance(images, list | tuple) else [images]:
        if isinstance(image, Image.Image):
            found.append(image.size if turn_of(image) in SIDEWAYS else (image.height, image.width))
        else:
            channels_last = isinstance(image, np.ndarray) and image.ndim > 2
            height, width = image.shape[-3:-1] if channels_last else image.shape[-2:]
            found += [(int(height), int(width))] * (len(image) if image.ndim == 4 else 1)
    return found


def fit_masks(
    masks: list[torch.Tensor], pictures: list[tuple[int, int]], height: int, width: int, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks scaled and cut as their pictures are, over pixels and over codes.

    A pixel is white if any of the mask's pixels that it covers is, and so is a cell.

    Args:
        masks: Of `read_masks`.
        pictures: `sizes` of their pictures: as many, or one of the two is one.
        height, width: Pixels of the pipeline.
        rows, columns: Codes of the pipeline.

    Returns:
        bool (B, 1, height, width) and bool (B, rows, columns), B the number of masks.

    Raises:
        ValueError: A mask has other proportions than its picture, or nothing white where the picture is kept.
    """
    fitted = []
    for i, mask in enumerate(masks):
        name = f"mask_image[{i}]" if len(masks) > 1 else "mask_image"
        for size in pictures[i : i + 1] if len(pictures) == len(masks) else pictures:
            if not _alike(tuple(mask.shape), size):
                turned = _alike(tuple(mask.shape), size[::-1])
                raise ValueError(
                    f"{name} has {mask.shape[1]} x {mask.shape[0]} pixels, its picture {size[1]} x {size[0]}: it may "
                    "be larger or smaller, but must have the picture's proportions"
                    + " (a picture is turned as its EXIF says; PIL.ImageOps.exif_transpose does it too)"
                    * turned
                )
        scaled = covering((mask.shape[0], mask.shape[1]), (height, width))
        refuse_strip(scaled, name)
        white = torch.nn.functional.adaptive_max_pool2d(mask[None].float(), scaled)  # (1, H, W)
        top, left = middle(scaled, (height, width))
        fitted.append(white[:, top : top + height, left : left + width])
        if not fitted[-1].any():
            raise ValueError(
                f"{name} keeps everything: make white (1; 255 as uint8) what is to be redrawn, in the middle "
                f"part that pictures are cut to ({width} x {height} here)"
            )
    pixels = torch.stack(fitted)  # (B, 1, height, width)
    return pixels > 0, torch.nn.functional.adaptive_max_pool2d(pixels, (rows, columns))[:, 0] > 0


def _alike(mask: tuple[int, ...], picture: tuple[int, int]) -> bool:
    """Whether one is the other scaled, but for rounding to whole pixels of the mask."""
    (height, width), (own_height, own_width) = mask, picture
    return abs(height - own_height * width / own_width) < 1 or abs(width - own_width * height / own_height) < 1
