"""Recipe of the verb `nelbo`: which pipelines, on which held-out codes, with how much noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xdlm_image.recipes.checks import require, require_at_least


@dataclass
class NelboRecipe:
    """NELBO of one or more pipelines on held-out codes, bits per token with 95 % intervals over images.

    Attributes:
        pipelines: Name of each pipeline in the table -> its folder.
        codes: Code cache of held-out images (from `encode`), made by the pipelines' own tokenizer.
        output_dir: Folder for `nelbo.json`, `nelbo.md`, `nelbo.csv` and `nelbo.png`; a killed run resumes there.
        runs: Name -> folder of a training run, whose validation curve goes into `nelbo_training.csv` and
            `nelbo_training.png`.
        num_images: Images of the cache, spread over all of it; None takes every one.
        num_times: Noise levels an image; each is one evaluation of the network.
        t_min: Least t that training saw; the share of the NELBO below it is reported.
        seed: Chooses the images and their noise.
        dtype: What the network computes in; the loss stays in float32.
        batch_size: Noisy images that the network sees at once.
        device: torch device; None picks the best there is.
    """

    pipelines: dict[str, str]
    codes: str
    output_dir: str
    runs: dict[str, str] = field(default_factory=dict)
    num_images: int | None = None
    num_times: int = 8
    t_min: float = 1e-3
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 256
    device: str | None = None

    def __post_init__(self) -> None:
        require(len(self.pipelines) > 0, "pipelines", self.pipelines, "name at least one, as NAME: FOLDER")
        remedy = "an interval takes at least 2 images, and many for one that means much"
        require_at_least(self, 2, "num_images", remedy=remedy)
        require_at_least(self, 1, "num_times", "batch_size")
        require_at_least(self, 0, "seed")
        require(0 < self.t_min < 1, "t_min", self.t_min, "must lie in (0, 1)")
