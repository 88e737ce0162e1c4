"""Batches of images, real, drawn or given: uint8 pixels, labels, codes if there are any, and the place in the set.

This file owns how a set is cut into batches and shared by ranks, and those of real images. It never draws or measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from xdlm_image.data.images import ImageSet, Uint8Images
from xdlm_image.ranks import rank_and_world

NO_CLASS = -1  # label of an image whose class is not known


class Batch(NamedTuple):
    """Consecutive images of a set.

    Attributes:
        images: uint8 (B, C, S, S).
        labels: Class ids (B,), or `NO_CLASS`.
        codes: (B, h, w); None where the images were not made of codes.
        start: Place of the first image in the set.
    """

    images: torch.Tensor
    labels: torch.Tensor
    codes: torch.Tensor | None
    start: int


def blocks_of_rank(total: int, batch_size: int) -> Iterator[range]:
    """This rank's blocks of `batch_size` consecutive places (the last may be shorter); the ranks take them in turn."""
    rank, world = rank_and_world()
    for start in range(rank * batch_size, total, world * batch_size):
        yield range(start, min(start + batch_size, total))


def real_batches(
    images: ImageSet, batch_size: int, indices: Sequence[int] | None = None, num_workers: int = 0
) -> Iterator[Batch]:
    """This rank's share of the images, in order."""
    chosen = range(len(images)) if indices is None else indices
    blocks = [[*block] for block in blocks_of_rank(len(chosen), batch_size)]
    loader = DataLoader(Uint8Images(images, chosen), batch_sampler=blocks, num_workers=num_workers)
    for block, (batch, labels) in zip(blocks, loader, strict=True):
        yield Batch(batch, labels, None, block[0])
