"""Which images, times and random numbers a training step sees: pure functions of (seed, step, rank).

Nothing here has a state, so a resumed run sees exactly what the killed one would have seen, and progress is counted
in images: the training set is an endless sequence of shuffled epochs, and step s takes the next global batch of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

POWER = 3  # t = s^3 of weighted_times


def step_seed(seed: int, step: int, rank: int = 0, micro_batch: int = 0) -> int:
    """One well-mixed 32-bit seed per (seed, step, rank, micro-batch)."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint32)[0])


@lru_cache(maxsize=2)
def _epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_images)


def batch_indices(num_images: int, seed: int, first: int, count: int) -> np.ndarray:
    """Images at positions first .. first + count - 1 of the endless shuffled sequence: int64 (count,)."""
    positions = np.arange(first, first + count)
    epochs = positions // num_images
    out = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _epoch_order(num_images, seed, int(epoch))[positions[here] % num_images]
    return out


def rank_positions(step: int, micro_batch: int, batch_size: int, accumulation: int, world: int, rank: int) -> int:
    """First position of one rank's micro-batch in the sequence."""
    return ((step * accumulation + micro_batch) * world + rank) * batch_size


def stratified_times(
    count: int, t_min: float, generator: torch.Generator | None = None, rank: int = 0, world: int = 1
) -> torch.Tensor:
    """Stratified t in [t_min, 1], float64 (count,), on the CPU: every rank covers the whole range.

    Of the count * world strata of one micro-batch, rank r takes r, r + world, r + 2 world, ...; each time is uniform
    in its stratum, and the order within the batch is random.
    """
    strata = torch.arange(count, dtype=torch.float64) * world + rank
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    t = (strata + jitter) / (count * world)
    return t_min + (1.0 - t_min) * t[torch.randperm(count, generator=generator)]


def weighted_times(count: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Times for an estimate of the NELBO, and their weights: the mean of weight l(t) estimates the integral of l.

        t = s^3,  weight = 3 s^2,  s stratified in (0, 1]

    The loss at small t is rare and large, of about 1/t: uniform times would have an infinite variance (why the third
    power: `evaluation.nelbo_estimate`).

    Returns:
        t in (0, 1] and weight, float64 (count,), in random order.
    """
    s = 1.0 - stratified_times(count, 0.0, generator)  # (0, 1]
    return s**POWER, POWER * s ** (POWER - 1)
