"""The verb `export`: a run's pipeline as a self-contained folder with its model card, and its way to the hub.

This file owns the order of the work: everything that can be refused is refused first. The folder is the pipeline's
own affair (`pipelines/self_contained.py`), the card `card`'s.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from xdlm_image.devices import best_device
from xdlm_image.drawing.opening import open_pipeline
from xdlm_image.files import refuse_unwritable
from xdlm_image.pipelines.folder_check import refuse_other_content
from xdlm_image.pipelines.self_contained import open_repository, upload, write_folder
from xdlm_image.recipes.publishing import ABOUT, ExportRecipe


@dataclass(frozen=True)
class Exported:
    """What was written; printing it tells the user.

    Attributes:
        folder: The self-contained folder.
        pushed: Where it was pushed to; None where it was not.
    """

    folder: Path
    pushed: str | None = None

    def __str__(self) -> str:
        return f"{self.folder}\n{self.pushed}" if self.pushed else str(self.folder)


def export(recipe: ExportRecipe) -> Exported:
    """Write the folder, whole or not at all, and push it if asked.

    Raises:
        FileNotFoundError, ValueError: No such pipeline, evaluation, card or picture, or they do not belong together.
        FileExistsError: The output folder holds something else.
        OSError: The folder cannot be written, or the hub refuses; before weights are saved.
    """
    output = Path(recipe.output).absolute()
    refuse_other_content(output, recipe.overwrite)
    refuse_unwritable(output.parent, "the folder of output")
    text = None
    if recipe.card is not None:
        if not Path(recipe.card).is_file():
            raise FileNotFoundError(f"card={recipe.card!r}: no such file")
        text = Path(recipe.card).read_text(encoding="utf-8")
    folder = Path(recipe.pipeline)
    if not (folder / "model_index.json").is_file() and (folder / "pipeline" / "model_index.json").is_file():
        folder = folder / "pipeline"
    pipeline = open_pipeline(folder, best_device(recipe.device))
    about = {name: getattr(recipe, name) for name in ABOUT if getattr(recipe, name) != getattr(ExportRecipe, name)}
    with tempfile.TemporaryDirectory() as scratch:
        text, files = pipeline.make_card(text, recipe.push_to or output.name, Path(scratch), about)
        if recipe.push_to is None:
            write_folder(pipeline, output, text, files, {})
            return Exported(Path(recipe.output))
        api = HfApi()
        repo_id = open_repository(api, recipe.push_to, recipe.private, recipe.revision)
        write_folder(pipeline, output, text, files, {})
    done = upload(api, output, repo_id, recipe.commit_message, recipe.revision, recipe.create_pr)
    return Exported(Path(recipe.output), f"pushed to {repo_id}, commit {done.oid}")
