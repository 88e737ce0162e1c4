"""Recipes of drawing: the verbs `sample` and `app`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xdlm_image.recipes.checks import require, require_at_least, require_in_time
from xdlm_image.seeds import check_seed

TraceKind = Literal["strip", "gif", "codes"]
TimeGrid = Literal["linear", "cosine", "arccos"]
Sampler = Literal["ancestral", "confidence", "halton", "psi"]


@dataclass
class SampleRecipe:
    """Draw images from a saved pipeline as a class grid (one row a class), and each image if asked.

    Attributes:
        pipeline: Folder of the saved pipeline.
        output: Path of the grid picture (PNG).
        class_labels: Ids or names of the classes, `Bag` or `[Bag, 3]`; None draws every class, or the first ten of
            more than 20.
        images_per_class: Images a row.
        num_steps: Reverse steps.
        guidance_scale: 1 is no guidance; each guided step runs the network on twice the batch. A pair such as `[1, 4]`
            runs linearly in time from its first, where noise is, to its second.
        guidance_interval: Times t in (low, high] of (0, 1] that are guided, such as `[0.1, 0.7]`; None is all.
        temperature: Divides the logits. A pair as for guidance: `[1, 0.3]` anneals.
        sampler: `ancestral` (the exact posterior), `psi` (the same, four fifths of the tokens noised again on the way),
            or an order in which positions are unmasked, `confidence` or `halton`, which need masks, k < 1. None is the
            pipeline's own.
        time_grid: Times of the steps, of r from 0 to 1: `linear`, `cosine` (t = cos(pi r / 2), slow at first) or
            `arccos` (t = 2 acos(r) / pi, fast at last). None is the pipeline's own.
        seed: Image i of the grid has its own generator, made of (seed, i), whatever the batch.
        images_dir: Also write each image there, as `CLASS/IIIIIII.png`, which `evaluate --images` takes; None writes
            the grid only.
        batch_size: Images drawn at once.
        dtype: What the network computes in; softmax, draws and the tokenizer stay in float32.
        device: torch device; None picks the best there is.
        image: Picture file that every image begins at, scaled to cover the pipeline's size, the middle kept; None
            begins at noise.
        mask: Picture file over `image`: what is white in it is redrawn, the rest is kept; None keeps nothing.
        strength: How far the picture is noised, above 0 to 1, which keeps nothing of it (but for what `mask` keeps);
            all num_steps lead back. None is 0.6, with `mask` 1.
        trace: Also write beside `output` how images came about, one of these or a list: `strip` (`.trace.png`, every
            state and what changed; also what a bare `--trace` writes), `gif` (`.trace.gif`, the same animated), `codes`
            (`.trace.npz`, for research).
        trace_images: Images of each class in the trace, the first of its row; at most 32 in all.
        trace_shows: `states`, or `predictions`: what the network took each state for.
        trace_frame_ms: Milliseconds a state in the animation; the result is held six times as long.
    """

    pipeline: str
    output: str
    class_labels: list[int | str] | int | str | None = None
    images_per_class: int = 8
    num_steps: int = 8
    guidance_scale: float | tuple[float, float] = 1.0
    guidance_interval: tuple[float, float] | None = None
    temperature: float | tuple[float, float] = 1.0
    sampler: Sampler | None = None
    time_grid: TimeGrid | None = None
    seed: int = 0
    images_dir: str | None = None
    batch_size: int = 100
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    trace: list[TraceKind] | TraceKind | None = field(default=None, metadata={"bare": "strip"})
    trace_images: int = 1
    trace_shows: Literal["states", "predictions"] = "states"
    trace_frame_ms: int = 500

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_steps", "images_per_class", "batch_size")
        check_seed(self.seed)
        require_in_time("guidance_scale", self.guidance_scale)
        require_in_time("temperature", self.temperature)
        require(self.strength is None or 0 < self.strength <= 1, "strength", self.strength, "above 0, at most 1")
        for name in ("mask", "strength"):
            value = getattr(self, name)
            require(self.image is not None or value is None, name, value, "does nothing without image")
        require(
            1 <= self.trace_images <= self.images_per_class,
            "trace_images",
            self.trace_images,
            f"at least 1 and at most images_per_class={self.images_per_class}",
        )
        require(self.trace != [], "trace", self.trace, "name strip, gif or codes, or leave it out")
        for name, default in (("trace_images", 1), ("trace_shows", "states"), ("trace_frame_ms", 500)):
            value = getattr(self, name)
            require(self.trace is not None or value == default, name, value, "does nothing without trace")
        require_at_least(self, 20, "trace_frame_ms", remedy="at least 20; viewers are no faster")


@dataclass
class AppRecipe:
    """Serve a page in the browser on which pipelines draw, begin at a picture, and inpaint.

    Attributes:
        pipelines: Name of each pipeline on the page -> its folder; none takes the checkout's shipped models.
        host: Address that is listened at. The default is reached from this machine alone; at `0.0.0.0` anyone who
            reaches the machine can draw.
        port: Its port; None takes the first free one from 7860 on.
        open_browser: Show the page at once.
        device: torch device; None picks the best there is.
    """

    pipelines: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int | None = None
    open_browser: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        require(self.port is None or 0 < self.port < 65536, "port", self.port, "from 1 to 65535")
