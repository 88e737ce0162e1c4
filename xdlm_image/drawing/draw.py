"""Images from an opened pipeline, with one generator an image: some, a grid's, or a balanced set by batches.

This file owns the call of the pipeline, the blocks of a balanced set and how long they took; it never judges images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from xdlm_image.data.image_batches import NO_CLASS, Batch, blocks_of_rank
from xdlm_image.data.images import to_uint8
from xdlm_image.drawing.drawn_codes import DrawnCodes
from xdlm_image.drawing.foreign_pipelines import ForeignPipeline
from xdlm_image.drawing.opening import is_conditional
from xdlm_image.drawing.sampler_settings import SamplerSettings, call_arguments, with_scheduler
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.ranks import sum_over_ranks


def draw_codes(
    pipeline: XDLMPipeline, labels: Sequence[int], indices: Sequence[int], seed: int, settings: SamplerSettings
) -> torch.Tensor:
    """Draw the codes of one image for each label.

    Args:
        pipeline: From `open_pipeline`.
        labels: Class ids (B).
        indices: Place of each image in the set (B); with `seed` it decides the image's random numbers.
        seed: Which set.
        settings: How the pipeline is called.

    Returns:
        (B, h, w) int64, on the pipeline's device.
    """
    arguments = call_arguments(pipeline, labels, indices, seed, settings)
    return with_scheduler(pipeline, settings)(**arguments, output_type="latent").images


@torch.no_grad()
def decode(pipeline: XDLMPipeline, codes: torch.Tensor) -> torch.Tensor:
    """Codes (B, h, w) -> uint8 images (B, C, S, S), rounded to nearest, on the CPU."""
    return to_uint8(pipeline.decode_latents(codes.to(pipeline.vqvae.device)).cpu())


def draw_images(
    pipeline: XDLMPipeline | ForeignPipeline,
    labels: Sequence[int],
    indices: Sequence[int],
    seed: int,
    settings: SamplerSettings,
) -> torch.Tensor:
    """As `draw_codes`, decoded: uint8 images (B, C, S, S) on the CPU; of any pipeline."""
    if isinstance(pipeline, ForeignPipeline):
        return pipeline.draw(labels, indices, seed, settings)
    if "mask_image" in settings.start:  # kept pixels, which no codes hold
        arguments = call_arguments(pipeline, labels, indices, seed, settings)
        images = with_scheduler(pipeline, settings)(**arguments, output_type="pt").images
        return to_uint8(2 * images.cpu() - 1)
    return decode(pipeline, draw_codes(pipeline, labels, indices, seed, settings))


class DrawnBatches:
    """This rank's share of a balanced set: image i of `num_samples` has class i mod num_classes, or none (-1) where the
    pipeline is unconditional.

    An iterable of batches. The set is cut into blocks of `batch_size` consecutive images, which
    the ranks take in turn; the last block is filled up with images that are then dropped. So a block is always drawn
    alike, however many processes there are; what `store` has of an earlier start is not drawn again. Without a store
    (pipelines that have no codes) everything is drawn.

    Attributes:
        blocks: (seconds an image, images kept) of each block that this rank decoded, or drew without a store, so far.
        called: Images that this rank had the pipeline draw so far, those that fill up the last block with them.
    """

    def __init__(
        self,
        pipeline: XDLMPipeline | ForeignPipeline,
        num_samples: int,
        num_classes: int,
        seed: int,
        settings: SamplerSettings,
        batch_size: int,
        store: DrawnCodes | None,
    ) -> None:
        self.pipeline = pipeline
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.seed = seed
        self.settings = settings
        self.batch_size = batch_size
        self.store = store
        self.blocks: list[tuple[float, int]] = []
        self.called = 0
        self.conditional = is_conditional(pipeline)

    def __iter__(self) -> Iterator[Batch]:
        for block in blocks_of_rank(self.num_samples, self.batch_size):
            start, stop = block.start, block.stop
            indices = [*block] + [start] * (self.batch_size - len(block))
            labels = [index % self.num_classes for index in indices]
            codes = None
            if self.store is not None:
                if not self.store.is_drawn(start, stop):
                    began = time.perf_counter()
                    drawn = draw_codes(self.pipeline, labels, indices, self.seed, self.settings)[: len(block)]
                    self.store.write(start, drawn, (time.perf_counter() - began) / len(indices))
                codes = self.store.read(start, stop)
            began = time.perf_counter()
            if codes is None:
                images = draw_images(self.pipeline, labels, indices, self.seed, self.settings)
                self.called += len(indices)
            else:
                images = decode(self.pipeline, codes)
            self.blocks.append(((time.perf_counter() - began) / len(images), len(block)))
            known = torch.tensor(labels[: len(block)])
            yield Batch(
                images[: len(block)], known if self.conditional else torch.full_like(known, NO_CLASS), codes, start
            )

    def seconds(self, device: torch.device) -> float:
        """What drawing and decoding the set took, over all processes; not what filled up the last block."""
        own = sum(seconds * kept for seconds, kept in self.blocks)
        return (self.store.seconds if self.store else 0.0) + sum_over_ranks(own, device)

    def images_per_second(self, device: torch.device, processes: int) -> float:
        """Speed of all processes together: their number over the seconds that an image usually takes one of them.

        Args:
            device: Where ranks exchange numbers.
            processes: How many drew what the store holds, else as many as there are now.

        Those are the median over blocks of what drawing took an image, and the same for decoding, whose medians of the
        ranks are averaged; so neither the last block nor a pause makes a difference.
        """
        own = [statistics.median(seconds for seconds, _ in self.blocks)] if self.blocks else []
        usual = sum_over_ranks(sum(own), device) / sum_over_ranks(len(own), device)
        return processes / (usual + (self.store.usual_seconds if self.store else 0.0))


def draw_all(
    pipeline: XDLMPipeline | ForeignPipeline,
    labels: Sequence[int],
    seed: int,
    settings: SamplerSettings,
    batch_size: int,
    description: str = "images",
) -> torch.Tensor:
    """Draw image i of class labels[i] for every i, by batches; uint8 (N, C, S, S)."""
    parts = []
    with tqdm(total=len(labels), desc=description, unit="image", leave=False) as progress:
        for start in range(0, len(labels), batch_size):
            indices = range(start, min(start + batch_size, len(labels)))
            parts.append(draw_images(pipeline, labels[start : indices.stop], indices, seed, settings))
            progress.update(len(indices))
    return torch.cat(parts)
