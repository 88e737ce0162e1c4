"""Checkpoints of a run: whole or absent, readable without unpickling code, bound to their recipe.

Owns the folder `checkpoints/step-N` (tensors as safetensors, optimizer state as a `weights_only` file, the rest as
JSON). It never decides when to save.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


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


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: Where they are.
        keep: How many of the newest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps at which there is a checkpoint, oldest first."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*"))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write to a temporary folder, rename it, then drop what is too old."""
        final = self._path(checkpoint.step)
        partial = self.folder / f".partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, partial / f"{name}.safetensors"
            )
        torch.save(checkpoint.optimizer, partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps({"step": checkpoint.step} | checkpoint.state, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(step), ignore_errors=True)
        return final

    def load_newest(self, device: torch.device) -> Checkpoint | None:
        """The newest checkpoint, None if there is none.

        Raises:
            ValueError: If a file of it is missing or damaged.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        try:
            state = json.loads((path / "state.json").read_text())
            tensors = {f.stem: load_file(f, device=str(device)) for f in sorted(path.glob("*.safetensors"))}
            optimizer = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"checkpoint {path} is damaged ({error}); remove that folder to go on from the one before"
            ) from error
        return Checkpoint(state.pop("step"), tensors, optimizer, state)


def refuse_other_recipe(saved: Mapping[str, Any], now: Mapping[str, Any], folder: str | Path) -> None:
    """Raise ValueError naming the first option in which a run would go on differently than it began."""
    for name in sorted({*saved, *now}):
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"{name}={now.get(name)!r}, but the run in {folder} began with {saved.get(name)!r}: "
                "go on with that value, or name another output_dir"
            )
