"""The folder a conversion leaves: whole or absent, with `provenance.json` beside the weights.

This file owns where the result goes and what is said of its origin; what is in it, the converters decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xdlm_image.conversion.checkpoint_file import CheckpointFile
from xdlm_image.files import new_folder, refuse_unwritable, write_json
from xdlm_image.recipes.conversion import ConversionRecipe

PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True)
class Conversion:
    """What a converter did; printing it tells the user.

    Attributes:
        output: The folder.
        notes: What was found, chosen and left out, a sentence each.
    """

    output: Path
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([str(self.output), *(f"- {note}" for note in self.notes)])


def refuse_taken(recipe: ConversionRecipe) -> None:
    """Raise before any work if the output folder is taken or cannot be written.

    Raises:
        FileExistsError: It holds something else than a conversion, or a conversion and `overwrite` is False.
        OSError: It cannot be written to.
    """
    output = Path(recipe.output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output={recipe.output!r}: is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / PROVENANCE_FILE).is_file():
            raise FileExistsError(f"output={recipe.output!r}: holds other files; name a new folder")
        if not recipe.overwrite:
            raise FileExistsError(
                f"output={recipe.output!r}: holds a conversion; name a new folder, or set overwrite: true"
            )
    refuse_unwritable(output.absolute().parent, "output")


def provenance(file: CheckpointFile, source_format: str, recipe: ConversionRecipe, notes: list[str]) -> dict[str, Any]:
    """The content of `provenance.json`: which file this was, by its name and hash, and what was done to it."""
    return {
        "source_file": file.path.name,
        "source_sha256": file.sha256,
        "source_format": source_format,
        "licence": recipe.licence,
        "url": recipe.url,
        "converted_by": f"xdlm-image {version('xdlm-image')}",
        "notes": notes,
    }


def write_folder(recipe: ConversionRecipe, content: dict[str, Any], save: Callable[[Path], object]) -> Path:
    """Call `save(new folder)`, add `provenance.json`, and move the whole to `recipe.output`."""
    with new_folder(Path(recipe.output).absolute()) as partial:
        save(partial)
        write_json(partial / PROVENANCE_FILE, content)
    return Path(recipe.output)
