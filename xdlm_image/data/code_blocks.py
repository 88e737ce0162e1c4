"""Codes of a split while they are being made: blocks of images, each in a file of its own.

This file owns the folder `.SPLIT.blocks` beside the cache that is to be. A block file is there whole or not at all, so
that a killed run goes on with the blocks that are missing, on however many processes. It never runs a tokenizer.

    of.json           what the codes are of; blocks of anything else are thrown away
    000001000.npy     (b, views, h*w) codes of the block that begins with image 1,000
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xdlm_image.data.code_cache import BESIDES, Manifest
from xdlm_image.files import write_atomic, write_json

OF = "of.json"
WAITS = (0, 1, 2, 4, 8)  # seconds


class CodeBlocks:
    """The blocks of one cache.

    Args:
        cache: Folder of the cache that is to be.
        manifest: What it will hold.
        size: Images a block; the last may be smaller.
        key: What else decides the codes: blocks made with another are thrown away.
    """

    def __init__(self, cache: Path, manifest: Manifest, size: int, **key: object):
        self.folder = cache.with_name(f".{cache.name}.blocks")
        self.manifest = manifest
        self.size = size
        about = dataclasses.asdict(manifest)
        self.key = {name: about[name] for name in about if name not in BESIDES} | {"size": size} | key

    def begin(self) -> None:
        """Make the folder; blocks of anything else go. One process calls it, before the others look."""
        try:
            same = json.loads((self.folder / OF).read_text(encoding="utf-8")) == self.key
        except (OSError, ValueError):
            same = False
        if not same:
            self.remove()
            write_json(self.folder / OF, self.key)

    def missing(self) -> list[range]:
        """The blocks that are still to be made, as ranges of images."""
        return [block for block in self._all() if not self._file(block).is_file()]

    def write(self, block: range, codes: np.ndarray) -> None:
        """Keep a block: codes (b, views, h*w) in [0, num_codes)."""
        write_atomic(self._file(block), lambda path: np.save(path, codes.astype(self.manifest.dtype)))

    def read(self) -> Iterator[tuple[range, np.ndarray]]:
        """Every block in order, with its codes (b, views, h*w).

        Raises:
            ValueError: A file is damaged; it is removed, so that the next run makes it again.
            OSError: A file cannot be read, or is not there even seconds later.
        """
        tail = (self.manifest.num_views, math.prod(self.manifest.grid))
        for block in self._all():
            file = self._file(block)
            try:
                self._wait_for(file)
                codes = np.load(file, allow_pickle=False)
                if codes.shape != (len(block), *tail):
                    raise ValueError(f"it holds {codes.shape}")
            except (ValueError, EOFError) as error:
                file.unlink(missing_ok=True)
                raise ValueError(f"{file} is damaged ({error}): start again, and it is rebuilt") from error
            except OSError as error:
                raise OSError(
                    f"{file} cannot be read ({error}): start again, what is missing is rebuilt; output_dir must be "
                    "one folder that all nodes see"
                ) from error
            yield block, codes

    def remove(self) -> None:
        """Throw all blocks away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_for(self, file: Path) -> None:
        """A file that another node wrote may be seen late, where a file system remembers what was not there."""
        for seconds in WAITS:
            if file.exists():
                return
            time.sleep(seconds)
            os.listdir(self.folder)  # makes such a file system look again

    def _all(self) -> list[range]:
        total = self.manifest.num_images
        return [range(first, min(first + self.size, total)) for first in range(0, total, self.size)]

    def _file(self, block: range) -> Path:
        return self.folder / f"{block.start:09d}.npy"
