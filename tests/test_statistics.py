"""Streamed statistics against numpy, and FID against closed forms and torch-fidelity."""

import dataclasses
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import statistics_of, write_images
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from two_ranks import features, reduce_on_rank

from xdlm_image.data.images import Uint8Images, open_images
from xdlm_image.evaluation.comparing import fids
from xdlm_image.features.extractor import load_extractor
from xdlm_image.features.fid import fid_from_statistics
from xdlm_image.features.small_classifier import SMALL_CLASSIFIER
from xdlm_image.features.statistics import StreamedStatistics
from xdlm_image.files import write_atomic

# ---------------------------------------------------------------------------------------------- statistics


def test_streamed_statistics_equal_numpy_however_they_are_cut():
    x = features(101, 7)
    whole, left, right = StreamedStatistics(7), StreamedStatistics(7), StreamedStatistics(7)
    for batch in x.split(13):
        whole.update(batch)
    left.update(x[:1])
    left.update(x[1:1])  # an empty batch changes nothing
    right.update(x[1:])
    left.merge(right)
    for statistics in (whole, left):
        fid = statistics.to_fid()
        assert statistics.count == 101 and fid["mu"].dtype == fid["sigma"].dtype == np.float64
        np.testing.assert_allclose(fid["mu"], x.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(fid["sigma"], np.cov(x.numpy(), rowvar=False), rtol=1e-11, atol=1e-12)


def test_streamed_statistics_survive_a_large_mean():
    x = features(500, 3)
    shifted = StreamedStatistics(3)
    for batch in (x + 1e6).split(50):
        shifted.update(batch)
    # sums of squares would lose 12 of 16 digits here
    np.testing.assert_allclose(shifted.to_fid()["sigma"], np.cov(x.numpy(), rowvar=False), rtol=1e-8)


def test_statistics_refuse_what_they_cannot_hold():
    statistics = StreamedStatistics(3)
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(B, 3\)"):
        statistics.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        statistics.update(torch.tensor([[0.0, float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="expected 3"):
        statistics.merge(StreamedStatistics(4))
    statistics.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="1 images.*at least 2"):
        statistics.to_fid()


def test_statistics_files_come_back_and_damage_is_seen(tmp_path):
    statistics = StreamedStatistics(4)
    statistics.update(features(9, 4))
    path = statistics.save(tmp_path / "deep" / "a.safetensors", {"layer": "pooled"})
    back = StreamedStatistics.load(path)
    assert back.count == 9 and torch.equal(back.mean, statistics.mean) and torch.equal(back.scatter, statistics.scatter)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        StreamedStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        StreamedStatistics.load(tmp_path / "none.safetensors")


def test_ranks_agree_on_the_whole(tmp_path):
    torch.multiprocessing.spawn(reduce_on_rank, (str(tmp_path),), nprocs=2)  # its module imports little
    whole = StreamedStatistics(5)
    whole.update(features(20, 5))
    for rank in range(2):
        part = StreamedStatistics.load(tmp_path / f"{rank}.safetensors")
        assert part.count == 20
        torch.testing.assert_close(part.mean, whole.mean)
        torch.testing.assert_close(part.scatter, whole.scatter)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------- FID


def _gaussian(mean, covariance, count=1000):
    statistics = StreamedStatistics(len(mean))
    statistics.count = count
    statistics.mean = torch.tensor(mean, dtype=torch.float64)
    statistics.scatter = torch.tensor(covariance, dtype=torch.float64) * (count - 1)
    return statistics


def test_fid_of_gaussians_in_closed_form():
    a = _gaussian([0.0, 1.0, 2.0], np.diag([1.0, 4.0, 9.0]))
    b = _gaussian([1.0, 1.0, 0.0], np.diag([4.0, 4.0, 1.0]))
    # |mu|^2 = 1 + 0 + 4; commuting covariances: sum of (sd_a - sd_b)^2 = 1 + 0 + 4
    assert fid_from_statistics(a, b) == pytest.approx(10.0, rel=1e-12)
    assert fid_from_statistics(a, a) == pytest.approx(0.0, abs=1e-9)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = [_gaussian(rotation @ s.mean.numpy(), rotation @ s.to_fid()["sigma"] @ rotation.T) for s in (a, b)]
    assert fid_from_statistics(*turned) == pytest.approx(10.0, rel=1e-9)
    with pytest.raises(ValueError, match="widths 3 and 2"):
        fid_from_statistics(a, _gaussian([0.0, 0.0], np.eye(2)))


def test_fid_equals_torch_fidelity_on_the_same_folders(parts, tmp_path):
    other = write_images(tmp_path / "other", {"train": 25, "val": 1}, seed=5)
    for file in list(Path(other.root).rglob("*.png"))[::2]:  # make the two sets differ
        Image.open(file).rotate(90).save(file)
    sets = [open_images(parts.data, "train"), open_images(other, "train")]
    extractor = load_extractor(parts.extractor, "cpu")
    batches = [torch.stack([item[0] for item in Uint8Images(images)]) for images in sets]
    ours = fids(*(statistics_of(extractor, images) for images in batches))
    for index, images in enumerate(batches):
        folder = tmp_path / str(index)
        folder.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
    for layer in ("pooled", "spatial"):
        theirs = calculate_metrics(
            input1=str(tmp_path / "0"),
            input2=str(tmp_path / "1"),
            feature_extractor=SMALL_CLASSIFIER,
            feature_extractor_weights_path=str(parts.extractor),
            feature_layer_fid=layer,
            fid=True,
            cuda=False,
            cache=False,
            save_cpu_ram=True,
            verbose=False,
            batch_size=250,
        )["frechet_inception_distance"]
        assert theirs > 0.01
        assert ours[layer] == pytest.approx(theirs, rel=1e-6)


def _random_inception(path: Path) -> Path:
    """Weights of torch-fidelity's network, drawn here: the released ones are 95 MB on a server."""
    torch.manual_seed(0)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None):
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("random", ["64"], feature_extractor_weights_path=str(path))
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("weight") and value.ndim == 4:
            torch.nn.init.kaiming_normal_(value)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("layer", ["64", pytest.param("2048", marks=pytest.mark.slow)])
def test_inception_fid_equals_torch_fidelitys_on_the_same_folders(parts, tmp_path, layer):
    weights = _random_inception(tmp_path / "inception.pth")
    rng = np.random.default_rng(0)
    folders, batches = [], []
    for index, axes in enumerate(((), (1, 2))):  # noise, and smooth pictures
        pixels = rng.normal(0, 40, (24, 32, 32, 3))
        for axis in axes:
            pixels = pixels.cumsum(axis)
        pixels = (pixels + 128).clip(0, 255).astype(np.uint8)
        folder = tmp_path / str(index)
        folder.mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{i:04d}.png")
        folders.append(str(folder))
        batches.append(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    theirs = calculate_metrics(
        input1=folders[0], input2=folders[1], feature_extractor_weights_path=str(weights), feature_layer_fid=layer,
        fid=True, cuda=False, cache=False, save_cpu_ram=True, verbose=False, batch_size=12,
    )["frechet_inception_distance"]  # fmt: skip
    if layer == "2048":
        extractor = load_extractor(f"inception:{weights}", "cpu")
    else:
        network = FeatureExtractorInceptionV3("random", [layer], feature_extractor_weights_path=str(weights)).eval()
        extractor = dataclasses.replace(
            load_extractor(parts.extractor, "cpu"),
            compute=lambda images: {layer: network(images)[0]},
            feature_dims={layer: int(layer)},
            logits_layer=None,
        )
    assert theirs > 1e-3
    ours = fids(*(statistics_of(extractor, images) for images in batches))
    assert ours[layer] == pytest.approx(theirs, rel=1e-6)
