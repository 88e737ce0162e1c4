"""Metrics that need the features themselves, not only their mean and covariance.

This file owns KID (overall and for each class), precision, recall, coverage and Inception Score as functions of feature
tensors. KID, precision and recall and Inception Score are torch-fidelity's; it never runs an extractor.
"""

from __future__ import annotations

import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # or the smaller set, where it has fewer images
KID_SEED = 2020
NEIGHBOUR = 3  # the manifold of a set: balls that reach to each image's third nearest neighbour
SCORE_SPLITS = 10
ROWS = 1000  # of a block of distances


def kid(samples: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Kernel Inception Distance (arXiv 1801.01401): unbiased MMD^2 of the kernel (x.y / D + 1)^3.

    Args:
        samples: (N, D) features.
        reference: (M, D) features.

    Returns:
        `mean` and `std` over 100 subsets of 1,000 images (or of the smaller set).
    """
    size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    found = kid_features_to_metric(
        samples.double(),
        reference.double(),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        rng_seed=KID_SEED,
        verbose=False,
    )
    return {"mean": found[KEY_METRIC_KID_MEAN], "std": found[KEY_METRIC_KID_STD]}


def unbiased_mmd(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """Unbiased MMD^2 of the kernel (x.y / D + 1)^3 on the whole sets, (N, D) and (M, D) with N, M >= 2."""
    a, b = samples.double(), reference.double()
    within = [_kernel_sum(x, x) - float(_kernel_diagonal(x).sum()) for x in (a, b)]
    n, m = len(a), len(b)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * _kernel_sum(a, b) / (n * m)


def kid_of_classes(
    samples: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor, reference_labels: torch.Tensor
) -> dict[int, float]:
    """Class id -> unbiased MMD^2 of its images, for every class with two images at least in both sets.

    Args:
        samples: (N, D) features.
        labels: (N,) class ids; a negative one is of no known class and left out.
        reference: (M, D) features.
        reference_labels: (M,) class ids.
    """
    found = {}
    for label in sorted(label for label in {*labels.tolist()} & {*reference_labels.tolist()} if label >= 0):
        ours, theirs = samples[labels == label], reference[reference_labels == label]
        if min(len(ours), len(theirs)) >= 2:
            found[int(label)] = unbiased_mmd(ours, theirs)
    return found


def precision_recall(samples: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Improved precision and recall (arXiv 1904.06991) with k = 3, as ADM reports them.

    Args:
        samples: (N, D) features.
        reference: (M, D) features.

    Returns:
        `precision`: share of samples inside the reference's manifold; `recall`: share of reference images inside the
        samples'.
    """
    found = prc_features_to_metric(
        samples, reference, prc_neighborhood=NEIGHBOUR, prc_batch_size=ROWS, save_cpu_ram=True, verbose=False
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


def coverage(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of reference images with a sample nearer than their third nearest neighbour (arXiv 2002.09797, eq. 6).

    Unlike recall it is not raised by a few samples that lie far out.

    Args:
        samples: (N, D) features.
        reference: (M, D) features, more than 3.
    """
    covered = 0
    for rows in reference.split(ROWS):
        radii = torch.cdist(rows, reference).kthvalue(NEIGHBOUR + 1).values  # (r,); the nearest is the image itself
        covered += int((torch.cdist(rows, samples).amin(1) < radii).sum())
    return covered / len(reference)


def inception_score(logits: torch.Tensor) -> dict[str, float]:
    """Inception Score (arXiv 1606.03498): exp of the mean KL between p(y|x) and p(y), over 10 splits in order.

    Args:
        logits: (N, classes), without the bias of the last layer where it is Inception (as torch-fidelity and ADM).

    Returns:
        `mean` and `std` over the splits.
    """
    found = isc_features_to_metric(logits, splits=SCORE_SPLITS, shuffle=False)
    return {"mean": found[KEY_METRIC_ISC_MEAN], "std": found[KEY_METRIC_ISC_STD]}


def _kernel_sum(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(sum(((rows @ b.T) / a.shape[1] + 1).pow(3).sum() for rows in a.split(ROWS)))


def _kernel_diagonal(a: torch.Tensor) -> torch.Tensor:
    return (a.square().sum(1) / a.shape[1] + 1).pow(3)
