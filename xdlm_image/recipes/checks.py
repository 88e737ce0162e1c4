"""What every recipe says of a value that it cannot take."""

from __future__ import annotations

import math


def require(condition: bool, argument: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{argument}={value!r}: {remedy}")


def require_finite(argument: str, value: float) -> None:
    require(math.isfinite(value), argument, value, "must be a finite number")


def require_in_time(argument: str, value: float | tuple[float, float]) -> None:
    for one in value if isinstance(value, list | tuple) else (value,):
        require_finite(argument, one)
