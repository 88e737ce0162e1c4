"""KID, precision, recall, coverage and Inception Score against direct formulas on small sets."""

import json
import math

import pytest
import torch
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from two_ranks import features, manifolds_on_rank

from xdlm_image.evaluation import feature_metrics
from xdlm_image.evaluation.feature_metrics import (
    inception_score,
    kid,
    kid_of_classes,
    manifold_metrics,
    radii_of_balls,
    unbiased_mmd,
)


def points(number: int, dim: int = 3, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed)) + shift


def direct_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_mmd_by_the_sum_over_pairs_whatever_the_block(monkeypatch):
    x, y = points(7), points(5, shift=0.5, seed=1)
    expected = direct_mmd(x.double(), y.double())
    for rows in (2, 1000):
        monkeypatch.setattr(feature_metrics, "ROWS", rows)
        assert unbiased_mmd(x, y) == pytest.approx(expected, rel=1e-10)
    assert kid(x[:5], y)["mean"] == pytest.approx(direct_mmd(x[:5].double(), y.double()), rel=1e-8)  # the whole sets
    monkeypatch.setattr(feature_metrics, "KID_SUBSETS", 5)
    assert kid(points(60), points(60, seed=1))["std"] == pytest.approx(0.0, abs=1e-9)  # every subset is the set
    with_subsets = kid(points(1500), points(1200, shift=1.0, seed=1))
    assert with_subsets["mean"] > 0.5 and with_subsets["std"] > 0
    assert with_subsets["mean"] == pytest.approx(unbiased_mmd(points(1500), points(1200, shift=1.0, seed=1)), rel=0.1)


def test_each_class_is_compared_with_itself():
    x, y = points(9), points(8, seed=1)
    labels, theirs = torch.tensor([0, 1, 2] * 3), torch.tensor([0, 0, 0, 2, 2, 2, 2, 1])
    found = kid_of_classes(x, labels, y, theirs)
    assert set(found) == {0, 2}  # one image of class 1 is too few
    strangers = kid_of_classes(x, torch.where(labels == 0, -1, labels), y, torch.where(theirs == 0, -1, theirs))
    assert set(strangers) == {2}  # of no known class on both sides
    assert found[2] == pytest.approx(direct_mmd(x[labels == 2].double(), y[theirs == 2].double()), rel=1e-10)


def test_manifolds_by_their_definition(monkeypatch):
    x, y = points(40), points(30, shift=1.0, seed=1)

    def radii(a):
        return torch.stack([(a - row).norm(dim=1).sort().values[3] for row in a])

    inside = (x[:, None] - y[None]).norm(dim=2)  # (40, 30)
    expected = {
        "precision": (inside <= radii(y)[None]).any(1).float().mean().item(),
        "recall": (inside <= radii(x)[:, None]).any(0).float().mean().item(),
    }
    expected["coverage"] = (inside.amin(0) < radii(y)).float().mean().item()
    for rows in (7, 1000):
        monkeypatch.setattr(feature_metrics, "ROWS", rows)
        assert manifold_metrics(x, y) == pytest.approx(expected)
        assert manifold_metrics(x, y, reference_radii=radii_of_balls(y)) == pytest.approx(expected)
        assert manifold_metrics(x, y, ["coverage"]) == {"coverage": pytest.approx(expected["coverage"])}
        assert "coverage" not in manifold_metrics(x, y, ["precision_recall"])
    assert all(0 < value < 1 for value in expected.values())
    assert manifold_metrics(y, y)["coverage"] == 1.0 and manifold_metrics(x + 100, y)["coverage"] == 0.0
    outlier = manifold_metrics(torch.cat([points(6), points(4) * 1000]), y)
    assert outlier["recall"] > 0.9 > outlier["coverage"]  # huge balls raise recall, not coverage


def test_precision_and_recall_are_torch_fidelitys():
    x, y = points(300, 64), points(200, 64, shift=0.1, seed=1)
    theirs = prc_features_to_metric(x, y, prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=True, verbose=False)
    assert 0 < theirs[KEY_METRIC_PRECISION] < 1 and 0 < theirs[KEY_METRIC_RECALL] < 1
    ours = manifold_metrics(x, y, ["precision_recall"])
    assert ours == pytest.approx({"precision": theirs[KEY_METRIC_PRECISION], "recall": theirs[KEY_METRIC_RECALL]})


def test_distances_of_a_few_rows_are_in_memory_at_once(monkeypatch):
    monkeypatch.setattr(feature_metrics, "ROWS", 16)
    shapes = []
    cdist = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: shapes.append((len(a), len(b))) or cdist(a, b))
    manifold_metrics(points(100), points(60))
    assert max(rows for rows, _ in shapes) == 16
    assert sum(rows * columns for rows, columns in shapes) == 60 * 60 + 100 * 100 + 100 * 60  # every pair once


def test_ranks_share_the_pairs_and_gather_features(tmp_path):
    torch.multiprocessing.spawn(manifolds_on_rank, (str(tmp_path),), nprocs=2)
    x, y = features(23, 4).float(), features(17, 4, seed=1).float()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["metrics"] == manifold_metrics(x, y)
        assert torch.equal(torch.tensor(found["features"]), x) and found["labels"] == [*range(23)]
        assert sum(found["rows"]) < 23 + 23 + 17  # not all of its own
    assert found["metrics"]["precision"] > 0 and 0 < found["metrics"]["coverage"] < 1


def test_inception_score_of_certain_and_of_undecided_predictions():
    certain = 50 * torch.eye(4).repeat(25, 1)  # four classes, all as often in every split
    assert inception_score(certain)["mean"] == pytest.approx(4.0, rel=0.05)
    assert inception_score(torch.zeros(9, 4)) is None
    assert inception_score(torch.zeros(100, 4)) == {"mean": pytest.approx(1.0), "std": pytest.approx(0.0)}
    halves = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]]).repeat(50, 1)
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert inception_score(halves)["mean"] == pytest.approx(math.exp(kl), rel=1e-6)
