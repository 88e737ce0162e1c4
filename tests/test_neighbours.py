"""Nearest training images: the search against all distances at once, and a copy that is found out."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from evaluation_parts import build_parts, one_thread  # noqa: F401
from PIL import Image

from xdlm_image.cli import main
from xdlm_image.data.images import open_images
from xdlm_image.evaluation import neighbours as room
from xdlm_image.evaluation.neighbours import nearest_images, neighbours
from xdlm_image.recipes import NeighboursRecipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return build_parts(tmp_path_factory.mktemp("parts"))


def recipe_of(parts, folder: Path, **changes) -> NeighboursRecipe:
    recipe = NeighboursRecipe(
        parts.pipelines["mdlm"], parts.data, str(parts.extractor), str(folder / "near.png"), held_out=30, batch_size=32,
        num_neighbours=2, num_steps=2, device="cpu",
    )  # fmt: skip
    return dataclasses.replace(recipe, **changes)


def test_a_search_in_parts_finds_what_all_distances_at_once_give():
    torch.manual_seed(0)
    queries, images = torch.randn(5, 8), torch.randn(103, 8)
    stream = ((start, {"a": images[start : start + 10]}) for start in range(0, 103, 10))
    found = nearest_images({"a": queries}, stream, 12)["a"]
    wanted = torch.cdist(queries, images).topk(12, largest=False)
    assert torch.equal(found.indices, wanted.indices)
    torch.testing.assert_close(found.distances, wanted.values)
    assert nearest_images({"a": queries}, iter([(0, {"a": images[:3]})]), 12)["a"].indices.shape == (5, 3)


def test_copies_are_found_out_and_others_are_not(parts, tmp_path, monkeypatch, capsys):
    trained = open_images(parts.data, "train")
    places = [7, 50, 110]
    copies = torch.stack([trained.raw(i) for i in places])
    drawn = neighbours(recipe_of(parts, tmp_path))
    random = json.loads(drawn.with_suffix(".json").read_text())["spaces"]
    monkeypatch.setattr(room, "draw_all", lambda *args: copies)
    output = neighbours(recipe_of(parts, tmp_path / "copies"))
    about = json.loads(output.with_suffix(".json").read_text())
    for space in ("pooled", "pixels"):
        found = about["spaces"][space]
        assert [near[0] for near in found["samples"]["nearest_images"]] == places
        assert found["samples"]["distances"] == pytest.approx([0, 0, 0], abs=1e-3)
        assert found["share_of_samples_nearer"] == 1.0 and found["held_out_quantiles"]["0.0"] > 0.01
        assert random[space]["share_of_samples_nearer"] == 0.0  # of an untrained network
    assert "pixels: 100.0 % of 3 samples" in capsys.readouterr().out
    with Image.open(output) as picture:
        assert picture.width > 5 * 56 and picture.height > 3 * 56


def test_samples_are_drawn_by_the_sampler_that_is_named(parts, tmp_path):
    found = {}
    for sampler in (None, "ancestral", "halton"):
        output = neighbours(recipe_of(parts, tmp_path / str(sampler), sampler=sampler))
        about = json.loads(output.with_suffix(".json").read_text())
        assert about["sampler"]["sampler"] == sampler
        found[sampler] = about["spaces"]["pixels"]["samples"]["distances"]
    assert found[None] == found["ancestral"] != found["halton"]


def test_what_does_not_fit_is_refused(parts, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"held_out=99: 33 test images are wanted of each class .* there are 12 of '"):
        neighbours(recipe_of(parts, tmp_path, held_out=99))
    with pytest.raises(ValueError, match="name a .png file"):
        neighbours(recipe_of(parts, tmp_path, output="near.jpg"))
    small = dataclasses.replace(parts.data, image_size=8)
    with pytest.raises(ValueError, match=r"trained on 3 x 16 x 16 images"):
        neighbours(recipe_of(parts, tmp_path, data=small))
    options = f"--pipeline {tmp_path} --data.name folder --data.root {parts.data.root} --held_out 5"
    assert pytest.raises(SystemExit, main, ["neighbours", *options.split()]).value.code == 2
    assert "held_out=5: at least 20" in capsys.readouterr().err


def test_held_out_images_are_of_the_classes_that_are_drawn(parts, tmp_path):
    held_out = open_images(parts.data, "test")
    for ids in ([0, 1, 2], [0, 2]):
        recipe = recipe_of(parts, tmp_path, held_out=36 if len(ids) == 3 else 24)
        chosen = room._held_out_images(recipe, held_out, ids)
        labels = held_out.labels[chosen].tolist()
        assert chosen == sorted(set(chosen)) and len(chosen) == recipe.held_out
        assert all(labels.count(label) == recipe.held_out * ids.count(label) / len(ids) for label in range(3))
    assert room._held_out_images(recipe, held_out, None) != chosen  # of no class: any
    with pytest.raises(
        ValueError, match="held_out=24: 16 test images are wanted of each class .* there are 12 of 'cat'"
    ):
        room._held_out_images(recipe, held_out, [2, 2, 1])
    with pytest.raises(ValueError, match="held_out=99: there are 36 test images"):
        room._held_out_images(recipe_of(parts, tmp_path, held_out=99), held_out, None)
