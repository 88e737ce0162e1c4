"""Image sets that somebody else drew: a folder of image files, or an .npz as ADM's evaluator takes it.

This file owns finding them, reading them without a change of size, and what a reader of the numbers must know about
them. It never draws and never measures.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

from xdlm_image.data.folders import not_taken, walk
from xdlm_image.data.image_batches import NO_CLASS, Batch, blocks_of_rank
from xdlm_image.data.images import read_image
from xdlm_image.drawing.pictures import class_folders
from xdlm_image.files import sha256_of_file
from xdlm_image.pipelines.init_images import DECODING_ERRORS

LOSSY = (".jpg", ".jpeg", ".webp")
NAMED = 5  # strange class folders that a note names
BESIDE_IMAGES = {".json", ".npz", ".txt", ".csv", ".md"}  # what programs write about images


class GivenImages:
    """A set of images on disk, all of one size; batches come out as from a sampler.

    Args:
        path: Folder of image files (class folders below it give labels), or .npz with `arr_0` uint8 (N, H, W, C) and,
            if there are labels, `arr_1` integers (N,).
        channels: 1 or 3; grey files become three equal channels, colour ones are refused where 1 is wanted.
        image_size: Side in pixels that every image must have; None takes the first image's.
        class_names: Names of the class folders by id; without any, labels are left alone.

    Attributes:
        image_size: Side in pixels of every image.
        labels: (N,) int64, -1 where the class is not known.
        notes: What a reader of the numbers must know, without the folder: it stands in what is published.

    Raises:
        FileNotFoundError: Nothing there, or no image in it.
        ValueError: A single image, or an archive without such an array, or of another size or kind.
    """

    def __init__(self, path: str | Path, channels: int, image_size: int | None, class_names: list[str]) -> None:
        self.path = Path(path)
        self.channels, self.image_size = channels, image_size
        self.notes: list[str] = []
        self._files: list[Path] = []
        self._array: np.ndarray | None = None
        if self.path.is_file() and self.path.suffix == ".npz":
            self._open_npz(len(class_names))
        elif self.path.is_dir():
            self._open_folder(class_names)
        else:
            what = "neither a folder nor an .npz file" if self.path.exists() else "no such folder or .npz file"
            raise FileNotFoundError(f"images={str(path)!r}: {what}; docs/evaluation.md shows how to write one")
        if len(self) < 2:
            raise ValueError(f"images={str(path)!r}: a single image; distances need at least 2, and mean far more")

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's share, in order.

        Raises:
            ValueError: A file is broken, or its size is another; the message names it.
        """
        for block in blocks_of_rank(len(self), batch_size):
            if self._array is not None:
                pixels = torch.from_numpy(np.array(self._array[block.start : block.stop]))
                images = self._fitted(pixels.permute(0, 3, 1, 2), str(self.path))
            else:
                images = torch.stack([self._read(self._files[i]) for i in block])
            yield Batch(images, torch.from_numpy(self.labels[block.start : block.stop]), None, block.start)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the files' names and contents, or of the archive."""
        if self._array is not None:
            return sha256_of_file(self.path)
        digest = hashlib.sha256()
        for file in self._files:
            name = file.relative_to(self.path).as_posix()
            digest.update(f"{name}\0{sha256_of_file(file)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a protocol must record about it."""
        return {"path": str(self.path), "num_images": len(self), "fingerprint": self.fingerprint}

    # -- folders ------------------------------------------------------------------------------------------------------

    def _open_folder(self, class_names: list[str]) -> None:
        others: Counter[str] = Counter()
        walked = walk(str(self.path), "images", others)
        found = [Path(inner) / name for inner, _, names in walked for name in names]
        self._files = sorted(found, key=lambda p: (p.name, p))  # not class by class: Inception Score splits in order
        if not self._files:
            raise FileNotFoundError(f"images={str(self.path)!r}: no image file in it ({', '.join(IMG_EXTENSIONS)})")
        for file in self._files:
            if not file.is_file():
                raise FileNotFoundError(f"images={str(self.path)!r}: the link '{file}' leads nowhere; take it away")
        self._read(self._files[0])
        self._refuse_other_sizes()
        if strange := Counter({kind: count for kind, count in others.items() if kind not in BESIDE_IMAGES}):
            self.notes.append(not_taken("the folder", strange))
        ids = {name: i for names in (class_folders(class_names), class_names) for i, name in enumerate(names)}
        below = [file.relative_to(self.path).parts[0] for file in self._files]
        self.labels = np.array([ids.get(name, NO_CLASS) for name in below], dtype=np.int64)
        strangers = sorted({name for name in below if name not in ids and (self.path / name).is_dir()})
        if strangers and class_names:
            named = ", ".join(strangers[:NAMED]) + (", ..." if len(strangers) > NAMED else "")
            self.notes.append(
                f"{len(strangers)} of its folders are no class of the reference ({named}): no class "
                "accuracy is given for it"
            )
        loose = sum((self.path / name).is_file() for name in below)
        if class_names and 0 < loose < len(below):
            self.notes.append(f"{loose} of its images lie beside the class folders: no class accuracy is given for it")
        lossy = sum(file.suffix.lower() in LOSSY for file in self._files)
        if lossy:
            self.notes.append(
                f"{lossy} of {len(self)} files are JPEG or WebP, whose losses shift FID by more than "
                "models differ; store samples as PNG"
            )

    def _read(self, file: Path) -> torch.Tensor:
        pixels = tv.pil_to_tensor(read_image(str(file), 3))  # (3, H, W)
        return self._fitted(pixels[None], str(file))[0]

    def _refuse_other_sizes(self) -> None:
        """By the files' headers, before anything is measured; a file that is no image is named when it is read."""
        size = (self.image_size, self.image_size)
        for file in tqdm(self._files, f"sizes of {self.path.name}", unit="image", leave=False, delay=5):
            try:
                with Image.open(file) as image:
                    found = image.size
            except DECODING_ERRORS:
                continue
            if found != size:
                self._refuse_size(str(file), found[1], found[0])

    # -- npz ----------------------------------------------------------------------------------------------------------

    def _open_npz(self, num_classes: int) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
                if "arr_0.npy" not in names:
                    raise ValueError(f"it holds {', '.join(names) or 'nothing'} and no arr_0")
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"{broken} does not fit its checksum: the file is damaged")
                array = _open_member(self.path, archive.getinfo("arr_0.npy"))
            labels = None
            if "arr_1.npy" in names:
                with np.load(self.path, allow_pickle=False) as opened:
                    labels = opened["arr_1"]
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error, struct.error) as error:
            raise ValueError(f"images={str(self.path)!r}: cannot be read as ADM's .npz ({error})") from error
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or len(array) == 0:
            raise ValueError(
                f"images={str(self.path)!r}: arr_0 is {array.dtype} {array.shape}; expected uint8 (N, H, W, 3) or "
                "(N, H, W, 1), values 0 to 255"
            )
        self._array = array
        self._fitted(torch.from_numpy(np.array(array[:1])).permute(0, 3, 1, 2), str(self.path))
        self.labels = np.full(len(array), NO_CLASS, dtype=np.int64)
        if labels is not None and num_classes > 0:
            if labels.shape != (len(array),) or labels.dtype.kind not in "iu":
                raise ValueError(
                    f"images={str(self.path)!r}: arr_1 is {labels.dtype} {labels.shape}, no labels of arr_0"
                )
            if labels.min() < 0 or labels.max() >= num_classes:
                raise ValueError(
                    f"images={str(self.path)!r}: labels from {labels.min()} to {labels.max()}, the reference has "
                    f"{num_classes} classes: number them as its class folders are sorted, or leave arr_1 out"
                )
            self.labels = labels.astype(np.int64)

    # -- both ---------------------------------------------------------------------------------------------------------

    def _fitted(self, images: torch.Tensor, name: str) -> torch.Tensor:
        """Refuse another size; grey to colour (B, C, S, S)."""
        if self.image_size is None:
            self.image_size = int(images.shape[-2])
        size = (self.image_size, self.image_size)
        if tuple(images.shape[-2:]) != size:
            self._refuse_size(name, *images.shape[-2:])
        if images.shape[1] == 3 and self.channels == 1:
            if not torch.equal(images[:, :1].expand_as(images), images):
                raise ValueError(
                    f"images: {name} is in colour, the reference grey; make them grey, or take one in colour"
                )
            return images[:, :1].contiguous()
        return images.expand(-1, self.channels, -1, -1).contiguous()

    def _refuse_size(self, name: str, height: int, width: int) -> None:
        raise ValueError(
            f"images: {name} has {height} x {width} pixels, the reference {self.image_size} x {self.image_size}; "
            "samples are never resized here: take a reference of their size, or resize them as their authors say"
        )


def images_in_npz(path: Path) -> tuple[int, int] | None:
    """(number, side in pixels) of the images in ADM's .npz; None where it holds none, or is no .npz."""
    if path.suffix != ".npz":
        return None
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            return None
        shape = _open_member(path, archive.getinfo("arr_0.npy")).shape
    return (shape[0], shape[1]) if len(shape) == 4 else None


def _open_member(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of an .npz: memory-mapped where it is stored as it is (np.savez), else read (np.savez_compressed)."""
    if member.compress_type != zipfile.ZIP_STORED:
        with np.load(path, allow_pickle=False) as opened:
            return opened[member.filename.removesuffix(".npy")]
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", file.read(30))
        file.seek(member.header_offset + 30 + name_length + extra_length)
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"format version {version} of an array")
        shape, fortran, dtype = read_header[version](file)
        if dtype.hasobject or fortran:
            raise ValueError("an array of objects, or in Fortran's order")
        return np.memmap(path, dtype, "r", offset=file.tell(), shape=shape)
