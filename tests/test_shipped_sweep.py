"""A sweep over the shipped models, killed ten times on the way, and one on two processes: the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_sweep_processes import numbers

SHIPPED = Path(__file__).parents[1] / "shipped" / "fashion_mnist"
STEPS, SAMPLES, KILLS = [1, 2, 4, 8], 200, 10
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(output: Path, *launcher: str) -> list[str]:
    pipelines = {folder.name: str(folder) for folder in sorted((SHIPPED / "pipelines").iterdir())}
    return [
        sys.executable, *launcher, "-m", "xdlm_image.cli", "evaluate", f"--pipelines={json.dumps(pipelines)}",
        f"--extractor={SHIPPED / 'extractor'}", f"--reference={SHIPPED / 'reference'}", f"--output_dir={output}",
        f"--num_steps={STEPS}", f"--num_samples={SAMPLES}", "--batch_size=25",
    ]  # fmt: skip


def drawn(output: Path) -> int:
    """Images whose codes are on disk."""
    return sum(int((np.fromfile(file, "<f4") > 0).sum()) for file in output.glob("codes/*/seconds.bin"))


@pytest.mark.slow
def test_ten_kills_and_two_processes_change_nothing(tmp_path):
    whole, killed, two = tmp_path / "whole", tmp_path / "killed", tmp_path / "two"
    subprocess.run(command(whole), env=ENVIRONMENT, check=True)
    total = drawn(whole)
    assert total == 4 * len(STEPS) * SAMPLES
    for kill in range(KILLS):
        process = subprocess.Popen(command(killed), env=ENVIRONMENT)
        wanted = (kill + 1) * total // (KILLS + 1)
        deadline = time.time() + 600
        while process.poll() is None and drawn(killed) < wanted and time.time() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wanted <= drawn(killed) < total and not (killed / "report.html").exists()
    subprocess.run(command(killed), env=ENVIRONMENT, check=True)
    subprocess.run(command(two, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"), env=ENVIRONMENT, check=True)  # fmt: skip # noqa: E501

    wanted = dict(numbers(json.loads((whole / "fid.json").read_text())["cells"]))
    for output, loose in ((killed, 0.0), (two, 1e-6)):
        assert drawn(output) == total and (output / "report.html").stat().st_size > 100_000
        found = dict(numbers(json.loads((output / "fid.json").read_text())["cells"]))
        assert found.keys() == wanted.keys()
        for place, value in wanted.items():
            assert found[place] == (pytest.approx(value, rel=loose, abs=1e-12) if isinstance(value, float) else value)
        for folder in (whole / "codes").iterdir():
            assert (output / "codes" / folder.name / "codes.bin").read_bytes() == (folder / "codes.bin").read_bytes()
