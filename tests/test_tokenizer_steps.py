"""One step of a tokenizer's training against what is computed by hand: losses, clipping, averages, codes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tokenizer_parts import home, pictures_fixture, tiny_recipe, trained_fixture  # noqa: F401

from xdlm_image.data.images import normalise, open_images
from xdlm_image.recipes import TokenizerModelOptions
from xdlm_image.tokenizer.codebook import nearest
from xdlm_image.tokenizer.codes import load_tokenizer
from xdlm_image.tokenizer.losses import reconstruction_loss
from xdlm_image.tokenizer.train import TokenizerTraining, TrainingViews, build_vqvae
from xdlm_image.training.batches import batch_indices


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_codebook_s_loss_by_hand_and_how_its_gradient_is_shared(tmp_path, pictures):
    """|sg z - e|^2 + beta |z - sg e|^2: of z's gradient the codebook has 1 / beta, whatever legacy means."""
    quantize = build_vqvae(tiny_recipe(tmp_path, pictures, commitment_weight=0.6)).quantize
    z = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _, loss, (_, _, codes) = quantize(z)
    flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
    rows = quantize.embedding.weight.detach()
    assert torch.equal(codes, nearest(flat, rows)[0])
    error = flat - rows[codes]
    assert loss.item() == pytest.approx((1 + 0.6) * error.square().mean().item(), rel=1e-5)
    loss.backward()
    of_z = z.grad.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(of_z, 0.6 * 2 * error / error.numel())
    of_rows = torch.zeros_like(rows).index_add_(0, codes, -2 * error / error.numel())
    torch.testing.assert_close(quantize.embedding.weight.grad, of_rows)


def test_the_loss_is_the_image_s_and_the_codebook_s(tmp_path, pictures, images):
    training = TokenizerTraining(tiny_recipe(tmp_path, pictures, plain_steps=0))
    training.network.train()
    with torch.no_grad():
        sample, codebook_loss, _, codes = training.network(images, True)
        wanted = reconstruction_loss(training.recipe, sample, images) + codebook_loss
    before = training.vqvae.quantize.embedding.weight.detach().clone()
    scalars = training.train_step(images)
    assert scalars["loss"].item() == pytest.approx(wanted.item(), rel=1e-5) and codebook_loss > 1e-3
    moved = (training.vqvae.quantize.embedding.weight - before).abs().sum(1) > 0
    assert set(moved.nonzero()[:, 0].tolist()) == set(codes.tolist())  # only that loss moves them


def norms_of_steps(training: TokenizerTraining) -> list[float]:
    """Gets the gradient's norm whenever the optimizer is about to step."""
    norms: list[float] = []
    squares = lambda: (p.grad.square().sum() for p in training.vqvae.parameters())  # noqa: E731
    training.optimizer.optimizer.register_step_pre_hook(lambda *_: norms.append(math.sqrt(sum(squares()))))
    return norms


def test_gradients_are_clipped_and_the_norm_of_before_is_told(tmp_path, pictures, images):
    norms = {}
    for clip in (1e-3, 0.0):
        training = TokenizerTraining(tiny_recipe(tmp_path, pictures, gradient_clip=clip))
        seen = norms_of_steps(training)
        norms[clip] = (float(training.train_step(images)["norm"]), seen[0])
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e-3][0] == norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-5) and norms[0.0][0] > 0.01


def test_the_average_has_the_recipe_s_decay_after_its_warm_up(tmp_path, pictures, images):
    training = TokenizerTraining(tiny_recipe(tmp_path, pictures, ema_decay=0.2))
    wanted = None
    for decay in (0.0, 2 / 11, 0.2):  # min((1 + n) / (10 + n), ema_decay); 0.25 would come next
        training.train_step(images)
        now = [p.detach().clone() for p in training.vqvae.parameters()]
        wanted = now if wanted is None else [decay * old + (1 - decay) * new for old, new in zip(wanted, now)]
    for average, by_hand in zip(training.ema.shadow_params, wanted):
        torch.testing.assert_close(average, by_hand)
    assert any((average - last).abs().max() > 1e-4 for average, last in zip(training.ema.shadow_params, now))


def test_a_code_that_another_process_used_is_alive(tmp_path, pictures, images, monkeypatch):
    training = TokenizerTraining(tiny_recipe(tmp_path, pictures, plain_steps=0, revive_after=0))
    elsewhere = torch.zeros(16, dtype=torch.int64)
    elsewhere[[3, 9]] = 5
    with torch.no_grad():
        training.vqvae.quantize.embedding.weight[[3, 9]] = 1e4  # used by no image here
    monkeypatch.setattr(training.accelerator, "reduce", lambda used, how: used + elsewhere)
    training.train_step(images)
    assert training.last_use[[3, 9]].tolist() == [1, 1] and (training.last_use == 0).any()


def test_new_rows_have_no_moments_of_the_old(tmp_path, pictures, images):
    training = TokenizerTraining(tiny_recipe(tmp_path, pictures, plain_steps=0, revive_after=0))
    training.train_step(images)
    state = training.optimizer.state[training.vqvae.quantize.embedding.weight]
    used = state["exp_avg_sq"].sum(1).nonzero()[:, 0]
    assert len(used) > 1
    training._set_rows(used[:1], torch.ones(1, 2))
    for name in ("exp_avg", "exp_avg_sq"):
        assert not state[name][used[0]].any() and state[name][used[1:]].any(1).all()


@pytest.mark.parametrize("flips", [True, False])
def test_a_view_is_its_image_or_for_half_of_the_places_its_mirror(pictures, flips):
    images = open_images(dataclasses.replace(pictures, crop="center"), "train")
    number = 400
    mirrored = 0
    for position in range(number):
        view = TrainingViews(images, 3, flips)[position]
        image = normalise(images.raw(int(batch_indices(len(images), 3, position, 1)[0])))
        is_plain, is_mirrored = torch.equal(view, image), torch.equal(view, image.flip(-1))
        assert is_plain or is_mirrored
        mirrored += is_mirrored and not is_plain
    unlike = sum(not torch.equal(images.raw(i), images.raw(i).flip(-1)) for i in range(len(images))) / len(images)
    assert abs(mirrored / number - flips * unlike / 2) < 5 * math.sqrt(1 / 4 / number) * flips + 1e-9
    assert unlike > 0.4


# --------------------------------------------------------------------------------------- a run that begins at another


def test_a_run_begins_at_another_ones_weights_and_codebook(trained, tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(TokenizerTraining, "init_codebook", lambda *_: pytest.fail("the codebook is there"))
    recipe = tiny_recipe(tmp_path / "on", pictures, init_from=str(trained), plain_steps=None, max_steps=6)
    assert recipe.plain_steps == 0
    begun = TokenizerTraining(recipe)
    of_trained = load_tokenizer(trained).state_dict()
    for name, value in begun.vqvae.state_dict().items():
        assert torch.equal(value, of_trained[name]), name
    begun.run()
    away = trained.with_name("away")
    trained.rename(away)  # it is only read once
    try:
        assert TokenizerTraining(recipe).resume()
    finally:
        away.rename(trained)
    moved = begun.vqvae.quantize.embedding.weight - of_trained["quantize.embedding.weight"]
    assert 0 < float(moved.abs().max()) < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plain_steps": 4}, "plain_steps=4: with init_from the codebook is there"),
        (
            {"model": TokenizerModelOptions([8, 8, 16], 1, 4, 16, 2, 4)},
            r"init_from=.*its block_out_channels is \[8, 8, 8\]",
        ),
        ({"init_from": "nowhere"}, "init_from='nowhere': .*no such folder"),
    ],
)
def test_beginnings_that_do_not_fit_are_refused(trained, tmp_path, pictures, changes, message):
    given = {"init_from": str(trained), "plain_steps": None, **changes}
    model = given.pop("model", None)
    with pytest.raises(ValueError, match=message):
        recipe = tiny_recipe(tmp_path / "on", pictures, **given)
        TokenizerTraining(recipe if model is None else dataclasses.replace(recipe, model=model))


def test_what_a_run_goes_on_with_is_named_option_by_option(tmp_path, pictures):
    recipe = tiny_recipe(tmp_path / "run", pictures, max_steps=6)
    TokenizerTraining(recipe).run()
    larger = dataclasses.replace(recipe, data=dataclasses.replace(pictures, image_size=20))
    with pytest.raises(ValueError, match=r"data\.image_size=20, but the run in .* began with 16"):
        TokenizerTraining(larger).resume()
