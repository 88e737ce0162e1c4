"""A run that goes on longer, or elsewhere: what may change, what is said of it, and what may not."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_training import logged, recipe_in, weights, world  # noqa: F401

from xdlm_image.processes import only_command
from xdlm_image.training import checkpoints as checkpoints_module
from xdlm_image.training.batches import batch_indices, rank_positions
from xdlm_image.training.going_on import NOT_THE_SAME
from xdlm_image.training.loop import TrainingRun, train


def test_a_finished_run_goes_on_longer_bit_for_bit_under_a_constant_learning_rate(world: Path, capsys) -> None:  # noqa: F811
    train(recipe_in(world, "whole", lr_schedule="constant"))
    train(recipe_in(world, "longer", lr_schedule="constant", max_steps=6))
    capsys.readouterr()
    train(recipe_in(world, "longer", lr_schedule="constant"))
    said = capsys.readouterr().out
    assert "max_steps is now 12, it was 6" in said and NOT_THE_SAME not in said
    assert logged(world / "longer", "train/loss") == logged(world / "whole", "train/loss")
    whole, longer = weights(world / "whole"), weights(world / "longer")
    assert all(torch.equal(whole[name], longer[name]) for name in whole)
    assert yaml.safe_load((world / "longer" / "recipe.yaml").read_text())["max_steps"] == 12
    with pytest.raises(ValueError, match="max_steps=8.* has done 12"):
        train(recipe_in(world, "longer", lr_schedule="constant", max_steps=8))


def test_a_folder_of_another_verbs_run_is_refused_by_its_name(world: Path) -> None:  # noqa: F811
    train(recipe_in(world, stop_after=4))
    (state,) = (world / "run" / "checkpoints").glob("step-*/state.json")
    content = json.loads(state.read_text())
    assert content["verb"] == "train"
    state.write_text(json.dumps(content | {"verb": "train-tokenizer"}))
    with pytest.raises(ValueError, match=r"output_dir='.*run': holds a run of train-tokenizer; name another folder"):
        train(recipe_in(world))
    del content["verb"]  # as checkpoints were once
    state.write_text(json.dumps(content))
    train(recipe_in(world))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_falling_learning_rate_binds_the_number_of_steps(world: Path, schedule: str) -> None:  # noqa: F811
    train(recipe_in(world, max_steps=4, lr_schedule=schedule))
    with pytest.raises(ValueError, match=rf"max_steps=8.*'{schedule}'.*init_from='.*run'.*output_dir"):
        train(recipe_in(world, max_steps=8, lr_schedule=schedule))
    train(recipe_in(world, "longer", max_steps=8, lr_schedule=schedule, init_from=str(world / "run")))


@pytest.mark.parametrize(
    "change",
    [{"attention_backend": "_native_math"}, {"batch_size": 16, "gradient_accumulation_steps": 1}],
)
def test_what_only_rounds_or_cuts_otherwise_may_change_and_is_said(world: Path, change: dict, capsys) -> None:  # noqa: F811
    train(recipe_in(world, "whole"))
    train(recipe_in(world, stop_after=6))
    capsys.readouterr()
    train(recipe_in(world, **change))
    said = [line for line in capsys.readouterr().out.splitlines() if NOT_THE_SAME in line]
    assert len(said) == 1 and all(name in said[0] for name in change)
    whole, changed = logged(world / "whole", "train/loss"), logged(world / "run", "train/loss")
    assert [whole[step] for step in range(1, 7)] == [changed[step] for step in range(1, 7)]
    assert logged(world / "run", "train/images") == logged(world / "whole", "train/images")
    assert list(changed) == list(range(1, 13)) and changed[12] == pytest.approx(whole[12], abs=1.0)


def test_precision_and_compiler_may_change_and_are_said(world: Path, monkeypatch, capsys) -> None:  # noqa: F811
    """Told by the checkpoint, whatever the machine's precision: nothing is trained or compiled for this."""
    train(recipe_in(world, stop_after=4))
    path = next((world / "run" / "checkpoints").glob("step-*")) / "state.json"
    state = json.loads(path.read_text())
    state["bound"] |= {"compile": True, "mixed_precision": "bf16"}
    path.write_text(json.dumps(state))
    run = TrainingRun(recipe_in(world))
    capsys.readouterr()
    run.resume()
    said = capsys.readouterr().out
    assert "compile is now False, it was True" in said and "mixed_precision is now 'no', it was 'bf16'" in said


def test_other_numbers_of_images_a_step_are_refused(world: Path) -> None:  # noqa: F811
    train(recipe_in(world, stop_after=4))
    for change in ({"batch_size": 4}, {"gradient_accumulation_steps": 4}):
        with pytest.raises(ValueError, match="(?s)images a step.* 1 x 8 x 2 = 16.*product"):
            train(recipe_in(world, **change))


def test_a_step_sees_the_same_images_however_it_is_cut() -> None:
    """Processes x batches x accumulation: the union over a step, for every cut of 24 images."""

    def images(step: int, processes: int, size: int, accumulation: int) -> set[int]:
        first = [
            rank_positions(step, m, size, accumulation, processes, rank)
            for m in range(accumulation)
            for rank in range(processes)
        ]
        return set(np.concatenate([batch_indices(100, 3, position, size) for position in first]).tolist())

    cuts = [(p, s, 24 // p // s) for p in (1, 2, 3, 4, 8) for s in (1, 3) if 24 % (p * s) == 0]
    for step in (0, 1, 2):
        seen = {frozenset(images(step, *cut)) for cut in cuts}
        assert len(seen) == 1 and len(next(iter(seen))) == 24


def test_checkpoints_of_before_an_option_was_there_go_on(world: Path) -> None:  # noqa: F811
    train(recipe_in(world, "whole"))
    train(recipe_in(world, stop_after=4))
    path = next((world / "run" / "checkpoints").glob("step-*")) / "state.json"
    state = json.loads(path.read_text())
    for name in ("init_from", "optimizer"):
        del state["bound"][name]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="optimizer='muon'.*'adamw'"):
        train(recipe_in(world, optimizer="muon"))
    train(recipe_in(world))
    assert logged(world / "run", "train/loss") == logged(world / "whole", "train/loss")


def test_a_second_command_on_one_run_folder_is_refused(world: Path) -> None:  # noqa: F811
    with only_command(world / "run", True), pytest.raises(ValueError, match="another command is at work there"):
        train(recipe_in(world))
    assert list((world / "run").iterdir()) == []


def test_nodes_that_do_not_see_one_run_folder_are_refused(world: Path, monkeypatch) -> None:  # noqa: F811
    run = TrainingRun(recipe_in(world))
    monkeypatch.setattr(checkpoints_module, "gather_object", lambda step: [*step, 4])  # the other has gone on
    with pytest.raises(ValueError, match=r"\(none, 4\).*one folder that all nodes see"):
        run.resume()
    assert not (world / "run").exists()


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two_and_back(world: Path) -> None:  # noqa: F811
    recipe = recipe_in(world, "moved", lr_schedule="constant", max_steps=4)  # 1 x 8 x 2 images a step
    train(recipe)
    two = dataclasses.replace(recipe, gradient_accumulation_steps=1, max_steps=8)
    (world / "two.yaml").write_text(yaml.safe_dump(dataclasses.asdict(two)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, "-m", "xdlm_image.cli", "train", f"--config={world / 'two.yaml'}"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )
    train(dataclasses.replace(recipe, max_steps=12))
    assert list(logged(world / "moved", "train/images").items()) == [(step, 16.0 * step) for step in range(1, 13)]
