"""The codes of a set of drawn images, on disk: what a killed sweep keeps, and what another metric later reads.

This file owns the folder of one set; it never draws and never decodes.

    about.json    everything that decides the codes: weights, sampler, seed; and the starts that drew
    codes.bin     (N, h, w) uint16 (int32 for 65,536 codes and more)
    starts.bin    (N,) uint16, which start drew the image, from 1 on; 0 where it is not known
    seconds.bin   (N,) float32, seconds that an image took; 0 where it is still to be drawn

Sets grow: image i is the same in a set of 1,000 and in one of 5,000. Several processes write at once, each its own
images; codes are on disk before the seconds that say so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdlm_image.data.code_cache import code_dtype
from xdlm_image.files import write_json
from xdlm_image.ranks import barrier, rank_and_world


class DrawnCodes:
    """One set of drawn images, opened for reading and writing.

    Args:
        folder: Made if it is not there.
        key: JSON that decides the codes.
        num_samples: Images N wanted; more may be there.
        grid: Rows and columns h, w of codes.
        num_codes: Codebook size.
        now: JSON that says who draws what is still missing.

    Raises:
        ValueError: The folder holds another set, or damaged files.
        OSError: There is no room for the codes.
    """

    def __init__(
        self,
        folder: str | Path,
        key: dict[str, Any],
        num_samples: int,
        grid: tuple[int, int],
        num_codes: int,
        now: dict[str, Any],
    ) -> None:
        self.folder = Path(folder)
        self.num_samples = num_samples
        self.num_codes = num_codes
        self._shape, self._dtype = (num_samples, *grid), code_dtype(num_codes)
        if rank_and_world()[0] == 0:
            self._prepare({"key": key, "grid": list(grid), "dtype": self._dtype.str}, now)
        barrier()
        self._known_starts = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))["drawn_by"]
        self._start = self._known_starts.index(now) + 1 if now in self._known_starts else 0  # 0: all are there
        self._codes = np.memmap(self.folder / "codes.bin", self._dtype, "r+", shape=self._shape)
        self._starts = np.memmap(self.folder / "starts.bin", "<u2", "r+", shape=num_samples)
        self._seconds = np.memmap(self.folder / "seconds.bin", "<f4", "r+", shape=num_samples)

    def _prepare(self, about: dict[str, Any], now: dict[str, Any]) -> None:
        """Write what is missing; make the files long enough (what is not written reads as 0)."""
        path = self.folder / "about.json"
        drawn_by: list[dict[str, Any]] = []
        if path.is_file():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: damaged ({error}); remove the folder") from error
            drawn_by = held.pop("drawn_by", [])
            if held != json.loads(json.dumps(about)):
                raise ValueError(f"{self.folder}: holds the codes of another set of images; remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        # bytes an image; codes grow first, so that seconds never tell of codes that are not there
        items = {"codes.bin": int(np.prod(self._shape[1:])) * self._dtype.itemsize, "starts.bin": 2, "seconds.bin": 4}
        whole = {}  # images; a start that was killed while a file grew leaves a part of one
        for name, item in items.items():
            (self.folder / name).touch()
            whole[name] = (self.folder / name).stat().st_size // item
        if whole["codes.bin"] < whole["seconds.bin"]:
            raise ValueError(f"{self.folder}: codes.bin was cut off: damaged; remove the folder")
        for name, item in items.items():
            if whole[name] < self.num_samples:
                os.truncate(self.folder / name, whole[name] * item)
                self._grow(self.folder / name, self.num_samples * item)
        is_whole = (np.fromfile(self.folder / "seconds.bin", "<f4", self.num_samples) > 0).all()
        if not is_whole and now not in drawn_by:
            drawn_by.append(now)
        write_json(path, {**about, "drawn_by": drawn_by})

    def _grow(self, file: Path, size: int) -> None:
        """Zeros up to `size`, written: a hole that no room is left for would end the process when it is filled."""
        before = file.stat().st_size
        try:
            with open(file, "ab") as opened:
                for start in range(before, size, 1 << 20):
                    opened.write(bytes(min(1 << 20, size - start)))
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            os.truncate(file, before)
            raise OSError(
                f"{file}: no room for the codes of {self.num_samples} images ({error}); free some, or name another "
                "output_dir"
            ) from error

    def is_drawn(self, start: int, stop: int) -> bool:
        """Whether all images from `start` up to `stop` are there."""
        return bool((self._seconds[start:stop] > 0).all())

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Codes (B, h, w) int64 of images `start` up to `stop`, which are there."""
        codes = torch.from_numpy(self._codes[start:stop].astype(np.int64))
        if codes.numel() and int(codes.max()) >= self.num_codes:
            raise ValueError(f"{self.folder}: an id is {codes.max()}, of {self.num_codes} codes: damaged; remove it")
        return codes

    def write(self, start: int, codes: torch.Tensor, seconds: float) -> None:
        """Keep codes (B, h, w) of the images from `start` on, each of which took `seconds`."""
        stop = start + len(codes)
        self._codes[start:stop] = codes.cpu().numpy().astype(self._dtype)
        self._codes.flush()
        self._starts[start:stop] = self._start
        self._starts.flush()
        self._seconds[start:stop] = max(seconds, 1e-9)
        self._seconds.flush()

    @property
    def drawn_by(self) -> list[dict[str, Any]]:
        """The `now` of each start that drew some of the images, the one that drew most of them first.

        Empty of a set that was drawn before this was kept.
        """
        counts = np.bincount(self._starts, minlength=len(self._known_starts) + 1)[1:]
        found = [(count, start) for count, start in zip(counts, self._known_starts) if count]
        return [start for _, start in sorted(found, key=lambda pair: -pair[0])]

    @property
    def seconds(self) -> float:
        """Seconds that all images took, over every process and every start."""
        return float(self._seconds.sum(dtype=np.float64))

    @property
    def usual_seconds(self) -> float:
        """Median of the seconds that an image took: a pause, or a first batch that was compiled, is not in it."""
        return float(np.median(self._seconds))
