"""What the ranks of `torch.distributed` do together; a process that is alone does it by itself.

This file owns sums, agreeing and waiting; who starts the processes is `processes`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where torch.distributed is not running."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_over_ranks(values: torch.Tensor, operation: Literal["sum", "min", "max"] = "sum") -> torch.Tensor:
    """Element by element over the ranks, in place; on the rank's GPU under NCCL. Alone: as it is."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(values, getattr(dist.ReduceOp, operation.upper()))
    return values


def sum_over_ranks(value: float, device: torch.device) -> float:
    """Sum over the ranks, exact for integers below 2**24."""
    if rank_and_world()[1] == 1:
        return value
    total = torch.tensor([value], dtype=torch.float32, device=device)  # MPS has no float64
    dist.all_reduce(total)
    return float(total)


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def of_first_rank(value: Any) -> Any:
    """The first rank's value: the ranks must decide alike, also where each has files of its own."""
    if rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_first_rank(find: Callable[[], T]) -> T:
    """What `find` gives on the first rank, on all of them; a ValueError or OSError of it is raised on all."""
    if rank_and_world()[1] == 1:
        return find()
    found: T | None = None
    error: Exception | None = None
    if rank_and_world()[0] == 0:
        try:
            found = find()
        except (ValueError, OSError) as raised:
            error = raised
    found, error = of_first_rank((found, error))
    if error is not None:
        raise error
    return found
