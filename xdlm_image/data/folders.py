"""Which files of a folder of images are of which class and which split.

This file owns the rules of class folders and of splits, and the fingerprint of what a split holds. It never opens an
image.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from xdlm_image.recipes import DataOptions

VALIDATION_FRACTION = DataOptions().validation_fraction
TEST_FRACTION = 0.05  # of a folder that has no test images of its own
LIKE_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
SHARE_OF = {"validation": "validation (data.validation_fraction)", "test": "test"}
TAKEN = " ".join(IMG_EXTENSIONS)
ONE_CLASS = "images"  # name of the class of images that lie in no class folder


@dataclass(frozen=True)
class FolderSplit:
    """One split of a folder: N images.

    Attributes:
        paths: The files.
        labels: int64 (N,).
        class_names: Name of each label.
        fingerprint: sha256 over file names, sizes and the split.
        touched: sha256 over when each file was last written.
        cut: Share of each split that was cut off the training images, and as `of` the sha256 of their names, whatever
            their cut; empty where nothing was cut.
    """

    paths: list[str]
    labels: np.ndarray
    class_names: list[str]
    fingerprint: str
    touched: str
    cut: dict[str, Any]


def find_split(data: DataOptions, split: str) -> FolderSplit:
    """The images of one split, by the rules of `images.open_images`; a line says how many there are, and why.

    Raises:
        ValueError, FileNotFoundError: As `open_images`.
    """
    assert data.root is not None  # DataOptions checked
    root = Path(data.root).expanduser()
    if not root.is_dir():
        what = "a file, not a folder" if root.exists() else "no such folder"
        raise FileNotFoundError(f"data.root={data.root!r}: {what}; name a folder of class folders, or of images")
    train = root / "train" if (root / "train").is_dir() else root
    _refuse_other_splits(data.root, root)
    own = {"validation": _first_folder(root, "val", "validation"), "test": _first_folder(root, "test")}
    if train == root:  # flat: nothing but class folders, whatever they are called
        own = {"validation": None, "test": None}
    elif own["test"] is None and own["validation"] is not None:
        own = {"validation": None, "test": own["validation"]}
    cut = {} if own["validation"] is not None else {"validation": data.validation_fraction}
    if own["test"] is None:
        cut["test"] = TEST_FRACTION
    if data.validation_fraction != VALIDATION_FRACTION and "validation" not in cut:
        raise ValueError(
            f"data.validation_fraction={data.validation_fraction}: {root} has folders for validation and test, so "
            "nothing is cut off; leave it out"
        )
    if cut.get(split) == 0:
        raise ValueError(
            f"data.validation_fraction=0: there is no {split} split of {root}, as nothing is cut off for it; leave the "
            "split out, or set a fraction"
        )

    names, samples = _list_folder(train)
    folder = train
    why = str(train)
    how: dict[str, Any] = {}
    if split != "train" and split not in cut:
        folder = own[split] or train
        why = str(folder)
        own_names, samples = _list_folder(folder)
        if own_names != names:
            odd = sorted(set(names) ^ set(own_names))
            raise ValueError(f"data.root={data.root!r}: {folder.name} and {train.name} differ in the classes {odd[:5]}")
    elif cut:
        all_of_train = len(samples)
        files = "\n".join(_below(train, path) for path, _ in samples)
        how = {"of": hashlib.sha256(files.encode(errors="surrogateescape")).hexdigest()} | cut
        if any(cut.values()):
            samples = [s for s in samples if hashed_split(_below(train, s[0]), cut) == split]
        if shares := " and ".join(f"{100 * share:.3g} % for {SHARE_OF[name]}" for name, share in cut.items() if share):
            why = f"{all_of_train:,} in {train}, cut by file name: {shares}"
        bare = sorted(set(range(len(names))) - {label for _, label in samples})
        if split == "train" and samples and bare:
            _say_once(
                f"note: no image of {len(bare)} of {len(names)} classes is left to train on ("
                f"{', '.join(names[label] for label in bare[:5])}{', ...' * (len(bare) > 5)}), since they have so few: "
                "add images, or make the folders train, val and test yourself"
            )
    if not samples:
        more = "raise data.validation_fraction (alike in every verb), " if split == "validation" else ""
        raise ValueError(
            f"data.root={data.root!r}: the split {split!r} is empty: cut by file name, {100 * cut.get(split, 1):.3g} % "
            f"of so few images came to none; add images, make the folders train, val and test yourself, {more}or leave "
            "the split out where splits are named"
        )
    digest, touched = hashlib.sha256(f"folder {split}\n".encode()), hashlib.sha256()
    slow = len(samples) > 100_000
    for path, _ in tqdm(samples, desc=f"fingerprint of {split}", unit="image", disable=not slow):
        try:
            status = os.stat(path)
            size, time = status.st_size, status.st_mtime_ns
        except OSError:  # a dangling link: reading it names the file
            size = time = -1
        relative = _below(folder, path).replace(os.sep, "/")
        digest.update(f"{relative}\0{size}\n".encode(errors="surrogateescape"))
        touched.update(f"{time}\n".encode())
    labels = np.array([label for _, label in samples], dtype=np.int64)
    paths = [path for path, _ in samples]
    kinds = f"{len(names)} class{'es' * (len(names) > 1)}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
    _say_once(f"{split}: {len(samples):,} images of {why}; {kinds}")
    return FolderSplit(paths, labels, names, digest.hexdigest(), touched.hexdigest(), how)


def _refuse_other_splits(given: str, root: Path) -> None:
    """Raise ValueError at folders that are called like splits and would be taken for classes, or for nothing."""
    names = set(next(walk(str(root)))[1])
    splits = {name for name in names if name.lower() in LIKE_SPLITS}
    if "train" in names:
        taken = {"train", "test", "val" if "val" in names else "validation"}
        if odd := sorted(splits - taken):
            raise ValueError(
                f"data.root={given!r}: the folder {odd[0]!r} beside 'train' would not be taken; call the folders of "
                "splits train, val and test, and move any other away"
            )
    elif names and names == splits:
        raise ValueError(
            f"data.root={given!r}: its folders {sorted(names)} are called like splits, and none is 'train'; call that "
            "of the training images train (the others val and test), or name a folder of class folders"
        )


def _below(folder: Path, path: str) -> str:
    """The name below `folder` of a path that `walk` made of it."""
    return path.removeprefix(os.path.join(folder, ""))


def _first_folder(root: Path, *names: str) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _list_folder(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names and (path, label) of a folder of class folders, in torchvision's order (sorted names).

    Images that lie in the folder itself, beside no other folder, are one class.
    """
    others: Counter[str] = Counter()
    root, names, files = next(walk(str(folder), others=others))
    if names:
        others.clear()  # lists and the like, beside the class folders
    if not names and files:
        _tell_of_others(folder, others)
        return [ONE_CLASS], [(os.path.join(root, name), 0) for name in sorted(files)]
    samples = [
        (os.path.join(inner, name), label)
        for label, folder_name in enumerate(names)
        for inner, _, files_there in sorted(walk(os.path.join(root, folder_name), others=others))
        for name in sorted(files_there)
    ]
    hollow = [names[label] for label in sorted(set(range(len(names))) - {label for _, label in samples})]
    if hollow or not names:
        found = f"no images in {', '.join(hollow[:5])}" if hollow else "no folders in it"
        found += f"; files of other kinds are {_kinds(others)}; {TAKEN} are taken" if others else ""
        raise ValueError(
            f"data.root: {folder} is no folder of class folders with images ({found}); put the images of each class "
            "into a folder of its name there, or loose ones of one class (for Fashion-MNIST set data.name: "
            "fashion-mnist)"
        )
    _tell_of_others(folder, others)
    below = {os.path.dirname(path) for path, _ in samples} if len(names) == 1 else set()
    if below and (common := os.path.commonpath(below)) not in below:
        _say_once(f"note: the {len(below)} folders in {common} are one class, {names[0]!r}; if each is one, name that")
    if files:
        _say_once(f"note: {len(files):,} images beside the class folders of {folder} are of no class and not taken")
    return names, samples


def not_taken(folder: Path | str, others: Counter[str]) -> str:
    """What is said of files in a folder that are no images."""
    return f"files of other kinds in {folder} are not taken ({_kinds(others)}); {TAKEN} are"


def _kinds(others: Counter[str]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in others.most_common(5)) + ", ..." * (len(others) > 5)


def _tell_of_others(folder: Path, others: Counter[str]) -> None:
    if others:
        _say_once(f"note: {not_taken(folder, others)}")


def walk(
    top: str, argument: str = "data.root", others: Counter[str] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` through links: sorted folders and images, without what systems and programs hide among them.

    Args:
        top: A folder.
        argument: What the caller calls it, for errors.
        others: Where files that are no images are counted, by suffix.

    Raises:
        ValueError: A folder cannot be listed; or a link leads to one above itself, where it would be met again and
            again.
    """

    def not_listed(error: OSError) -> None:
        raise ValueError(
            f"{argument}: the folder {error.filename} cannot be listed ({error.strerror}), and its images would be "
            "left out; make it readable, or take it away"
        ) from error

    for root, folders, files in os.walk(top, onerror=not_listed, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for link in filter(os.path.islink, (os.path.join(root, name) for name in folders)):
            target = os.path.realpath(link)
            if target in map(os.path.realpath, Path(os.path.abspath(link)).parents):
                raise ValueError(
                    f"{argument}: the link {link} leads to {target}, above itself, so that every image there would "
                    "come again and again; take the link away"
                )
        shown = [name for name in files if not is_hidden(name)]
        images = [name for name in shown if name.lower().endswith(IMG_EXTENSIONS)]
        if others is not None:
            others.update(Path(name).suffix.lower() or name for name in set(shown) - set(images))
        yield root, folders, images


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no user's: `.ipynb_checkpoints`, `._0.jpg`, previews of archives and NAS."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def hashed_split(name: str, cut: dict[str, float]) -> str:
    """The split of a file, by a hash of class folder and file name: a split in `cut` gets its share, the rest trains.

    Places in [0, 1): test has [0.05, 0.1) whatever validation has; validation has its share downwards from 0.05, and
    further from 1, so that a larger share holds a smaller one.
    """
    digest = hashlib.sha256(name.replace(os.sep, "/").encode(errors="surrogateescape")).digest()
    place = int.from_bytes(digest[:8], "big")  # uniform over [0, 2^64)
    twentieth = -(-(2**64) // 20)
    if "test" in cut and twentieth <= place < -(-(2**64) // 10):
        return "test"
    is_validation = (twentieth - 1 - place) % 2**64 < _of_64_bits(cut.get("validation", 0))
    return "validation" if is_validation else "train"


@cache
def _of_64_bits(share: float) -> int:
    return round(Fraction(str(share)) * 2**64)


@cache
def _say_once(text: str) -> None:
    """One line, from one process, however often images are opened."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(text, file=sys.stderr)
