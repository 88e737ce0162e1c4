"""Nearest training images: the search against all distances at once, and a copy that is found out."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from xdlm_image.cli import main
from xdlm_image.data.images import open_images
from xdlm_image.evaluation import neighbours as module
from xdlm_image.evaluation.neighbours import nearest_images, neighbours
from xdlm_image.recipes import NeighboursRecipe


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
    monkeypatch.setattr(module, "draw_all", lambda *args: copies)
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


def test_samples_may_be_drawn_as_readme_advises(parts, tmp_path):
    output = neighbours(recipe_of(parts, tmp_path / "a", temperature=(1.0, 0.2), time_grid="cosine"))
    sampler = json.loads(output.with_suffix(".json").read_text())["sampler"]
    assert sampler["temperature"] == [1.0, 0.2] and sampler["time_grid"] == "cosine" and sampler["seed"] == 0


def test_what_does_not_fit_is_refused(parts, tmp_path, capsys):
    with pytest.raises(ValueError, match="name a .png file"):
        neighbours(recipe_of(parts, tmp_path, output="near.jpg"))
    small = dataclasses.replace(parts.data, image_size=8)
    with pytest.raises(ValueError, match=r"trained on 3 x 16 x 16 images"):
        neighbours(recipe_of(parts, tmp_path, data=small))
    options = f"--pipeline {tmp_path} --held_out 0"
    assert pytest.raises(SystemExit, main, ["neighbours", *options.split()]).value.code == 2
    assert "held_out=0: must be at least 1" in capsys.readouterr().err


def test_held_out_images_are_of_the_classes_that_are_drawn(parts, tmp_path):
    held_out = open_images(parts.data, "test")
    for ids in ([0, 1, 2], [0, 2]):
        recipe = recipe_of(parts, tmp_path, held_out=36 if len(ids) == 3 else 24)
        chosen = module._held_out_images(recipe, held_out, ids)
        labels = held_out.labels[chosen].tolist()
        assert chosen == sorted(set(chosen)) and len(chosen) == recipe.held_out
        assert all(labels.count(label) == recipe.held_out * ids.count(label) / len(ids) for label in range(3))
    assert module._held_out_images(recipe, held_out, None) != chosen  # of no class: any


def test_of_classes_with_few_test_images_all_are_taken_and_this_is_said(parts, capsys, tmp_path):
    held_out = open_images(parts.data, "test")
    recipe = recipe_of(parts, tmp_path, held_out=24)
    assert len(module._held_out_images(recipe, held_out, [2, 2, 1])) == 8 + 12
    assert "note: held_out=24: there are fewer test images of 'cat' 12: 20 are searched for" in capsys.readouterr().out
    usual = recipe_of(parts, tmp_path, held_out=NeighboursRecipe.held_out)
    assert module._held_out_images(usual, held_out, [0, 1, 2]) == [*range(36)]
    assert module._held_out_images(usual, held_out, None) == [*range(36)]
    bare = SimpleNamespace(labels=held_out.labels * 0, class_names=held_out.class_names)
    with pytest.raises(ValueError, match="class_labels=None: there is no test image of these classes"):
        module._held_out_images(recipe, bare, [2])


@pytest.mark.parametrize(("held_out", "percent"), [(1, 50), (9, 14), (36, 7)])
def test_the_share_told_to_be_usual_is_that_of_samples_from_where_the_held_out_are(held_out, percent):
    """Distances drawn alike for both: how often a sample falls below the limit, over many draws."""
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(600):
        distances = torch.rand(50 + held_out, 1, generator=generator)
        shares.append(module._compare(module.Nearest(distances, distances.long()), 50)["share_of_samples_nearer"])
    assert sum(shares) / len(shares) == pytest.approx(module.usual_share(held_out), abs=0.03)
    assert round(100 * module.usual_share(held_out)) == percent


def test_the_default_answers_for_a_small_set(parts, tmp_path, capsys):
    output = neighbours(recipe_of(parts, tmp_path, held_out=NeighboursRecipe.held_out))
    said = capsys.readouterr().out
    assert "held_out=500: there are fewer test images of 'ant' 12, 'bee, wasp' 12, 'cat' 12: 36 are searched" in said
    assert "the nearest 5 % of 36 held-out images of the same classes do (about 7 % if none is a copy)" in said
    assert json.loads(output.with_suffix(".json").read_text())["held_out_images"]["searched_for"] == 36
