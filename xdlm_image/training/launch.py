"""accelerate as a training run needs it: what a launcher may ask for, and what is refused.

Owns the making of the `Accelerator`; it never trains.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

from xdlm_image.devices import process_group_timeout, warn_if_slow
from xdlm_image.processes import on_cpu
from xdlm_image.recipes import TokenizerRecipe, TrainRecipe

PRECISION = "ACCELERATE_MIXED_PRECISION"
COMPILER = "ACCELERATE_DYNAMO_BACKEND"
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def refuse_sharding() -> None:
    """Raise ValueError where the launcher wants parameters in pieces: average and checkpoints are of whole ones."""
    for flag, name in SHARDING.items():
        if parse_flag_from_env(flag):
            raise ValueError(
                f"{flag}={os.environ[flag]}: {name} cuts parameters into pieces, each device must hold them whole: "
                "launch it with `accelerate launch --multi_gpu` or torchrun"
            )


def make_accelerator(recipe: TrainRecipe | TokenizerRecipe) -> Accelerator:
    """The run's `Accelerator`.

    Batches a step are the recipe's: `accelerate launch` exports a number even where nobody named one.

    Raises:
        ValueError: The launcher wants parameters in pieces, a precision that trainings do not know, or another
            compiler; fp16 on a CPU; or an earlier training of this Python process had another precision.
    """
    refuse_sharding()
    launched = os.environ.get(PRECISION)
    if recipe.mixed_precision is None and launched not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"{PRECISION}={launched}: trainings take no, fp16 or bf16; name one as mixed_precision")
    precision = recipe.mixed_precision or launched or "no"
    if os.environ.get(COMPILER, "no").lower() != "no":
        raise ValueError(f"{COMPILER}={os.environ[COMPILER]}: unset it; what compiles a training is compile=true")
    device = PartialState(cpu=on_cpu(), **process_group_timeout().to_kwargs()).device
    if precision == "fp16" and device.type == "cpu":
        name = PRECISION if recipe.mixed_precision is None else "mixed_precision"
        raise ValueError(f"{name}='fp16': a CPU would compute in float32 all the same; name bf16 or no")
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        raise ValueError(
            f"mixed_precision={recipe.mixed_precision!r}: this Python process began with "
            f"{AcceleratorState().mixed_precision!r}, which accelerate keeps; train in a process of its own"
        )
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(getattr(recipe, "gradient_accumulation_steps", 1)),
    )
    if precision == "bf16":
        warn_if_slow(device, torch.bfloat16, "mixed_precision='bf16'")
    return accelerator
