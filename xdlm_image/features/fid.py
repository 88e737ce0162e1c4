"""Fréchet distance between two sets of features, from streamed statistics.

This file owns the way from features to statistics and to the number; the number itself is torch-fidelity's
`fid_statistics_to_metric`:

    FID = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

It never draws or opens images.
"""

from __future__ import annotations

import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from xdlm_image.features.extractor import FeatureExtractor
from xdlm_image.features.statistics import StreamedStatistics


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
