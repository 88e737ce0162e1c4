"""Pictures that users bring: what may be decoded, and how they come to the size and channels of a tokenizer.

This file owns the limits of size, modes, orientation and the rule of resizing. It never runs a network. It imports
only torch, diffusers, Pillow, numpy and the standard library, so that it can travel beside the weights.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import ExifTags, Image

ROUNDING = 1e-4  # how far a float may lie beyond [0, 1]
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

TURNS: dict[Any, Image.Transpose] = {  # EXIF's orientation -> what makes a picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURNS[orientation] for orientation in (5, 6, 7, 8)}  # height and width change places

InitImages = (
    Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image] | Sequence[np.ndarray] | Sequence[torch.Tensor]
)


def refuse_bomb(size: tuple[int, int], name: str = "image") -> None:
    """Refuse a picture that is too large to be decoded; an opened file has told its size but is not decoded yet.

    Pillow itself only warns up to twice its limit, `PIL.Image.MAX_IMAGE_PIXELS`.

    Args:
        size: Width and height.
        name: What the error calls it.

    Raises:
        ValueError: Names the size and the limit.
    """
    limit, (width, height) = Image.MAX_IMAGE_PIXELS, size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has {width} x {height} pixels: there is nothing in it")
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{name} has {width} x {height} pixels, the limit is {limit}: it may be a decompression bomb; scale it "
            "down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )


def to_8_bits(image: Image.Image, channels: int, name: str = "image") -> Image.Image:
    """Decode a picture to an upright `L` (channels 1) or `RGB` (channels 3) one of its full size.

    EXIF rotation is applied; what is transparent is laid on white; CMYK, palette and grey are converted; 16-bit grey is
    divided by 257.

    Raises:
        ValueError: It is too large, cannot be decoded (broken, truncated), or has no 8-bit meaning.
    """
    refuse_bomb(image.size, name)
    try:
        image.load()
        turn = turn_of(image)
        image = image.copy() if turn is None else image.transpose(turn)
    except DECODING_ERRORS as error:
        raise ValueError(cannot_be_read(name, error)) from error
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would cut everything above 255 off
        values = values_of_16_bits(image, name)
        grey = ((values + 128) // 257).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    elif image.mode == "F":
        raise ValueError(floating_point(name))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = with_alpha(image)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    upright = image if channels == 3 else image.convert("L")
    upright.info = {}  # Pillow carries EXIF along: whoever reads this picture again would turn it again
    return upright


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright, by EXIF's word on how the camera was held; None where that cannot be read.

    The EXIF block is not written again, as `ImageOps.exif_transpose` would: that fails at odd tags, which harm nobody.
    """
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever Pillow raises at a block that is broken
        return None


def with_alpha(image: Image.Image) -> Image.Image:
    """The picture in mode `RGBA`; from `La`, grey times alpha, Pillow has no way straight there."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def preprocess(images: Any, height: int, width: int, channels: int) -> torch.Tensor:
    """Pictures as a tokenizer takes them.

    Whatever does not fit is scaled, bicubic with antialiasing, until it just covers height x width, and the middle is
    cut out: nothing is stretched. Grey becomes three equal channels, colour becomes grey by luminance (ITU-R 601).

    Args:
        images: One picture or several: Pillow pictures, arrays (B, H, W, C) or (H, W, C) or (H, W), tensors
            (B, C, H, W) or (C, H, W), floats in [0, 1] (up to 1e-4 beyond: rounding) or uint8; or a list of those,
            each of one picture.
        height, width: Pixels that the tokenizer takes.
        channels: 1 or 3.

    Returns:
        (B, channels, height, width) float32 in [-1, 1].

    Raises:
        ValueError: No picture at all, a wrong shape, values out of range, or what `to_8_bits` refuses.
    """
    if channels not in (1, 3):
        raise ValueError(f"image: the tokenizer takes {channels} channels; pictures have 1 or 3")
    several = isinstance(images, list | tuple)
    rows = [
        _one(image, height, width, channels, f"image[{i}]" if several else "image")
        for i, image in enumerate(images if several else [images])
    ]
    if not rows or sum(map(len, rows)) == 0:
        raise ValueError("image is empty: give at least one picture")
    return VaeImageProcessor.normalize(torch.cat(rows))  # (B, channels, height, width)


def _one(image: Any, height: int, width: int, channels: int, name: str) -> torch.Tensor:
    """(n, channels, height, width) float32 in [0, 1]; n = 1 but for arrays and tensors of several pictures."""
    if isinstance(image, Image.Image):
        return _fit_picture(to_8_bits(image, channels, name), height, width, name)
    pixels = to_pixels(image, name)  # (n, c, H, W)
    if pixels.shape[1] < channels:
        pixels = pixels.expand(-1, channels, -1, -1)
    elif pixels.shape[1] > channels:
        luminance = torch.tensor(
            [0.299, 0.587, 0.114], dtype=torch.float32, device="cpu"
        )  # as Pillow's conversion to L
        pixels = torch.einsum("nchw,c->nhw", pixels, luminance)[:, None]
    return _fit_tensor(pixels, height, width, name)


def to_pixels(image: Any, name: str) -> torch.Tensor:
    """An array or tensor of one picture or several as (n, c, H, W) float32 in [0, 1], c = 1 or 3, at its full size.

    Floats up to 1e-4 beyond the ends are rounding, and become the ends.

    Raises:
        ValueError: It is neither, has a wrong shape or dtype, or values out of range.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
            raise ValueError(f"{name} is an array of {image.dtype}: give floats in [0, 1], or uint8")
        pixels = torch.from_numpy(np.array(image, np.uint8 if image.dtype == np.uint8 else np.float32))  # writable
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels.movedim(-1, -3) if pixels.ndim in (3, 4) else pixels
    elif isinstance(image, torch.Tensor):
        pixels = image.detach().cpu()
        pixels = pixels[None] if pixels.ndim == 2 else pixels
    else:
        kind = type(image).__name__
        opened = "; PIL.Image.open reads a file" if isinstance(image, str | os.PathLike) else ""
        raise ValueError(f"{name} is a {kind}: give a Pillow picture, an array, a tensor, or a list of those{opened}")
    shape = tuple(image.shape)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or 0 in pixels.shape[2:]:
        order = "(B, H, W, C)" if isinstance(image, np.ndarray) else "(B, C, H, W)"
        raise ValueError(f"{name} has shape {shape}: must be {order} with 1 or 3 channels and not empty")
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    elif not pixels.is_floating_point():
        raise ValueError(f"{name} is a tensor of {pixels.dtype}: give floats in [0, 1], or uint8")
    pixels = pixels.float()  # (n, c, H, W)
    if pixels.numel() and not (pixels.min() >= -ROUNDING and pixels.max() <= 1 + ROUNDING):  # NaN fails too
        low, high = pixels.min().item(), pixels.max().item()
        remedy = "; divide by 255, or give uint8" if low >= 0 and high <= 255 else ""
        remedy = "; take (x + 1) / 2" if -1 <= low < 0 and high <= 1 else remedy
        raise ValueError(f"{name} holds values from {low:.6g} to {high:.6g}: floats must lie in [0, 1]{remedy}")
    return pixels.clamp(0, 1)


def covering(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture scaled until it just covers `new`, the longer side rounded down."""
    if old[0] * new[1] <= old[1] * new[0]:  # flatter than asked for: the height decides
        return new[0], max(new[1], old[1] * new[0] // old[0])
    return max(new[0], old[0] * new[1] // old[1]), new[1]


def middle(scaled: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
    """Top and left of the middle part of size `new`."""
    return round((scaled[0] - new[0]) / 2), round((scaled[1] - new[1]) / 2)


def _fit_picture(image: Image.Image, height: int, width: int, name: str) -> torch.Tensor:
    scaled = covering((image.height, image.width), (height, width))
    if scaled != (image.height, image.width):
        refuse_strip(scaled, name)
        image = image.resize(scaled[::-1], Image.Resampling.BICUBIC)
    top, left = middle(scaled, (height, width))
    image = image.crop((left, top, left + width, top + height))
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image))  # (1, C, height, width)


def _fit_tensor(pixels: torch.Tensor, height: int, width: int, name: str) -> torch.Tensor:
    scaled = covering((pixels.shape[-2], pixels.shape[-1]), (height, width))
    if scaled != tuple(pixels.shape[-2:]):
        refuse_strip(scaled, name)
        pixels = torch.nn.functional.interpolate(pixels, scaled, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = middle(scaled, (height, width))
    return pixels[..., top : top + height, left : left + width]


def refuse_strip(scaled: tuple[int, int], name: str = "image") -> None:
    """Refuse a strip so long that it fills the memory once its shorter side is scaled up; `scaled` is of `covering`."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and scaled[0] * scaled[1] > limit:
        raise ValueError(
            f"{name} would be scaled to {scaled[1]} x {scaled[0]} pixels, the limit is {limit}: cut the long strip"
        )


def values_of_16_bits(image: Image.Image, name: str) -> np.ndarray:
    """The values of a picture of mode I, if 16 bits hold them."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError(f"{name} holds 32-bit values: convert it to 8 or 16 bits")
    return values


def floating_point(name: str) -> str:
    """What is said of a picture of mode F."""
    return f"{name} holds floating-point pixels of unknown range: convert it to 8 bits"


def cannot_be_read(name: str, error: Exception) -> str:
    """What is said of a picture that Pillow cannot decode."""
    return f"{name} cannot be read ({type(error).__name__}: {error}): replace it, or take it away"
