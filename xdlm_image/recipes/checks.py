"""What every recipe says of a value that it cannot take."""

from __future__ import annotations

import math


def require(condition: bool, argument: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{argument}={value!r}: {remedy}")


def require_at_least(recipe: object, least: int, *names: str, group: str = "", remedy: str = "") -> None:
    """That every named option which is not None is at least so much; `group` stands before the names in errors."""
    for name in names:
        value = getattr(recipe, name)
        require(value is None or value >= least, group + name, value, remedy or f"must be at least {least}")


def require_finite(argument: str, value: float) -> None:
    require(math.isfinite(value), argument, value, "must be a finite number")


def require_in_time(argument: str, value: float | tuple[float, float]) -> None:
    for one in value if isinstance(value, list | tuple) else (value,):
        require_finite(argument, one)
        require(one >= 0, argument, value, "must not be negative")
