"""Recipe of what judges images: the verb `train-extractor`."""

from __future__ import annotations

from dataclasses import dataclass, field

from xdlm_image.recipes.checks import require, require_at_least
from xdlm_image.recipes.data import DataOptions


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
        require_at_least(self, 1, "width", "feature_dim", "batch_size", "epochs")
        require(self.feature_dim % 8 == 0, "feature_dim", self.feature_dim, "must be a multiple of 8")  # timm's rule
        require_at_least(self, 0, "seed", "weight_decay", "num_workers")
        require(self.seed < 2**32, "seed", self.seed, "must be below 2**32")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive")
