"""Other class-conditional diffusers pipelines (DiT and its kind) as a source of images for a sweep.

This file owns opening one, calling it with a generator an image, and counting what its network computes. What it knows
of a pipeline is what diffusers promises: a call with class_labels, num_inference_steps, generator and output_type.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from xdlm_image.devices import warn_if_slow
from xdlm_image.drawing.sampler_settings import SamplerSettings
from xdlm_image.seeds import image_generators, image_seed
from xdlm_image.weights import weights_hash

OURS = {"XDLMPipeline", "XDLMImg2ImgPipeline", "XDLMInpaintPipeline"}
DENOISERS = ("transformer", "unet", "prior")


def is_foreign(folder: str | Path) -> bool:
    """Whether the folder holds a saved pipeline of another class than ours; False where it holds none."""
    index = Path(folder) / "model_index.json"
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return OURS.isdisjoint(name if isinstance(name, list) else [name])


class ForeignPipeline:
    """A saved diffusers pipeline that draws images of given classes.

    Args:
        folder: From `save_pretrained`; no code in it is run.
        device: Where it runs.
        argument: What the caller calls the folder, for errors.
        dtype: What all of it computes in.

    Attributes:
        shape: (channels, side in pixels) of its images.
        rows: Images that its network has seen so far; guided ones count twice.

    Raises:
        ValueError: It cannot be loaded, or its call takes no class labels; or its images are not square.
    """

    def __init__(
        self, folder: str, device: torch.device, argument: str = "pipeline", dtype: torch.dtype = torch.float32
    ) -> None:
        warn_if_slow(device, dtype, f"dtype={str(dtype).removeprefix('torch.')!r}")
        try:
            self.pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=dtype)
        except Exception as error:  # json, safetensors, OSError, AttributeError: whatever a damaged folder raises
            raise ValueError(f"{argument}={folder!r}: cannot be loaded ({type(error).__name__}: {error})") from error
        self.name = type(self.pipeline).__name__
        self.parameters = inspect.signature(self.pipeline.__call__).parameters
        missing = sorted({"class_labels", "num_inference_steps", "generator", "output_type"} - set(self.parameters))
        modules = {name: m for name, m in self.pipeline.components.items() if isinstance(m, torch.nn.Module)}
        denoisers = [modules[name] for name in DENOISERS if name in modules]
        if missing or not denoisers:
            lacks = f"its call takes no {', '.join(missing)}" if missing else f"it has none of {', '.join(DENOISERS)}"
            raise ValueError(f"{argument}={folder!r}: a {self.name}, which is no class-conditional pipeline ({lacks})")
        self.modules, self.denoiser = modules, denoisers[0]
        self.device = device
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.rows = 0
        self.denoiser.register_forward_pre_hook(self._count, with_kwargs=True)
        channels, height, width = self._draw([0], [0], 0, num_inference_steps=1).shape[1:]
        if height != width:
            raise ValueError(f"{argument}={folder!r}: draws {height} x {width} pixels: only square ones are evaluated")
        self.shape = (channels, width)

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.rows += len(next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.ndim > 0))

    def draw(self, labels: Sequence[int], indices: Sequence[int], seed: int, settings: SamplerSettings) -> torch.Tensor:
        """uint8 (B, C, S, S) on the CPU, rounded to nearest: image indices[i] of set `seed`, of class labels[i].

        Raises:
            ValueError: Settings that only our own pipelines have.
        """
        ours = {name: getattr(settings, name) for name in ("temperature", "time_grid", "sampler", "guidance_interval")}
        for name, value in ours.items():
            if value not in (None, 1):
                raise ValueError(f"{name}={value!r}: a {self.name} has none; leave it out")
        guidance = {"guidance_scale": settings.guidance_scale} if "guidance_scale" in self.parameters else {}
        if not isinstance(settings.guidance_scale, Real):
            raise ValueError(f"guidance_scale={settings.guidance_scale!r}: a {self.name} takes a number")
        if not guidance and settings.guidance_scale != 1:
            raise ValueError(f"guidance_scale={settings.guidance_scale!r}: a {self.name} takes none; use 1")
        return self._draw(labels, indices, seed, num_inference_steps=settings.num_steps, **guidance)

    @torch.no_grad()
    def _draw(self, labels: Sequence[int], indices: Sequence[int], seed: int, **call: Any) -> torch.Tensor:
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(image_seed(seed, indices[0]))  # for schedulers that are given no generator
            images = self.pipeline(
                class_labels=list(labels), generator=image_generators(seed, indices), output_type="np", **call
            ).images  # float (B, S, S, C) in [0, 1]
        pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float()
        return (pixels * 255).round_().clamp_(0, 255).to(torch.uint8).cpu()

    @property
    def draws_by_batches(self) -> bool:
        """Whether an image depends on the batch that it is drawn in: DiT's call gives its scheduler no generator, so
        one that is not deterministic (DDPM's) draws for all images of a batch at once."""
        alone, second = (self._draw([0] * len(i), i, 0, num_inference_steps=4)[-1] for i in ([1], [0, 1]))
        return (alone.int() - second.int()).abs().max().item() > 16  # of 255: no rounding

    @property
    def num_classes(self) -> int | None:
        """Classes that its network knows; None where it does not say."""
        config = getattr(self.denoiser, "config", {})
        return config.get("num_embeds_ada_norm") or config.get("num_class_embeds")

    @property
    def class_names(self) -> list[str]:
        """`class 0`, `class 1`, ..., as many as its network has; `images` where it does not say."""
        return [f"class {i}" for i in range(self.num_classes)] if self.num_classes else ["images"]

    def describe(self) -> dict[str, Any]:
        """What a protocol must record about it."""
        configs = {
            name: {k: v for k, v in dict(part.config).items() if not k.startswith("_")}
            for name, part in self.pipeline.components.items()
            if hasattr(part, "config")
        }
        digest = hashlib.sha256(json.dumps([self.name, configs], sort_keys=True, default=str).encode())
        for name in sorted(self.modules):
            digest.update(weights_hash(self.modules[name]).encode())
        return {
            "class": self.name,
            "weights_hash": digest.hexdigest(),
            "tokenizer_hash": None,
            "scheduler": {"class": type(self.pipeline.scheduler).__name__, **configs.get("scheduler", {})},
            "parameters": sum(int(p.numel()) for p in self.denoiser.parameters()),
            "conditional": True,
            "grid": None,
        }
