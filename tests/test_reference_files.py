"""Statistics that others published: read as data, and refused where they are something else."""

import dataclasses
import hashlib
import json
import pickle
import subprocess

import numpy as np
import pytest
import torch
from tiny_parts import statistics_of

from xdlm_image.data.images import Uint8Images, open_images
from xdlm_image.evaluation import plan, reference_files, sweep
from xdlm_image.evaluation.reference_files import KNOWN, KnownFile, find_reference_file, read_moments
from xdlm_image.features.extractor import load_extractor
from xdlm_image.features.fid import fid_from_statistics
from xdlm_image.features.statistics import StreamedStatistics
from xdlm_image.recipes import DataOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")

MU, SIGMA = np.array([1.0, 2.0]), np.diag([4.0, 9.0])


def test_adms_file_gives_fid_and_sfid_and_its_images_are_not_touched(tmp_path):
    arrays = {
        "arr_0": np.zeros((2, 4, 4, 3), np.uint8),
        "mu": MU,
        "sigma": SIGMA,
        "mu_s": MU[:1],
        "sigma_s": SIGMA[:1, :1],
    }
    np.savez(tmp_path / "adm.npz", **arrays)
    found = read_moments(tmp_path / "adm.npz")
    assert set(found) == {"2048", "spatial"} and found["spatial"].dim == 1
    other = StreamedStatistics(2)
    other.count, other.scatter = 10, torch.eye(2, dtype=torch.float64) * 9
    # |mu|^2 = 5, and (2 - 1)^2 + (3 - 1)^2 = 5
    assert fid_from_statistics(found["2048"], other) == pytest.approx(10.0, rel=1e-9)


def test_tensors_of_a_pt_file(tmp_path):
    torch.save({"mu": torch.tensor(MU).float(), "sigma": torch.tensor(SIGMA)}, tmp_path / "a.pt")
    found = read_moments(tmp_path / "a.pt")
    assert set(found) == {"2048"} and found["2048"].to_fid()["sigma"] == pytest.approx(SIGMA)


def test_arrays_in_a_pt_file_are_refused_with_our_own_remedy(tmp_path):
    torch.save({"mu": MU, "sigma": SIGMA}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="numpy arrays perhaps; save tensors, or an .npz") as caught:
        read_moments(tmp_path / "a.pt")
    assert "weights_only" not in str(caught.value)


def test_what_is_no_such_file_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was run",))

    def refused(name: str, match: str, error=ValueError):
        with pytest.raises(error, match=match):
            read_moments(tmp_path / name)

    refused("none.npz", "no such file", FileNotFoundError)
    torch.save({"mu": Evil(), "sigma": 1}, tmp_path / "evil.pt")
    refused("evil.pt", "cannot be read as a file of statistics")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    refused("evil.pkl", "pickles are not opened")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=SIGMA)
    refused("objects.npz", "cannot be read")
    np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4, 3), np.uint8))
    refused("images.npz", "holds arr_0; expected mu and sigma")
    np.savez(tmp_path / "shape.npz", mu=MU, sigma=SIGMA[:1])
    refused("shape.npz", r"mu has shape \(2,\) and sigma \(1, 2\)")
    np.savez(tmp_path / "nan.npz", mu=MU, sigma=np.full((2, 2), np.nan))
    refused("nan.npz", "no covariance")
    np.savez(tmp_path / "skew.npz", mu=MU, sigma=np.array([[1.0, 2.0], [0.0, 1.0]]))
    refused("skew.npz", "no covariance")
    np.savez(tmp_path / "negative.npz", mu=MU, sigma=np.array([[1.0, 2.0], [2.0, 1.0]]))
    refused("negative.npz", "no covariance .its eigenvalues go from -1 to 3; none may be negative")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "shape.npz").read_bytes()[:40])
    refused("cut.npz", "cannot be read")


@pytest.fixture
def inception(parts, monkeypatch):
    """The small classifier under Inception's names: the network itself takes long for so little."""
    small = load_extractor(parts.extractor, "cpu")
    names = {"2048": "pooled", "spatial": "spatial"}

    def compute(images):
        found = small.compute(images)
        return {name: found[own] for name, own in names.items()}

    dims = {name: small.feature_dims[own] for name, own in names.items()}
    extractor = dataclasses.replace(
        small, compute=compute, feature_dims=dims, logits_layer=None, config=None, is_inception=True
    )
    monkeypatch.setattr(plan, "load_extractor", lambda name, device: extractor)
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    return extractor


def test_a_sweep_against_adms_file_gives_the_numbers_of_its_images(parts, inception, tmp_path):
    images = torch.stack([image for image, _ in Uint8Images(open_images(parts.data, "test"))])
    statistics = {name: s.to_fid() for name, s in statistics_of(inception, images).statistics.items()}
    moments = {"mu": statistics["2048"]["mu"], "sigma": statistics["2048"]["sigma"]}
    moments |= {"mu_s": statistics["spatial"]["mu"], "sigma_s": statistics["spatial"]["sigma"]}
    np.savez(tmp_path / "adm.npz", images.permute(0, 2, 3, 1).numpy(), **moments)
    np.savez(tmp_path / "bare.npz", **{name: moments[name] for name in ("mu", "sigma")})
    recipe = parts.recipe(tmp_path / "direct", num_steps=[2], seeds=[0])
    direct = json.loads(sweep.evaluate(recipe).read_text())["cells"]

    def against(file: str, **changes) -> dict:
        reference = {"data": DataOptions(), "reference": str(tmp_path / file), **changes}
        return json.loads(
            sweep.evaluate(
                dataclasses.replace(recipe, output_dir=str(tmp_path / f"against {file}"), **reference)
            ).read_text()
        )

    through = against("adm.npz")
    for ours, theirs in zip(through["cells"], direct):
        assert ours["fid"] == pytest.approx(theirs["fid"], rel=1e-6)
        for metric in ("precision", "recall", "coverage"):
            assert ours[metric] == theirs[metric]
        assert ours["kid"] == pytest.approx(theirs["kid"]) and ours["fid_against_reconstructions"] is None
    digest = hashlib.sha256((tmp_path / "adm.npz").read_bytes()).hexdigest()
    assert through["protocol"]["reference"]["fingerprint"] == digest
    assert "Inception Distance" in through["metric"]
    bare = against("bare.npz")
    assert bare["cells"][0]["fid"] == pytest.approx({"2048": direct[0]["fid"]["2048"]}, rel=1e-6)
    assert bare["cells"][0]["precision"] is None
    page = (tmp_path / "against bare.npz" / "fid.md").read_text()
    assert "features `2048`" in page and "features `spatial`" not in page and "bare.npz" in page
    np.savez(tmp_path / "larger.npz", np.zeros((4, 32, 32, 3), np.uint8), **moments)
    with pytest.raises(ValueError, match=r"draws images of .* \(3, 16\), the reference has \(3, 32\); use another"):
        against("larger.npz")
    np.savez(tmp_path / "narrow.npz", mu=MU, sigma=SIGMA)
    with pytest.raises(ValueError, match="'2048' has 2 features, .* 16"):
        against("narrow.npz")


def test_a_file_that_does_not_say_its_size_takes_that_of_the_first_set(parts, inception, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(16), sigma=np.eye(16))
    images = {"val": f"{parts.data.root}/val"}
    recipe = parts.recipe(
        tmp_path / "out", data=DataOptions(), reference=str(tmp_path / "a.npz"), pipelines={}, images=images
    )
    checked = sweep.check(recipe)
    assert (checked.given["val"].image_size, checked.given["val"].channels) == (16, 3)
    assert "the reference has no floors" in checked.warnings
    with pytest.raises(ValueError, match=r"and data\.image_size=16: a reference folder or file stands for the images"):
        sweep.check(dataclasses.replace(recipe, data=DataOptions("fashion-mnist", image_size=16)))
    with pytest.raises(ValueError, match="reference_split='train': .* is a file of statistics, which has no splits"):
        sweep.check(dataclasses.replace(recipe, reference_split="train"))


def test_weights_that_nobody_released_are_told_of_beside_published_statistics(parts, inception, tmp_path, monkeypatch):
    other = dataclasses.replace(inception, is_inception=False, unreleased=True)
    monkeypatch.setattr(plan, "load_extractor", lambda name, device: other)
    np.savez(tmp_path / "a.npz", mu=np.zeros(16), sigma=np.eye(16))
    recipe = parts.recipe(tmp_path / "out", data=DataOptions(), reference=str(tmp_path / "a.npz"))
    with pytest.warns(UserWarning, match="no Inception FID and compares with no published number or statistics"):
        checked = sweep.check(recipe)
    assert any("not the released ones" in warning for warning in checked.warnings)


def test_published_statistics_judge_only_inceptions_features(parts, tmp_path):
    np.savez(tmp_path / "a.npz", mu=MU, sigma=SIGMA)
    recipe = parts.recipe(tmp_path / "out", data=DataOptions(), reference=str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="published statistics are of Inception"):
        sweep.check(recipe)


def test_known_files_are_told_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_files, "CACHE", tmp_path)
    np.savez(tmp_path / "mine.npz", mu=MU, sigma=SIGMA)
    content = (tmp_path / "mine.npz").read_bytes()
    git = subprocess.run(["git", "hash-object", tmp_path / "mine.npz"], capture_output=True, text=True, check=True)
    sha256 = hashlib.sha256(content).hexdigest()
    for digest in ("sha256:" + sha256, "git:" + git.stdout.strip()):
        known = KnownFile("mine.npz", (tmp_path / "mine.npz").as_uri(), digest, 16, "mine")
        monkeypatch.setitem(KNOWN, "mine", known)
        assert find_reference_file("mine") == (tmp_path / "mine.npz", sha256, known)
        assert find_reference_file(str(tmp_path / "mine.npz")) == (tmp_path / "mine.npz", sha256, known)
    monkeypatch.setattr(reference_files, "CACHE", tmp_path / "cache")
    assert find_reference_file("mine")[0].read_bytes() == content  # fetched
    (tmp_path / "cache" / "mine.npz").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not the file of git:"):
        find_reference_file("mine")
    monkeypatch.setitem(KNOWN, "gone", dataclasses.replace(known, file="gone.npz", url=tmp_path.as_uri() + "/gone"))
    with pytest.raises(OSError, match="cannot be fetched .* put the file at"):
        find_reference_file("gone")
    with pytest.raises(FileNotFoundError, match="by name are known adm-imagenet-256, mar-imagenet-256"):
        find_reference_file("nowhere.npz")
