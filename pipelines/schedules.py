"""Settings that may change in the course of a call: the guidance scale and the temperature.

This file owns how such a setting is given, a number or a pair for both ends, and what it is at a time. Noise and times
are the scheduler's. It imports only the standard library, so that it can travel beside the weights.
"""

from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import Any

InTime = float | Sequence[float]  # a number; or (at t = 1, at t = 0), linear between: noise comes first
Interval = Sequence[float] | None  # (low, high): the times low < t <= high; None is all


def value_at(setting: InTime, t: float) -> float:
    """What a setting is in the step that leaves time t: start t + end (1 - t)."""
    if isinstance(setting, list | tuple):
        start, end = setting
        return float(start * t + end * (1.0 - t))
    return float(setting)  # type: ignore[arg-type]


def guidance_at(scale: InTime, interval: Interval, t: float) -> float:
    """The guidance scale at time t: 1, which is none, outside of the interval (Kynkäänniemi et al., 2024).

    Times of a grid are rounded: one within 1e-9 of an end is that end.
    """
    inside = interval is None or interval[0] + 1e-9 < t <= interval[1] + 1e-9
    return value_at(scale, t) if inside else 1.0


def check_setting(name: str, setting: InTime, lowest: float = -float("inf")) -> None:
    """Raise ValueError unless a setting is a finite number, or a pair of them, and none is below `lowest`."""
    is_pair = isinstance(setting, list | tuple)
    values: list[Any] = [*setting] if isinstance(setting, list | tuple) else [setting]
    if len(values) != 1 + is_pair or not all(_is_number(value) and value >= lowest for value in values):
        least = "" if lowest == -float("inf") else f", at least {lowest:g}"
        raise ValueError(f"{name}={setting!r}: must be a finite number{least}, or a pair of them, (at t = 1, at t = 0)")


def check_interval(name: str, interval: Interval) -> None:
    """Raise ValueError unless the interval is None or holds times of (0, 1]."""
    if interval is None:
        return
    is_pair = isinstance(interval, list | tuple) and len(interval) == 2 and all(map(_is_number, interval))
    if not is_pair or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"{name}={interval!r}: must be None or (low, high) with 0 <= low < high <= 1, times t")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
