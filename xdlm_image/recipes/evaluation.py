"""Recipes of judging images: the verbs `reference`, `evaluate`, `neighbours` and `demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, get_args

from xdlm_image.recipes.checks import require, require_at_least, require_in_time
from xdlm_image.recipes.data import DataOptions
from xdlm_image.recipes.sampling import Sampler, TimeGrid
from xdlm_image.seeds import MAX_IMAGES, check_seed

FeatureMetric = Literal["kid", "precision_recall", "coverage"]
FEATURE_METRICS: tuple[FeatureMetric, ...] = get_args(FeatureMetric)
VARIED = ("guidance_scale", "temperature", "time_grid", "sampler", "guidance_interval")  # of a sweep, beside the steps


@dataclass
class ReferenceRecipe:
    """Measure a set of real images once, so that samples can be judged where the images are not at hand.

    Attributes:
        output_dir: The reference folder that is written.
        data: The real images.
        extractor: `inception` (torch-fidelity's: FID, sFID, Inception Score), `dinov2` (FD-DINOv2), either with
            `:FILE` of its weights, the folder of a trained small classifier, or a list of them, the main one first.
        reference_split: Split whose images are the reference.
        tokenizers: Folders of tokenizers whose reconstructions are measured too.
        num_samples: Sizes of the sets that floors of real images are computed for.
        batch_size: Images at once.
        device: torch device; None picks the best there is.
    """

    output_dir: str
    data: DataOptions = field(default_factory=DataOptions)
    extractor: list[str] | str = "inception"
    reference_split: Literal["train", "validation", "test"] = "test"
    tokenizers: list[str] = field(default_factory=list)
    num_samples: list[int] = field(default_factory=lambda: [1000, 5000])
    batch_size: int = 250
    device: str | None = None

    def __post_init__(self) -> None:
        require(all(n >= 2 for n in self.num_samples), "num_samples", self.num_samples, "each is at least 2 images")
        require_at_least(self, 1, "batch_size")


@dataclass
class EvaluateRecipe:
    """FID of one or more pipelines over step counts: JSON with the whole protocol, table, plot and class grids.

    Attributes:
        output_dir: Folder for `fid.json`, `fid.md`, `fid.png` and `grid_*.png`; a killed sweep resumes there.
        pipelines: Name of each pipeline in the table -> its folder; ours, or any class-conditional one of diffusers.
        images: Name of each set that is already drawn -> its folder of image files (class folders give classes) or .npz
            (ADM's format); judged as they are, never resized.
        data: The reference images.
        reference: In the place of the images: a folder of `xdlm-image reference`, a file of published statistics (.npz,
            .pt), or a known one by name (`adm-imagenet-256`, `mar-imagenet-256`).
        further_references: Name -> another such folder or file; FID against each stands beside that against the main
            one, such as `{adm: adm-imagenet-256}` beside the validation images.
        extractor: `inception` (torch-fidelity's: FID, sFID, Inception Score), `dinov2` (FD-DINOv2), either with
            `:FILE` of its weights, the folder of a trained small classifier, or a list of them, the main one first.
        classifier: Who says whether samples are of the class that was asked for: `timm:MODEL` or `timm:MODEL:FILE` for
            ImageNet's classes, or the folder of a small classifier; None leaves it to the extractor.
        nelbo: `nelbo.json` of the verb `nelbo` on these pipelines, for a plot of FID against NELBO; None leaves it out.
        reference_split: Split whose images are the reference; None is `test`, or that of the reference folder.
        num_steps: Step counts of the sweep.
        num_samples: Images a cell; a multiple of the class count, so that classes are balanced. None is 5,000, or the
            next multiple.
        guidance_scale: One or several; 1 is no guidance. A pair in the list, such as `[[1, 4]]`, is one that runs
            linearly in time from its first, where noise is, to its second.
        guidance_interval: Times t in (low, high] of (0, 1] that are guided, such as `[0.1, 0.7]`, or several; None is
            all.
        temperature: One or several; divides the logits. A pair in the list as for guidance: `[[1, 0.3]]` anneals.
        time_grid: `linear`, `cosine`, `arccos`, or several; None keeps each pipeline's own.
        sampler: `ancestral` (the exact posterior), `psi` (the same, four fifths of the tokens noised again on the way,
            which corrects), or an order of unmasking, `confidence` (MaskGIT's, choice temperature 4.5) or
            `halton` (Halton-MaskGIT's), which need masks, k < 1; one or several. None keeps each pipeline's own
            scheduler.
        seeds: Sampling seeds; each gives its own set of images, and the table shows their mean and spread.
        feature_metrics: What is computed from features beside FID and Inception Score: `kid`, `precision_recall`,
            `coverage`; `[]` is none. Against 10,000 images they took ten seconds a cell on two CPU cores.
        dtype: What the network computes in; softmax, draws and the tokenizer stay in float32.
        compile: Draw through torch.compile; the first cell takes half a minute to a minute longer, and on a CPU a C++
            compiler is needed. Images of a seed then differ in rounding.
        batch_size: Images drawn at once.
        images_dir: Also write every drawn image there, as CELL/CLASS/IIIIIII.png, so that a folder CELL can be given to
            `images`; None writes none.
        images_npz: Also write CELL/images.npz there, for ADM's evaluator and others: `arr_0` uint8 (N, S, S, C).
        device: torch device; None picks the best there is.
    """

    output_dir: str
    pipelines: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    data: DataOptions = field(default_factory=DataOptions)
    reference: str | None = None
    further_references: dict[str, str] = field(default_factory=dict)
    extractor: list[str] | str = "inception"
    classifier: str | None = None
    nelbo: str | None = None
    reference_split: Literal["train", "validation", "test"] | None = None
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    num_samples: int | None = None
    guidance_scale: list[float | tuple[float, float]] | float = 1.0
    guidance_interval: list[tuple[float, float] | None] | tuple[float, float] | None = None
    temperature: list[float | tuple[float, float]] | float = 1.0
    time_grid: list[TimeGrid] | TimeGrid | None = None
    sampler: list[Sampler] | Sampler | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    feature_metrics: list[FeatureMetric] = field(default_factory=lambda: [*FEATURE_METRICS])
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    batch_size: int = 250
    images_dir: str | None = None
    images_npz: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        require(
            len(self.pipelines) + len(self.images) > 0,
            "pipelines",
            self.pipelines,
            "name at least one, as NAME: FOLDER, or sets of images with images",
        )
        both = sorted(set(self.pipelines) & set(self.images))
        require(self.images_dir is None or len(self.pipelines) > 0, "images_dir", self.images_dir, "needs pipelines")
        require(self.images_dir is not None or not self.images_npz, "images_npz", self.images_npz, "needs images_dir")
        require(not both, "images", self.images, f"the name {both and both[0]!r} stands for a pipeline too")
        for name in ("guidance_scale", "temperature", "guidance_interval"):
            values = _as_floats(getattr(self, name))  # 1 is 1.0, also in a cell's key
            if isinstance(values, list):  # of pairs, too, that YAML or a caller lists
                values = [tuple(value) if isinstance(value, list) else value for value in values]
            setattr(self, name, values)
        settings = self.settings
        for name, values in {"num_steps": self.num_steps, "seeds": self.seeds, **settings}.items():
            require(
                len(values) > 0 and len(set(values)) == len(values), name, values, "name at least one, each only once"
            )
        require(all(n >= 1 for n in self.num_steps), "num_steps", self.num_steps, "every step count is at least 1")
        for seed in self.seeds:
            check_seed(seed, "seeds")
        if self.num_samples is not None:
            require_at_least(
                self, 2, "num_samples", remedy="at least 2 images, and far more for numbers that mean much"
            )
            require(
                self.num_samples <= MAX_IMAGES,
                "num_samples",
                self.num_samples,
                f"at most {MAX_IMAGES}, so that no two images share random numbers; give more seeds",
            )
        known = isinstance(self.feature_metrics, list) and set(self.feature_metrics) <= set(FEATURE_METRICS)
        require(known, "feature_metrics", self.feature_metrics, f"a list of some of {', '.join(FEATURE_METRICS)}")
        require_at_least(self, 1, "batch_size")
        require(
            settings["guidance_interval"] == [None] or settings["guidance_scale"] != [1],
            "guidance_interval",
            self.guidance_interval,
            "does nothing with guidance_scale=1; leave it out",
        )
        for name in ("guidance_scale", "temperature"):
            for scale in settings[name]:
                require_in_time(name, scale)

    @property
    def settings(self) -> dict[str, list[Any]]:
        """What is chosen for each setting of `VARIED`."""
        values = {name: getattr(self, name) for name in VARIED}
        return {name: value if isinstance(value, list) else [value] for name, value in values.items()}

    @property
    def variants(self) -> list[tuple[Any, ...]]:
        """Values of `VARIED` of every setting but the steps; without guidance there is no interval, and one such."""
        settings = product(*self.settings.values())
        return [*dict.fromkeys((*axes, None if axes[0] == 1 else interval) for *axes, interval in settings)]


def _as_floats(value: Any) -> Any:
    """The same with floats for integers, however deep in lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)(map(_as_floats, value))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass
class NeighboursRecipe:
    """Find the training images nearest to samples, in features and in pixels: are samples copies?

    Attributes:
        pipeline: Folder of the saved pipeline.
        data: The images that it was trained on; their test split tells how near images lie that nobody copied.
        extractor: In whose main features: see `evaluate`.
        output: Path of the picture (PNG); the distances lie beside it as .json.
        class_labels: Ids or names of the classes, `Bag` or `[Bag, 3]`; None takes every class, or the first ten of
            more than 20.
        images_per_class: Samples of each.
        num_neighbours: Training images shown beside each sample, in features and in pixels.
        held_out: Most test images that are searched for too, for comparison: of the classes that are drawn, each as
            often as among the samples, and all of one that has fewer, which is said.
        num_steps: Reverse steps.
        guidance_scale: 1 is no guidance; a pair as in `sample`.
        guidance_interval: As in `sample`.
        temperature: Divides the logits; a pair as in `sample`.
        sampler: As in `sample`: `ancestral`, `psi`, `confidence`, `halton`; None is the pipeline's own.
        time_grid: As in `sample`: `linear`, `cosine`, `arccos`; None is the pipeline's own.
        seed: Decides the samples, and which test images are taken.
        batch_size: Images at once.
        device: torch device; None picks the best there is.
    """

    pipeline: str
    data: DataOptions = field(default_factory=DataOptions)
    extractor: str = "inception"
    output: str = "neighbours.png"
    class_labels: list[int | str] | int | str | None = None
    images_per_class: int = 1
    num_neighbours: int = 4
    held_out: int = 500
    num_steps: int = 8
    guidance_scale: float | tuple[float, float] = 1.0
    guidance_interval: tuple[float, float] | None = None
    temperature: float | tuple[float, float] = 1.0
    sampler: Sampler | None = None
    time_grid: TimeGrid | None = None
    seed: int = 0
    batch_size: int = 250
    device: str | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "images_per_class", "num_neighbours", "held_out", "num_steps", "batch_size")
        check_seed(self.seed)
        require_in_time("guidance_scale", self.guidance_scale)
        require_in_time("temperature", self.temperature)


@dataclass
class DemoRecipe:
    """Draw and judge the models that come with a checkout: grids at 8 steps, and a table over step counts.

    Attributes:
        models: Folder with pipelines/NAME/ (saved pipelines), extractor/ and reference/ (of the verb `reference`);
            None takes the checkout's `shipped/fashion_mnist`.
        output_dir: Folder for grids, table, plot and JSON; a killed demo resumes there.
        full: The whole protocol, as in the committed table (5,000 images, three seeds, 1 to 64 steps; hours on a
            CPU), instead of the quick one (1,000 images, one seed, 1 to 16 steps; minutes).
        batch_size: Images drawn at once.
        dtype: What the networks compute in; None is bfloat16 on a CPU with units for its matrix products (AMX,
            AVX512-BF16), else float32.
        compile: Draw through torch.compile; None does so on a CPU if a C++ compiler is there, which takes half a minute
            and then draws about twice as fast.
        device: torch device; None picks the best there is.
    """

    models: str | None = None
    output_dir: str = "demo"
    full: bool = False
    batch_size: int = 100
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compile: bool | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size")
