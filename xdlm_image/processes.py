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

    Asked before an `Accelerator` is made, it must be told by hand that the processes are to run on CPUs: the state is
    made once and kept, and without this word each process would take itself for the only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from xdlm_image.devices import process_group_timeout

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **process_group_timeout().to_kwargs())
