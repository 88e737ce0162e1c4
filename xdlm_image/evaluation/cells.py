"""Finished parts of a long verb: one JSON file each, valid only for the protocol that it was measured under.

This file owns their names and how they are read back; what is in them is their verb's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm


def refuse_name(argument: str, name: str) -> None:
    """Raise ValueError for a name of the user's that cannot be part of a file's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*", name):
        raise ValueError(f"{argument}: the name {name!r} becomes part of file names; use letters, digits, . _ = + -")


def read_cell(path: Path, key: dict[str, Any], number: str) -> dict[str, Any] | None:
    """The result in a cell's file `{"key": ..., "result": ...}`.

    Args:
        path: The file.
        key: JSON of everything that decides the result.
        number: Name of what every result holds.

    Returns:
        None, with a line of why, where there is no such file or it is damaged, without `number`, or of another key.
    """
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is of another protocol")
        if stored["result"].get(number) is None:
            raise ValueError(f"it has no {number}")
        return dict(stored["result"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        tqdm.write(f"{path}: this result cannot be used ({error}); measuring again")
        return None
