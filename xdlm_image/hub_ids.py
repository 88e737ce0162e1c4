"""What an error adds where a missing folder looks like the id of a hub's repository. It fetches nothing."""

from __future__ import annotations

import re
from pathlib import Path


def fetch_hint(folder: str | Path) -> str:
    """What to add to the error about a missing folder where its name could be a hub's OWNER/NAME; else empty."""
    name = str(folder)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or Path(name).parent.exists():
        return ""
    return f"; a repository of the Hub becomes a folder by `hf download {name} --local-dir DIR`"
