"""What a verb knows of the other processes of its run (`accelerate launch`, torchrun), and of other commands.

This file owns the one way to accelerate's state of processes, and the lock that keeps a second command out of a run's
folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from xdlm_image.files import refuse_unwritable

if TYPE_CHECKING:
    import torch
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


def own_device(device: str | None) -> torch.device:
    """Where this process works: at `device`, else where accelerate puts it among the others, else at the best there is.

    Raises:
        ValueError: No such device.
    """
    from xdlm_image.devices import best_device

    processes = process_state()  # first: among several, "cuda" is the process's own GPU
    return best_device(device) if processes is None or device is not None else processes.device


@contextmanager
def main_process_first() -> Iterator[None]:
    """What the main process does before the others do it, who then find a file that it fetched."""
    processes = process_state()
    with nullcontext() if processes is None else processes.main_process_first():
        yield


@contextmanager
def only_command(output_dir: Path, is_main: bool) -> Iterator[None]:
    """Keep every other command out of a run's folder; the lock goes with the process, killed or not.

    Args:
        output_dir: The folder; made if it is not there.
        is_main: The main process holds the lock for all of its run.

    Raises:
        ValueError: Another command is at work there.
        OSError: It cannot be made, or written to.
    """
    if not is_main:
        yield
        return
    from filelock import FileLock, Timeout

    refuse_unwritable(output_dir, "output_dir")
    lock = output_dir / ".lock"
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"output_dir={str(output_dir)!r}: another command is at work there, and two would write the same files; "
            "wait until it ends, end it, or name another folder"
        ) from error
    with held:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who opened it just before finds it nameless, and opens another


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
