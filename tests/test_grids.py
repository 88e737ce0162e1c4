"""Grids of images and the verb `sample`."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import CLASSES, save_pipeline

from xdlm_image.drawing import sample as verb
from xdlm_image.drawing.given_images import GivenImages
from xdlm_image.drawing.grids import GAP, class_ids, save_grid
from xdlm_image.drawing.opening import open_pipeline
from xdlm_image.drawing.sample import sample
from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.recipes import SampleRecipe


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "p")


def _recipe(pipeline, output, **changes):
    values = {"num_steps": 2, "images_per_class": 3, "batch_size": 4, "device": "cpu", **changes}
    return SampleRecipe(pipeline=str(pipeline), output=str(output), **values)


def test_a_grid_holds_each_pixel_at_its_place(tmp_path):
    images = torch.randint(0, 256, (2, 3, 1, 60, 60), dtype=torch.uint8)  # large enough not to be enlarged
    path = save_grid(tmp_path / "sub" / "grid.png", images)
    picture = np.array(Image.open(path).convert("L"))
    assert picture.shape == (GAP + 2 * (60 + GAP), GAP + 3 * (60 + GAP))
    for row in range(2):
        for column in range(3):
            y, x = GAP + row * (60 + GAP), GAP + column * (60 + GAP)
            np.testing.assert_array_equal(picture[y : y + 60, x : x + 60], images[row, column, 0].numpy())
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_small_images_are_enlarged_and_names_take_room(tmp_path):
    images = torch.zeros(2, 2, 3, 28, 28, dtype=torch.uint8)
    plain = np.array(Image.open(save_grid(tmp_path / "a.png", images)))
    assert plain.shape == (GAP + 2 * (56 + GAP), GAP + 2 * (56 + GAP), 3)
    named = np.array(Image.open(save_grid(tmp_path / "b.png", images, ["ant", "bee"], ["1", "2"], "a title")))
    assert named.shape[0] > plain.shape[0] and named.shape[1] > plain.shape[1]
    margin = named[-2 * (56 + GAP) : -(56 + GAP), : named.shape[1] - plain.shape[1]]
    assert margin.min() < 100  # the first row's name is written left of it
    broken = np.array(Image.open(save_grid(tmp_path / "c.png", images, ["a\nt", "bee"], ["1\r\n", "2"])))
    whole = np.array(Image.open(save_grid(tmp_path / "d.png", images, ["a t", "bee"], ["1", "2"])))
    np.testing.assert_array_equal(broken, whole)  # a name may come from anywhere


def test_wrong_grids_are_refused(tmp_path):
    images = torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="row_names: 1 names"):
        save_grid(tmp_path / "a.png", images, ["one"])
    with pytest.raises(ValueError, match="float32"):
        save_grid(tmp_path / "a.png", images.float())
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\)"):
        save_grid(tmp_path / "a.png", images[0])
    assert not list(tmp_path.iterdir())


def test_sampling_does_not_depend_on_the_batch(pipeline, tmp_path):
    a = sample(_recipe(pipeline, tmp_path / "a.png", images_dir=str(tmp_path / "a")))
    b = sample(_recipe(pipeline, tmp_path / "b.png", images_dir=str(tmp_path / "b"), batch_size=9))
    files = [path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.png")]
    names = sorted(files, key=os.path.basename)
    assert names == [f"{CLASSES[i // 3]}/{i:07d}.png" for i in range(9)]
    given = GivenImages(tmp_path / "a", 3, 16, CLASSES)
    assert given.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and not given.notes  # as `evaluate --images` takes them
    pictures = [np.array(Image.open(tmp_path / "a" / name)).astype(int) for name in names]
    for name, picture in zip(names, pictures):
        other = np.array(Image.open(tmp_path / "b" / name)).astype(int)
        assert picture.shape == (16, 16, 3) and np.abs(picture - other).max() <= 1
    assert len({picture.tobytes() for picture in pictures}) == 9  # nine images, none twice
    assert np.abs(np.array(Image.open(a)).astype(int) - np.array(Image.open(b))).max() <= 1
    c = sample(_recipe(pipeline, tmp_path / "c.png", seed=1))
    assert np.abs(np.array(Image.open(a)).astype(int) - np.array(Image.open(c))).max() > 10


def test_a_sampler_draws_the_grid_the_single_images_and_the_trace(pipeline, tmp_path):
    drawn = {}
    for sampler in (None, "ancestral", "halton"):
        recipe = _recipe(pipeline, tmp_path / f"{sampler}.png", sampler=sampler, trace="codes", trace_images=3)
        drawn[sampler] = np.array(Image.open(sample(recipe))), np.load(tmp_path / f"{sampler}.trace.npz")["codes"]
    for one, other in zip(drawn[None], drawn["ancestral"]):
        assert np.array_equal(one, other)
    for one, other in zip(drawn[None], drawn["halton"]):
        assert one.shape == other.shape and not np.array_equal(one, other)
    masks = (drawn["halton"][1] == drawn["halton"][1].max()).sum((2, 3))  # (states, images)
    assert masks[2].max() == 0 and (masks[1] < masks[0]).all()


@pytest.mark.filterwarnings("ignore:.*no units for bfloat16:UserWarning")
def test_the_network_computes_in_the_dtype_that_is_asked_for(pipeline, tmp_path, monkeypatch):
    drawn = []
    original = verb.class_grid
    monkeypatch.setattr(verb, "class_grid", lambda pipe, *given: drawn.append(pipe) or original(pipe, *given))
    for dtype in ("float32", "bfloat16"):
        sample(_recipe(pipeline, tmp_path / f"{dtype}.png", dtype=dtype))
    assert [pipe.transformer.dtype for pipe in drawn] == [torch.float32, torch.bfloat16]
    assert [pipe.vqvae.dtype for pipe in drawn] == [torch.float32] * 2


def test_a_pipeline_without_masks_takes_no_order(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "class_grid", lambda *args: pytest.fail("drawn"))
    udlm = save_pipeline(tmp_path / "udlm", k=1.0)
    with pytest.raises(ValueError, match="sampler='confidence': k=1.0: uniform noise has no masks"):
        sample(_recipe(udlm, tmp_path / "x.png", sampler="confidence"))


def test_a_fresh_process_can_sample(pipeline, tmp_path):
    """diffusers loads only classes whose modules are imported, and here nothing but the verb is."""
    code = (
        "import sys; from xdlm_image.drawing.sample import sample; from xdlm_image.recipes import SampleRecipe; "
        "sample(SampleRecipe(pipeline=sys.argv[1], output=sys.argv[2], num_steps=1, images_per_class=1, device='cpu'))"
    )
    command = [sys.executable, "-c", code, str(pipeline), str(tmp_path / "x.png")]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert Image.open(tmp_path / "x.png").height >= 3 * 56


def test_classes_by_id_by_name_and_by_synonym(pipeline, tmp_path):
    by_id = sample(_recipe(pipeline, tmp_path / "id.png", class_labels=["1", "2"]))
    by_name = sample(_recipe(pipeline, tmp_path / "name.png", class_labels=["Wasp", CLASSES[2]]))
    assert np.array_equal(np.array(Image.open(by_id)), np.array(Image.open(by_name)))
    whole = sample(_recipe(pipeline, tmp_path / "all.png", class_labels=None))
    assert Image.open(whole).height > Image.open(by_id).height


def test_a_name_goes_before_an_id_and_one_label_needs_no_list(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    index["id2label"] = {"0": "2", "1": "bee", "2": "5"}
    (tmp_path / "p" / "model_index.json").write_text(json.dumps(index))
    opened = open_pipeline(tmp_path / "p", torch.device("cpu"))
    assert class_ids(opened, ["2", 2, "1", "5", "bee"]) == [0, 2, 1, 2, 1]
    assert class_ids(opened, "5") == [2] == class_ids(opened, 2)
    assert class_ids(opened, "bee") == [1] and class_ids(opened, 0) == [0] and class_ids(opened, None) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"class_labels holds 5: the classes are 0 to 2"):
        class_ids(opened, 5)
    with pytest.raises(ValueError, match=r"bee,5.*; several stand in brackets, as in '\[bee,5\]'"):
        class_ids(opened, "bee,5")


def test_places_that_cannot_be_written_are_found_before_drawing(pipeline, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("drawn")

    monkeypatch.setattr(verb, "class_grid", never)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="output=.*cannot be written"):
        sample(_recipe(pipeline, tmp_path / "file" / "x.png"))
    with pytest.raises(OSError, match="images_dir=.*cannot be written"):
        sample(_recipe(pipeline, tmp_path / "x.png", images_dir=str(tmp_path / "file")))


def test_images_of_two_calls_are_not_mixed(pipeline, tmp_path):
    recipe = _recipe(pipeline, tmp_path / "a.png", images_dir=str(tmp_path / "images"))
    sample(recipe)
    sample(_recipe(pipeline, tmp_path / "a.png", images_dir=str(tmp_path / "images"), seed=3))  # every one is replaced
    with pytest.raises(ValueError, match=r"images_dir=.*holds ant/0000001.png and 7 more images of another call"):
        sample(_recipe(pipeline, tmp_path / "a.png", images_dir=str(tmp_path / "images"), images_per_class=1))


def test_images_are_not_written_among_the_folders_of_a_run(pipeline, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="images_dir=.*holds the folder 'checkpoints', which is no class .* nothing el"
    ):
        sample(_recipe(pipeline, tmp_path / "a.png", images_dir=str(tmp_path / "run")))
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "checkpoints"]
    sample(_recipe(pipeline, tmp_path / "beside" / "a.png", images_dir=str(tmp_path / "beside"), class_labels="ant"))
    sample(_recipe(pipeline, tmp_path / "beside" / "a.png", images_dir=str(tmp_path / "beside")))


def test_wrong_requests_are_refused_before_anything_is_drawn(pipeline, tmp_path, monkeypatch):
    cases = [
        (dict(class_labels=["dragonfly"]), "dragonfly"),
        (dict(class_labels=["3"]), "'3'.*0 to 2"),
        (dict(class_labels=["-1"]), "'-1'"),
        (dict(class_labels=[]), "at least one class"),
        (dict(temperature=0.0), "temperature=0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(seed=2**20), "seed=1048576"),
        (dict(seed="one"), "seed='one': must be a whole number in"),
        (dict(num_steps=10**8), "num_inference_steps=100000000: .*num_steps of a pipeline"),
        (dict(images_per_class=2**19), "images_per_class=524288: of 3 classes; at most 262144 images"),
        (dict(images_per_class=2**17), "images_per_class=131072: of 3 classes; at most 262144 images"),
    ]
    monkeypatch.setattr(XDLMTransformer2DModel, "forward", lambda *_, **__: pytest.fail("the network has run"))
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            sample(_recipe(pipeline, tmp_path / "x.png", **changes))
    with pytest.raises(ValueError, match=r"x\.jpg.*\.png"):
        sample(_recipe(pipeline, tmp_path / "x.jpg"))
    for changes, message in (
        (dict(image="nothing.png"), "image='nothing.png': no such file; name a picture"),
        (dict(image=str(pipeline)), "image='.*': a folder, not a file; name a picture"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            sample(_recipe(pipeline, tmp_path / "x.png", **changes))
    with pytest.raises(FileNotFoundError, match="no saved pipeline"):
        sample(_recipe(tmp_path / "nothing", tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()


def test_of_many_classes_the_first_ten_are_drawn_and_this_is_said(tmp_path, capsys):
    for count, rows in ((20, 20), (21, 10)):
        pipeline = save_pipeline(tmp_path / str(count), num_classes=count)
        output = sample(_recipe(pipeline, tmp_path / f"{count}.png", images_per_class=1, num_steps=1))
        assert Image.open(output).height == GAP + rows * (64 + GAP)
        assert ("the first 10 of 21 classes; name others" in capsys.readouterr().out) == (count == 21)
    named = class_ids(open_pipeline(pipeline, torch.device("cpu")), [*range(15)])
    assert len(named) == 15  # what is named is drawn


def test_a_pipeline_without_names_gets_numbers(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    index["id2label"] = None
    (tmp_path / "p" / "model_index.json").write_text(json.dumps(index))
    assert sample(_recipe(tmp_path / "p", tmp_path / "x.png")).exists()
    with pytest.raises(ValueError, match="no id2label"):
        sample(_recipe(tmp_path / "p", tmp_path / "x.png", class_labels=["ant"]))
