"""The demo on a tiny folder of models, laid out as the shipped one."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_parts import save_pipeline

from xdlm_image.cli import main
from xdlm_image.evaluation import demo as demo_module
from xdlm_image.evaluation import sweep
from xdlm_image.evaluation.references import reference
from xdlm_image.recipes import ReferenceRecipe
from xdlm_image.shipped_models import models_folder, shipped_pipelines

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")


@pytest.fixture(scope="module")
def models(parts, tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    folder = root / "shipped"
    save_pipeline(folder / "pipelines" / "udlm", k=1.0)
    shutil.copytree(parts.pipelines["mdlm"], folder / "pipelines" / "mdlm")
    shutil.copytree(parts.extractor, folder / "extractor")
    tokenizers = [str(folder / "pipelines" / "udlm" / "vqvae")]
    settings = {"tokenizers": tokenizers, "num_samples": [6], "device": "cpu"}
    reference(ReferenceRecipe(str(folder / "reference"), parts.data, str(folder / "extractor"), **settings))
    return folder


def test_the_demo_prints_tables_and_says_where_everything_is(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "QUICK", {**demo_module.QUICK, "num_samples": 6, "num_steps": [1, 2]})
    monkeypatch.setattr(sweep, "GRID_IMAGES", 1)
    arguments = ["demo", "--models", str(models), "--output_dir", str(tmp_path / "demo"), "--device", "cpu"]
    arguments += ["--compile", "false", "--dtype", "float32"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "6 images a cell (indicative)" in first and "Committed" not in first
    assert re.search(r"\| mdlm \| \d+\.\d+ \| \d+\.\d+ \|\n\| udlm \| \d+\.\d+", first)  # by rising k
    for path in re.findall(r"\S+\.(?:png|md|json)(?=\s|$)", first):
        assert (tmp_path / "demo").as_posix() in path and Path(path).stat().st_size > 100
    assert first.count("grid_") == 2
    (models / "evaluation").mkdir()
    shutil.copyfile(tmp_path / "demo" / "fid.json", models / "evaluation" / "fid.json")
    assert main(arguments) == 0  # goes on from its cells
    again = capsys.readouterr().out
    assert "Committed table, 6 images a cell, 1 sampling seeds" in again and again.count("| udlm |") == 2
    shutil.rmtree(models / "evaluation")


def test_it_draws_in_the_way_that_is_fast_here(models, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(demo_module, "evaluate", lambda recipe: asked.append(recipe) or tmp_path)
    monkeypatch.setattr(demo_module, "_summary", lambda *_: [])
    for units, why_not, expected in [
        ({"amx_bf16": True}, None, ("bfloat16", True)),
        ({"avx2": True}, "no compiler", ("float32", False)),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units, raising=False)
        monkeypatch.setattr(demo_module, "why_not_compiled", lambda device, why_not=why_not: why_not)
        assert main(["demo", "--models", str(models), "--device", "cpu"]) == 0
        assert (asked[-1].dtype, asked[-1].compile) == expected
        assert ("(no compiler): drawing takes about twice as long" in capsys.readouterr().err) == bool(why_not)
    assert main(["demo", "--models", str(models), "--dtype", "float16", "--compile", "true", "--device", "cpu"]) == 0
    assert (asked[-1].dtype, asked[-1].compile) == ("float16", True)  # what is asked for is done, whatever it takes


def test_without_models_it_says_where_they_are(tmp_path, capsys):
    assert main(["demo", "--models", str(tmp_path)]) == 2
    assert "clone the repository" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="carries no weights"):
        models_folder(str(tmp_path / "none"))
    (tmp_path / "pipelines").mkdir()
    with pytest.raises(FileNotFoundError, match="no pipeline"):
        shipped_pipelines(tmp_path)
