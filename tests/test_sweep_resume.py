"""Sweeps that go on: what was finished is found again, and nothing else is taken for it."""

import copy
import dataclasses
import json
import shutil

import pytest
from test_sweep import _numbers
from tiny_parts import save_pipeline

from xdlm_image.drawing import draw
from xdlm_image.evaluation import sweep
from xdlm_image.evaluation.sweep import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """Output folder of a whole sweep."""
    return evaluate(parts.recipe(tmp_path_factory.mktemp("sweep"))).parent


def test_a_killed_sweep_goes_on_and_gives_the_same_numbers(parts, finished, tmp_path, monkeypatch):
    measured = []
    original = sweep.measure

    def dies_in_the_third_cell(extractor, batches, *rest):
        measured.append(batches.settings.num_steps)
        if len(measured) == 3:
            next(iter(batches))
            raise KeyboardInterrupt
        return original(extractor, batches, *rest)

    monkeypatch.setattr(sweep, "measure", dies_in_the_third_cell)
    recipe = parts.recipe(tmp_path, pipelines={"mdlm": parts.pipelines["mdlm"]})
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe)
    assert len(list((tmp_path / "cells").iterdir())) == 2
    evaluate(recipe)
    assert len(measured) == 3 + 2  # four cells, two of them were there
    assert _numbers(tmp_path) == [cell for cell in _numbers(finished) if cell["pipeline"] == "mdlm"]
    grid, strip = tmp_path / "grid_mdlm.png", tmp_path / "strip_mdlm.png"
    stamps = grid.stat().st_mtime_ns, strip.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "open_any_pipeline", lambda *args: pytest.fail("opened"))
        evaluate(recipe)
    assert len(measured) == 5  # nothing is measured twice, or drawn
    assert (grid.stat().st_mtime_ns, strip.stat().st_mtime_ns) == stamps
    pixels = grid.read_bytes()
    evaluate(dataclasses.replace(recipe, seeds=recipe.seeds[::-1]))
    assert len(measured) == 5 and grid.read_bytes() != pixels
    measured[:] = [None]  # dies in the second of two cells more
    with pytest.raises(KeyboardInterrupt):
        evaluate(dataclasses.replace(recipe, num_steps=[2, *recipe.num_steps]))
    assert [cell["num_steps"] for cell in _numbers(tmp_path)] == [2, 1, 1, 3, 3]  # with what was finished


def test_a_sweep_killed_in_every_block_draws_each_image_once(parts, finished, tmp_path, monkeypatch):
    drawn, original = [], draw.draw_codes

    def dies_after_each_block(pipeline, labels, indices, seed, settings):
        if len(drawn) % 2:
            drawn.append(None)
            raise KeyboardInterrupt
        drawn.append(indices)
        return original(pipeline, labels, indices, seed, settings)

    monkeypatch.setattr(draw, "draw_codes", dies_after_each_block)
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    recipe = parts.recipe(tmp_path, pipelines={"mdlm": parts.pipelines["mdlm"]}, num_steps=[3], seeds=[1])
    for _ in range(2):  # 18 images are three blocks of 7
        with pytest.raises(KeyboardInterrupt):
            evaluate(recipe)
    installed = sweep.versions()
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "versions", lambda: {"torch": "another"})
        evaluate(recipe)
    cell = json.loads((tmp_path / "fid.json").read_text())["cells"][0]
    assert [start["versions"] for start in cell["drawn_by"]] == [installed, {"torch": "another"}]
    assert cell["versions"] == installed and "drawn_by" not in (tmp_path / "fid.csv").read_text()
    blocks = [block for block in drawn if block is not None]
    assert [block[:2] for block in blocks] == [[0, 1], [7, 8], [14, 15]]
    assert {len(block) for block in blocks} == {7}  # the last is filled up, and cut off
    expected = [c for c in _numbers(finished) if (c["pipeline"], c["num_steps"], c["seed"]) == ("mdlm", 3, 1)]
    assert _numbers(tmp_path) == expected


def test_cells_of_another_protocol_are_not_taken_for_this_one(parts, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "sweep")
    changed = copy.deepcopy(parts.recipe(tmp_path / "sweep", num_steps=[3], seeds=[0], temperature=0.5))
    changed.pipelines = {"mdlm": parts.pipelines["mdlm"]}
    before = next(c for c in _numbers(finished) if (c["pipeline"], c["num_steps"], c["seed"]) == ("mdlm", 3, 0))
    evaluate(changed)
    assert _numbers(tmp_path / "sweep")[0]["fid"] != before["fid"]
    # other weights under the same name, and a damaged file
    changed.pipelines = {"mdlm": str(save_pipeline(tmp_path / "mdlm", k=0.0, seed=9))}
    changed.temperature = 1.0
    capfd.readouterr()
    evaluate(changed)
    assert _numbers(tmp_path / "sweep")[0]["fid"] != before["fid"]
    assert "1 result(s) of another protocol are left aside" in "".join(capfd.readouterr())
    changed.pipelines = {"mdlm": parts.pipelines["mdlm"]}
    cells = list((tmp_path / "sweep" / "cells").glob("mdlm-steps3-seed0-*.json"))
    for file in cells:
        file.write_text(json.dumps({**json.loads(file.read_text()), "result": {"kid": None}}))
    capfd.readouterr()
    evaluate(changed)
    assert "cannot be used (it has no fid); measuring again" in "".join(capfd.readouterr())
    assert _numbers(tmp_path / "sweep")[0]["fid"] == before["fid"]
    for file in cells:
        file.write_text(file.read_text()[:-20])
    for file in (tmp_path / "sweep" / "reference" / "statistics").rglob("pooled.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    evaluate(changed)
    after = _numbers(tmp_path / "sweep")[0]["fid"]
    assert after == pytest.approx(before["fid"], rel=1e-6)


def test_settings_that_change_with_time_are_found_again(parts, tmp_path, monkeypatch):
    """They are pairs, which a file holds as lists."""
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    axes = {"num_steps": [3], "seeds": [0], "feature_metrics": []}
    recipe = parts.recipe(tmp_path, temperature=[1, [1, 0.3]], guidance_scale=[[1.0, 2.0]], **axes)
    evaluate(recipe)
    pages = {name: (tmp_path / name).read_bytes() for name in ("fid.md", "fid.json", "fid_k.png")}
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "measure", lambda *args: pytest.fail("measured again"))
        evaluate(recipe)
        assert pages == {name: (tmp_path / name).read_bytes() for name in pages}
        evaluate(parts.recipe(tmp_path, temperature=[1.0, (1.0, 0.3)], guidance_scale=[(1, 2)], **axes))
        assert pages == {name: (tmp_path / name).read_bytes() for name in pages}
    evaluate(dataclasses.replace(recipe, seeds=[0, 1]))
    rows = [line for line in (tmp_path / "fid.md").read_text().splitlines() if "temperature 1 to 0.3 |" in line]
    assert len(rows) >= 4 and all(line.count("±") == 1 for line in rows)


def test_weights_that_are_replaced_meanwhile_are_not_taken_for_those_that_were_there(parts, tmp_path, monkeypatch):
    changing = tmp_path / "changing"
    shutil.copytree(parts.pipelines["mdlm"], changing)
    original = sweep.measure

    def measure_while_somebody_saves(*args):
        shutil.copytree(parts.pipelines["xdlm-0.1"], changing, dirs_exist_ok=True)
        return original(*args)

    monkeypatch.setattr(sweep, "measure", measure_while_somebody_saves)
    pipelines = {"first": parts.pipelines["mdlm"], "second": str(changing)}
    with pytest.raises(ValueError, match=r"pipelines\.second=.*changing': it was rewritten since"):
        evaluate(parts.recipe(tmp_path / "out", pipelines=pipelines, num_steps=[1], seeds=[0]))
    assert [cell["pipeline"] for cell in _numbers(tmp_path / "out")] == ["first"]


def test_features_are_kept_only_for_numbers_that_need_them(parts, tmp_path, monkeypatch):
    kept, original = [], sweep.measure
    monkeypatch.setattr(sweep, "measure", lambda *args: kept.append(args[-1]) or original(*args))
    for metrics in ([], ["coverage"]):
        evaluate(parts.recipe(tmp_path, num_steps=[1], seeds=[0], feature_metrics=metrics))
    assert kept == [None, None, 18, 18]
