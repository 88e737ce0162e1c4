"""Whether a run may go on under a changed recipe, and what is then said.

Owns which options bind a run, which may change with a word, and which are free. It compares; it never loads anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdlm_image.data.code_cache import Manifest
from xdlm_image.recipes import TrainRecipe
from xdlm_image.training.checkpoints import refuse_other_recipe

FREE = {
    # nothing that the weights depend on
    "output_dir", "tokenizer", "codes", "validation_codes", "log_every", "validate_every", "validation_samples",
    "sample_every", "sample_steps", "checkpoint_every", "keep_checkpoints", "pipeline_every", "resume", "stop_after",
    "log_with", "gradient_checkpointing",  # computes the same again
    "init_from",  # see `refuse_other_beginning`; the folder need no longer be there
}  # fmt: skip
SAME_BUT_ROUNDED = ("attention_backend", "compile", "mixed_precision")
PROCESSES = "number of processes"
IMAGES_A_STEP = (PROCESSES, "batch_size", "gradient_accumulation_steps")  # their product places a step in the images
NOT_THE_SAME = "from here on the run is not bit for bit what it would have been"


def what_binds(recipe: TrainRecipe, manifest: Manifest, processes: int, mixed_precision: str) -> dict[str, Any]:
    """What a checkpoint keeps of its run, flat: option -> value, JSON.

    Args:
        recipe: The recipe.
        manifest: Of the training codes, which count by what they hold, not by where they are.
        processes: How many share the run.
        mixed_precision: The precision that is computed in.
    """
    flat = {name: value for name, value in _flat(recipe).items() if name not in FREE}
    flat["mixed_precision"] = mixed_precision
    flat["codes"] = manifest.checksums
    flat["data"] = manifest.data_fingerprint
    flat["tokenizer"] = manifest.tokenizer_hash
    flat[PROCESSES] = processes
    return json.loads(json.dumps(flat))


def changes_of(saved: Mapping[str, Any], now: Mapping[str, Any], step: int, folder: str | Path) -> list[str]:
    """What changes when a run goes on, a sentence each.

    More steps under a constant learning rate change nothing of what was done. Another precision, attention or compiler
    rounds otherwise; another cut of a step into processes, batches and accumulation draws other noise for the same
    images. Everything else stays.

    Args:
        saved: `what_binds` of the checkpoint; options that came later are taken at their defaults.
        now: `what_binds` of the run that goes on.
        step: Steps done.
        folder: The run's, for errors.

    Raises:
        ValueError: Naming the first option that may not change, its values, and the way out.
    """
    defaults = json.loads(json.dumps(_flat(TrainRecipe(codes="", output_dir="", tokenizer=""))))
    saved = {name: defaults[name] for name in now if name in defaults} | dict(saved)
    notes = []
    before, after = saved["max_steps"], now["max_steps"]
    if before != after:
        if now["lr_schedule"] == saved["lr_schedule"] != "constant":
            raise ValueError(
                f"max_steps={after}, but the run in {folder} began with {before}: under lr_schedule="
                f"{now['lr_schedule']!r} the learning rate of every step depends on it. Go on with {before}; or begin "
                f"another run at its weights, with init_from={str(folder)!r} and another output_dir"
            )
        if after < step:
            raise ValueError(f"max_steps={after}: the run in {folder} has done {step} already; name more")
        notes.append(f"max_steps is now {after}, it was {before}")
    for name in SAME_BUT_ROUNDED:
        if saved[name] != now[name]:
            notes.append(f"{name} is now {now[name]!r}, it was {saved[name]!r}: {NOT_THE_SAME}")
    cuts = [[values[name] for name in IMAGES_A_STEP] for values in (saved, now)]
    if cuts[0] != cuts[1]:
        (a, b, c), (x, y, z) = cuts
        what = " x ".join(IMAGES_A_STEP)
        if a * b * c != x * y * z:
            raise ValueError(
                f"{what} = {x} x {y} x {z} = {x * y * z} images a step, but the run in {folder} began with {a} x {b} x "
                f"{c} = {a * b * c}, by which it knows the images it has seen: choose them so that the product stays"
            )
        notes.append(f"{what} is now {x} x {y} x {z}, it was {a} x {b} x {c}: the same images a step; {NOT_THE_SAME}")
    if saved["conditional"] != now["conditional"]:  # before what follows from it
        refuse_other_recipe({"conditional": saved["conditional"]}, {"conditional": now["conditional"]}, folder)
    may_change = {"max_steps", "init_from", *SAME_BUT_ROUNDED, *IMAGES_A_STEP}
    old, new = ({name: value for name, value in values.items() if name not in may_change} for values in (saved, now))
    refuse_other_recipe(old, new, folder)
    return notes


def refuse_other_beginning(init_from: str | None, began: str | None, folder: str | Path) -> None:
    """Raise ValueError where `init_from` names other weights than those at which the run in `folder` began."""
    if init_from is not None and (began is None or os.path.abspath(init_from) != os.path.abspath(began)):
        raise ValueError(
            f"init_from={init_from!r}: the run in {folder} began at {'new weights' if began is None else repr(began)}, "
            "and goes on from its checkpoint; leave init_from out for that, or name another output_dir to begin there"
        )


def _flat(recipe: TrainRecipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(recipe).items():
        inner = value if isinstance(value, dict) else {None: value}
        flat |= {name if key is None else f"{name}.{key}": item for key, item in inner.items()}
    return flat
