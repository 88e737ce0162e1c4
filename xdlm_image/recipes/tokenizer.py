"""Recipe of the VQ tokenizer: the verb `train-tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xdlm_image.recipes.checks import require, require_at_least
from xdlm_image.recipes.data import DataOptions


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
        sizes = ("layers_per_block", "latent_channels", "vq_embed_dim", "norm_num_groups")
        require_at_least(self, 1, *sizes, group="model.")
        require_at_least(self, 2, "num_vq_embeddings", group="model.")
        require(
            len(self.block_out_channels) > 0 and min(self.block_out_channels) >= 1,
            "model.block_out_channels",
            self.block_out_channels,
            "name a positive width for each resolution level, finest first",
        )
        for width in self.block_out_channels:
            require(
                width % self.norm_num_groups == 0,
                "model.block_out_channels",
                self.block_out_channels,
                f"every width must be a multiple of model.norm_num_groups={self.norm_num_groups}",
            )


@dataclass
class TokenizerRecipe:
    """Train a VQ tokenizer and report PSNR, codebook usage and a reconstruction picture.

    Attributes:
        output_dir: Folder for checkpoints, the tokenizer, `report.json` and `reconstructions.png`.
        data: Which images.
        model: The tokenizer's sizes.
        init_from: Folder of a tokenizer of these sizes at whose weights and codebook the run begins: to train one for
            longer, or on other images. Only read when the run begins. None begins with new weights.
        seed: Seeds everything: weights, order, augmentation.
        batch_size: Images a step on each device.
        max_steps: Optimizer steps in all.
        learning_rate: Peak AdamW learning rate.
        warmup_steps: Steps of linear warm-up; cosine decay to 0 follows.
        plain_steps: Steps as a plain autoencoder; then k-means lays the codebook onto the latents. None: 100, and 0 of
            a run that begins with the codebook of another.
        weight_decay: AdamW weight decay.
        l1_weight: Weight of |x - x'| beside the squared error of weight 1 (pixels in [-1, 1]).
        edge_weight: Weight of the L1 error of horizontal and vertical differences, which keeps edges and texture.
        perceptual: Folder of a small classifier (from `train-extractor`, with another seed than the judge's) in whose
            features images are compared too (LPIPS, arXiv 1801.03924); None leaves that out.
        perceptual_weight: Weight of that distance; 1 where there is none.
        commitment_weight: Weight of the encoder's commitment to its codes.
        revive_after: Steps without use after which a code is replaced by a current latent (0: never).
        ema_decay: Decay of the weight average that is saved.
        gradient_clip: Largest gradient norm; 0 does not clip.
        horizontal_flip: Mirror half of the training images.
        extractor: Extractor folder (from `train-extractor`) for rFID in the report; None leaves rFID out.
        mixed_precision: accelerate's precision. None: what `accelerate launch` says (its configuration, or
            ACCELERATE_MIXED_PRECISION), else `no`.
        compile: Train encoder and decoder through torch.compile: the first step takes minutes longer, and on a CPU a
            C++ compiler is needed.
        num_workers: Data loading processes.
        log_every: Steps between log lines; 0 only at the end.
        checkpoint_every: Steps between checkpoints; 0 only at the end. The newest is resumed.
        resume: Go on from the newest checkpoint in output_dir.
    """

    output_dir: str
    data: DataOptions = field(default_factory=DataOptions)
    model: TokenizerModelOptions = field(default_factory=TokenizerModelOptions)
    init_from: str | None = None
    seed: int = 0
    batch_size: int = 64
    max_steps: int = 4000
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    plain_steps: int = None  # type: ignore[assignment]  # only until init_from is known
    weight_decay: float = 0.0
    l1_weight: float = 1.0
    edge_weight: float = 1.0
    perceptual: str | None = None
    perceptual_weight: float = 1.0
    commitment_weight: float = 0.25
    revive_after: int = 200
    ema_decay: float = 0.995
    gradient_clip: float = 1.0
    horizontal_flip: bool = True
    extractor: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    compile: bool = False
    num_workers: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    resume: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "max_steps")
        require_at_least(
            self,
            0,
            "seed",
            "warmup_steps",
            "weight_decay",
            "l1_weight",
            "edge_weight",
            "perceptual_weight",
            "commitment_weight",
            "revive_after",
            "gradient_clip",
            "num_workers",
            "log_every",
            "checkpoint_every",
        )
        require(self.seed < 2**32, "seed", self.seed, "must be below 2**32")
        require(
            self.perceptual is not None or self.perceptual_weight == 1,
            "perceptual_weight",
            self.perceptual_weight,
            "does nothing without perceptual, the classifier in whose features images are compared",
        )
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must lie in [0, 1)")
        require(
            self.warmup_steps < self.max_steps,
            "warmup_steps",
            self.warmup_steps,
            f"must be below max_steps={self.max_steps}; lower warmup_steps, or raise max_steps",
        )
        if self.plain_steps is None:
            self.plain_steps = 100 if self.init_from is None else 0
        require(
            self.init_from is None or self.plain_steps == 0,
            "plain_steps",
            self.plain_steps,
            "with init_from the codebook is there from the first step; set 0, or leave it out",
        )
        require(
            0 <= self.plain_steps < self.max_steps,
            "plain_steps",
            self.plain_steps,
            f"must be at least 0 and below max_steps={self.max_steps}: the codebook is laid after these steps and "
            "needs some of its own; lower plain_steps, or raise max_steps",
        )
