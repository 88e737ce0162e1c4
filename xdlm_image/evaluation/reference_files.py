"""Reference statistics that others published: ADM's .npz, and .npz or .pt files of a mean and a covariance.

This file owns their formats and reads them as untrusted data. What they are statistics of is not in them: the caller
says which extractor and layer, and the SHA-256 of the file goes into the protocol.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdlm_image.evaluation.statistics import StreamedStatistics

# names of (mean, covariance) in files seen in the wild -> Inception's layer
NAMES = {("mu", "sigma"): "2048", ("mu_s", "sigma_s"): "spatial"}
UNKNOWN_COUNT = 50_000  # the files do not say of how many images; it cancels in FID


def read_moments(path: str | Path) -> dict[str, StreamedStatistics]:
    """Layer -> statistics from a file with `mu` and `sigma`, and where it is ADM's also `mu_s` and `sigma_s` (sFID).

    Args:
        path: .npz (numpy arrays), or .pt / .pth (a dict of tensors or arrays, loaded with weights_only=True).

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another kind of file, damaged, or without such arrays; or they are no mean and covariance.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"reference={str(path)!r}: no such file")
    try:
        found = _arrays(path)
    except (ValueError, OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
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
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"a {type(loaded).__name__}, no dict")
        return {str(name): value for name, value in loaded.items()}
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
    statistics = StreamedStatistics(len(mu))
    statistics.count = UNKNOWN_COUNT
    statistics.mean, statistics.scatter = mu, sigma * (UNKNOWN_COUNT - 1)
    return statistics
