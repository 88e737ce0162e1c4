"""Frechet distance between two sets of images, from streamed statistics.

This file owns the way from images through an extractor to statistics and to the number; the number itself is
torch-fidelity's `fid_statistics_to_metric`:

    FID = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

It never draws or opens images.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from xdlm_image.evaluation.extractor import FeatureExtractor
from xdlm_image.evaluation.statistics import StreamedStatistics

Images = torch.Tensor | Iterable[torch.Tensor]  # uint8 (N, C, H, W), or batches of it
BATCH = 250


def fid_from_statistics(a: StreamedStatistics, b: StreamedStatistics) -> float:
    """Frechet distance of two sets of features; at least 0 up to rounding.

    Raises:
        ValueError: Different widths, or fewer than two vectors in one.
    """
    if a.dim != b.dim:
        raise ValueError(f"statistics of widths {a.dim} and {b.dim}: compare one feature layer with itself")
    return float(fid_statistics_to_metric(a.to_fid(), b.to_fid(), verbose=False)[KEY_METRIC_FID])


def new_statistics(extractor: FeatureExtractor) -> dict[str, StreamedStatistics]:
    """Empty statistics for each FID layer of the extractor."""
    return {layer: StreamedStatistics(dim) for layer, dim in extractor.feature_dims.items()}


def update_statistics(statistics: dict[str, StreamedStatistics], features: dict[str, torch.Tensor]) -> None:
    """Add what an extractor gave for a batch, layer -> (B, D), to the statistics of each FID layer."""
    for layer, layer_statistics in statistics.items():
        layer_statistics.update(features[layer])


def statistics_of_images(extractor: FeatureExtractor, images: Images) -> dict[str, StreamedStatistics]:
    """Statistics of each FID layer.

    Args:
        extractor: From `load_extractor`.
        images: uint8 (N, C, H, W), or an iterable of such batches.

    Raises:
        ValueError: Images of a dtype, size or channels that the extractor does not take.
    """
    statistics = new_statistics(extractor)
    for batch in images.split(BATCH) if isinstance(images, torch.Tensor) else images:
        update_statistics(statistics, extractor(batch))
    return statistics


def fid_of_images(extractor: FeatureExtractor, images_a: Images, images_b: Images) -> dict[str, float]:
    """Frechet distance of two sets of images for each FID layer (`pooled` or `2048`, and `spatial`).

    Args:
        extractor: From `load_extractor`.
        images_a: uint8 (N, C, H, W), or an iterable of such batches.
        images_b: The same.
    """
    a, b = statistics_of_images(extractor, images_a), statistics_of_images(extractor, images_b)
    return {layer: fid_from_statistics(a[layer], b[layer]) for layer in a}
