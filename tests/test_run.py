"""`./run` and `shipped/train.sh`: what they say, and the whole path from raw images to a folder of models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xdlm_image.data.images import DEBIAN_FASHION_MNIST

ROOT = Path(__file__).parents[1]


def call(*command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_run_tells_what_it_can_do_and_refuses_the_rest(tmp_path):
    told = call("./run", "--help")
    assert told.returncode == 0 and all(f"./run {what}" in told.stdout for what in ("demo", "app", "tests"))
    wrong = call("./run", "dmeo")
    assert wrong.returncode == 2 and "'dmeo' is none of demo, app and tests" in wrong.stderr
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.9.1'\nexit 1\n")
    old.chmod(0o755)
    refused = call("./run", "demo", PYTHON=str(old), VENV=str(tmp_path / "venv"))
    assert refused.returncode == 2 and "Python 3.9.1 will not do" in refused.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("what", ["demo", "app"])
def test_run_uses_an_environment_that_is_there(tmp_path, what):
    """A stamp newer than pyproject.toml: nothing is installed again."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "bin" / "xdlm-image").write_text('#!/bin/sh\necho "xdlm-image $*"\n')
    (tmp_path / "bin" / "xdlm-image").chmod(0o755)
    (tmp_path / f".installed-{what}").touch()
    done = call("./run", what, "--full", VENV=str(tmp_path))
    assert done.stdout == f"xdlm-image {what} --full\n", done.stderr


def test_training_tells_its_sizes():
    told = call("shipped/train.sh")
    assert told.returncode == 2 and all(f"shipped/train.sh {size}" in told.stdout for size in ("cpu", "gpu", "smoke"))
    told = call("shipped/training_seed.sh", "one")
    assert told.returncode == 2 and "shipped/training_seed.sh 1" in told.stdout


@pytest.mark.slow  # every verb once, on Fashion-MNIST: minutes
@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_whole_path_in_small(tmp_path):
    places = {"RUNS": str(tmp_path / "runs"), "MODELS": str(tmp_path / "models")}
    for _ in range(2):  # the second time everything is there
        done = call("shipped/train.sh", "smoke", **places)
        assert done.returncode == 0, done.stderr[-3000:]
    assert f"xdlm-image demo --models {tmp_path / 'models'}" in done.stdout
    models = tmp_path / "models"
    content = json.loads((models / "evaluation" / "fid.json").read_text())
    assert len(content["cells"]) == 8
    assert {name: p["scheduler"]["k"] for name, p in content["protocol"]["pipelines"].items()} == {
        "mdlm": 0.0, "xdlm-0.1": 0.1, "xdlm-0.5": 0.5, "udlm": 1.0,
    }  # fmt: skip
    judge = content["protocol"]["extractor"]["classifier"]["weights_sha256"]
    assert judge != content["protocol"]["extractor"]["weights_sha256"]
    for name in ("fid_nelbo.png", "nelbo.json", "nelbo.md"):
        assert (models / "evaluation" / name).stat().st_size > 500
    for name in ("recipe.yaml", "metrics.jsonl"):
        assert (models / "training" / "xdlm-0.5" / name).stat().st_size > 100
    assert (models / "training" / "curves.png").stat().st_size > 1000
