"""Which random numbers an image is drawn from: one generator an image, whatever the batch or the number of devices.

This file owns the rule (seed, image index) -> generator, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INDEX_BITS = 18  # torch's CPU generator (mt19937) uses 32 bits of a seed: 18 for the image, 14 for the seed
MAX_IMAGES = 2**INDEX_BITS
MAX_SEED = 2 ** (32 - INDEX_BITS)
SEED_RULE = "image i of seed s: mt19937 seeded with MurmurHash3's finalizer of (s * 2**18 + i)"  # for protocols


def check_seed(seed: int, argument: str = "seed") -> None:
    """Raise ValueError outside [0, 16384)."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < MAX_SEED:
        raise ValueError(
            f"{argument}={seed!r}: must be a whole number in [0, {MAX_SEED}) so that no two images share random numbers"
        )


def image_seed(seed: int, index: int) -> int:
    """The 32-bit seed of image `index` in the set `seed`; different for every pair.

    The pair is packed into 32 bits and scrambled by MurmurHash3's finalizer, a bijection, so that no two pairs share
    a seed and neighbours do not look alike. (`torch.Generator.manual_seed` drops all but the low 32 bits on the CPU:
    seed * 2**32 + index would make every set the same.)

    Args:
        seed: Set of images, in [0, 16384).
        index: Image in the set, in [0, 262144).

    Raises:
        ValueError: Outside these ranges.
    """
    check_seed(seed)
    if not 0 <= index < MAX_IMAGES:
        raise ValueError(f"image index {index!r}: must lie in [0, {MAX_IMAGES}); draw fewer images or a second seed")
    h = (seed << INDEX_BITS) | index
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator an image, for a pipeline's `generator` argument."""
    import torch  # here, so that recipes know the limits above without it

    return [torch.Generator("cpu").manual_seed(image_seed(seed, int(index))) for index in indices]
