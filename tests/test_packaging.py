"""The wheel: builds, holds code and recipes and no weights, and works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PROGRAM = """
import xdlm_image, xdlm_image.pipelines
from pathlib import Path
assert Path(xdlm_image.__file__).is_relative_to(Path({target!r})), xdlm_image.__file__
assert Path(xdlm_image.pipelines.__file__).is_relative_to(Path({target!r}))
from xdlm_image import XDLMPipeline, XDLMProcess, XDLMScheduler, XDLMTransformer2DModel, __version__
from xdlm_image.cli import parse, shipped_recipes
assert parse("train", ["--config", "fashion_mnist/mdlm"]).process.k == 0.0, shipped_recipes()
print(__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes build/ beside the source: not into the checkout
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (CHECKOUT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((CHECKOUT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def test_holds_code_and_recipes_and_no_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {i.filename: i.file_size for i in archive.infolist()}
    assert {
        "xdlm_image/py.typed",
        "xdlm_image/pipelines/pipeline_xdlm.py",
        "xdlm_image/configs/fashion_mnist/mdlm.yaml",
    } <= set(names)
    tracked = subprocess.run(
        ["git", "ls-files", "xdlm_image", "pipelines"], cwd=CHECKOUT, capture_output=True, check=True, text=True
    )
    for name in tracked.stdout.split():
        assert (name if name.startswith("xdlm_image") else "xdlm_image/" + name) in names
    assert not [n for n in names if n.endswith((".safetensors", ".pt", ".npz"))] and sum(names.values()) < 2_000_000


def test_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(target=str(target))],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wheel.name.split("-")[1]
