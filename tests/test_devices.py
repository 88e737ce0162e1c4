"""What a machine is told about itself: units it lacks for short floats, and a compiler that is not there."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from test_training import recipe_in, world  # noqa: F401
from tiny_parts import save_pipeline

from xdlm_image.devices import LONGEST_WAIT, fast_dtype, process_group_timeout, warn_if_slow, why_not_compiled
from xdlm_image.drawing.opening import open_pipeline
from xdlm_image.processes import on_cpu
from xdlm_image.training.loop import TrainingRun

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "fast", "slow"),
    [
        ({"amx_bf16": False, "avx512_bf16": False, "amx_fp16": False, "avx512_fp16": False}, "float32", (True, True)),
        ({"amx_bf16": True, "avx512_bf16": True, "amx_fp16": False, "avx512_fp16": True}, "bfloat16", (False, False)),
        ({"amx_bf16": False, "avx512_bf16": True, "amx_fp16": False, "avx512_fp16": False}, "bfloat16", (False, True)),
        ({"neon": True}, "float32", (False, False)),  # nothing known is nothing told
    ],
)
def test_a_processor_without_units_for_short_floats(monkeypatch, capabilities, fast, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_dtype(CPU) == fast and fast_dtype(torch.device("meta")) == "float32"
    for dtype, is_slow in zip((torch.bfloat16, torch.float16, torch.float32), (*slow, False)):
        for device in (CPU, torch.device("meta")):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                warn_if_slow(device, dtype, "dtype='it'")
            assert len(told) == (is_slow and device == CPU)
            assert all("dtype='it': this processor has no units for" in str(warning.message) for warning in told)


@pytest.fixture
def own_accelerator():
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_training_and_drawing_tell(monkeypatch, tmp_path, world, own_accelerator):  # noqa: F811
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    with pytest.warns(UserWarning, match="mixed_precision='bf16': this processor has no units for bfloat16"):
        TrainingRun(recipe_in(world, mixed_precision="bf16"))
    with pytest.warns(UserWarning, match="dtype='bfloat16': this processor has no units"):
        open_pipeline(save_pipeline(tmp_path / "drawn", k=0.1, seed=2), CPU, dtype=torch.bfloat16)


def test_a_machine_without_a_compiler_says_so():
    """In a process of its own: PyTorch looks for its compiler once."""
    code = "import torch; from xdlm_image.devices import why_not_compiled; print(why_not_compiled(torch.device('cpu')))"
    environment = {**os.environ, "CXX": "/no/such/compiler"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "compiler" in told.stdout and told.stdout != "None\n"
    assert "CPUs only" in why_not_compiled(torch.device("meta"))


def test_processes_wait_longer_for_one_another_than_by_default():
    """Through accelerate to torch: only what differs from its defaults is handed on."""
    assert process_group_timeout().to_kwargs() == {"timeout": LONGEST_WAIT}
    assert LONGEST_WAIT.total_seconds() > 1800  # the longer default of torch's, that of gloo


@pytest.mark.parametrize(
    ("processes", "flag", "device", "wanted"),
    [
        ("1", None, None, False),  # alone: accelerate finds what there is
        ("1", "true", None, True),
        ("2", None, None, True),  # each would take itself for the only one
        ("2", None, "mps", True),
        ("2", None, "cuda", False),
        ("2", "true", "cuda", True),
    ],
)
def test_several_processes_without_a_gpu_each_run_on_cpus(monkeypatch, processes, flag, device, wanted):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if flag is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    there = None if device is None else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    assert on_cpu() is wanted
