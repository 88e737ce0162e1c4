"""What every recipe says of a value that it cannot take."""

from __future__ import annotations


def require(condition: bool, argument: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{argument}={value!r}: {remedy}")
