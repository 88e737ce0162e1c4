"""Metrics that need the features themselves, not only their mean and covariance.

This file owns KID (overall and for each class), precision, recall, coverage and Inception Score as functions of feature
tensors. KID and Inception Score are torch-fidelity's, precision and recall its definition; it never runs an extractor.

Precision, recall and coverage take all pairs of two sets. They are computed on the device that is named, a block of
rows of distances at a time, and the ranks of `torch.distributed` share the blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from tqdm import tqdm

from xdlm_image.data.image_batches import blocks_of_rank
from xdlm_image.ranks import rank_and_world, reduce_over_ranks

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # or the smaller set, where it has fewer images
KID_SEED = 2020
NEIGHBOUR = 3  # the manifold of a set: balls that reach to each image's third nearest neighbour
SCORE_SPLITS = 10
MANIFOLD_METRICS = ("precision_recall", "coverage")
ROWS = 1000  # of a block of distances
SHOWN_AFTER = 5  # seconds, a progress bar


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


def radii_of_balls(features: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Distance of each image to its third nearest neighbour: the balls whose union is the manifold of a set.

    Args:
        features: (N, D), N > 3; the same on every rank.
        device: Where it is computed.

    Returns:
        (N,) on `device`, on every rank.
    """
    features = features.to(device)
    radii = features.new_zeros(len(features))
    for rows in _own_rows(len(features), "manifold"):
        distances = torch.cdist(features[rows], features)  # (r, N)
        radii[rows] = distances.topk(NEIGHBOUR + 1, largest=False).values[:, -1]  # the nearest is the image itself
        _wait_for(radii)
    return reduce_over_ranks(radii)


def manifold_metrics(
    samples: torch.Tensor,
    reference: torch.Tensor,
    wanted: Collection[str] = MANIFOLD_METRICS,
    device: torch.device | str = "cpu",
    reference_radii: torch.Tensor | None = None,
) -> dict[str, float]:
    """Improved precision and recall (arXiv 1904.06991) with k = 3, as ADM reports them, and coverage.

    Args:
        samples: (N, D) features, N > 3; the same on every rank.
        reference: (M, D) features, M > 3; the same on every rank.
        wanted: Of `MANIFOLD_METRICS`.
        device: Where it is computed.
        reference_radii: `radii_of_balls` of the reference, where they are known; None computes them.

    Returns:
        `precision`: share of samples inside the reference's manifold; `recall`: share of reference images inside the
        samples'; `coverage`: share of reference images with a sample nearer than their third nearest neighbour (arXiv
        2002.09797, eq. 6), which unlike recall is not raised by a few samples that lie far out. On every rank.
    """
    samples, reference = samples.to(device), reference.to(device)
    theirs = radii_of_balls(reference, device) if reference_radii is None else reference_radii.to(device)  # (M,)
    ours = radii_of_balls(samples, device) if "precision_recall" in wanted else None  # (N,)
    inside = torch.zeros(1, dtype=torch.int64, device=device)
    reached = torch.zeros(len(reference), dtype=torch.int32, device=device)
    nearest = torch.full_like(theirs, torch.inf)
    for rows in _own_rows(len(samples), "samples in manifolds"):
        distances = torch.cdist(samples[rows], reference)  # (r, M)
        nearest = torch.minimum(nearest, distances.amin(0))
        if ours is not None:
            inside += (distances <= theirs).any(1).sum()
            reached |= (distances <= ours[rows, None]).any(0).int()
        _wait_for(nearest)
    found = {}
    if ours is not None:
        found["precision"] = int(reduce_over_ranks(inside)) / len(samples)
        found["recall"] = int(reduce_over_ranks(reached, "max").sum()) / len(reference)
    if "coverage" in wanted:
        found["coverage"] = int((reduce_over_ranks(nearest, "min") < theirs).sum()) / len(reference)
    return found


def inception_score(logits: torch.Tensor) -> dict[str, float] | None:
    """Inception Score (arXiv 1606.03498): exp of the mean KL between p(y|x) and p(y), over 10 splits in order.

    Args:
        logits: (N, classes), without the bias of the last layer where it is Inception (as torch-fidelity and ADM).

    Returns:
        `mean` and `std` over the splits; None of fewer images than splits.
    """
    if len(logits) < SCORE_SPLITS:
        return None
    found = isc_features_to_metric(logits, splits=SCORE_SPLITS, shuffle=False)
    return {"mean": found[KEY_METRIC_ISC_MEAN], "std": found[KEY_METRIC_ISC_STD]}


def _kernel_sum(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(sum(((rows @ b.T) / a.shape[1] + 1).pow(3).sum() for rows in a.split(ROWS)))


def _kernel_diagonal(a: torch.Tensor) -> torch.Tensor:
    return (a.square().sum(1) / a.shape[1] + 1).pow(3)


def _own_rows(total: int, description: str) -> Iterator[slice]:
    """This rank's blocks of rows."""
    blocks = [slice(block.start, block.stop) for block in blocks_of_rank(total, ROWS)]
    hidden = rank_and_world()[0] != 0
    yield from tqdm(blocks, description, unit="block", leave=False, delay=SHOWN_AFTER, disable=hidden)


def _wait_for(values: torch.Tensor) -> None:
    """Until a GPU has computed them, so that the bar tells what is done and no blocks wait in memory."""
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)
