"""Drawn sets as PNG files, for other people's evaluators: images are on disk only where this is asked for.

This file owns the folder of one set; it never draws and never measures.

    about.json           everything that decides the images: weights, sampler, seed
    CLASS/IIIIIII.png    image i, in the folder of its class, i mod the number of classes
    images.npz           if it is asked for: all of them, as ADM's evaluator takes them
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from xdlm_image.data.image_batches import Batch
from xdlm_image.drawing.given_images import images_in_npz
from xdlm_image.drawing.pictures import class_folders, numbered_images, numbered_names, save_images
from xdlm_image.files import write_atomic, write_json
from xdlm_image.ranks import barrier, rank_and_world


class DrawnPictures:
    """The folder of a balanced set of drawn images.

    Args:
        folder: Made when images are kept.
        key: JSON that decides the images.
        num_samples: Images of the set.
        class_names: By class id; the folders are called as `class_folders` says. None of an unconditional pipeline:
            its images are in one folder, `images`, and have no labels.

    Raises:
        ValueError: The folder holds images of another set, or of somebody else.
    """

    def __init__(
        self, folder: str | Path, key: dict[str, Any], num_samples: int, class_names: Sequence[str] | None
    ) -> None:
        self.folder = Path(folder)
        classes = ["images"] if class_names is None else class_folders(class_names)
        self.npz = self.folder / "images.npz"
        self.labels = None if class_names is None else np.arange(num_samples) % len(classes)
        self.names = numbered_names(classes, (i % len(classes) for i in range(num_samples)))
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
            self.npz.unlink(missing_ok=True)
            write_json(self.folder / "about.json", self._about)
        barrier()
        for batch in batches:
            save_images(self.folder, self.names[batch.start : batch.start + len(batch.images)], batch.images)
            yield batch

    def pack(self) -> None:
        """Write `images.npz`, unless it is there: `arr_0` uint8 (N, S, S, C) in the set's order, `arr_1` class ids.

        The first rank reads an image at a time; the others wait.
        """
        barrier()  # until every rank has written its images
        if rank_and_world()[0] == 0 and not self._is_packed():
            write_atomic(self.npz, self._write_npz)
        barrier()

    def _is_packed(self) -> bool:
        found = images_in_npz(self.npz) if self.npz.is_file() else None
        return found is not None and found[0] == len(self.names)

    def _write_npz(self, path: Path) -> None:
        first = np.asarray(Image.open(self.folder / self.names[0]))
        shape = (len(self.names), *first.shape[:2], first.shape[2] if first.ndim == 3 else 1)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for name in tqdm(self.names, f"{self.folder.name}/images.npz", unit="image", leave=False, delay=5):
                    with Image.open(self.folder / name) as picture:
                        member.write(np.asarray(picture).tobytes())
            if self.labels is not None:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, self.labels, allow_pickle=False)

    def _is_of_this_set(self) -> bool:
        try:
            return json.loads((self.folder / "about.json").read_text(encoding="utf-8")) == self._about
        except (OSError, ValueError):
            return False

    def _found(self) -> set[str]:
        return numbered_images(self.folder)
