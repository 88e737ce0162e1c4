"""Where a run's curves, recipe and sample grids go besides its own folder: TensorBoard and Weights & Biases.

Owns accelerate's trackers as a run needs them: made before the first step, going on where a killed run stopped. What is
logged, the loop decides.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available
from PIL import Image

from xdlm_image.files import write_text

AVAILABLE = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
WANDB_ID = "wandb_id.txt"  # in the run folder: by it Weights & Biases knows a resumed run


def refuse_missing(names: Sequence[str]) -> None:
    """Raise ValueError naming the first tracker whose package is not installed."""
    for name in names:
        if not AVAILABLE[name]():
            raise ValueError(f"log_with={name!r}: its package is not installed; pip install {name}, or leave it out")


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], output_dir: Path, step: int, recipe: Mapping[str, Any]
) -> None:
    """Start the trackers and show them the recipe.

    What a killed run logged after its last checkpoint is logged again: TensorBoard leaves the old lines out of its
    curves, Weights & Biases keeps them, which are the same.

    Args:
        accelerator: Whose `log` then reaches them.
        names: Of `AVAILABLE`.
        output_dir: The run folder.
        step: Steps done; 0 begins a new run at Weights & Biases.
        recipe: The resolved recipe.

    Raises:
        ValueError: Weights & Biases refuses to begin.
    """
    if not accelerator.is_main_process:
        return
    trackers: list[Any] = []
    if "tensorboard" in names:
        trackers.append(TensorBoardTracker("tensorboard", str(output_dir), purge_step=step + 1))
    if "wandb" in names:
        path = output_dir / WANDB_ID
        if step == 0 or not path.exists():
            write_text(path, uuid.uuid4().hex)
        settings = {"name": output_dir.name, "dir": str(output_dir), "id": path.read_text(), "resume": "allow"}
        trackers.append(WandBTracker(os.environ.get("WANDB_PROJECT", "xdlm_image"), **settings))
    accelerator.log_with = trackers
    try:
        accelerator.init_trackers("")  # the names are with the trackers
    except Exception as error:  # whatever wandb raises without a login, a network or a project
        raise ValueError(
            f"log_with={list(names)}: {error}; run `wandb login`, set WANDB_MODE=offline, or leave wandb out"
        ) from error
    for tracker in trackers:
        if isinstance(tracker, TensorBoardTracker):
            tracker.writer.add_text("recipe", f"```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```", step)
        else:
            tracker.store_init_configuration(dict(recipe))


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Show a saved picture in every tracker."""
    picture = np.asarray(Image.open(path).convert("RGB"))[None]  # (1, H, W, 3) uint8
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if isinstance(tracker, TensorBoardTracker) else {}
        tracker.log_images({name: picture}, step=step, **layout)
