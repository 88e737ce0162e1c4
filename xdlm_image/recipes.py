"""What every recipe may say: one dataclass a verb, its fields, defaults and ranges.

This file owns names, defaults and range checks, and nothing else: it imports no torch, so that
`xdlm-image VERB --help` answers at once. The YAML files in `configs/` and the command line fill these classes;
the rooms (`data`, `tokenizer`, `training`, `evaluation`, `cli`) read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _require(condition: bool, argument: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{argument}={value!r}: {remedy}")


@dataclass
class DataOptions:
    """Which images.

    Attributes:
        name: `fashion-mnist` (28x28 grey, 10 classes) or `folder`
            (a folder of class folders; `root/train` and `root/val` where they exist).
        root: Where the files are, or are downloaded to. None: for Fashion-MNIST Debian's package
            `dataset-fashion-mnist` if installed, else `~/.cache/xdlm_image`; a folder must be named.
        image_size: Side of the square image in pixels after resize and crop.
        channels: 1 (grey) or 3 (RGB).
        crop: `center` (shorter side resized, middle cut out), or `random` (training of tokenizers only).
        download: Fetch Fashion-MNIST through torchvision when no local copy is found.
    """

    name: Literal["fashion-mnist", "folder"] = "fashion-mnist"
    root: str | None = None
    image_size: int = 28
    channels: Literal[1, 3] = 1
    crop: Literal["center", "random"] = "center"
    download: bool = True

    def __post_init__(self) -> None:
        _require(self.name != "folder" or self.root is not None, "data.root", self.root, "name the image folder")
        _require(self.image_size >= 8, "data.image_size", self.image_size, "must be at least 8 pixels")


@dataclass
class TokenizerModelOptions:
    """The VQ tokenizer: diffusers' `VQModel`. Its grid is image_size / 2**(len(block_out_channels) - 1).

    Attributes:
        block_out_channels: Width of each resolution level, finest first.
        layers_per_block: ResNet blocks a level.
        latent_channels: Channels of the encoder's output.
        num_vq_embeddings: Codebook size K.
        vq_embed_dim: Width of a codebook row.
        norm_num_groups: Groups of the group normalisation; divides every width.
        mid_block_add_attention: Self-attention in the middle of encoder and decoder.
    """

    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 128])
    layers_per_block: int = 1
    latent_channels: int = 64
    num_vq_embeddings: int = 512
    vq_embed_dim: int = 8
    norm_num_groups: int = 16
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("layers_per_block", "latent_channels", "vq_embed_dim", "norm_num_groups"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        _require(
            len(self.block_out_channels) > 0 and min(self.block_out_channels) >= 1,
            "model.block_out_channels",
            self.block_out_channels,
            "name a positive width for each resolution level, finest first",
        )
        for width in self.block_out_channels:
            _require(
                width % self.norm_num_groups == 0,
                "model.block_out_channels",
                self.block_out_channels,
                f"every width must be a multiple of model.norm_num_groups={self.norm_num_groups}",
            )
        _require(self.num_vq_embeddings >= 2, "model.num_vq_embeddings", self.num_vq_embeddings, "at least 2 codes")


@dataclass
class TokenizerRecipe:
    """Train a VQ tokenizer and report PSNR, codebook usage and a reconstruction picture.

    Attributes:
        output_dir: Folder for checkpoints, the tokenizer, `report.json` and `reconstructions.png`.
        data: Which images.
        model: The tokenizer's sizes.
        seed: Seeds everything: weights, order, augmentation.
        batch_size: Images a step on each device.
        max_steps: Optimizer steps in all.
        learning_rate: Peak AdamW learning rate.
        warmup_steps: Steps of linear warm-up; cosine decay to 0 follows.
        plain_steps: Steps as a plain autoencoder; then k-means lays the codebook onto the latents.
        weight_decay: AdamW weight decay.
        l1_weight: Weight of |x - x'| beside the squared error of weight 1 (pixels in [-1, 1]).
        edge_weight: Weight of the L1 error of horizontal and vertical differences, which keeps edges and texture.
        commitment_weight: Weight of the encoder's commitment to its codes.
        revive_after: Steps without use after which a code is replaced by a current latent (0: never).
        ema_decay: Decay of the weight average that is saved.
        gradient_clip: Largest gradient norm; 0 does not clip.
        horizontal_flip: Mirror half of the training images.
        extractor: Extractor folder (from `train-extractor`) for rFID in the report; None leaves rFID out.
        mixed_precision: accelerate's precision.
        num_workers: Data loading processes.
        log_every: Steps between log lines; 0 only at the end.
        checkpoint_every: Steps between checkpoints; 0 only at the end. The newest is resumed.
        resume: Go on from the newest checkpoint in output_dir.
    """

    output_dir: str
    data: DataOptions = field(default_factory=DataOptions)
    model: TokenizerModelOptions = field(default_factory=TokenizerModelOptions)
    seed: int = 0
    batch_size: int = 64
    max_steps: int = 4000
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    plain_steps: int = 100
    weight_decay: float = 0.0
    l1_weight: float = 1.0
    edge_weight: float = 1.0
    commitment_weight: float = 0.25
    revive_after: int = 200
    ema_decay: float = 0.995
    gradient_clip: float = 1.0
    horizontal_flip: bool = True
    extractor: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    num_workers: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in (
            "seed",
            "warmup_steps",
            "weight_decay",
            "l1_weight",
            "edge_weight",
            "commitment_weight",
            "revive_after",
            "gradient_clip",
            "num_workers",
            "log_every",
            "checkpoint_every",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")
        _require(self.seed < 2**32, "seed", self.seed, "must be below 2**32")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must lie in [0, 1)")
        _require(
            0 <= self.plain_steps < self.max_steps,
            "plain_steps",
            self.plain_steps,
            f"must be at least 0 and below max_steps={self.max_steps}: the codebook is laid after these steps and "
            "needs some of its own; lower plain_steps, or raise max_steps",
        )


@dataclass
class ExtractorRecipe:
    """Train a small classifier whose features judge images where Inception cannot (or need not) be had.

    Attributes:
        output_dir: Folder for `config.json`, `model.safetensors` and `report.json`.
        data: Which images.
        seed: Seeds weights and order. Another seed gives an independent judge.
        width: Channels of the first stage.
        feature_dim: Width of the pooled features that FID uses.
        batch_size: Images a step.
        epochs: Passes over the training images.
        learning_rate: Peak learning rate of a one-cycle schedule.
        weight_decay: AdamW weight decay.
        num_workers: Data loading processes.
    """

    output_dir: str
    data: DataOptions = field(default_factory=DataOptions)
    seed: int = 0
    width: int = 32
    feature_dim: int = 128
    batch_size: int = 128
    epochs: int = 4
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "feature_dim", "batch_size", "epochs"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(self.feature_dim % 8 == 0, "feature_dim", self.feature_dim, "must be a multiple of 8")  # timm's rule
        for name in ("seed", "weight_decay", "num_workers"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive")


@dataclass
class EncodeRecipe:
    """Encode images to a memory-mapped code cache, plain and mirrored, with a manifest.

    Attributes:
        tokenizer: Folder of the tokenizer (a saved diffusers `VQModel`).
        output_dir: Folder for one cache a split: `output_dir/train`, ...
        data: Which images.
        splits: Which splits.
        flip: Store the mirrored view too.
        batch_size: Images encoded at once.
        num_workers: Data loading processes.
        device: torch device; None picks the best there is.
        overwrite: Replace the caches that are there. Without it, those of this very recipe are kept, and any other is
            an error.
    """

    tokenizer: str
    output_dir: str
    data: DataOptions = field(default_factory=DataOptions)
    splits: list[Literal["train", "validation", "test"]] = field(
        default_factory=lambda: ["train", "validation", "test"]
    )
    flip: bool = True
    batch_size: int = 250
    num_workers: int = 0
    device: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require(
            len(self.splits) > 0 and len(set(self.splits)) == len(self.splits),
            "splits",
            self.splits,
            "name each split once",
        )
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        _require(self.num_workers >= 0, "num_workers", self.num_workers, "must be at least 0")


@dataclass
class ProcessOptions:
    """The noise process (DESIGN: r = k/N on the codes + (1 - k) on the mask).

    Attributes:
        k: Weight of uniform noise in [0, 1]: 0 is MDLM, 1 is UDLM, between is XDLM.
        definition: `A`: uniform noise draws from the K codes; `B`: from every id of the logits width, mask included,
            as in the paper's code.
    """

    k: float = 0.1
    definition: Literal["A", "B"] = "A"

    def __post_init__(self) -> None:
        _require(0 <= self.k <= 1, "process.k", self.k, "must lie in [0, 1] (0 is MDLM, 1 is UDLM)")


@dataclass
class TransformerOptions:
    """The denoising transformer; grid, codebook and class count come from the code cache.

    Attributes:
        num_layers: Blocks.
        num_attention_heads: Heads a block.
        attention_head_dim: Width of a head; heads x head width is the width of the network.
        mlp_ratio: Hidden width of the feed-forward over the network's width.
        dropout: Residual dropout.
        conditioning_dim: Width of the conditioning vector; None is the network's width.
        norm_type: `rms_norm`, or `layer_norm` (scale, no bias).
        activation_fn: `swiglu` or `gelu-approximate`.
        rope_type: `2d` (rows and columns) or `1d` (raster order).
        qk_norm: Normalise queries and keys.
        time_conditioning: `none`; `time` feeds t; `constant` feeds t = 0 always (the official network).
        position_embedding: `learned` tells each place of the grid apart; `none` (the official network) has rotary
            positions only, and predicts the same at every place while all codes are masks.
    """

    num_layers: int = 6
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    mlp_ratio: float = 8 / 3
    dropout: float = 0.0
    conditioning_dim: int | None = None
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    activation_fn: Literal["swiglu", "gelu-approximate"] = "swiglu"
    rope_type: Literal["2d", "1d"] = "2d"
    qk_norm: bool = True
    time_conditioning: Literal["none", "time", "constant"] = "none"
    position_embedding: Literal["learned", "none"] = "learned"


@dataclass
class TrainRecipe:
    """Train a transformer on cached codes with the XDLM objective.

    Attributes:
        codes: Code cache of the training images (from `encode`).
        output_dir: Run folder: `checkpoints/`, TensorBoard logs, `metrics.jsonl`, `pipeline/`.
        tokenizer: Tokenizer folder; goes into the saved pipeline and must be the one that made the codes.
        validation_codes: Code cache for validation NELBO; None leaves validation out.
        process: The noise process.
        model: The network's sizes.
        seed: Seeds weights, order, noise and dropout.
        batch_size: Images a step on each device (before accumulation).
        gradient_accumulation_steps: Batches a step.
        max_steps: Optimizer steps in all.
        learning_rate: Peak AdamW learning rate.
        warmup_steps: Steps of linear warm-up.
        lr_schedule: After warm-up: `constant`, `cosine` or `linear` (to 0 at max_steps).
        weight_decay: AdamW weight decay of matrices.
        adam_beta1: AdamW first-moment decay.
        adam_beta2: AdamW second-moment decay.
        gradient_clip: Largest gradient norm; 0 does not clip.
        ema_decay: Decay of the weight average that is validated, sampled and saved.
        class_dropout: Share of labels replaced by the null class, for guidance.
        t_min: Training draws t from [t_min, 1]; the loss at t has weight 1/t.
        mixed_precision: accelerate's precision.
        log_every: Steps between log lines.
        validate_every: Steps between validations; 0 only at the end.
        validation_samples: Largest number of images a validation.
        sample_every: Steps between sample grids; 0 only at the end.
        sample_steps: Sampling steps of those grids.
        checkpoint_every: Steps between checkpoints; 0 only at the end.
        keep_checkpoints: Newest checkpoints that are kept.
        resume: Go on from the newest whole checkpoint in output_dir.
        stop_after: Stop (with a checkpoint) at this step although max_steps is not reached; for queues. None: never.
    """

    codes: str
    output_dir: str
    tokenizer: str
    validation_codes: str | None = None
    process: ProcessOptions = field(default_factory=ProcessOptions)
    model: TransformerOptions = field(default_factory=TransformerOptions)
    seed: int = 0
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    max_steps: int = 2000
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    class_dropout: float = 0.1
    t_min: float = 1e-3
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    log_every: int = 20
    validate_every: int = 500
    validation_samples: int = 2000
    sample_every: int = 500
    sample_steps: int = 8
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    resume: bool = True
    stop_after: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "max_steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive")
        _require(0 <= self.class_dropout < 1, "class_dropout", self.class_dropout, "must lie in [0, 1)")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must lie in [0, 1)")
        _require(0 < self.t_min < 1, "t_min", self.t_min, "must lie in (0, 1)")
        _require(self.gradient_clip >= 0, "gradient_clip", self.gradient_clip, "must be positive, or 0 to clip nothing")
        for name in ("validation_samples", "sample_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(self.log_every >= 1, "log_every", self.log_every, "must be at least 1 step")
        for name in ("validate_every", "sample_every", "checkpoint_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be positive, or 0 for only at the end")
        _require(
            self.stop_after is None or self.stop_after >= 1,
            "stop_after",
            self.stop_after,
            "at least 1, or null",
        )
        _require(
            0 <= self.warmup_steps < self.max_steps,
            "warmup_steps",
            self.warmup_steps,
            f"must lie in [0, max_steps={self.max_steps})",
        )


@dataclass
class SampleRecipe:
    """Draw images from a saved pipeline as a class grid (one row a class), and each image if asked.

    Attributes:
        pipeline: Folder of the saved pipeline.
        output: Path of the grid picture (PNG).
        class_labels: Ids or names of the classes; None draws every class.
        images_per_class: Images a row.
        num_steps: Reverse steps.
        guidance_scale: 1 is no guidance; each guided step runs the network on twice the batch.
        temperature: Divides the logits.
        seed: Image i of the grid has its own generator, made of (seed, i), whatever the batch.
        images_dir: Also write each image there as PNG; None writes the grid only.
        batch_size: Images drawn at once.
        device: torch device; None picks the best there is.
    """

    pipeline: str
    output: str
    class_labels: list[int | str] | int | str | None = None
    images_per_class: int = 8
    num_steps: int = 8
    guidance_scale: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    images_dir: str | None = None
    batch_size: int = 100
    device: str | None = None

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1 step")
        _require(self.images_per_class >= 1, "images_per_class", self.images_per_class, "at least 1 image")


@dataclass
class EvaluateRecipe:
    """FID of one or more pipelines over step counts: JSON with the whole protocol, table, plot and class grids.

    Attributes:
        pipelines: Name of each pipeline in the table -> its folder.
        output_dir: Folder for `fid.json`, `fid.md`, `fid.png` and `grid_*.png`; a killed sweep goes on from there.
        data: The reference images.
        extractor: `inception` (torch-fidelity's, needs its weights) or the folder of a trained extractor.
        reference_split: Split whose images are the reference.
        num_steps: Step counts of the sweep.
        num_samples: Images a cell; a multiple of the class count, so that classes are balanced.
        guidance_scale: 1 is no guidance.
        temperature: Divides the logits.
        seeds: Sampling seeds; each gives its own set of images, and the table shows their mean and spread.
        batch_size: Images drawn at once.
        device: torch device; None picks the best there is.
    """

    pipelines: dict[str, str]
    output_dir: str
    data: DataOptions = field(default_factory=DataOptions)
    extractor: str = "inception"
    reference_split: Literal["train", "validation", "test"] = "test"
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    num_samples: int = 5000
    guidance_scale: float = 1.0
    temperature: float = 1.0
    seeds: list[int] = field(default_factory=lambda: [0])
    batch_size: int = 250
    device: str | None = None

    def __post_init__(self) -> None:
        _require(len(self.pipelines) > 0, "pipelines", self.pipelines, "name at least one, as NAME: FOLDER")
        for name in ("num_steps", "seeds"):
            values = getattr(self, name)
            _require(
                len(values) > 0 and len(set(values)) == len(values), name, values, "name at least one, each only once"
            )
        _require(all(n >= 1 for n in self.num_steps), "num_steps", self.num_steps, "every step count is at least 1")
        _require(
            self.num_samples >= 2,
            "num_samples",
            self.num_samples,
            "at least 2 images, and far more for numbers that mean much",
        )
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        _require(self.temperature > 0, "temperature", self.temperature, "must be positive")
