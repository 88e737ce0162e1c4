"""What a launcher may ask of a training: a precision, processes that wait; parameters in pieces are refused."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from test_devices import own_accelerator  # noqa: F401
from test_training import recipe_in, world  # noqa: F401
from tokenizer_parts import home, pictures_fixture, tiny_recipe  # noqa: F401

from xdlm_image.cli import parse
from xdlm_image.devices import LONGEST_WAIT
from xdlm_image.recipes import TokenizerRecipe
from xdlm_image.tokenizer.train import TokenizerTraining
from xdlm_image.training.loop import TrainingRun


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron-LM"])
def test_launchers_that_shard_are_refused_before_any_work(name: str, monkeypatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper().replace('-', '_')}", "true")
    recipe = parse("train", ["--codes=nowhere", "--tokenizer=nowhere", "--output_dir=nowhere"])
    with pytest.raises(ValueError, match=f"=true: {name} .*accelerate launch --multi_gpu"):
        TrainingRun(recipe)
    with pytest.raises(ValueError, match=f"=true: {name} "):
        TokenizerTraining(TokenizerRecipe("nowhere"))


def test_a_tokenizer_takes_the_launcher_s_precision_and_goes_on_with_it(
    tmp_path: Path,
    pictures,
    monkeypatch,
    own_accelerator,  # noqa: F811
) -> None:
    """As one that names it; runs of before have it by its name in their checkpoints."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    training = TokenizerTraining(tiny_recipe(tmp_path, pictures))
    seen = []
    training.vqvae.encoder.conv_in.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    training.train_step(torch.zeros(2, 1, 16, 16))
    assert seen == [torch.bfloat16]
    training.save_checkpoint()
    assert TokenizerTraining(tiny_recipe(tmp_path, pictures, mixed_precision="bf16")).resume()


@pytest.mark.parametrize(("launched", "asked"), [("fp16", None), (None, "fp16"), ("bf16", "fp16")])
def test_fp16_on_a_cpu_is_refused_and_another_precision_may_follow(
    launched: str | None,
    asked: str | None,
    world: Path,  # noqa: F811
    pictures,
    monkeypatch,
    own_accelerator,  # noqa: F811
) -> None:
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    name = "ACCELERATE_MIXED_PRECISION" if asked is None else "mixed_precision"
    for start, recipe in ((TrainingRun, recipe_in), (TokenizerTraining, tiny_recipe)):
        data = () if recipe is recipe_in else (pictures,)
        with pytest.raises(ValueError, match=f"{name}='fp16': a CPU .*; name bf16 or no"):
            start(recipe(world, *data, mixed_precision=asked))
    assert TrainingRun(recipe_in(world, mixed_precision="no")).accelerator.mixed_precision == "no"


@pytest.mark.parametrize(
    ("launched", "asked", "used"),
    [(None, None, "no"), ("bf16", None, "bf16"), ("bf16", "no", "no"), ("no", "bf16", "bf16")],
)
def test_the_launcher_s_precision_holds_where_the_recipe_names_none(
    launched: str | None,
    asked: str | None,
    used: str,
    world: Path,  # noqa: F811
    monkeypatch,
    own_accelerator,  # noqa: F811
) -> None:
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    run = TrainingRun(recipe_in(world, mixed_precision=asked))
    assert run.accelerator.mixed_precision == used
    run.resume()
    assert yaml.safe_load((world / "run" / "recipe.yaml").read_text())["mixed_precision"] == used
    seen = []
    run.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    run.train_step()
    assert set(seen) == {torch.bfloat16 if used == "bf16" else torch.float32}


def test_a_launched_precision_that_train_has_not_is_refused(world: Path, monkeypatch, own_accelerator) -> None:  # noqa: F811
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION=fp8.*mixed_precision"):
        TrainingRun(recipe_in(world))


def test_batches_a_step_are_the_recipe_s_and_its_compiler_too(world: Path, monkeypatch, own_accelerator) -> None:  # noqa: F811
    """`accelerate launch` exports 1 where nobody named a number."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    run = TrainingRun(recipe_in(world, gradient_accumulation_steps=2))
    steps = []
    run.optimizer.optimizer.register_step_post_hook(lambda *a: steps.append(run.accelerator.sync_gradients))
    run.train_step()
    assert run.accelerator.gradient_accumulation_steps == 2 and steps == [True]
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="ACCELERATE_DYNAMO_BACKEND=INDUCTOR: unset it.* compile=true"):
        TrainingRun(recipe_in(world))


def test_precision_on_the_command_line() -> None:
    folders = ["--codes=a", "--tokenizer=b", "--output_dir=c"]
    assert parse("train", folders).mixed_precision is None
    for text, value in (("no", "no"), ("bf16", "bf16"), ("null", None)):
        assert parse("train", [*folders, f"--mixed_precision={text}"]).mixed_precision == value
    for name in ("mdlm", "xdlm", "udlm"):
        assert parse("train", [f"--config=fashion_mnist/{name}"]).mixed_precision == "no"


def test_processes_wait_for_the_one_that_draws(world: Path, monkeypatch, own_accelerator) -> None:  # noqa: F811
    given = {}
    made = PartialState.__init__
    monkeypatch.setattr(PartialState, "__init__", lambda self, *a, **k: (given.update(k), made(self, *a, **k))[1])
    TrainingRun(recipe_in(world))
    assert given["timeout"] == LONGEST_WAIT
