"""Writing files so that a killed process leaves either the old file or the whole new one.

This file owns temporary names, the final `os.replace` and SHA-256 of files; it never knows what is inside.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary path beside path)`, then move the result to `path`; the suffix is kept.

    Whatever `write` leaves behind when it fails is removed, and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows: safetensors would leave it readable to its owner only
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def new_folder(final: str | Path) -> Iterator[Path]:
    """An empty folder to write into, beside `final`; in the end it takes its place, on failure it is removed.

    What a process left that was killed here is tidied up first. One process at a time writes a folder.
    """
    final = Path(final)
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _put_back(final)
    try:
        partial.mkdir(parents=True)
        yield partial
        replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, final: Path) -> None:
    """Move the whole new folder `partial` to `final`; what was there goes only when the new one stands.

    Stopped between the two, what was there comes back; killed there, with the next call, or the next `new_folder`. Of a
    link the link alone goes; the folder it leads to stays.
    """
    share_permissions(partial)
    _put_back(final)
    try:
        if final.is_symlink():
            final.unlink()
        elif final.exists():
            os.replace(final, _old(final))
        os.replace(partial, final)
    finally:
        _put_back(final)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _put_back(final: Path) -> None:
    """What had to make room comes back where nothing took its place, else it goes."""
    if _old(final).exists() and not os.path.lexists(final):
        os.replace(_old(final), final)
    shutil.rmtree(_old(final), ignore_errors=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON atomically; keys stay in the order given. Raises ValueError on NaN and infinities."""
    return write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def sha256_of_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share_permissions(folder: str | Path) -> None:
    """Give every file below `folder` the permissions that the umask allows to a new file.

    safetensors, and so `save_pretrained`, writes files that only their owner may read. No permission is taken away;
    links are left alone.
    """
    folder = Path(folder)
    probe = folder / f".permissions.{os.getpid()}"
    probe.touch()
    allowed = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode | allowed != mode:
            path.chmod(mode | allowed)


def refuse_unwritable(folder: str | Path, argument: str) -> None:
    """Make `folder` and try to write into it, before work that would be lost. Raises OSError naming `argument`."""
    folder = Path(folder)
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{argument}={str(folder)!r}: cannot be written to ({error}); name another folder") from error
