"""What a verb knows of the other processes of its run (`accelerate launch`, torchrun).

This file owns the one way to accelerate's state of processes, and nothing else.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def process_state() -> PartialState | None:
    """accelerate's state, with `torch.distributed` running; None where this process is alone.

    The processes wait `devices.LONGEST_WAIT` for one that has more to do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    from xdlm_image.devices import process_group_timeout

    return PartialState(cpu=on_cpu(), **process_group_timeout().to_kwargs())


def on_cpu() -> bool:
    """What `PartialState(cpu=)` and `Accelerator(cpu=)` must be told, the first of which is kept.

    Without this word several processes on CPUs would each take itself for the only one, and do the work over. Apple's
    GPU cannot be shared either.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return True
    device = torch.accelerator.current_accelerator(check_available=True)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and (device is None or device.type == "mps")
