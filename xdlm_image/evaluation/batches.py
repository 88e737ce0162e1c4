"""Images as uint8 batches with labels, as the metrics want them: real ones and reconstructed ones.

This file owns the order of real images and their split over ranks. It never draws samples and never measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from diffusers import VQModel
from torch.utils.data import DataLoader, Dataset

from xdlm_image.data.images import ImageSet, normalise, to_uint8
from xdlm_image.evaluation.statistics import rank_and_world
from xdlm_image.tokenizer.codes import decode_codes, encode_images

UINT8_RULE = "round to nearest, cut off at 0 and 255: clamp(round((x + 1) * 127.5)), x in [-1, 1]"

LabelledBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # uint8 (B, C, S, S), labels, codes (B, h, w)


class Uint8Images(Dataset[tuple[torch.Tensor, int]]):
    """An image set as the metrics want it: item = (uint8 (C, S, S) after resize and crop, label).

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


def real_batches(
    images: ImageSet, batch_size: int, indices: Sequence[int] | None = None, num_workers: int = 0
) -> Iterator[LabelledBatch]:
    """This rank's share of the images, in order."""
    rank, world = rank_and_world()
    wanted = list(range(len(images)) if indices is None else indices)[rank::world]
    for batch, labels in DataLoader(Uint8Images(images, wanted), batch_size, num_workers=num_workers):
        yield batch, labels, None


def reconstructed_batches(vqvae: VQModel, batches: Iterable[LabelledBatch]) -> Iterator[LabelledBatch]:
    """Each batch through encoder, codebook and decoder, back to uint8."""
    for images, labels, _ in batches:
        codes = encode_images(vqvae, normalise(images).to(vqvae.device))  # (B, h, w)
        yield to_uint8(decode_codes(vqvae, codes)).cpu(), labels, codes.cpu()
