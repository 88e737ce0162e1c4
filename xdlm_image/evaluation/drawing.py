"""Images from a saved pipeline: opening it with checks, its hash, and drawing with one generator an image.

This file owns the user's call of the pipeline on behalf of grids and sweeps; it never measures and never writes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import statistics
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from xdlm_image.data.images import to_uint8
from xdlm_image.devices import warn_if_slow
from xdlm_image.evaluation.batches import NO_CLASS, Batch, blocks_of_rank
from xdlm_image.evaluation.drawn_codes import DrawnCodes
from xdlm_image.evaluation.foreign_pipelines import ForeignPipeline, is_foreign
from xdlm_image.evaluation.sampler_settings import SamplerSettings, call_arguments, with_scheduler
from xdlm_image.hub.ids import fetch_hint
from xdlm_image.pipelines import XDLMImg2ImgPipeline, XDLMInpaintPipeline, XDLMPipeline
from xdlm_image.ranks import sum_over_ranks
from xdlm_image.schedulers import XDLMScheduler
from xdlm_image.weights import weights_hash


def open_pipeline(
    folder: str | Path, device: torch.device, argument: str = "pipeline", dtype: torch.dtype = torch.float32
) -> XDLMPipeline:
    """Load a saved pipeline in evaluation mode.

    Args:
        folder: From `save_pretrained`.
        device: Where it will run.
        argument: What the caller calls the folder, for errors.
        dtype: What the network computes in; the tokenizer stays in float32.

    Raises:
        FileNotFoundError: No such folder, or no `model_index.json` in it.
        ValueError: A file in it is damaged or its parts do not fit.
    """
    path = Path(folder)
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{argument}={str(folder)!r}: no saved pipeline there (no model_index.json); "
            + (
                f"name the run's {str(path / 'pipeline')!r}"
                if (path / "pipeline" / "model_index.json").is_file()
                else "train one with `xdlm-image train`, or check the path"
            )
            + fetch_hint(folder)
        )
    warn_if_slow(device, dtype, f"dtype={str(dtype).removeprefix('torch.')!r}")
    try:
        dtypes = {"transformer": dtype, "default": torch.float32}
        pipeline = XDLMPipeline.from_pretrained(str(path), local_files_only=True, dtype=dtypes)
    except Exception as error:  # json, safetensors, OSError, KeyError: whatever a damaged folder raises
        raise ValueError(
            f"{argument}={str(folder)!r}: cannot be loaded ({type(error).__name__}: {error}); save it again"
        ) from error
    if pipeline.vqvae is None:
        raise ValueError(f"{argument}={str(folder)!r}: saved without its tokenizer (vqvae); save it with that")
    pipeline.transformer.eval()
    pipeline.vqvae.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def open_any_pipeline(
    folder: str, device: torch.device, argument: str = "pipeline", dtype: torch.dtype = torch.float32
) -> XDLMPipeline | ForeignPipeline:
    """`open_pipeline`, or another class-conditional diffusers pipeline, of which `dtype` is the whole's."""
    return (ForeignPipeline if is_foreign(folder) else open_pipeline)(folder, device, argument, dtype)


def beginning_at(
    pipeline: XDLMPipeline, image: Image.Image, mask: Image.Image | None, strength: float | None
) -> tuple[XDLMPipeline, dict[str, Any]]:
    """A pipeline that shares the parts of this one and begins at a picture, or paints its mask anew; and what it takes
    beside a pipeline's usual arguments (`SamplerSettings.start`). Strength None is its default."""
    start: dict[str, Any] = {"image": image}
    if mask is not None:
        start["mask_image"] = mask
    if strength is not None:
        start["strength"] = strength
    begins = (XDLMImg2ImgPipeline if mask is None else XDLMInpaintPipeline).from_pipe(pipeline)
    begins.set_progress_bar_config(disable=True)
    return begins, start


def pipeline_hash(pipeline: XDLMPipeline) -> str:
    """SHA-256 over the weights of network and tokenizer and over the configurations that decide what is drawn."""
    digest = hashlib.sha256()
    for module in (pipeline.transformer, pipeline.vqvae):
        digest.update(weights_hash(module).encode())
        digest.update(_config_json(module).encode())
    scheduler = pipeline.scheduler
    if type(scheduler) is not XDLMScheduler:  # which had no other beside it once: its hashes stay
        digest.update(type(scheduler).__name__.encode())
    # `from_config` keeps what another class of scheduler was told, and this one does not read
    digest.update(_config_json(scheduler, inspect.signature(type(scheduler).__init__).parameters).encode())
    return digest.hexdigest()


def refuse_changed(about: Mapping[str, Any], device: torch.device, argument: str) -> None:
    """Raise ValueError if a pipeline is another by now than a protocol says, by its "folder" and "weights_hash"."""
    pipeline = open_any_pipeline(about["folder"], device, argument)
    foreign = isinstance(pipeline, ForeignPipeline)
    if about["weights_hash"] != (pipeline.describe()["weights_hash"] if foreign else pipeline_hash(pipeline)):
        raise ValueError(
            f"{argument}={about['folder']!r}: it was written anew since this command began; give the command again"
        )


def _config_json(component: Any, names: Container[str] | None = None) -> str:
    """Settings of a part, as JSON; only those of `names`, if given."""
    config = {k: v for k, v in dict(component.config).items() if not k.startswith("_")}
    config = {k: v for k, v in config.items() if names is None or k in names}
    return json.dumps(config, sort_keys=True, default=str)


def image_shape(pipeline: XDLMPipeline | ForeignPipeline) -> tuple[int, int]:
    """(channels, side in pixels) of the pipeline's square images. Raises ValueError where they are not square."""
    if isinstance(pipeline, ForeignPipeline):
        return pipeline.shape
    height, width = pipeline.image_size
    if height != width:
        raise ValueError(f"the pipeline draws images of {height} x {width} pixels: only square ones are evaluated")
    return int(pipeline.vqvae.config.out_channels), height


def is_conditional(pipeline: XDLMPipeline | ForeignPipeline) -> bool:
    """Whether the pipeline draws images of classes."""
    return isinstance(pipeline, ForeignPipeline) or pipeline.transformer.config.num_classes is not None


def class_names(pipeline: XDLMPipeline) -> list[str]:
    """Short names by class id, `class 3` where there is none; empty for an unconditional pipeline."""
    names = pipeline.id2label
    return [
        names[i].partition(",")[0] if i in names else f"class {i}"
        for i in range(pipeline.transformer.config.num_classes or 0)
    ]


def folder_names(pipeline: XDLMPipeline | ForeignPipeline) -> list[str]:
    """What folders of its classes are called, by class id: WordNet ids, else names."""
    if isinstance(pipeline, ForeignPipeline):
        return pipeline.class_names
    names = {**pipeline.id2label, **pipeline.id2synset}
    count = pipeline.transformer.config.num_classes
    return ["images"] if count is None else [names.get(i, f"class {i}") for i in range(count)]


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
