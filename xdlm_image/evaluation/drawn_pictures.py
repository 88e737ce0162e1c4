"""Drawn sets as PNG files, for other people's evaluators: images are on disk only where this is asked for.

This file owns the folder of one set; it never draws and never measures.

    about.json           everything that decides the images: weights, sampler, seed
    CLASS/IIIIIII.png    image i, in the folder of its class, i mod the number of classes
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xdlm_image.evaluation.batches import Batch
from xdlm_image.evaluation.given_images import class_folders
from xdlm_image.evaluation.measuring import barrier
from xdlm_image.evaluation.pictures import save_images
from xdlm_image.evaluation.statistics import rank_and_world
from xdlm_image.files import write_json


class DrawnPictures:
    """The folder of a balanced set of drawn images.

    Args:
        folder: Made when images are kept.
        key: JSON that decides the images.
        num_samples: Images of the set.
        class_names: By class id; the folders are called as `class_folders` says.

    Raises:
        ValueError: The folder holds images of another set, or of somebody else.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], num_samples: int, class_names: Sequence[str]) -> None:
        self.folder = Path(folder)
        classes = class_folders(class_names)
        self.names = [f"{classes[i % len(classes)]}/{i:07d}.png" for i in range(num_samples)]
        self._about = json.loads(json.dumps({"key": key}))
        if self._found() and not self._is_of_this_set():
            raise ValueError(f"images_dir: {self.folder} holds other images than would be written; move it away")

    def is_whole(self) -> bool:
        """Whether the folder holds the images of this set, and no others."""
        return self._found() == set(self.names)

    def keep(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, each written first; every rank writes its own. What a larger set had more is removed."""
        if rank_and_world()[0] == 0:
            for name in self._found() - set(self.names):
                (self.folder / name).unlink()
            write_json(self.folder / "about.json", self._about)
        barrier()
        for batch in batches:
            save_images(self.folder, self.names[batch.start : batch.start + len(batch.images)], batch.images)
            yield batch

    def _is_of_this_set(self) -> bool:
        try:
            return json.loads((self.folder / "about.json").read_text(encoding="utf-8")) == self._about
        except (OSError, ValueError):
            return False

    def _found(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.glob("*/" + 7 * "[0-9]" + ".png")}
