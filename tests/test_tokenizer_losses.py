"""Losses of a reconstruction: by hand, through a classifier's eyes, and through torch.compile."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from tokenizer_parts import home, losses, pictures_fixture, tiny_recipe  # noqa: F401

from xdlm_image.features.extractor_training import train_extractor
from xdlm_image.recipes import ExtractorRecipe
from xdlm_image.tokenizer.losses import PerceptualLoss, reconstruction_loss
from xdlm_image.tokenizer.train import TokenizerTraining, TrainingViews, train_tokenizer


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, pictures) -> Path:
    data = dataclasses.replace(pictures, crop="center")
    folder = tmp_path_factory.mktemp("classifier") / "classifier"
    return train_extractor(ExtractorRecipe(str(folder), data, width=8, feature_dim=8, batch_size=8, epochs=1))


def test_pixels_and_edges_by_hand(pictures):
    recipe = tiny_recipe(Path("unused"), pictures, l1_weight=2.0, edge_weight=3.0)
    images = torch.zeros(1, 1, 2, 2)
    sample = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    # squares 1/4; l1 1/4; differences across: 1, 0 -> 1/2; down: 1, 0 -> 1/2
    assert reconstruction_loss(recipe, sample, images).item() == pytest.approx(0.25 + 2 * 0.25 + 3 * 0.5)


def test_perceptual_distance_follows_its_formula_and_moves_only_the_sample(classifier):
    perceptual = PerceptualLoss(classifier, 1, 16)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 16, 16, generator=generator) * 2 - 1
    sample = (images + 0.3 * torch.randn(3, 1, 16, 16, generator=generator)).requires_grad_()
    assert perceptual(images, images).item() == 0
    distance = perceptual.train()(sample, images)
    distance.backward()
    assert sample.grad.abs().sum() > 0 and all(p.grad is None for p in perceptual.parameters())
    stages = [perceptual.net.forward_intermediates(a, intermediates_only=True) for a in (sample.detach(), images)]
    expected = 0.0
    for a, b in zip(*stages):
        a, b = (f / f.square().sum(1, keepdim=True).sqrt().clamp(min=1e-6) for f in (a, b))
        expected += (a - b).square().sum(1).mean().item() / len(stages[0])
    assert distance.item() == pytest.approx(expected, rel=1e-5)
    far = perceptual(images.flip(0), images).item()
    assert far > perceptual(images + 0.01, images).item() > 0


def test_the_perceptual_distance_is_part_of_the_loss(classifier, pictures, tmp_path):
    loss, norm = {}, {}
    for weight in (0.0, 2.0):
        training = TokenizerTraining(
            tiny_recipe(tmp_path, pictures, perceptual=str(classifier), perceptual_weight=weight)
        )
        images = torch.stack([TrainingViews(training.images, 0, False)[i] for i in range(4)])
        with torch.no_grad():
            distance = training.perceptual(training.network(images, False)[0], images)
        scalars = training.train_step(images)
        loss[weight], norm[weight] = scalars["loss"].item(), scalars["norm"].item()
    assert loss[2.0] - loss[0.0] == pytest.approx(2 * distance.item(), rel=1e-4)
    assert norm[2.0] != pytest.approx(norm[0.0], rel=1e-3)


def test_a_run_is_not_resumed_with_another_classifier(classifier, pictures, tmp_path):
    train_tokenizer(tiny_recipe(tmp_path, pictures, perceptual=str(classifier)))
    moved = tmp_path / "moved"
    shutil.copytree(classifier, moved)
    train_tokenizer(tiny_recipe(tmp_path, pictures, perceptual=str(moved)))  # the same weights elsewhere
    with pytest.raises(ValueError, match="perceptual=None, but the run .* began with"):
        train_tokenizer(tiny_recipe(tmp_path, pictures))


def test_a_classifier_that_cannot_help_is_refused_before_training(classifier, pictures, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="perceptual=.*nowhere"):
        train_tokenizer(tiny_recipe(output, pictures, perceptual=str(tmp_path / "nowhere")))
    other_size = dataclasses.replace(pictures, image_size=12)
    with pytest.raises(ValueError, match="perceptual=.*trained on 1 x 16 x 16 images"):
        train_tokenizer(tiny_recipe(output, other_size, perceptual=str(classifier)))
    with pytest.raises(ValueError, match="perceptual_weight=-1"):
        tiny_recipe(output, pictures, perceptual_weight=-1.0)
    assert not output.exists()


@pytest.mark.slow  # minutes of a C++ compiler
def test_a_compiled_tokenizer_learns_the_same(pictures, tmp_path):
    for name in ("plain", "compiled"):
        train_tokenizer(tiny_recipe(tmp_path / name, pictures, compile=name == "compiled", revive_after=0))
    plain, compiled = ([line[1] for line in losses(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-3)
