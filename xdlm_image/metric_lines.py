"""`metrics.jsonl`: what a run measured, one JSON object a line, each with its `step`.

This file owns how lines are added, taken back and read; what they hold is the run's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xdlm_image.files import write_text

NAME = "metrics.jsonl"


class MetricLines:
    """The lines of one run: every step once, however often the run is killed.

    Args:
        folder: The run's; the file in it need not be there yet.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line; `values` hold `step`. NaN and infinities, which JSON has not, become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(finite, allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a last one that a kill or a run at work has not ended is left out.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A line is no JSON object with a step; names it.
        """
        return [values for _, values in self._whole()]

    def forget_after(self, step: int) -> None:
        """Drop what a killed run wrote after its last checkpoint, and a line that it did not finish.

        Raises:
            ValueError: As `read`.
        """
        if self.path.exists():
            write_text(self.path, "".join(text for text, values in self._whole() if values["step"] <= step))

    def _whole(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, text in enumerate(self.path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
            if not text.endswith("\n"):
                continue
            try:
                values = json.loads(text)
                int(values["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: line {number} is {text[:60]!r} ({error!r}); mend or remove it"
                ) from error
            yield text, values
