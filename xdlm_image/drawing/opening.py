"""Opening a saved pipeline to draw from: checks, its hash, and what it says of its images and classes.

This file owns what is read from a pipeline's folder; it never draws and never writes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from xdlm_image.devices import warn_if_slow
from xdlm_image.drawing.foreign_pipelines import ForeignPipeline, is_foreign
from xdlm_image.hub_ids import fetch_hint
from xdlm_image.pipelines import XDLMImg2ImgPipeline, XDLMInpaintPipeline, XDLMPipeline
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
    refuse_missing(folder, argument)
    warn_if_slow(device, dtype, f"dtype={str(dtype).removeprefix('torch.')!r}")
    bars = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()  # of the parts that are loaded: it would break into a verb's own
    try:
        dtypes = {"transformer": dtype, "default": torch.float32}
        pipeline = XDLMPipeline.from_pretrained(str(path), local_files_only=True, dtype=dtypes)
    except Exception as error:  # json, safetensors, OSError, KeyError: whatever a damaged folder raises
        raise ValueError(
            f"{argument}={str(folder)!r}: cannot be loaded ({type(error).__name__}: {error}); save it again"
        ) from error
    finally:
        if bars:
            diffusers_logging.enable_progress_bar()
    if pipeline.vqvae is None:
        raise ValueError(f"{argument}={str(folder)!r}: saved without its tokenizer (vqvae); save it with that")
    pipeline.transformer.eval()
    pipeline.vqvae.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def refuse_missing(folder: str | Path, argument: str) -> None:
    """Raise FileNotFoundError unless a pipeline was saved there."""
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


def open_any_pipeline(
    folder: str, device: torch.device, argument: str = "pipeline", dtype: torch.dtype = torch.float32
) -> XDLMPipeline | ForeignPipeline:
    """`open_pipeline`, or another class-conditional diffusers pipeline, of which `dtype` is the whole's."""
    return (ForeignPipeline if is_foreign(folder) else open_pipeline)(folder, device, argument, dtype)


def beginning_at(
    pipeline: XDLMPipeline, image: Image.Image, mask: Image.Image | None, strength: float | None
) -> tuple[XDLMPipeline, dict[str, Any]]:
    """An image-to-image pipeline that shares the parts of this one, with a mask an inpainting one; and the arguments
    that it takes beside the usual ones (`SamplerSettings.start`). Strength None is its default."""
    kind = XDLMImg2ImgPipeline if mask is None else XDLMInpaintPipeline
    usual = inspect.signature(kind.__call__).parameters["strength"].default
    start: dict[str, Any] = {"image": image, "strength": usual if strength is None else strength}
    if mask is not None:
        start["mask_image"] = mask
    begins = kind.from_pipe(pipeline)
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
            f"{argument}={about['folder']!r}: it was rewritten since this command began; give the command again"
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
