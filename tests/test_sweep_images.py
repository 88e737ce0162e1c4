"""Images on disk around a sweep: judged as a pipeline's, written where it is asked for, known when they change."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import CLASSES, save_pipeline

from xdlm_image.data.images import open_images
from xdlm_image.drawing import draw
from xdlm_image.drawing.draw import decode
from xdlm_image.drawing.opening import open_pipeline
from xdlm_image.evaluation import sweep
from xdlm_image.evaluation.sweep import evaluate
from xdlm_image.evaluation.tables import number
from xdlm_image.processes import only_command

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*compare like with like:UserWarning"),
]


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """Output folder of a sweep of one cell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_draw_pictures", lambda *args: None)
        pipelines = {"mdlm": parts.pipelines["mdlm"]}
        recipe = parts.recipe(tmp_path_factory.mktemp("sweep"), pipelines=pipelines, num_steps=[3], seeds=[1])
        return evaluate(recipe).parent


def _numbers(folder):
    """The cells without what differs from run to run: times."""
    cells = json.loads((folder / "fid.json").read_text())["cells"]
    drop = ("sampling_seconds", "images_per_second")
    return [{key: value for key, value in cell.items() if key not in drop} for cell in cells]


def test_images_on_disk_are_judged_as_the_pipeline_that_drew_them(parts, finished, tmp_path, capsys):
    images = {
        name: str(tmp_path / file) for name, file in (("png", "drawn"), ("npz", "drawn.npz"), ("bare", "bare.npz"))
    }
    recipe = parts.recipe(tmp_path / "out", pipelines={}, images=images)
    (cell,) = _numbers(finished)
    folder = next((finished / "codes").glob("mdlm-steps3-seed1-*"))
    codes = np.memmap(folder / "codes.bin", "<u2", "r").reshape(-1, 4, 4)[:18].astype(np.int64)
    pipe = open_pipeline(parts.pipelines["mdlm"], torch.device("cpu"))
    # as many at once as the sweep decoded: with others a pixel may be rounded otherwise
    pixels = torch.cat([decode(pipe, some) for some in torch.from_numpy(codes).split(recipe.batch_size)])
    pixels = pixels.permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        place = tmp_path / "drawn" / CLASSES[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:02d}.png")
    np.savez(tmp_path / "drawn.npz", pixels, np.arange(18) % 3)
    np.savez(tmp_path / "bare.npz", pixels)
    capsys.readouterr()
    content = json.loads(evaluate(recipe).read_text())
    assert "cells:" not in capsys.readouterr().err  # no bar of nothing
    found = {result["name"]: result for result in content["image_sets"]}
    for name in images:
        assert found[name]["num_images"] == 18 and found[name]["fid"] == pytest.approx(cell["fid"], rel=1e-6)
        for metric in ("precision", "recall", "coverage"):
            assert found[name][metric] == cell[metric]
    for name in ("png", "npz"):
        assert found[name]["class_accuracy"] == cell["class_accuracy"]
        assert found[name]["kid_of_classes"] == pytest.approx(cell["kid_of_classes"], rel=1e-3)
    assert found["bare"]["class_accuracy"] is None and found["bare"]["kid_of_classes"] == {}
    assert content["cells"] == [] and not (tmp_path / "out" / "fid.png").exists()
    page = (tmp_path / "out" / "fid.md").read_text()
    assert re.search(r"\| npz \| 18 \| \d+\.\d+ \|", page) and "3 steps" not in page
    floor = content["floors"]["train_against_reference"]
    told = "Floors: 18 training images against the reference: FID"
    assert f"{told} `pooled` {number(floor['fid']['pooled'])}, FID `spatial`" in page
    assert f"class accuracy (%) {number(100 * floor['class_accuracy'])}." in page
    again = json.loads(evaluate(dataclasses.replace(recipe, images={"other": images["png"]})).read_text())
    assert again["image_sets"][0]["fid"] == found["png"]["fid"]
    with pytest.raises(ValueError, match="images=.*the name 'mdlm' stands for a pipeline too"):
        parts.recipe(tmp_path, images={"mdlm": "a"})


def test_drawn_images_are_written_where_it_is_asked_for(parts, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    shutil.copytree(finished, tmp_path / "out")
    recipe = parts.recipe(tmp_path / "out", pipelines={"mdlm": parts.pipelines["mdlm"]}, num_steps=[3], seeds=[1])
    asking = dataclasses.replace(recipe, images_dir=str(tmp_path / "images"))
    folder = tmp_path / "images" / "mdlm-steps3-seed1"

    def written() -> list[str]:
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))

    with monkeypatch.context() as patch:  # codes are stored, so that a finished cell is only decoded
        patch.setattr(draw, "draw_codes", None)
        evaluate(asking)
        everything = sorted(f"{CLASSES[i % 3]}/{i:07d}.png" for i in range(18))
        assert written() == everything
        for lose in (Path.unlink, lambda path: path.rename(folder / "ant" / "0000021.png")):  # as of a larger set
            lose(folder / "ant" / "0000003.png")
            evaluate(asking)
            assert written() == everything
        asking = dataclasses.replace(asking, images_npz=True)
        for lose in (
            lambda: None,
            (folder / "bee, wasp" / "0000004.png").unlink,
        ):  # whole, and decoded anew
            lose()
            evaluate(asking)
            with np.load(folder / "images.npz") as packed:
                assert packed["arr_0"].dtype == np.uint8 and packed["arr_0"].shape == (18, 16, 16, 3)
                for name, pixels in zip(sorted(everything, key=lambda name: name[-11:]), packed["arr_0"]):
                    assert np.array_equal(np.asarray(Image.open(folder / name)), pixels)
                assert packed["arr_1"].tolist() == [i % 3 for i in range(18)]
        patch.setattr(sweep, "measure", None)
        stamp = (folder / "images.npz").stat().st_mtime_ns
        evaluate(asking)  # nothing is missing
        assert (folder / "images.npz").stat().st_mtime_ns == stamp
    cell = _numbers(tmp_path / "out")[0]
    assert [cell] == _numbers(finished)
    images = {"x": str(folder), "npz": str(folder / "images.npz")}
    judged = parts.recipe(tmp_path / "judged", pipelines={}, images=images)
    for found in json.loads(evaluate(judged).read_text())["image_sets"]:
        assert found["fid"] == pytest.approx(cell["fid"], rel=1e-9, abs=1e-9) and found["num_images"] == 18
        for name in ("kid", "kid_of_classes", "precision", "recall", "coverage", "class_accuracy"):
            assert found[name] == cell[name], name
    pixels = {path: path.read_bytes() for path in folder.rglob("*.png")}
    with pytest.raises(ValueError, match="images_dir: .*mdlm-steps3-seed1 holds other images than would be written"):
        evaluate(dataclasses.replace(asking, pipelines={"mdlm": parts.pipelines["xdlm-0.1"]}))  # under this name
    (folder / "about.json").rename(tmp_path / "about.json")
    with pytest.raises(ValueError, match="holds other images"):
        evaluate(asking)  # they may be anybody's
    assert pixels == {path: path.read_bytes() for path in folder.rglob("*.png")}
    with pytest.raises(ValueError, match="images_dir='a': needs pipelines"):
        parts.recipe(tmp_path, pipelines={}, images={"x": "b"}, images_dir="a")
    with pytest.raises(ValueError, match="images_npz=True: needs images_dir"):
        parts.recipe(tmp_path, images_npz=True)


def test_images_that_were_written_anew_are_measured_anew(parts, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    root = tmp_path / "images"
    shutil.copytree(parts.data.root, root)

    def rewrite(flip: bool) -> None:
        for file in (root / "val").rglob("*.png"):
            with Image.open(file) as picture:
                pixels = np.array(picture)
            Image.fromarray(255 - pixels if flip else pixels).save(file, format="BMP")  # always as large

    def fids() -> list[dict[str, float]]:
        content = json.loads(evaluate(recipe).read_text())
        return [found["fid"] for found in (*content["cells"], *content["image_sets"])]

    data = dataclasses.replace(parts.data, root=str(root))
    pipelines, images = {"mdlm": parts.pipelines["mdlm"]}, {"val": str(root / "val")}
    recipe = parts.recipe(tmp_path / "out", data=data, pipelines=pipelines, images=images, num_steps=[1], seeds=[0])
    rewrite(flip=False)
    before, fingerprint = fids(), open_images(data, "test").fingerprint
    assert before[1]["pooled"] == pytest.approx(0, abs=1e-3)  # the reference against itself
    capfd.readouterr()
    assert fids() == before and "since" not in "".join(capfd.readouterr())
    rewrite(flip=True)
    assert open_images(data, "test").fingerprint == fingerprint  # which does not see it
    after = fids()
    assert after[0] != before[0] and after[1]["pooled"] == pytest.approx(0, abs=1e-3)
    assert "were written since these statistics were computed; computing them again" in "".join(capfd.readouterr())


def test_images_of_an_unconditional_pipeline_have_no_class(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    free = {"free": str(save_pipeline(tmp_path / "free", num_classes=None))}
    recipe = parts.recipe(tmp_path / "out", pipelines=free, num_steps=[1], seeds=[0])
    recipe = dataclasses.replace(recipe, images_dir=str(tmp_path / "images"), images_npz=True)
    content = json.loads(evaluate(recipe).read_text())
    (cell,) = content["cells"]
    assert cell["kid"] is not None and cell["kid_of_classes"] == {} and cell["class_accuracy"] is None
    assert content["protocol"]["class_balance"] is content["protocol"]["samples_per_class"] is None
    page = (tmp_path / "out" / "fid.md").read_text()
    assert "worst class" not in page and "18 images a cell; seeds 0" in page
    folder = tmp_path / "images" / "free-steps1-seed0"
    assert len(list((folder / "images").glob("*.png"))) == 18
    with np.load(folder / "images.npz") as packed:
        assert packed.files == ["arr_0"]


def test_codes_that_are_judged_anew_keep_who_drew_them(parts, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_draw_pictures", lambda *args: None)
    shutil.copytree(finished, tmp_path / "out")
    recipe = parts.recipe(tmp_path / "out", pipelines={"mdlm": parts.pipelines["mdlm"]}, num_steps=[3], seeds=[1])
    monkeypatch.setattr(draw, "draw_codes", None)
    monkeypatch.setattr(sweep, "device_name", lambda device: "another machine")
    (before,) = _numbers(finished)
    (cell,) = json.loads(evaluate(dataclasses.replace(recipe, batch_size=9, feature_metrics=[])).read_text())["cells"]
    assert cell["kid"] is None and cell["batch_size"] == 7 and cell["device"] == before["device"] != "another machine"
    assert "drawn_by" not in cell


def test_two_commands_on_one_folder_are_refused(parts, tmp_path):
    with only_command(tmp_path, True), pytest.raises(ValueError, match="another command is at work there"):
        evaluate(parts.recipe(tmp_path))
    assert list(tmp_path.iterdir()) == []
