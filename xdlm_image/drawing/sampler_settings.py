"""How a pipeline is called: steps, guidance, temperature, sampler; whether it takes them, and what they cost.

This file owns what such settings mean for our pipeline; it never draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.pipelines.pipeline_xdlm_img2img import check_strength
from xdlm_image.pipelines.schedules import Interval, InTime, guidance_at
from xdlm_image.recipes import NeighboursRecipe, SampleRecipe
from xdlm_image.schedulers import XDLMOrderedScheduler, XDLMPsiScheduler, XDLMScheduler
from xdlm_image.schedulers.scheduling_xdlm_psi import KAPPA
from xdlm_image.seeds import image_generators


@dataclass(frozen=True)
class SamplerSettings:
    """How a pipeline is called.

    Attributes:
        num_steps: Reverse steps.
        guidance_scale: 1 is no guidance; a pair runs from its first at t = 1 to its second at t = 0.
        temperature: Divides the logits; a pair as for guidance.
        time_grid: Of `scheduling_xdlm.TIME_GRIDS`; None is the pipeline's own.
        sampler: `ancestral`, `psi`, or an order of `scheduling_xdlm_ordered.UNMASKING`; None is the pipeline's own.
        guidance_interval: Times (low, high] that are guided; None is all.
        start: Further arguments of a call that begins at a picture: that, its mask, the strength.
    """

    num_steps: int
    guidance_scale: InTime = 1.0
    temperature: InTime = 1.0
    time_grid: str | None = None
    sampler: str | None = None
    guidance_interval: Interval = None
    start: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: SampleRecipe | NeighboursRecipe, start: Mapping[str, Any] | None = None) -> Self:
        """Those that a recipe names."""
        names = {setting.name for setting in fields(cls)} - {"start"}
        return cls(**{name: getattr(recipe, name) for name in names}, start=start or {})


def scheduler_for(pipeline: XDLMPipeline, settings: SamplerSettings) -> XDLMScheduler:
    """A scheduler of its own with the sampler and the time grid of the settings, else as the pipeline's.

    Raises:
        ValueError: Noise without masks (k = 1) has no order of unmasking.
    """
    own = pipeline.scheduler
    changes: dict[str, Any] = {} if settings.time_grid is None else {"time_grid": settings.time_grid}
    if settings.sampler is None:
        return type(own).from_config(own.config, **changes)
    if settings.sampler == "ancestral":
        return XDLMScheduler.from_config(own.config, **changes)
    if settings.sampler == "psi":
        return XDLMPsiScheduler.from_config(own.config, kappa=KAPPA, correct_within=None, **changes)
    changes |= {"unmasking": settings.sampler, "choice_temperature": None}
    try:
        return XDLMOrderedScheduler.from_config(own.config, **changes)
    except ValueError as error:
        raise ValueError(f"sampler={settings.sampler!r}: {error}") from error


def with_scheduler(pipeline: XDLMPipeline, settings: SamplerSettings) -> XDLMPipeline:
    """The pipeline, with `scheduler_for` the settings where they name a sampler or a time grid; all else is shared."""
    if settings.sampler is None and settings.time_grid is None:
        return pipeline
    changed: XDLMPipeline = type(pipeline).from_pipe(pipeline, scheduler=scheduler_for(pipeline, settings))
    changed.set_progress_bar_config(disable=True)
    return changed


def check_settings(pipeline: XDLMPipeline, settings: SamplerSettings) -> None:
    """Raise ValueError, before anything is drawn, if the pipeline does not take the settings."""
    scale, interval = settings.guidance_scale, settings.guidance_interval
    with_scheduler(pipeline, settings).check_inputs(scale, settings.temperature, 1, "latent", [], interval)
    _times(pipeline, settings)


def nfe(pipeline: XDLMPipeline, settings: SamplerSettings) -> int:
    """Network evaluations an image; a guided step takes two."""
    times = _times(pipeline, settings)
    scales = (guidance_at(settings.guidance_scale, settings.guidance_interval, t) for t in times)
    return sum(1 if scale == 1 else 2 for scale in scales)


def _times(pipeline: XDLMPipeline, settings: SamplerSettings) -> list[float]:
    strength = settings.start.get("strength", 1.0)
    check_strength(strength)
    scheduler = scheduler_for(pipeline, settings)
    scheduler.set_timesteps(settings.num_steps, start=float(strength))
    times: list[float] = scheduler.timesteps.tolist()
    return times


def call_arguments(
    pipeline: XDLMPipeline, labels: Sequence[int], indices: Sequence[int], seed: int, settings: SamplerSettings
) -> dict[str, Any]:
    """What the pipeline `with_scheduler` is called with for these images, see `draw.draw_codes`."""
    conditional = pipeline.transformer.config.num_classes is not None
    return {
        "class_labels": list(labels) if conditional else None,
        "num_steps": settings.num_steps,
        "guidance_scale": settings.guidance_scale,
        "temperature": settings.temperature,
        "guidance_interval": settings.guidance_interval,
        "generator": image_generators(seed, indices),
        "num_images_per_prompt": 1 if conditional else len(indices),
        **settings.start,
    }
