"""Recipe of the verb `train`: process, network, optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xdlm_image.recipes.checks import require, require_at_least


@dataclass
class ProcessOptions:
    """The noise process (r = k/N on the codes + (1 - k) on the mask).

    Attributes:
        k: Weight of uniform noise in [0, 1]: 0 is MDLM, 1 is UDLM, between is XDLM.
        definition: `A`: uniform noise draws from the K codes; `B`: from every id of the logits width, mask included,
            as in the paper's code.
    """

    k: float = 0.1
    definition: Literal["A", "B"] = "A"

    def __post_init__(self) -> None:
        require(0 <= self.k <= 1, "process.k", self.k, "must lie in [0, 1] (0 is MDLM, 1 is UDLM)")


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
        output_dir: Run folder: `checkpoints/`, `tensorboard/`, `metrics.jsonl`, `pipeline/`.
        tokenizer: Tokenizer folder; goes into the saved pipeline and must be the one that made the codes. None: where
            it was then.
        validation_codes: Code cache for validation NELBO; None leaves validation out.
        init_from: Begin at the weights of a trained network: a saved pipeline, its `transformer` folder, or a run
            folder with `pipeline/` in it. For training longer, with another k, or on own classes (each then begins as
            the null class, and this is said). Sizes and codes must be its own; steps, EMA and optimizer start afresh.
            None: random weights. Where a checkpoint is resumed, its weights win.
        process: The noise process.
        model: The network's sizes.
        seed: Seeds weights, order, noise and dropout.
        batch_size: Images a step on each device (before accumulation).
        gradient_accumulation_steps: Batches a step.
        max_steps: Optimizer steps in all. A run with a `constant` schedule may be continued with more.
        optimizer: `adamw`; or `muon`: Muon for the weights of attention and feed-forward, AdamW for the rest, with one
            learning rate for both. shipped/README.md compares them.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up.
        lr_schedule: After warm-up: `constant`, `cosine` or `linear` (to 0 at max_steps).
        weight_decay: Decoupled weight decay of matrices.
        adam_beta1: AdamW first-moment decay.
        adam_beta2: AdamW second-moment decay.
        gradient_clip: Largest gradient norm; 0 does not clip.
        ema_decay: Decay of the EMA weights, which are validated, sampled and saved.
        conditional: False trains without classes: the network has no class embedding, the pipeline takes no labels.
        class_dropout: Share of labels replaced by the null class, for guidance. None: 0.1, and 0 without classes.
        t_min: Training draws t from [t_min, 1]; the loss at t has weight 1/t.
        mixed_precision: accelerate's precision. None: what `accelerate launch` says (its configuration, or
            ACCELERATE_MIXED_PRECISION), else `no`.
        attention_backend: Name of one of diffusers' attention backends (`native`, `_native_math`, `flash`, ...); None
            is PyTorch's choice. For bf16 on a CPU take `_native_math`: the backward of PyTorch's own is slow there.
        compile: Train through torch.compile: the first step takes about a minute longer, and on a CPU a C++ compiler
            is needed. Validation and sample grids stay uncompiled. See benchmarks/compiled_training.py.
        gradient_checkpointing: Keep only what enters each block for the backward pass, and compute the rest again: less
            memory, one more forward pass through the blocks, the same numbers.
        log_with: `tensorboard`, `wandb` (Weights & Biases; its package must be installed), a list of both, or `none`.
            `metrics.jsonl` and `samples/` are written in any case.
        log_every: Steps between log lines.
        validate_every: Steps between validations; 0 only at the end.
        validation_samples: Largest number of images a validation.
        sample_every: Steps between sample grids; 0 only at the end.
        sample_steps: Sampling steps of those grids.
        checkpoint_every: Steps between checkpoints; 0 only at the end.
        keep_checkpoints: Newest checkpoints that are kept.
        pipeline_every: Steps between pipelines of the EMA weights, `output_dir/pipelines/step-N`, all of which
            stay; for FID over training. 0 only at the end, `output_dir/pipeline`.
        resume: Continue from the newest whole checkpoint in output_dir; docs/training.md tells what may change then.
        stop_after: Stop (with a checkpoint) at this step although max_steps is not reached; for queues. None: never.
    """

    codes: str
    output_dir: str
    tokenizer: str | None = None
    validation_codes: str | None = None
    init_from: str | None = None
    process: ProcessOptions = field(default_factory=ProcessOptions)
    model: TransformerOptions = field(default_factory=TransformerOptions)
    seed: int = 0
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    max_steps: int = 2000
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    conditional: bool = True
    class_dropout: float | None = None
    t_min: float = 1e-3
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    attention_backend: str | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    log_with: Literal["tensorboard", "wandb", "none"] | list[Literal["tensorboard", "wandb"]] = "tensorboard"
    log_every: int = 20
    validate_every: int = 500
    validation_samples: int = 2000
    sample_every: int = 500
    sample_steps: int = 8
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    pipeline_every: int = 0
    resume: bool = True
    stop_after: int | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "gradient_accumulation_steps", "max_steps", "keep_checkpoints")
        require_at_least(self, 1, "validation_samples", "sample_steps", "log_every")
        require_at_least(self, 1, "stop_after", remedy="at least 1, or null")
        require_at_least(self, 0, "seed", "weight_decay")
        require_at_least(self, 0, "gradient_clip", remedy="must be positive, or 0 to clip nothing")
        rare = ("validate_every", "sample_every", "checkpoint_every", "pipeline_every")
        require_at_least(self, 0, *rare, remedy="must be positive, or 0 for only at the end")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive")
        if self.class_dropout is None:
            self.class_dropout = 0.1 if self.conditional else 0.0
        require(0 <= self.class_dropout < 1, "class_dropout", self.class_dropout, "must lie in [0, 1)")
        require(
            self.conditional or self.class_dropout == 0,
            "class_dropout",
            self.class_dropout,
            "with conditional=false there is no class to drop; set 0, or leave it out",
        )
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must lie in [0, 1)")
        require(0 < self.t_min < 1, "t_min", self.t_min, "must lie in (0, 1)")
        require(
            0 <= self.warmup_steps < self.max_steps,
            "warmup_steps",
            self.warmup_steps,
            f"must be at least 0 and below max_steps={self.max_steps}; lower warmup_steps, or raise max_steps",
        )

    @property
    def trackers(self) -> list[str]:
        """`log_with` as a list, each name once."""
        names = [self.log_with] if isinstance(self.log_with, str) else self.log_with
        return [name for name in dict.fromkeys(names) if name != "none"]
