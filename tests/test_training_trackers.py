"""Trackers: TensorBoard's files read again; Weights & Biases by a stand-in that notes what it is given."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import logged, recipe_in, world  # noqa: F401

from xdlm_image.cli import parse
from xdlm_image.metric_lines import MetricLines
from xdlm_image.training import trackers
from xdlm_image.training.loop import train


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    """A module with the calls that accelerate makes of the real one."""
    seen = SimpleNamespace(runs=[], config={}, lines=[], finished=0)

    def init(**settings) -> SimpleNamespace:
        seen.runs.append(settings)
        return SimpleNamespace(log=lambda values, step: seen.lines.append((step, values)), finish=finish)

    def finish() -> None:
        seen.finished += 1

    config = SimpleNamespace(update=lambda values, allow_val_change: seen.config.update(values))
    module = SimpleNamespace(init=init, config=config, Image=lambda pixels: pixels)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(trackers.AVAILABLE, "wandb", lambda: True)
    return seen


def test_tensorboard_shows_curves_pictures_and_the_recipe(world: Path) -> None:  # noqa: F811
    """A run that was stopped past its checkpoint and resumed has every step once."""
    train(recipe_in(world, stop_after=6, sample_every=3))
    next((world / "run" / "checkpoints").glob("*6")).rename(world / "lost")  # killed between 4 and 8
    train(recipe_in(world, sample_every=3))
    events = EventAccumulator(str(world / "run" / "tensorboard"), {"images": 0, "scalars": 0, "tensors": 0}).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(losses) == list(range(1, 13)) and len(events.Scalars("train/loss")) == 12
    assert losses == pytest.approx(logged(world / "run", "train/loss"))
    assert {event.step for event in events.Images("samples")} == {3, 6, 9, 12}
    text = events.Tensors("recipe/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "learning_rate: 0.003" in text


def test_wandb_gets_the_same_and_a_resumed_run_is_the_same_run(world: Path, wandb, capsys) -> None:  # noqa: F811
    train(recipe_in(world, stop_after=4, log_with=["tensorboard", "wandb"]))
    train(recipe_in(world, log_with="wandb"))
    first, second = wandb.runs
    assert first == second and first["resume"] == "allow" and first["project"] == "xdlm_image" and wandb.finished == 2
    assert wandb.config["process"]["k"] == 0.1 and wandb.config["max_steps"] == 12
    losses = {step: values["train/loss"] for step, values in wandb.lines if "train/loss" in values}
    assert losses == logged(world / "run", "train/loss")
    [picture] = next(values["samples"] for step, values in wandb.lines if "samples" in values)
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == "uint8"
    train(recipe_in(world, "another", max_steps=3, log_with="wandb"))
    assert wandb.runs[-1]["id"] != first["id"]


def test_without_trackers_the_run_s_own_files_are_written(world: Path) -> None:  # noqa: F811
    train(recipe_in(world, log_with="none"))
    assert len(logged(world / "run", "train/loss")) == 12 and list((world / "run" / "samples").iterdir())
    assert not list((world / "run").rglob("events.out.tfevents*"))


def test_lines_are_json_where_a_number_is_none(tmp_path: Path) -> None:
    lines = MetricLines(tmp_path)
    lines.append({"step": 1, "loss": 2.5, "norm": float("inf"), "accuracy": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5, "norm": null, "accuracy": null}\n'
    lines.append({"step": 2, "loss": 2.25})
    lines.forget_after(1)
    assert logged(tmp_path, "norm") == {1: None}


def test_lines_are_read_up_to_one_that_is_not_ended(tmp_path: Path) -> None:
    lines = MetricLines(tmp_path)
    with pytest.raises(FileNotFoundError):
        lines.read()
    lines.append({"step": 1, "loss": 2.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert lines.read() == [{"step": 1, "loss": 2.5}]
    for line in ("[1]", '{"loss": 2.5}', "{", '{"step": "x"}'):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
        for meet in (lines.read, lambda: lines.forget_after(1)):
            with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is .*mend or remove it"):
                meet()


def test_a_missing_package_or_login_is_told_before_training(world: Path, wandb, monkeypatch) -> None:  # noqa: F811
    def refuse(**settings) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ValueError, match="api_key not configured.*wandb login"):
        train(recipe_in(world, log_with="wandb"))
    assert not (world / "run" / "metrics.jsonl").exists()
    monkeypatch.setitem(trackers.AVAILABLE, "wandb", lambda: False)
    with pytest.raises(ValueError, match="log_with='wandb'.*pip install wandb"):
        train(recipe_in(world, log_with=["wandb"]))


def test_trackers_on_the_command_line() -> None:
    folders = ["--codes=a", "--tokenizer=b", "--output_dir=c"]
    for text, names in (
        ("wandb", ["wandb"]), ("none", []), ("[tensorboard, wandb, wandb]", ["tensorboard", "wandb"]),
    ):  # fmt: skip
        assert parse("train", [*folders, f"--log_with={text}"]).trackers == names
    assert parse("train", folders).trackers == ["tensorboard"]
    with pytest.raises(SystemExit):
        parse("train", [*folders, "--log_with=mlflow"])
