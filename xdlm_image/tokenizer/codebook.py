"""Keeping every row of a codebook alive: k-means for the start, counting of use, revival of dead rows.

This file owns what happens to the codebook beside gradient descent. It knows no images and no training loop.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from xdlm_image.data.code_cache import CodeCache

BLOCK = 8192  # latents compared with the codebook at once


def nearest(latents: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest row and squared distance: latents (M, D), codebook (K, D) -> ids (M,) int64, distances (M,)."""
    ids, distances = [], []
    for block in latents.split(BLOCK):
        smallest = torch.cdist(block, codebook).min(dim=1)
        ids.append(smallest.indices)
        distances.append(smallest.values.square())
    return torch.cat(ids), torch.cat(distances)


def kmeans(latents: torch.Tensor, num_codes: int, generator: torch.Generator, iterations: int = 10) -> torch.Tensor:
    """Lloyd's algorithm from random latents; a centre without members moves to a latent that is badly served.

    Args:
        latents: (M, D) float32, M >= 1; fewer than num_codes are only repeated, with a little noise.
        num_codes: K.
        generator: CPU generator.

    Returns:
        Codebook (K, D).
    """
    count = len(latents)
    order = torch.randperm(count, generator=generator)
    chosen = order.repeat(-(-num_codes // count))[:num_codes]
    centres = latents[chosen.to(latents.device)].clone()
    if count < num_codes:
        noise = torch.randn(centres.shape, generator=generator).to(centres)
        return centres + 1e-2 * latents.std(unbiased=False) * noise
    for _ in range(iterations):
        ids, distances = nearest(latents, centres)
        members = torch.bincount(ids, minlength=num_codes)  # (K,)
        sums = torch.zeros_like(centres).index_add_(0, ids, latents)
        centres = torch.where(members[:, None] > 0, sums / members[:, None].clamp(min=1), centres)
        empty = (members == 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = draw_badly_served(latents, distances, len(empty), generator)
    return centres


def draw_badly_served(
    latents: torch.Tensor, distances: torch.Tensor, number: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw latents (number, D) with probability proportional to their squared distance to the codebook."""
    weights = distances.cpu().double() + 1e-12
    cumulative = weights.cumsum(0)
    uniform = torch.rand(number, generator=generator, dtype=torch.float64) * cumulative[-1]
    picked = torch.searchsorted(cumulative, uniform).clamp_(max=len(weights) - 1)
    return latents[picked.to(latents.device)]


def usage_of(counts: torch.Tensor) -> dict[str, float]:
    """Summary of how often each code occurs: counts (K,) -> codes used, percent of the codebook, perplexity.

    The perplexity exp(entropy) is the number of equally likely codes with the same entropy, in [1, K].
    """
    counts = counts.cpu().double()
    total = counts.sum()
    if total == 0:
        raise ValueError("counts are all zero: no codes were counted")
    share = counts[counts > 0] / total
    used = int((counts > 0).sum())
    return {
        "codes_used": used,
        "codes_used_percent": 100 * used / len(counts),
        "perplexity": float(torch.exp(-(share * share.log()).sum())),
    }


def usage_of_cache(cache: CodeCache) -> dict[str, Any]:
    """How the cache uses the codebook: codes used, percent, perplexity, as `usage_of`."""
    counts = np.zeros(cache.manifest.num_codes, dtype=np.int64)
    rows = max(1, 2**24 // max(1, math.prod(cache.codes.shape[1:])))
    for first in tqdm(range(0, len(cache), rows), desc="counting codes", unit="block", disable=len(cache) <= rows):
        counts += np.bincount(cache.codes[first : first + rows].ravel(), minlength=len(counts))
    return usage_of(torch.from_numpy(counts))
