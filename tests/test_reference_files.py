"""Statistics that others published: read as data, and refused where they are something else."""

import pickle

import numpy as np
import pytest
import torch

from xdlm_image.evaluation.fid import fid_from_statistics
from xdlm_image.evaluation.reference_files import read_moments
from xdlm_image.evaluation.statistics import StreamedStatistics

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


def test_tensors_and_arrays_of_a_pt_file(tmp_path):
    torch.save({"mu": torch.tensor(MU).float(), "sigma": torch.tensor(SIGMA)}, tmp_path / "a.pt")
    found = read_moments(tmp_path / "a.pt")
    assert set(found) == {"2048"} and found["2048"].to_fid()["sigma"] == pytest.approx(SIGMA)


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
    (tmp_path / "cut.npz").write_bytes((tmp_path / "shape.npz").read_bytes()[:40])
    refused("cut.npz", "cannot be read")
