"""How far a measured set of images is from a reference: every number of a row of the tables.

This file owns which metrics there are and what they are called in `fid.json`; the formulas are in
`features.fid`, `feature_metrics` and `code_pairs`. It never runs an extractor.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from xdlm_image.evaluation.feature_metrics import (
    MANIFOLD_METRICS,
    NEIGHBOUR,
    kid,
    kid_of_classes,
    manifold_metrics,
    radii_of_balls,
)
from xdlm_image.evaluation.measuring import Measured
from xdlm_image.features.fid import fid_from_statistics
from xdlm_image.ranks import rank_and_world
from xdlm_image.recipes.evaluation import FEATURE_METRICS


def fids(a: Measured, b: Measured) -> dict[str, float]:
    """Frechet distance for each layer that both have."""
    return {
        layer: fid_from_statistics(statistics, b.statistics[layer])
        for layer, statistics in a.statistics.items()
        if layer in b.statistics
    }


def distances(
    samples: Measured,
    reference: Measured,
    device: torch.device | str,
    feature_metrics: Collection[str] = FEATURE_METRICS,
) -> dict[str, Any]:
    """Distances of a set from the reference images; every rank must ask for them, the first gets all.

    Args:
        samples: The set that is judged.
        reference: What it is held against; of the same extractor.
        device: Where distances between all pairs of images are computed: the extractor's.
        feature_metrics: Of `FEATURE_METRICS`: what is computed beside FID and Inception Score.

    Returns:
        `fid` (layer -> value); of the main layer `kid` (`mean`, `std`), `kid_of_classes` (class id as JSON has it ->
        value), `precision`, `recall`, `coverage`; of the samples alone `inception_score`. These are None where they
        are not wanted, the features of one of the two were not kept, or are of fewer images than have a third
        neighbour; and KID on all ranks but the first.
    """
    found: dict[str, Any] = {"fid": fids(samples, reference), "inception_score": samples.score}
    found |= dict.fromkeys(("kid", "kid_of_classes", "precision", "recall", "coverage"))
    ours, theirs = samples.kept, reference.kept
    if ours is None or theirs is None or min(len(ours.labels), len(theirs.labels)) <= NEIGHBOUR:
        return found
    if "kid" in feature_metrics and rank_and_world()[0] == 0:
        classes = kid_of_classes(ours.features, ours.labels, theirs.features, theirs.labels)
        found["kid"] = kid(ours.features, theirs.features)
        found["kid_of_classes"] = {str(label): value for label, value in classes.items()}
    wanted = [name for name in MANIFOLD_METRICS if name in feature_metrics]
    if wanted:
        if theirs.radii is None:
            theirs.radii = radii_of_balls(theirs.features, device)
        found |= manifold_metrics(ours.features, theirs.features, wanted, device, theirs.radii)
    return found
