"""Mean and covariance of features, streamed: nothing but (D,) and (D, D) is ever held.

This file owns the float64 sums, their merge over batches and ranks, and their files. It never sees an image.

Batches are merged by Chan, Golub and LeVeque's update, stable where sums of squares cancel:

    n = n_a + n_b,  d = mean_b - mean_a
    mean = mean_a + d n_b / n
    S    = S_a + S_b + d d^T n_a n_b / n          (S = sum of (x - mean)(x - mean)^T)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from xdlm_image.files import write_atomic
from xdlm_image.ranks import rank_and_world


class StreamedStatistics:
    """Count, mean and scatter matrix of feature vectors, in float64 on the CPU.

    Args:
        dim: Width D of the features.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)  # (D,)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # (D, D)

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return self.mean.shape[0]

    def update(self, features: torch.Tensor) -> None:
        """Add features (B, D) of any float type, on any device.

        Raises:
            ValueError: Another width, or values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features.shape={tuple(features.shape)}: expected (B, {self.dim})")
        if len(features) == 0:
            return
        batch = features.detach().cpu().double()
        if not torch.isfinite(batch).all():
            raise ValueError("features: NaN or infinite values; check the images and the extractor")
        other = StreamedStatistics(self.dim)
        other.count = len(batch)
        other.mean = batch.mean(0)
        centred = batch - other.mean  # (B, D)
        other.scatter = centred.T @ centred
        self.merge(other)

    def merge(self, other: StreamedStatistics) -> None:
        """Add what another object has seen. Raises ValueError on another width."""
        if other.dim != self.dim:
            raise ValueError(f"other.dim={other.dim}: expected {self.dim}, the same feature layer")
        if other.count == 0:
            return
        total = self.count + other.count
        difference = other.mean - self.mean
        self.scatter = (
            self.scatter + other.scatter + torch.outer(difference, difference) * (self.count * other.count / total)
        )
        self.mean = self.mean + difference * (other.count / total)
        self.count = total

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Merge over the ranks of torch.distributed; afterwards every rank holds the whole. Alone: nothing to do.

        Args:
            device: Where the exchange happens: the rank's GPU under NCCL, the CPU under gloo.
        """
        if rank_and_world()[1] == 1:
            return
        count = torch.tensor([self.count], dtype=torch.int64, device=device)
        dist.all_reduce(count)
        total = int(count)
        if total == 0:
            return
        mean = (self.mean * (self.count / total)).to(device)
        dist.all_reduce(mean)
        difference = self.mean - mean.cpu()
        scatter = (self.scatter + torch.outer(difference, difference) * self.count).to(device)
        dist.all_reduce(scatter)
        self.count, self.mean, self.scatter = total, mean.cpu(), scatter.cpu()

    def to_fid(self) -> dict[str, np.ndarray]:
        """{"mu": (D,), "sigma": (D, D)} in float64, as torch-fidelity's `fid_statistics_to_metric` takes them.

        Raises:
            ValueError: Fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"statistics of {self.count} images: a covariance needs at least 2")
        return {"mu": self.mean.numpy(), "sigma": (self.scatter / (self.count - 1)).numpy()}

    def save(self, path: str | Path, metadata: dict[str, str]) -> Path:
        """Write a safetensors file atomically; `metadata` says what the features are of."""
        tensors = {
            "count": torch.tensor([self.count], dtype=torch.int64),
            "mean": self.mean.contiguous(),
            "scatter": self.scatter.contiguous(),
        }
        return write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> StreamedStatistics:
        """Read a file that `save` wrote. Raises ValueError where it is damaged."""
        try:
            tensors = load_file(path)
            statistics = cls(len(tensors["mean"]))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"statistics {str(path)!r}: damaged ({error}); delete the file") from error
        statistics.count = int(tensors["count"])
        statistics.mean, statistics.scatter = tensors["mean"], tensors["scatter"]
        return statistics
