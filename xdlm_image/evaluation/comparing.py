"""How far a measured set of images is from a reference: every number of a row of the tables.

This file owns which metrics there are and what they are called in `fid.json`; the formulas are in `fid`,
`feature_metrics` and `code_pairs`. It never runs an extractor.
"""

from __future__ import annotations

from typing import Any

from xdlm_image.evaluation.feature_metrics import NEIGHBOUR, coverage, kid, kid_of_classes, precision_recall
from xdlm_image.evaluation.fid import fid_from_statistics
from xdlm_image.evaluation.measuring import Measured


def fids(a: Measured, b: Measured) -> dict[str, float]:
    """Frechet distance for each layer that both have."""
    return {
        layer: fid_from_statistics(statistics, b.statistics[layer])
        for layer, statistics in a.statistics.items()
        if layer in b.statistics
    }


def distances(samples: Measured, reference: Measured) -> dict[str, Any]:
    """Distances of a set from the reference images.

    Args:
        samples: The set that is judged.
        reference: What it is held against; of the same extractor.

    Returns:
        `fid` (layer -> value); of the main layer `kid` (`mean`, `std`), `kid_of_classes` (class id as JSON has it ->
        value), `precision`, `recall`, `coverage`; of the samples alone `inception_score`. These are None where the
        features of one of the two were not kept, or are of fewer images than have a third neighbour.
    """
    found: dict[str, Any] = {"fid": fids(samples, reference), "inception_score": samples.score}
    ours, theirs = samples.kept, reference.kept
    if ours is None or theirs is None or min(len(ours.labels), len(theirs.labels)) <= NEIGHBOUR:
        return found | dict.fromkeys(("kid", "kid_of_classes", "precision", "recall", "coverage"))
    classes = kid_of_classes(ours.features, ours.labels, theirs.features, theirs.labels)
    return {
        **found,
        "kid": kid(ours.features, theirs.features),
        "kid_of_classes": {str(label): value for label, value in classes.items()},
        **precision_recall(ours.features, theirs.features),
        "coverage": coverage(ours.features, theirs.features),
    }
