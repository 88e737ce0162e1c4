"""One pass over all files of an image set before expensive work, so that broken ones are known at once.

This file owns the pass and the memory of sets that passed (small files in `~/.cache/xdlm_image/checked`, named after
what the images are and when they were written). What makes a file broken is decided in `images`. It never changes an
image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from xdlm_image.data.images import ImageSet, check_image
from xdlm_image.files import write_json
from xdlm_image.processes import process_state

NAMED = 10  # broken files that the error names


def check_images(images: ImageSet, num_workers: int = 0, places: Sequence[int] | None = None) -> None:
    """Decode every file of `images` once, unless this very set has passed before; arrays need no check.

    Several processes (`accelerate launch`, torchrun) share the files, and all raise when one finds something.

    Args:
        images: From `open_images`.
        num_workers: Threads that decode (they wait for no lock while they do); 0 is one.
        places: Of the images that are wanted; None is all.

    Raises:
        ValueError: Some files cannot be read; it tells how many and names the first ten with their faults.
    """
    paths = images.paths
    if not paths:
        return
    processes = process_state()
    rank, world = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    notes = [_note_of(images, paths)]
    if places is not None:
        if len(places) == 0:
            return
        paths = [paths[i] for i in places]
        notes.append(_note_of(images, paths))
    if any(all(_over_ranks(_exists(note), world)) for note in notes):
        return
    mine = paths[rank::world]
    broken: list[tuple[str, str]] = []  # (path, fault)
    small, least = 0, images.image_size  # images that are enlarged, and the shortest side
    with ThreadPool(max(1, num_workers)) as pool:
        found = pool.imap_unordered(_fault, mine, chunksize=32)
        for path, side, fault in tqdm(
            found, f"checking the files of {images.split}", len(mine), unit="image", disable=rank != 0, mininterval=1
        ):
            if fault is not None:
                broken.append((path, fault))
            elif side < images.image_size:
                small, least = small + 1, min(least, side)
    counts, sides = zip(*_over_ranks((small, least), world))
    broken = sorted(item for part in _over_ranks(broken, world) for item in part)
    if broken:
        faults = "\n  ".join(fault for _, fault in broken[:NAMED])
        more = f"\n  and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise ValueError(f"data: {len(broken)} of {len(paths)} files of {images.split} are broken:\n  {faults}{more}")
    if rank == 0:
        if sum(counts):
            tqdm.write(
                f"note: {sum(counts)} of {len(paths)} images of {images.split} are smaller than {images.image_size} x "
                f"{images.image_size} pixels, down to {min(sides)}, and are enlarged"
            )
        try:
            write_json(notes[-1], {"images": len(paths), "first": paths[0]})
        except OSError as error:
            tqdm.write(f"note: {notes[-1]} cannot be written ({error}); the next run checks these files again")


def _fault(path: str) -> tuple[str, int, str | None]:
    """The path, the shorter side in pixels, and what is wrong with the file."""
    try:
        return path, check_image(path), None
    except ValueError as error:
        return path, 0, str(error)


def _note_of(images: ImageSet, paths: list[str]) -> Path:
    """File that says that these images, at this place and as they were last written, have passed."""
    name = hashlib.sha256(
        f"{images.fingerprint}\0{images.touched}\0{os.path.abspath(paths[0])}".encode(errors="surrogateescape")
    )
    if len(paths) < len(images.paths):
        name.update("\0".join(paths).encode(errors="surrogateescape"))
    return Path.home() / ".cache" / "xdlm_image" / "checked" / f"{name.hexdigest()[:32]}.json"


def _exists(note: Path) -> bool:
    try:
        return note.is_file()
    except OSError:  # a folder above it may not be read
        return False


def _over_ranks(value, world: int) -> list:
    """The value of each rank, on every rank."""
    if world == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
