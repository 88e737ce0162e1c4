"""Reference statistics that others published: ADM's .npz, and .npz or .pt files of a mean and a covariance.

This file owns their formats, which it reads as untrusted data, and what is known of the best-known ones. What a file is
of does not stand in it; its SHA-256 goes into the protocol.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from xdlm_image.data.images import UINT8_RULE
from xdlm_image.evaluation.measuring import Measured
from xdlm_image.evaluation.references import Reference
from xdlm_image.features.extractor import FeatureExtractor
from xdlm_image.features.statistics import StreamedStatistics
from xdlm_image.files import sha256_of_file
from xdlm_image.processes import main_process_first

# names of (mean, covariance) in files seen in the wild -> Inception's layer
NAMES = {("mu", "sigma"): "2048", ("mu_s", "sigma_s"): "spatial"}
UNKNOWN_COUNT = 50_000  # the files do not say of how many images; it cancels in FID
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "xdlm_image" / "references"


@dataclass(frozen=True)
class KnownFile:
    """A file of statistics that many papers use.

    Attributes:
        file: Its name.
        url: Where it comes from.
        digest: `sha256:...` of it, or `git:...`, the id that git gives its content.
        image_size: Side in pixels of the images that it is of.
        about: What they are.
    """

    file: str
    url: str
    digest: str
    image_size: int
    about: str


KNOWN = {
    "adm-imagenet-256": KnownFile(
        "VIRTUAL_imagenet256_labeled.npz",
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
        "VIRTUAL_imagenet256_labeled.npz",
        "sha256:b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
        256,
        "ImageNet training images, resized and cropped as ADM does (arXiv 2105.05233); with 10,000 of the images",
    ),
    "mar-imagenet-256": KnownFile(
        "adm_in256_stats.npz",
        "https://raw.githubusercontent.com/LTH14/mar/main/fid_stats/adm_in256_stats.npz",
        "git:1da4c17607fe959d54999fd098105649a0c05e15",
        256,
        "ImageNet training images, resized and cropped as ADM does, seen by torch-fidelity's Inception (MAR, arXiv "
        "2406.11838)",
    ),
}


class FoundFile(NamedTuple):
    """A file of statistics on disk: its SHA-256, and what is known of it."""

    path: Path
    sha256: str
    known: KnownFile | None


def find_reference_file(reference: str) -> FoundFile:
    """The file that `reference` names, by its path or by a key of `KNOWN`; read once for its hash.

    A known file is taken from `~/.cache/xdlm_image/references`, or fetched there once.

    Raises:
        FileNotFoundError: No such file.
        OSError: It cannot be fetched.
        ValueError: The file under a known name has another content.
    """
    if reference in KNOWN:
        known = KNOWN[reference]
        path = CACHE / known.file
        with main_process_first():
            if not path.is_file():
                _fetch(known, path)
        sha256 = sha256_of_file(path)
        if not _is(known, path, sha256):
            raise ValueError(f"reference={reference!r}: {path} is not the file of {known.digest}; remove it")
        return FoundFile(path, sha256, known)
    path = Path(reference)
    if not path.is_file():
        raise FileNotFoundError(f"reference={reference!r}: no such file; by name are known {', '.join(KNOWN)}")
    sha256 = sha256_of_file(path)
    of_this_name = [known for known in KNOWN.values() if known.file == path.name]
    return FoundFile(path, sha256, next((known for known in of_this_name if _is(known, path, sha256)), None))


def is_reference_file(reference: str) -> bool:
    """Whether `reference` names a file of statistics, and not a folder of the verb `reference`."""
    return reference in KNOWN or Path(reference).suffix in (".npz", ".pt", ".pth")


def open_reference_file(reference: str, extractor: FeatureExtractor) -> tuple[Reference, Path]:
    """Statistics of a file as a reference: of Inception's layers, without floors; and where the file is.

    Raises:
        FileNotFoundError, OSError: As `find_reference_file`.
        ValueError: Another extractor than Inception, statistics of another width, or no such file.
    """
    if not (extractor.is_inception or extractor.unreleased):
        raise ValueError(
            f"reference={reference!r}: published statistics are of Inception, the extractor is {extractor.name}; set "
            "extractor: inception (first in a list), or make a reference folder with `xdlm-image reference`"
        )
    path, digest, known = find_reference_file(reference)
    statistics = {layer: found for layer, found in read_moments(path).items() if layer in extractor.feature_dims}
    for layer, found in statistics.items():
        if found.dim != extractor.feature_dims[layer]:
            raise ValueError(
                f"reference={reference!r}: its {layer!r} has {found.dim} features, {extractor.name} "
                f"{extractor.feature_dims[layer]}"
            )
    about: dict[str, Any] = {
        "images": {
            "name": path.name if known is None else known.about,
            "url": None if known is None else known.url,
            "fingerprint": digest,
            "split": None,
            "num_images": None,
            "image_size": None if known is None else known.image_size,
            "channels": 3,
            "crop": None,
            "uint8_rule": UINT8_RULE,
        },
        "class_accuracy": None,
        "train": {"images": None, "floors": {}},
        "reconstructions": {},
    }
    measured = Measured(statistics, None, None, dict.fromkeys(statistics, digest))
    return Reference(about, measured, {}), path


def _fetch(known: KnownFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = known.digest.removeprefix("sha256:") if known.digest.startswith("sha256:") else None
    try:
        torch.hub.download_url_to_file(known.url, str(path), hash_prefix=prefix)
    except Exception as error:  # urllib, SSL, RuntimeError on a wrong hash: the remedy is the same
        raise OSError(f"reference: {known.url} cannot be fetched ({error}); put the file at {path}") from error


def _is(known: KnownFile, path: Path, sha256: str) -> bool:
    kind, _, wanted = known.digest.partition(":")
    if kind == "sha256":
        return sha256 == wanted
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest() == wanted


def read_moments(path: str | Path) -> dict[str, StreamedStatistics]:
    """Layer -> statistics from a file with `mu` and `sigma`, and where it is ADM's also `mu_s` and `sigma_s` (sFID).

    Args:
        path: .npz (numpy arrays), or .pt / .pth (a dict of tensors, loaded with weights_only=True).

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another kind of file, damaged, or without such arrays; or they are no mean and covariance.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"reference={str(path)!r}: no such file")
    try:
        found = _arrays(path)
    except (ValueError, OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"reference={str(path)!r}: cannot be read as a file of statistics ({error})") from error
    statistics = {}
    for (mean, covariance), layer in NAMES.items():
        if mean in found and covariance in found:
            statistics[layer] = _statistics(path, mean, found[mean], covariance, found[covariance])
    if "2048" not in statistics:
        held = ", ".join(sorted(found)) or "nothing"
        raise ValueError(f"reference={str(path)!r}: holds {held}; expected mu and sigma of Inception's 2048 features")
    return statistics


def _arrays(path: Path) -> dict[str, Any]:
    wanted = {name for pair in NAMES for name in pair}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as opened:  # images (ADM's arr_0) are not touched
            return {name: opened[name] if name in wanted else None for name in opened.files}
    if path.suffix in (".pt", ".pth"):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's advice is to run the file
            raise ValueError("more is in it than tensors, numpy arrays perhaps; save tensors, or an .npz") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"a {type(loaded).__name__}, no dict")
        return {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    raise ValueError(f"{path.suffix or 'no suffix'}: .npz, .pt and .pth are known; pickles are not opened")


def _statistics(path: Path, mean_name: str, mean: Any, covariance_name: str, covariance: Any) -> StreamedStatistics:
    mu, sigma = (torch.as_tensor(value).to(torch.float64) for value in (mean, covariance))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"reference={str(path)!r}: {mean_name} has shape {tuple(mu.shape)} and {covariance_name} "
            f"{tuple(sigma.shape)}; expected (D,) and (D, D)"
        )
    largest = float(sigma.abs().max())
    if not (torch.isfinite(mu).all() and torch.isfinite(sigma).all()) or not torch.allclose(
        sigma, sigma.T, atol=1e-6 * largest
    ):
        raise ValueError(f"reference={str(path)!r}: {covariance_name} is no covariance (not finite, or not symmetric)")
    eigenvalues = torch.linalg.eigvalsh(sigma)  # ascending
    if eigenvalues[0] < -1e-6 * eigenvalues[-1].abs():
        raise ValueError(
            f"reference={str(path)!r}: {covariance_name} is no covariance (its eigenvalues go from "
            f"{eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}; none may be negative)"
        )
    statistics = StreamedStatistics(len(mu))
    statistics.count = UNKNOWN_COUNT
    statistics.mean, statistics.scatter = mu, sigma * (UNKNOWN_COUNT - 1)
    return statistics
