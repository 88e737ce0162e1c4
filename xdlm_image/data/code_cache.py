"""The code cache: every image of a split as codes, memory-mapped, with a manifest of what they are.

This file owns the format (`codes.bin`, `labels.bin`, `manifest.json`), its checks and its atomic writing. It never
runs a tokenizer (`tokenizer.encode` does) and never trains.

    codes.bin      (N, views, h*w) uint16 (int32 for 65,536 codes and more), raster order; view 1 is the mirrored image
    labels.bin     (N,) uint16 (int64 for 65,536 classes and more)
    manifest.json  everything needed to read the two, to know where they come from, and to tell damage
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xdlm_image.files import new_folder, sha256_of_file, write_json

if TYPE_CHECKING:
    from diffusers import VQModel

    from xdlm_image.data.images import ImageSet

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CODES, LABELS = "codes.bin", "labels.bin"
BESIDES = ("tokenizer", "checksums", "cut")  # fields of a manifest that do not tell which codes these are


@dataclass
class Manifest:
    """What a cache holds.

    Attributes:
        tokenizer_hash: `weights.weights_hash` of the tokenizer that made the codes.
        data_fingerprint: `ImageSet.fingerprint` of the images.
        split, image_size, channels, crop: How the images were opened.
        grid: Rows and columns of codes of an image.
        num_codes: Codebook size; every code is below it.
        num_images, num_views: N, and 1 (plain) or 2 (plain, mirrored).
        class_names: Name of each label.
        dtype, label_dtype: numpy names of the element types (little-endian).
        tokenizer: Where the tokenizer was, for people, and for who names none.
        checksums: File name -> sha256.
        cut: `ImageSet.cut`, for whether training and validation images are others; None in caches written before this
            field existed.
        schema_version: Of this format.
    """

    tokenizer_hash: str
    data_fingerprint: str
    split: str
    image_size: int
    channels: int
    crop: str
    grid: list[int]
    num_codes: int
    num_images: int
    num_views: int
    class_names: list[str]
    dtype: str
    label_dtype: str
    tokenizer: str = ""
    checksums: dict[str, str] = field(default_factory=dict)
    cut: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION


class CodeCache:
    """A cache on disk, opened for reading; see `open`.

    Attributes:
        codes: memmap (N, views, h*w), read-only.
        labels: memmap (N,), read-only.
        manifest: What it holds.
        path: Its folder.
    """

    def __init__(self, path: Path, manifest: Manifest, codes: np.memmap, labels: np.memmap):
        self.path = path
        self.manifest = manifest
        self.codes = codes
        self.labels = labels

    @classmethod
    def open(cls, path: str | os.PathLike, argument: str = "codes") -> CodeCache:
        """Open a cache; sizes are checked now, checksums by `verify`.

        Args:
            path: Its folder.
            argument: What the caller calls it, for errors.

        Raises:
            FileNotFoundError: No cache there.
            ValueError: Unknown schema version, damaged manifest, or a file of the wrong size.
        """
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            splits = sorted(str(file.parent) for file in folder.glob(f"*/{MANIFEST}"))
            remedy = f"name one of {splits}" if splits else "write one with encode"
            raise FileNotFoundError(f"{argument}={str(path)!r}: no code cache ({MANIFEST}) there; {remedy}")
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version = content["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{argument}={str(path)!r}: {MANIFEST} is damaged ({error!r}); encode again") from error
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{argument}={str(path)!r}: schema_version={version!r}, but this xdlm_image reads {SCHEMA_VERSION}; "
                "encode again, or use the version that wrote it"
            )
        try:
            manifest = Manifest(**content)
            shape = (manifest.num_images, manifest.num_views, math.prod(manifest.grid))
            code_type, label_type = np.dtype(manifest.dtype), np.dtype(manifest.label_dtype)
            codes = _map(folder / CODES, code_type, shape)
            labels = _map(folder / LABELS, label_type, shape[:1])
        except TypeError as error:  # fields missing or unknown, or of the wrong kind
            raise ValueError(f"{argument}={str(path)!r}: {MANIFEST} is damaged ({error}); encode again") from error
        return cls(folder, manifest, codes, labels)

    def __len__(self) -> int:
        return self.manifest.num_images

    def batch(
        self, indices: torch.Tensor | np.ndarray, flips: torch.Tensor | np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and labels of some images.

        Args:
            indices: (n,) ints in [0, N).
            flips: (n,) bools; True takes the mirrored view. None: plain views.

        Returns:
            codes (n, h*w) int64 and labels (n,) int64.

        Raises:
            IndexError: An index outside the cache.
            ValueError: A mirrored view of a cache that has none; a code outside the codebook (the file is damaged).
        """
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"indices run from {rows.min()} to {rows.max()}, but {self.path} holds {len(self)} images")
        views = np.zeros_like(rows) if flips is None else np.asarray(flips).astype(np.int64)
        if views.shape != rows.shape:
            raise ValueError(f"flips of shape {views.shape}: must be that of indices, {rows.shape}")
        if self.manifest.num_views == 1 and views.any():
            raise ValueError(f"flips: {self.path} holds plain views only; encode with flip: true")
        codes = torch.from_numpy(self.codes[rows, views].astype(np.int64))  # (n, L)
        labels = torch.from_numpy(self.labels[rows].astype(np.int64))  # (n,)
        _check_range(codes.numpy(), self.manifest.num_codes, "codes", f"{self.path / CODES} is damaged; encode again")
        _check_range(
            labels.numpy(), len(self.manifest.class_names), "labels", f"{self.path / LABELS} is damaged; encode again"
        )
        return codes, labels

    def check(self, tokenizer: VQModel | None = None, data: ImageSet | None = None) -> None:
        """Raise ValueError unless the cache was made by this tokenizer from these images."""
        held = self.manifest
        if tokenizer is not None:
            from xdlm_image.weights import weights_hash

            given = weights_hash(tokenizer)
            if given != held.tokenizer_hash:
                raise ValueError(
                    f"tokenizer: its hash is {given[:12]}, but the codes in {self.path} were made by "
                    f"{held.tokenizer_hash[:12]} ({held.tokenizer}): encode again, or name that tokenizer"
                )
        if data is not None:
            for name in ("split", "image_size", "channels", "crop"):
                if getattr(data, name) != getattr(held, name):
                    raise ValueError(
                        f"data.{name}={getattr(data, name)!r}, but {self.path} was encoded with "
                        f"{getattr(held, name)!r}: encode again, or set it to that"
                    )
            if data.fingerprint != held.data_fingerprint or data.class_names != held.class_names:
                raise ValueError(
                    f"data: these images ({data.fingerprint[:12]}) are not the ones {self.path} was encoded from "
                    f"({held.data_fingerprint[:12]}): files were added, changed or renamed; encode again"
                )

    def verify(self) -> None:
        """Read both files whole and compare their sha256 with the manifest; ValueError names the damaged file."""
        for name in (CODES, LABELS):
            found, wanted = sha256_of_file(self.path / name), self.manifest.checksums.get(name)
            if found != wanted:
                raise ValueError(
                    f"{self.path / name}: sha256 is {found[:12]}..., the manifest says {str(wanted)[:12]}...: the file "
                    "is damaged; encode again"
                )


def code_dtype(num_codes: int) -> np.dtype:
    """uint16 below 65,536 codes, else int32."""
    return np.dtype("<u2") if num_codes < 65_536 else np.dtype("<i4")


def write_code_cache(
    path: str | os.PathLike,
    manifest: Manifest,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    overwrite: bool = False,
) -> Path:
    """Write a cache whole or not at all: into a temporary folder beside it, then one rename.

    Args:
        path: Folder of the cache.
        manifest: What it will hold; `checksums` is filled in here.
        batches: (codes (b, views, h*w), labels (b,)) in order, N images in all.
        overwrite: Replace a cache that is there.

    Raises:
        FileExistsError: `path` exists and overwrite is False, or is something else than a cache.
        ValueError: A code or label out of range, a wrong shape, or another number of images than manifest.num_images.
    """
    final = Path(path)
    refuse_existing(final, overwrite)
    tail = (manifest.num_views, math.prod(manifest.grid))
    written = 0
    with new_folder(final) as partial:  # what is there, refuse_existing allowed to go
        with open(partial / CODES, "wb") as code_file, open(partial / LABELS, "wb") as label_file:
            for codes, labels in batches:
                codes, labels = np.asarray(codes), np.asarray(labels)
                if codes.shape[1:] != tail or codes.shape[:1] != labels.shape:
                    raise ValueError(f"codes of shape {codes.shape}, labels {labels.shape}: need {('b', *tail)}, (b,)")
                _check_range(codes, manifest.num_codes, "codes", "they are not from this tokenizer")
                _check_range(labels, len(manifest.class_names), "labels", "they are not of these classes")
                codes.astype(manifest.dtype).tofile(code_file)
                labels.astype(manifest.label_dtype).tofile(label_file)
                written += len(labels)
        if written != manifest.num_images:
            raise ValueError(f"num_images={manifest.num_images}, but {written} were written")
        checksums = {name: sha256_of_file(partial / name) for name in (CODES, LABELS)}
        write_json(partial / MANIFEST, dataclasses.asdict(dataclasses.replace(manifest, checksums=checksums)))
    return final


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError when `path` exists, unless it is a cache (or empty) and may be replaced."""
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists: set overwrite: true to replace it, or name another output_dir")
    if not path.is_dir() or (any(path.iterdir()) and not (path / MANIFEST).is_file()):
        raise FileExistsError(f"{path} is no code cache, so it is not overwritten: name another output_dir")


def _map(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    wanted = dtype.itemsize * math.prod(shape)
    found = file.stat().st_size if file.is_file() else None
    if found != wanted:
        what = "is missing" if found is None else f"has {found} bytes"
        raise ValueError(f"{file} {what}, but its manifest tells of {wanted}: the cache is damaged; encode again")
    return np.memmap(file, dtype=dtype, mode="r", shape=shape)


def _check_range(values: np.ndarray, end: int, name: str, remedy: str) -> None:
    if values.size and (values.min() < 0 or values.max() >= end):
        raise ValueError(f"{name} run from {values.min()} to {values.max()}, outside [0, {end}): {remedy}")
