"""How codes at two positions go together: a measure of samplers that needs no feature extractor.

Drawing many positions at once from their single-position predictions gets pairs of codes wrong: that is the error of
few steps. It shows in the total-variation distance between the pair frequencies of drawn and of held-out codes,

    TV(p, q) = 1/2 sum over (a, b) of |p(a, b) - q(a, b)|,   in [0, 1],

for neighbouring positions ("near") and for positions half a grid apart ("far"), pooled over the grid. A finite sample
alone makes it positive: compare with the floor of as many real images. This file never draws images.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from xdlm_image.files import write_atomic
from xdlm_image.ranks import rank_and_world

MAX_BINS = 2**20  # K^2 pairs are counted exactly up to K = 1024; beyond, they are hashed into this many bins
DISTANCES = ("near", "far")


class PairFrequencies:
    """Counts of pairs of codes at neighbouring and at distant positions.

    Args:
        num_codes: Codebook size K.
    """

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes
        self.num_bins = min(num_codes**2, MAX_BINS)
        self.counts = {name: torch.zeros(self.num_bins, dtype=torch.int64) for name in DISTANCES}

    def update(self, codes: torch.Tensor) -> None:
        """Add grids of codes (B, h, w), each in [0, num_codes).

        Raises:
            ValueError: Another shape, a grid of fewer than 2 x 2, or ids that are no codes.
        """
        if codes.ndim != 3 or min(codes.shape[1:]) < 2:
            raise ValueError(f"codes of shape {tuple(codes.shape)}: need (B, h, w) with h and w at least 2")
        codes = codes.detach().cpu().long()
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise ValueError(f"codes from {codes.min()} to {codes.max()}: they must lie in [0, {self.num_codes})")
        rows, columns = codes.shape[1:]
        for name, down, right in (("near", 1, 1), ("far", rows // 2, columns // 2)):
            self._count(name, codes[:, :-down], codes[:, down:])
            self._count(name, codes[:, :, :-right], codes[:, :, right:])

    def _count(self, name: str, first: torch.Tensor, second: torch.Tensor) -> None:
        pairs = (first * self.num_codes + second).flatten()
        if self.num_bins < self.num_codes**2:
            pairs = ((pairs * 0x9E3779B1) % 2**32) * self.num_bins >> 32  # Fibonacci hashing: spread, then scale
        self.counts[name] += torch.bincount(pairs, minlength=self.num_bins)

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Add up over the ranks of torch.distributed. Alone: nothing to do."""
        if rank_and_world()[1] > 1:
            for name in DISTANCES:
                counts = self.counts[name].to(device)
                dist.all_reduce(counts)
                self.counts[name] = counts.cpu()

    def total_variation(self, other: PairFrequencies) -> dict[str, float]:
        """{"near": TV, "far": TV} to another set of grids, each in [0, 1].

        Raises:
            ValueError: Another codebook size, or nothing counted in one of the two.
        """
        if other.num_codes != self.num_codes:
            raise ValueError(f"pairs of {self.num_codes} and of {other.num_codes} codes: use one tokenizer")
        distances = {}
        for name in DISTANCES:
            p, q = self.counts[name].double(), other.counts[name].double()
            if p.sum() == 0 or q.sum() == 0:
                raise ValueError("pairs of codes: one of the sets holds no image")
            distances[name] = float((p / p.sum() - q / q.sum()).abs().sum() / 2)
        return distances

    def save(self, path: str | Path, metadata: dict[str, str]) -> Path:
        """Write a safetensors file atomically; counts below 2^31 in half the bytes."""
        small = all(int(counts.max()) < 2**31 for counts in self.counts.values())
        counts = {name: value.int() if small else value for name, value in self.counts.items()}
        return write_atomic(path, lambda temporary: save_file(counts, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path, num_codes: int) -> PairFrequencies:
        """Read a file that `save` wrote. Raises ValueError when it is damaged or of another codebook size."""
        pairs = cls(num_codes)
        try:
            counts = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({error}); delete the file") from error
        if {name: len(value) for name, value in counts.items()} != dict.fromkeys(DISTANCES, pairs.num_bins):
            raise ValueError(f"{path}: it does not hold pairs of {num_codes} codes; delete the file")
        pairs.counts = {name: value.long() for name, value in counts.items()}
        return pairs
