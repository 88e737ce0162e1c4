"""diffusers' own testers on our transformer and pipeline, and a table of what ran, passed and does not apply.

Needs a checkout of diffusers' repository (its wheel has no tests), by preference of the tag that is installed:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    pytest tests/test_diffusers_conformity.py --diffusers-repository=diffusers

Write the `=`: of a path that stands alone pytest loads the conftest, which puts the checkout's own diffusers first.

Owns how they are run and reported; what they are given stands in `diffusers_testers.py`.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

TESTERS = Path(__file__).with_name("diffusers_testers.py")
NEEDS_DEVICE = re.compile("accelerator|CUDA|XPU", re.IGNORECASE)
# Tests that ask for an accelerator and need none. Where there is no other device they run once more with the CPU under
# a name that passes for one; all others that ask need a second device, its streams or its kernels.
CPU_CAN_STAND_IN = (
    "TestTransformer::test_sharded_checkpoints",
    "TestTransformer::test_sharded_checkpoints_with_variant",
    "TestTransformerMemory::test_layerwise_casting_memory",
    "TestPipelineMemory::test_layerwise_casting_inference",
)
SLOW_ON_A_CPU = (  # minutes of a C++ compiler: with --slow
    "TestTransformerCompile::test_torch_compile_recompilation_and_graph_break",
    "TestTransformerCompile::test_torch_compile_repeated_blocks",
    "TestTransformerCompile::test_compile_works_with_aot",
)


def checkout_version(repository: Path) -> str:
    source = repository / "src/diffusers/__init__.py"
    found = re.search(r'__version__ = "(.+)"', source.read_text()) if source.is_file() else None
    if not found or not (repository / "tests/models/testing_utils").is_dir():
        pytest.fail(f"--diffusers-repository {repository}: no checkout of diffusers of 0.40 or later, with its tests")
    return found[1]


def run_testers(repository: Path, folder: Path, tests: tuple[str, ...] = (), device: str | None = None) -> dict:
    """Outcomes by test, "class::name" -> (passed, failed or skipped, reason), of a pytest in its own process."""
    results = folder / f"results-{len(tests)}.xml"
    path = os.pathsep.join(filter(None, (str(repository), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if device is not None:
        environment["DIFFUSERS_TEST_DEVICE"] = device
    names = [f"{TESTERS}::{test}" for test in tests] or [str(TESTERS)]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-W", "ignore", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *names, *options, f"--junitxml={results}", "-o", "junit_family=xunit1"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: some test failed
        pytest.fail(f"the testers did not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped")
        name = f"{case.get('classname', '').rpartition('diffusers_testers')[2].strip('.')}::{case.get('name')}"
        if bad:
            outcomes[name] = ("failed", bad[0].text or bad[0].get("message") or "")
        elif skipped is not None:
            outcomes[name] = ("skipped", skipped.get("message") or "")
        else:
            outcomes[name] = ("passed", "")
    return outcomes


def table(outcomes: dict, stand_in: dict, headline: str) -> str:
    """What ran and passed, by class; what did not, by reason."""
    groups: dict[str, dict[str, list[str]]] = {"passed": {}, "wants another device": {}, "does not apply": {}}
    for name, (outcome, reason) in outcomes.items():
        test_class, _, test = name.rpartition("::")
        if outcome == "skipped" and stand_in.get(name, ("", ""))[0] == "passed":
            groups["passed"].setdefault(f"{test_class} (the CPU for an accelerator)", []).append(test)
        elif outcome == "passed":
            groups["passed"].setdefault(test_class, []).append(test)
        elif outcome == "skipped":
            kind = "wants another device" if NEEDS_DEVICE.search(reason) else "does not apply"
            groups[kind].setdefault(reason, []).append(name.removeprefix("::test_left_out"))
    count = {kind: sum(map(len, group.values())) for kind, group in groups.items()}
    failed = sum(outcome == "failed" for outcome, _ in outcomes.values())
    lines = [f"{headline}: {failed} failed, " + ", ".join(f"{n} {kind}" for kind, n in count.items())]
    for kind, group in groups.items():
        lines += [kind.upper()] + [f"  {title}: {', '.join(names)}" for title, names in group.items()]
    return "\n".join(lines)


@pytest.mark.diffusers_testers
def test_diffusers_own_testers(pytestconfig, tmp_path, record_property) -> None:
    repository = pytestconfig.getoption("--diffusers-repository").expanduser().resolve()
    version, installed = checkout_version(repository), installed_version("diffusers")
    outcomes = run_testers(repository, tmp_path)
    stand_in: dict = {}
    if not torch.accelerator.is_available():
        tests = CPU_CAN_STAND_IN + (SLOW_ON_A_CPU if pytestconfig.getoption("--slow") else ())
        stand_in = run_testers(repository, tmp_path, tests, device="cpu:0")
    headline = f"testers of diffusers {version} on diffusers {installed}"
    record_property("terminal summary", table(outcomes, stand_in, headline))

    failed = []
    for run in (outcomes, stand_in):
        failed += [f"{name}\n{text}" for name, (outcome, text) in run.items() if outcome == "failed"]
    if failed and version != installed:
        headline += f" (the tag v{installed} would compare like with like)"
    assert not failed, f"{headline}:\n" + "\n".join(failed)
    assert sum(outcome == "passed" for outcome, _ in outcomes.values()) >= 30  # not an empty run
