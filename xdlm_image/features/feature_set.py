"""Features of a set of images, kept in the order of the images: what KID, precision and recall need.

This file owns their gathering over batches and ranks and their file. It never runs an extractor and computes no metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from xdlm_image.files import write_atomic
from xdlm_image.ranks import rank_and_world

MOST_KEPT = 50_000  # of a larger set a random part stands in, the same at every run
SUBSET_SEED = 0


@dataclass
class FeatureSet:
    """Features (N, D) float32 of one layer and class ids (N,) int64, in the order of the images.

    Attributes:
        radii: `feature_metrics.radii_of_balls` of the features, once they were asked for; in no file.
    """

    features: torch.Tensor
    labels: torch.Tensor
    radii: torch.Tensor | None = None

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file atomically."""
        tensors = {"features": self.features.contiguous(), "labels": self.labels.contiguous()}
        return write_atomic(path, lambda temporary: save_file(tensors, temporary))

    @classmethod
    def load(cls, path: str | Path) -> FeatureSet:
        """Read a file that `save` wrote. Raises ValueError if it is damaged, OSError if it is not there."""
        try:
            tensors = load_file(path)
            return cls(tensors["features"], tensors["labels"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"features {str(path)!r}: damaged ({error}); delete the file") from error


class FeatureCollector:
    """Takes features batch by batch on every rank, and puts the set together at the end.

    Args:
        total: Images of the whole set; of more than 50,000 that many are kept.
    """

    def __init__(self, total: int) -> None:
        self._kept: torch.Tensor | None = None  # (total,) whether an image is kept
        if total > MOST_KEPT:
            self._kept = torch.zeros(total, dtype=torch.bool)
            self._kept[np.random.default_rng(SUBSET_SEED).permutation(total)[:MOST_KEPT]] = True
        self._parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def update(self, start: int, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add features (B, D) and labels (B,) of the images from place `start` of the set on."""
        features, labels = features.float().cpu(), labels.long().cpu()
        if self._kept is not None:
            kept = self._kept[start : start + len(features)]
            features, labels = features[kept], labels[kept]
        self._parts.append((start, features, labels))

    def gather(self, device: torch.device | str = "cpu") -> FeatureSet:
        """The whole set, the same on every rank; exchanged on `device`, which is the rank's GPU under NCCL."""
        rank, world = rank_and_world()
        parts = sorted(self._parts, key=lambda part: part[0])
        if world > 1:
            shapes: list = [None] * world  # of each rank: places and sizes of its parts, width
            own = ([(start, len(labels)) for start, _, labels in parts], parts[0][1].shape[1] if parts else 0)
            dist.all_gather_object(shapes, own)
            width = max(width for _, width in shapes)
            gathered: list[tuple[int, torch.Tensor, torch.Tensor]] = []
            for source, (sizes, _) in enumerate(shapes):
                count = sum(size for _, size in sizes)
                if count == 0:
                    continue
                if source == rank:
                    features = torch.cat([part[1] for part in parts]).to(device)
                    labels = torch.cat([part[2] for part in parts]).to(device)
                else:
                    features = torch.empty(count, width, device=device)
                    labels = torch.empty(count, dtype=torch.int64, device=device)
                for tensor in (features, labels):
                    dist.broadcast(tensor, source)
                cuts = [size for _, size in sizes]
                places = [start for start, _ in sizes]
                gathered += zip(places, features.cpu().split(cuts), labels.cpu().split(cuts))
            parts = sorted(gathered, key=lambda part: part[0])
        _, all_features, all_labels = zip(*parts)
        return FeatureSet(torch.cat(all_features), torch.cat(all_labels))
