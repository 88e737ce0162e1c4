"""A sweep on two processes, killed on the way, against the same sweep on one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import psutil
import pytest

from xdlm_image.devices import LONGEST_WAIT
from xdlm_image.evaluation import sweep
from xdlm_image.evaluation.sweep import evaluate
from xdlm_image.processes import process_state

LOOSE = 1e-6  # sums are added in another order, which FID's matrix root magnifies where images are as few as here
pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")


def numbers(value, path=""):
    """Every number below a JSON value with its place, but for times and what counts processes."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("sampling_seconds", "images_per_second", "processes"):
                yield from numbers(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{path}[{i}]")
    else:
        yield path, value


def test_verbs_ask_for_processes_that_wait_long(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(accelerate, "PartialState", dict)
    assert process_state() == {"cpu": True, "timeout": LONGEST_WAIT}


def test_two_processes_killed_on_the_way_give_what_one_gives(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    one = parts.recipe(tmp_path / "one", num_steps=[2], seeds=[0, 1], images_dir=str(tmp_path / "images of one"))
    whole = json.loads(evaluate(one).read_text())
    options = [
        f"--pipelines={json.dumps(parts.pipelines)}",
        f"--extractor={parts.extractor}",
        f"--output_dir={tmp_path / 'two'}",
        f"--images_dir={tmp_path / 'images of two'}",
        f"--data.root={parts.data.root}",
        *("--data.name=folder", "--data.image_size=16", "--data.channels=3"),
        *("--num_steps=[2]", "--num_samples=18", "--seeds=[0,1]", "--batch_size=7"),
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "xdlm_image.cli", "evaluate", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while process.poll() is None and time.time() < deadline and not list((tmp_path / "two" / "cells").glob("*.json")):
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)  # which have process groups of their own
    for running in [*workers, process]:
        running.kill()  # in the second of four cells
    process.wait()
    psutil.wait_procs(workers, timeout=60)
    killed = {path: path.stat().st_mtime_ns for path in (tmp_path / "two" / "cells").glob("*.json")}
    assert 1 <= len(killed) < 4
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in killed.items())
    content = json.loads((tmp_path / "two" / "fid.json").read_text())
    assert content["cells"][-1]["processes"] == 2
    for part in ("cells", "floors"):
        ours, theirs = dict(numbers(content[part])), dict(numbers(whole[part]))
        assert ours.keys() == theirs.keys() and len(ours) > 20
        for place, value in theirs.items():
            if isinstance(value, float):
                assert ours[place] == pytest.approx(value, rel=LOOSE, abs=1e-12), place
            elif "sha256" not in place and not place.endswith("folder"):
                assert ours[place] == value, place
    for drawn in sorted((tmp_path / "one" / "codes").iterdir()):
        again = Path(tmp_path, "two", "codes", drawn.name)
        assert (again / "codes.bin").read_bytes() == (drawn / "codes.bin").read_bytes()
    pictures = [path for path in Path(one.images_dir).rglob("*") if path.is_file()]
    assert len(pictures) == 4 * (18 + 1)
    for path in pictures:
        assert path.read_bytes() == (tmp_path / "images of two" / path.relative_to(one.images_dir)).read_bytes()
