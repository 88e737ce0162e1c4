"""Checkpoints of a run: whole or absent, readable without unpickling code, bound to their recipe.

Owns the folder `checkpoints/step-N` (tensors as safetensors, optimizer state as a `weights_only` file, the rest as
JSON). It never decides when to save.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from xdlm_image.files import new_folder

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

CONTENTS = {  # of which a run keeps hashes
    "images": "the images",
    "data": "the images of the codes",
    "codes": "the codes",
    "tokenizer": "the weights of the tokenizer",
}


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: Optimizer steps done.
        tensors: Name of a part (`model`, `ema`, ...) -> its tensors.
        optimizer: The optimizer's state dict.
        state: Everything else, JSON.
    """

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    optimizer: dict[str, Any]
    state: dict[str, Any]


@dataclass
class TrainState:
    """What every training learns, as a checkpoint holds it; `scaler` is None without fp16."""

    network: nn.Module
    ema: EMAModel
    optimizer: Any
    scaler: Any

    def pack(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> Checkpoint:
        """A checkpoint, with further tensors and state of the run's own."""
        average = {str(i): value for i, value in enumerate(self.ema.shadow_params)}
        tensors = {"model": self.network.state_dict(), "ema": average} | tensors
        scaler = None if self.scaler is None else self.scaler.state_dict()
        state = {"ema_steps": self.ema.optimization_step, "scaler": scaler} | state
        return Checkpoint(step, tensors, self.optimizer.state_dict(), state)

    def unpack(self, checkpoint: Checkpoint) -> None:
        """Put what `pack` took back into its places."""
        self.network.load_state_dict(checkpoint.tensors["model"])
        for i, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(checkpoint.tensors["ema"][str(i)])
        self.ema.optimization_step = checkpoint.state["ema_steps"]
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.scaler is not None and checkpoint.state["scaler"] is not None:
            self.scaler.load_state_dict(checkpoint.state["scaler"])


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: Where they are.
        verb: Whose run it is.
        keep: How many of the newest stay.
    """

    def __init__(self, folder: str | Path, verb: str, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.verb = verb
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps at which there is a checkpoint, oldest first."""
        names = (re.fullmatch(r"step-(\d+)", p.name) for p in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write to a temporary folder, rename it, then drop what is too old.

        Raises:
            ValueError: A tensor holds NaN or infinity; good checkpoints are not given away for it.
        """
        for part, tensors in checkpoint.tensors.items():
            for name, value in tensors.items():
                if not bool(torch.isfinite(value).all()):
                    good = f"that of step {max(self.steps())} stays" if self.steps() else "there is none before it"
                    raise ValueError(
                        f"step {checkpoint.step}: {part} holds NaN or infinity in {name}, so no checkpoint is written "
                        f"({good}); lower the learning rate or the gradient clip and begin again in another folder"
                    )
        final = self._path(checkpoint.step)
        for left_by_a_killed_run in self.folder.glob(".*.partial"):  # maybe of a step that is not saved again
            shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
        with new_folder(final) as partial:
            for name, tensors in checkpoint.tensors.items():
                contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
                save_file(contiguous, partial / f"{name}.safetensors")
            torch.save(checkpoint.optimizer, partial / "optimizer.pt")
            state = {"step": checkpoint.step, "verb": self.verb} | checkpoint.state
            (partial / "state.json").write_text(json.dumps(state, indent=2))
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(step), ignore_errors=True)
        return final

    def load_newest(self) -> Checkpoint | None:
        """The newest checkpoint with its tensors on the CPU, None if there is none.

        Raises:
            ValueError: If a file of it is missing or damaged, or another verb wrote it.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        try:
            state = json.loads((path / "state.json").read_text())
            tensors = {f.stem: load_file(f) for f in sorted(path.glob("*.safetensors"))}
            optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        except Exception as error:
            remedy = f"go on from step {steps[-2]}" if len(steps) > 1 else "start afresh, as there is none before it"
            raise ValueError(f"checkpoint {path} is damaged ({error!r}); remove that folder to {remedy}") from error
        verb = state.pop("verb", self.verb)  # which once was not written
        if verb != self.verb:
            raise ValueError(f"output_dir={str(self.folder.parent)!r}: holds a run of {verb}; name another folder")
        return Checkpoint(state.pop("step"), tensors, optimizer, state)


def refuse_other_folders(checkpoints: CheckpointFolder) -> None:
    """Raise ValueError, on every process, unless all see the same newest checkpoint; before any loads one."""
    newest = gather_object([max(checkpoints.steps(), default=0)])
    if len(set(newest)) > 1:
        told = ", ".join(f"{step or 'none'}" for step in newest)
        raise ValueError(
            f"output_dir={str(checkpoints.folder.parent)!r}: the newest checkpoint is that of another step for each "
            f"process ({told}), which would go on with different weights: output_dir must be one folder that all "
            "nodes see"
        )


def refuse_other_recipe(saved: Mapping[str, Any], now: Mapping[str, Any], folder: str | Path) -> None:
    """Raise ValueError naming the first option in which a run would go on differently than it began."""
    for name in sorted({*saved, *now}):
        if saved.get(name) != now.get(name) and name in CONTENTS:
            raise ValueError(
                f"{CONTENTS[name]} are not those that the run in {folder} began with: give it those, or name another "
                "output_dir"
            )
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"{name}={now.get(name)!r}, but the run in {folder} began with {saved.get(name)!r}: "
                "go on with that value, or name another output_dir"
            )
