"""One optimizer step of a training against what is computed by hand: draws, gradients, rates, averages."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_training import CLASSES, logged, recipe_in, world  # noqa: F401

from xdlm_image.data.code_cache import CodeCache, write_code_cache
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.recipes import TransformerOptions
from xdlm_image.tokenizer.measure import SHOWN_AT_ONCE
from xdlm_image.training.batches import batch_indices, stratified_times, weighted_times
from xdlm_image.training.loop import TrainingRun
from xdlm_image.training.meters import LossMeter
from xdlm_image.training.validation import validation_nelbo

PLAIN = TransformerOptions(num_layers=1, num_attention_heads=2, attention_head_dim=8)


def run_in(world: Path, **changes) -> TrainingRun:  # noqa: F811
    return TrainingRun(recipe_in(world, **({"model": PLAIN} | changes)))


def before_each_step(run: TrainingRun, look) -> list:
    """What `look()` gives when the optimizer is about to step."""
    seen: list = []
    run.optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(look()))
    return seen


def norm_of(run: TrainingRun) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in run.transformer.parameters()))


# ---------------------------------------------------------------------------------------------------------- draws


def test_half_of_the_draws_are_mirrored_and_classes_are_dropped_as_told(world: Path) -> None:  # noqa: F811
    count = 4096
    old = CodeCache.open(world / "codes" / "train")
    codes = np.stack([old.codes[:, 0], old.codes[:, 0] ^ 2], 1)  # no code of one view is in the other
    write_code_cache(world / "codes" / "train", old.manifest, [(codes, np.array(old.labels))], overwrite=True)
    run = run_in(world, batch_size=count, gradient_accumulation_steps=1, class_dropout=0.5)
    _, x, _, labels = run._draw(0)
    indices = batch_indices(len(codes), run.recipe.seed, 0, count)
    mirrored = (x.numpy() == codes[indices, 1]).all(1)
    assert (mirrored | (x.numpy() == codes[indices, 0]).all(1)).all()
    dropped = labels.numpy() == len(CLASSES)
    assert np.array_equal(labels.numpy()[~dropped], np.array(old.labels)[indices[~dropped]])
    for share, wanted in ((mirrored, 0.5), (dropped, 0.5), (mirrored & dropped, 0.25)):
        assert abs(share.mean() - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / count)


def test_every_rank_and_batch_has_its_own_noise_and_times_of_its_own_strata(world: Path) -> None:  # noqa: F811
    ranks, size, t_min = 4, 16, 0.3
    run = run_in(world, batch_size=size, t_min=t_min)
    strata, offsets, seeds = {}, [], set()
    for batch in (0, 1):
        for rank in range(ranks):
            run.accelerator = SimpleNamespace(process_index=rank, num_processes=ranks)
            _, _, t, _ = run._draw(batch)
            place = (t.double() - t_min) / (1 - t_min) * size * ranks
            strata.setdefault(batch, []).append(place.long())
            offsets.append((place % 1).sort().values)
            seeds.add(torch.initial_seed())  # of dropout
    for places in strata.values():
        assert torch.equal(torch.cat(places).sort().values, torch.arange(size * ranks))
    assert len(seeds) == len(offsets) == 2 * ranks
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(offsets) for b in offsets[:i])


def test_times_are_uniform_within_their_strata() -> None:
    count = 20_000
    offsets = stratified_times(count, 0.0, torch.Generator().manual_seed(0), 1, 2) * 2 * count % 1
    assert abs(offsets.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / count)
    assert abs(offsets.var() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / count)


def test_weighted_times_estimate_an_integral() -> None:
    t, weight = weighted_times(10_000, torch.Generator().manual_seed(0))
    assert (weight * t.square()).mean().item() == pytest.approx(1 / 3, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ gradients


def test_the_gradient_is_the_mean_over_the_batches_of_a_step(world: Path) -> None:  # noqa: F811
    run = run_in(world, gradient_clip=0.0)
    for _ in range(2):  # the head begins at 0: what lies behind it has no gradient at first
        run.train_step()
    parameters = list(run.transformer.parameters())
    each = [torch.autograd.grad(run.model(*run._draw(batch)).mean, parameters) for batch in (0, 1)]
    found = before_each_step(run, lambda: [p.grad.clone() for p in parameters])
    run.train_step()
    for gradient, first, second in zip(found[0], *each):
        torch.testing.assert_close(gradient, (first + second) / 2, rtol=1e-4, atol=1e-7)
    assert sum(gradient.abs().sum() for gradient in found[0]) > 0


def test_gradients_are_clipped_and_the_norm_of_before_is_told(world: Path) -> None:  # noqa: F811
    norms = {}
    for clip in (1e-3, 1e9):
        run = run_in(world, gradient_clip=clip)
        seen = before_each_step(run, lambda run=run: norm_of(run))
        run.train_step()
        norms[clip] = (seen[0], float(run.gradient_norm))
    assert norms[1e-3][0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e-3][1] == norms[1e9][1] == pytest.approx(norms[1e9][0], rel=1e-5) and norms[1e9][0] > 0.01


def test_the_optimizer_has_the_recipe_s_numbers(world: Path) -> None:  # noqa: F811
    run = run_in(world, adam_beta1=0.7, adam_beta2=0.8, weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {group["betas"] for group in run.optimizer.param_groups} == {(0.7, 0.8)}
    assert decay[id(run.transformer.proj_out.weight)] == 0.05 and decay[id(run.transformer.proj_out.bias)] == 0.0


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", lambda share: 1.0),
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: (1 + math.cos(math.pi * share)) / 2),
    ],
)
def test_learning_rates_follow_their_formulas(world: Path, schedule: str, after) -> None:  # noqa: F811
    run = run_in(world, lr_schedule=schedule, max_steps=9, warmup_steps=3, learning_rate=1.0, gradient_clip=1e-6)
    used = before_each_step(run, lambda: {group["lr"] for group in run.optimizer.param_groups})
    told = []
    for _ in range(9):
        run.train_step()
        told.append(run.learning_rate)
    assert told == pytest.approx([0, 1 / 3, 2 / 3, *(after((step - 3) / 6) for step in range(3, 9))])
    assert used == [{rate} for rate in told]


# ------------------------------------------------------------------------------------------------------- averages


def test_the_average_has_the_recipe_s_decay_after_its_warm_up(world: Path) -> None:  # noqa: F811
    """Decay min((1 + n) / (10 + n), ema_decay) from the n-th step on, counted from 0, which has none."""
    run = run_in(world, ema_decay=0.2)
    wanted = None
    for decay in (0.0, 2 / 11, 0.2):  # 0.25 would come next
        run.train_step()
        now = [p.detach().clone() for p in run.transformer.parameters()]
        wanted = now if wanted is None else [decay * old + (1 - decay) * new for old, new in zip(wanted, now)]
    for average, by_hand in zip(run.ema.shadow_params, wanted):
        torch.testing.assert_close(average, by_hand)
    assert any((average - last).abs().max() > 1e-5 for average, last in zip(run.ema.shadow_params, now))


def test_samples_and_validation_are_those_of_the_average(world: Path) -> None:  # noqa: F811
    run = run_in(world)
    decoded = []
    run.vqvae.post_quant_conv.register_forward_hook(lambda _, inputs, __: decoded.append(len(inputs[0])))
    picture, told = run.output_dir / "samples" / "step-00000000.png", []
    for _ in range(2):
        run.draw_samples()
        run.validate()
        told.append((picture.read_bytes(), logged(run.output_dir, "validation/bits_per_token")[0]))
        picture.unlink()
        with torch.no_grad():
            for parameter in run.transformer.parameters():
                parameter.fill_(math.nan)
    assert told[0] == told[1] and math.isfinite(told[0][1])
    assert all(parameter.isnan().all() for parameter in run.transformer.parameters())
    assert sum(decoded) == 2 * 8 * len(CLASSES) and max(decoded) <= SHOWN_AT_ONCE


@pytest.mark.parametrize("class_dropout", [0.0, 0.1])
def test_a_pipeline_has_guidance_where_classes_were_dropped(world: Path, class_dropout: float) -> None:  # noqa: F811
    folder = run_in(world, class_dropout=class_dropout).save_pipeline()
    assert XDLMPipeline.from_pretrained(folder).config.supports_guidance == (class_dropout > 0)


# ------------------------------------------------------------------------------------------------------- measures


def test_the_meter_tells_branches_and_times_apart() -> None:
    meter = LossMeter(9, torch.device("cpu"))
    z, x = torch.tensor([[9, 1, 2], [9, 9, 2]]), torch.tensor([[0, 0, 2], [0, 0, 2]])
    loss = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    meter.update(loss, z, x, torch.tensor([0.05, 0.75]))
    values = meter.take(Accelerator(cpu=True))
    by_branch = {"mask": 25 / 3, "wrong": 2.0, "right": 18.0}
    assert values["loss"] == 10.5
    assert {name: values[f"loss_by_branch/{name}"] for name in by_branch} == pytest.approx(by_branch)
    shares = [values[f"share_by_branch/{name}"] for name in by_branch]
    assert shares == pytest.approx([25 / 6, 2 / 6, 36 / 6])
    times = {name: value for name, value in values.items() if "alpha" in name}
    assert times == pytest.approx({"loss_by_alpha/0.9-1.0": 7 / 3, "loss_by_alpha/0.2-0.3": 56 / 3})


def test_processes_validate_each_image_once(world: Path) -> None:  # noqa: F811
    run, parts = run_in(world), []

    def keep(found: torch.Tensor, reduction: str) -> torch.Tensor:
        parts.append(found.clone())
        return found

    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        process = SimpleNamespace(
            process_index=rank, num_processes=ranks, is_local_main_process=False, device=torch.device("cpu"),
            autocast=nullcontext, reduce=keep,
        )  # fmt: skip
        validation_nelbo(run.model, run.validation_cache, process, num_images=50, batch_size=7)
    whole, first, second = (part[0] for part in parts)
    assert (whole != 0).all() and ((first != 0) ^ (second != 0)).all()
    assert torch.equal(first + second, whole) and (first != 0).sum() == 4 * 7


def test_one_image_has_no_standard_error(world: Path, capsys) -> None:  # noqa: F811
    run = run_in(world, validation_samples=1)
    run.validate()
    assert "bits per token" in (said := capsys.readouterr().out) and "+-" not in said
    assert not logged(run.output_dir, "validation/bits_per_token_stderr")


def test_a_new_run_tells_its_images_a_step_and_one_that_goes_on_does_not(world: Path, capsys) -> None:  # noqa: F811
    for _ in range(2):
        run = run_in(world)
        run.resume()
        told = "number of processes x batch_size x gradient_accumulation_steps = 1 x 8 x 2 = 16 images a step, of 90"
        assert (told in capsys.readouterr().out) == (run.step == 0)
        run.train_step()
        run.save_checkpoint()
