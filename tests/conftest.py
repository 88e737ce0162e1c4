"""Settings for every test: one thread (tiny tensors on busy cores), and the same hypothesis examples in every run."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; subprocesses inherit it

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")
torch.set_num_threads(1)


def pytest_configure(config) -> None:
    """Tests marked gpu run alone (`-m gpu`); all others are the CPU's, and find no GPU."""
    expression = config.option.markexpr
    if "gpu" not in expression or "not gpu" in expression:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is asked for; subprocesses inherit it
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton: its kernels then run on the CPU


def pytest_addoption(parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    repository = os.environ.get("DIFFUSERS_REPOSITORY")
    parser.addoption(
        "--diffusers-repository",
        type=Path,
        default=Path(repository) if repository else None,
        help="checkout of diffusers' repository, whose own testers then run too (or DIFFUSERS_REPOSITORY)",
    )


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config, items) -> None:
    """Skip, visibly, what this run or this machine cannot do; where there is a GPU, kernels are tried there."""
    for item in items:
        if "kernel" in item.keywords and torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "diffusers_testers" in item.keywords and config.getoption("--diffusers-repository") is None:
            item.add_marker(pytest.mark.skip(reason="diffusers_testers: run with --diffusers-repository=PATH"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device, or not asked for with -m gpu"))


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what tests recorded as `terminal summary`: it shows whether they pass or fail, and with workers too."""
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, text in getattr(report, "user_properties", ()):
            if name == "terminal summary" and report.when == "call":
                terminalreporter.section(report.nodeid)
                terminalreporter.write_line(text)


@pytest.fixture
def modules(tmp_path, monkeypatch) -> Iterator[Path]:
    """An own cache of remote code, of which nothing stays in this process."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "modules"
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Images, an extractor trained on them and two pipelines, for tests that draw and judge: read, never changed."""
    from tiny_parts import build_parts

    return build_parts(tmp_path_factory.mktemp("parts"))
