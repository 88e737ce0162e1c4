"""The tokenizer: care of the codebook, a whole tiny training, kill and resume."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import VQModel
from PIL import Image
from tiny_parts import statistics_of
from tokenizer_parts import CHECKPOINT, STEPS, home, losses, pictures_fixture, tiny_recipe, trained_fixture  # noqa: F401

from xdlm_image.data.images import open_images, to_uint8
from xdlm_image.evaluation.comparing import fids
from xdlm_image.features.extractor import load_extractor
from xdlm_image.features.extractor_training import train_extractor
from xdlm_image.processes import only_command
from xdlm_image.recipes import (
    DataOptions,
    EncodeRecipe,
    EvaluateRecipe,
    ExtractorRecipe,
    TokenizerModelOptions,
)
from xdlm_image.tokenizer import measure as measure_module
from xdlm_image.tokenizer import train as train_module
from xdlm_image.tokenizer.codebook import draw_badly_served, kmeans, nearest, usage_of
from xdlm_image.tokenizer.codes import decode_codes, encode_images, load_tokenizer
from xdlm_image.tokenizer.measure import measure_tokenizer
from xdlm_image.tokenizer.train import (
    Positions,
    TokenizerTraining,
    TrainingViews,
    learning_rate_at,
    train_tokenizer,
)
from xdlm_image.training import checkpoints as checkpoints_module
from xdlm_image.weights import weights_hash

# ------------------------------------------------------------------------------------------------ codebook


def test_kmeans_finds_well_separated_groups_and_uses_every_centre():
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    latents = groups.repeat_interleave(50, 0) + 0.01 * torch.randn(150, 2, generator=generator)
    centres = kmeans(latents, 3, generator)
    assert nearest(groups, centres)[1].max() < 0.01
    centres = kmeans(latents, 40, generator)
    assert len(nearest(latents, centres)[0].unique()) == 40
    assert kmeans(latents[:3], 8, generator).unique(dim=0).shape == (8, 2)  # fewer latents than codes


def test_revival_draws_where_the_codebook_serves_badly():
    latents = torch.arange(100.0)[:, None]
    distances = torch.zeros(100)
    distances[60:62] = 1.0
    drawn = draw_badly_served(latents, distances, 200, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {60.0, 61.0}


def test_usage_of_known_counts():
    assert usage_of(torch.tensor([5, 5, 5, 5])) == {
        "codes_used": 4, "codes_used_percent": 100.0, "perplexity": pytest.approx(4),
    }  # fmt: skip
    assert usage_of(torch.tensor([9, 0, 0, 0]))["perplexity"] == 1
    with pytest.raises(ValueError, match="all zero"):
        usage_of(torch.zeros(4))


def test_dead_codes_are_revived_in_weights_average_and_moments(tmp_path, pictures):
    training = TokenizerTraining(tiny_recipe(tmp_path, pictures, plain_steps=0))
    weight = training.vqvae.quantize.embedding.weight
    with torch.no_grad():
        weight[8:] = 1e4  # far from every latent
        weight[:8] = torch.randn(8, 2)
    before = weight.detach().clone()
    views = TrainingViews(training.images, 0, False)
    for _ in range(4):
        training.train_step(torch.stack([views[i] for i in range(16)]))
    assert (weight[8:].abs() < 100).all() and not torch.equal(weight[8:], before[8:])
    assert torch.equal(training.ema_codebook[8:], weight[8:])
    assert (training.optimizer.state[weight]["exp_avg"][8:] == 0).all()
    assert (training.last_use[8:] == 4).all()


# ------------------------------------------------------------------------------------------------ order


def test_learning_rate_warms_up_and_ends_at_zero(pictures):
    recipe = tiny_recipe(Path("unused"), pictures, max_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) > 0.97 and rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_views_are_fixed_by_position_and_each_epoch_sees_every_image(pictures):
    images = open_images(pictures, "train")
    views, again = TrainingViews(images, 3, True), TrainingViews(images, 3, True)
    late = again[100]  # without having seen the others
    stream = [views[p] for p in range(101)]
    assert torch.equal(stream[100], late)
    n = len(images)
    seen = {to_uint8(view).sort().values.numpy().tobytes() for view in stream[:n]}
    assert len(seen) == len({images.raw(i).sort().values.numpy().tobytes() for i in range(n)})
    assert not all(torch.equal(a, b) for a, b in zip(stream[:n], stream[n:]))
    ranks = [list(Positions(2, 4, 3, rank, 2)) for rank in (0, 1)]
    assert ranks == [[12, 13, 14, 18, 19, 20], [15, 16, 17, 21, 22, 23]]


def test_every_seed_cuts_and_mirrors_its_own_way(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    wide = np.arange(16 * 512, dtype=np.int64).reshape(16, 512) % 251
    for i in range(2):
        Image.fromarray(wide.astype(np.uint8)).save(tmp_path / "train" / "a" / f"{i}.png")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    images = open_images(DataOptions("folder", str(tmp_path), image_size=16, crop="random"), "train")
    streams = [torch.stack([TrainingViews(images, seed, True)[p] for p in range(4)]) for seed in (0, 1, 1)]
    assert not torch.equal(streams[0], streams[1]) and torch.equal(streams[1], streams[2])
    assert len({view.numpy().tobytes() for stream in streams[:2] for view in stream}) == 8


# ------------------------------------------------------------------------------------------------ a whole training


def test_training_leaves_a_tokenizer_a_report_and_a_picture(trained, pictures):
    vqvae = load_tokenizer(trained)
    assert isinstance(vqvae, VQModel) and not vqvae.training
    told = json.loads((trained / "tokenizer.json").read_text())
    assert told["tokenizer_hash"] == weights_hash(vqvae)
    assert (told["image_size"], told["channels"], told["grid"], told["num_codes"]) == (16, 1, [4, 4], 16)
    assert told["data_fingerprint"] == open_images(pictures, "train").fingerprint
    report = json.loads((trained / "report.json").read_text())
    assert report["split"] == "test" and report["images"] == 12
    assert 1 <= report["perplexity"] <= report["codes_used"] <= 16
    assert report["training"]["images_seen"] == STEPS * 4
    with Image.open(trained / "reconstructions.png") as picture:
        assert picture.width > picture.height > 16
    weights = trained / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_mode == (trained / "tokenizer.json").stat().st_mode  # others may read it too
    psnrs = [line[2] for line in losses(trained)]
    assert len(psnrs) == STEPS and psnrs[-1] < psnrs[0]
    # the report is what an independent computation gives
    test = open_images(pictures, "test")
    raw = torch.stack([test.raw(i) for i in range(12)])
    again = to_uint8(decode_codes(vqvae, encode_images(vqvae, raw.float() / 127.5 - 1)))
    mse = ((again.double() - raw.double()) ** 2).flatten(1).mean(1)
    assert report["psnr"] == pytest.approx(float((10 * torch.log10(255**2 / mse)).mean()), abs=1e-3)


def test_killed_and_resumed_is_bitwise_the_same(tmp_path, trained, pictures, monkeypatch, capsys):
    recipe = tiny_recipe(tmp_path / "tokenizer", pictures)
    step, count = torch.optim.AdamW.step, 0

    def dies_after_nine(self, *arguments, **named):
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", dies_after_nine)
        train_tokenizer(recipe)
    output = tmp_path / "tokenizer"
    told = "number of processes x batch_size = 1 x 4 = 4 images a step, of 40 in "
    assert told in capsys.readouterr().out
    assert [line[0] for line in losses(output)] == list(range(1, 10))
    assert [p.name for p in (output / "checkpoints").glob("step-*")] == [f"step-{CHECKPOINT:08d}"]
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_tokenizer(output)
    # a checkpoint and a line that were being written when the lights went out
    (output / "checkpoints" / ".step-00000010.partial").mkdir()
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')

    train_tokenizer(recipe)
    assert told not in capsys.readouterr().out
    assert losses(output) == losses(trained)
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (2 * CHECKPOINT, STEPS)]
    assert yaml.safe_load((output / "recipe.yaml").read_text()) == dataclasses.asdict(recipe)
    assert weights_hash(load_tokenizer(output)) == weights_hash(load_tokenizer(trained))
    codes = [encode_images(load_tokenizer(p), torch.zeros(1, 1, 16, 16)) for p in (output, trained)]
    assert torch.equal(*codes)


def test_a_trained_tokenizer_is_whole_before_it_is_measured_by_any_number_of_processes(
    tmp_path, trained, pictures, monkeypatch
):
    recipe = tiny_recipe(tmp_path / "tokenizer", pictures)
    output = tmp_path / "tokenizer"

    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "measure_tokenizer", dies)
        train_tokenizer(recipe)
    assert weights_hash(load_tokenizer(output)) == weights_hash(load_tokenizer(trained))
    assert json.loads((output / "tokenizer.json").read_text())["num_codes"] == 16
    assert not (output / "report.json").exists()

    state = output / "checkpoints" / f"step-{STEPS:08d}" / "state.json"
    content = json.loads(state.read_text())
    content["bound"]["number of processes"] = 8
    state.write_text(json.dumps(content))
    train_tokenizer(recipe)
    report = json.loads((output / "report.json").read_text())
    assert report["training"]["images_seen"] == STEPS * 4 * 8
    assert report["psnr"] == json.loads((trained / "report.json").read_text())["psnr"]

    state.write_text(json.dumps({**content, "step": STEPS - 1}))  # on the way it matters who trains
    with pytest.raises(ValueError, match="number of processes=1, but the run .* began with 8"):
        train_tokenizer(recipe)


def test_a_measured_tokenizer_is_measured_again_only_with_another_judge_or_where_it_is_damaged(
    tmp_path, trained, pictures, monkeypatch
):
    shutil.copytree(trained, tmp_path / "tokenizer")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokenizer").glob("*.json")}
    measured = []
    monkeypatch.setattr(train_module, "measure_tokenizer", lambda *a: measured.append(a) or {"psnr": 0.0})
    recipe = tiny_recipe(tmp_path / "tokenizer", pictures)
    train_tokenizer(recipe)
    assert not measured and all(path.stat().st_mtime_ns == time for path, time in before.items())
    judge = ExtractorRecipe(str(tmp_path / "judge"), pictures, width=8, feature_dim=8, batch_size=8, epochs=1)
    train_tokenizer(dataclasses.replace(recipe, extractor=str(train_extractor(judge))))
    assert len(measured) == 1
    train_tokenizer(recipe)
    (tmp_path / "tokenizer" / "diffusion_pytorch_model.safetensors").unlink()
    train_tokenizer(recipe)
    assert len(measured) == 3 and load_tokenizer(tmp_path / "tokenizer")


TWO_PROCESSES = """
import json, sys, torch
torch.set_num_threads(1)
from xdlm_image.recipes import DataOptions, TokenizerModelOptions, TokenizerRecipe
from xdlm_image.weights import weights_hash
from xdlm_image.tokenizer.train import TokenizerTraining
values = json.loads(sys.argv[1])
data, model = DataOptions(**values.pop("data")), TokenizerModelOptions(**values.pop("model"))
recipe = TokenizerRecipe(data=data, model=model, **values)
training = TokenizerTraining(recipe)
training.run()
training.accelerator.wait_for_everyone()
again = TokenizerTraining(recipe)
assert again.resume() and weights_hash(again.vqvae) == weights_hash(training.vqvae)
hashes = [None, None]
torch.distributed.all_gather_object(hashes, weights_hash(training.vqvae))
assert hashes[0] == hashes[1], hashes
training.finish()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_take_the_steps_of_one(tmp_path, pictures):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    one = TokenizerTraining(tiny_recipe(tmp_path / "one", pictures, batch_size=8))
    one.run()
    recipe = json.dumps(dataclasses.asdict(tiny_recipe(tmp_path / "two", pictures, batch_size=4)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), recipe]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # gradients are averaged over the same eight images; revival, which draws from one process's latents, comes later
    norms = [[line[3] for line in losses(tmp_path / name)][:7] for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    alone = measure_tokenizer(load_tokenizer(tmp_path / "two"), open_images(pictures, "test"), 5)
    assert alone.pop("split") == report["split"]
    assert {name: report[name] for name in alone} == pytest.approx(alone, rel=1e-5)


def test_widths_may_be_a_tuple(tmp_path, pictures):
    """As diffusers writes them; a checkpoint's are JSON's lists."""
    recipe = tiny_recipe(tmp_path / "tokenizer", pictures)
    recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, block_out_channels=tuple(recipe.model.block_out_channels))
    )
    training = TokenizerTraining(recipe)
    training.step = 3
    training.save_checkpoint()
    again = TokenizerTraining(recipe)
    assert again.resume() and again.step == 3


def test_another_recipe_is_not_resumed(trained, pictures, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(trained, folder)
    with pytest.raises(ValueError, match=r"learning_rate=0\.01, but the run .* began with 0\.005"):
        train_tokenizer(tiny_recipe(folder, pictures, learning_rate=1e-2))
    with pytest.raises(ValueError, match="resume=False"):
        train_tokenizer(tiny_recipe(folder, pictures, resume=False))


def test_nodes_that_do_not_see_one_folder_are_refused(trained, pictures, tmp_path, monkeypatch):
    """Each would go on at its own step, with its own weights."""
    shutil.copytree(trained, tmp_path / "tokenizer")
    training = TokenizerTraining(tiny_recipe(tmp_path / "tokenizer", pictures))
    monkeypatch.setattr(checkpoints_module, "gather_object", lambda step: [*step, 0])  # the other has none
    with pytest.raises(ValueError, match=rf"\({STEPS}, none\).*one folder that all nodes see"):
        training.resume()


HOLDS = """
import sys, time
from pathlib import Path
from xdlm_image.processes import only_command
with only_command(Path(sys.argv[1]), True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_command_on_one_folder_is_refused_until_the_first_is_gone(tmp_path, pictures):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="output_dir='.*run': another command is at work there"):
            train_tokenizer(tiny_recipe(tmp_path / "run", pictures))
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        with only_command(tmp_path / "run", False):  # another rank of the run that holds it
            pass
    finally:
        holder.kill()
        holder.wait()
    for _ in range(2):  # the lock went with it, and goes with each command
        train_tokenizer(tiny_recipe(tmp_path / "run", pictures))


def test_zero_means_no_clipping_and_only_at_the_end(tmp_path, pictures):
    recipe = tiny_recipe(tmp_path, pictures, gradient_clip=0.0, log_every=0, checkpoint_every=0, revive_after=0)
    training = TokenizerTraining(recipe)
    before = [p.detach().clone() for p in training.vqvae.parameters()]
    training.run()
    assert [line[0] for line in losses(tmp_path)] == [STEPS]
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == [f"step-{STEPS:08d}"]
    moved = [(a - b.detach()).abs().max() for a, b in zip(before, training.vqvae.parameters())]
    assert max(moved) > 1e-2


def test_a_loss_that_is_no_number_stops_the_training(tmp_path, pictures):
    training = TokenizerTraining(tiny_recipe(tmp_path, pictures))
    with torch.no_grad():
        training.vqvae.post_quant_conv.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="step 1: the loss is nan: lower learning_rate"):
        training.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"log_every": -1}, "log_every=-1"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"gradient_clip": -1.0}, "gradient_clip=-1.0"),
        ({"revive_after": -1}, "revive_after=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"warmup_steps": 14}, "warmup_steps=14: .*below max_steps=14; lower warmup_steps, or raise max_steps"),
        ({"plain_steps": 20}, "plain_steps=20: .*below max_steps=14.*lower plain_steps, or raise max_steps"),
    ],
)
def test_ranges_of_the_recipe(tmp_path, pictures, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_recipe(tmp_path, pictures, **changes)


def test_ranges_of_the_other_recipes(pictures):
    for changes in ({"norm_num_groups": 0}, {"block_out_channels": []}, {"block_out_channels": [0]}):
        with pytest.raises(ValueError, match=f"model.{next(iter(changes))}="):
            TokenizerModelOptions(**changes)
    with pytest.raises(ValueError, match="layers_per_block=0"):
        TokenizerModelOptions(layers_per_block=0)
    for kind, required in ((EncodeRecipe, ["a", "b"]), (ExtractorRecipe, ["a"]), (EvaluateRecipe, ["c", {"a": "b"}])):
        with pytest.raises(ValueError, match="batch_size=0"):
            kind(*required, batch_size=0)
        if kind is not EvaluateRecipe:
            with pytest.raises(ValueError, match="num_workers=-1"):
                kind(*required, num_workers=-1)
    with pytest.raises(ValueError, match="name each split once"):
        EncodeRecipe("a", "b", splits=[])


def test_wrong_options_fail_before_training(tmp_path, pictures):
    with pytest.raises(ValueError, match="plain_steps=14"):
        tiny_recipe(tmp_path, pictures, plain_steps=STEPS)
    with pytest.raises(ValueError, match=r"image_size=18: must be a multiple"):
        train_tokenizer(tiny_recipe(tmp_path, dataclasses.replace(pictures, image_size=18)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train_tokenizer(tiny_recipe(tmp_path, pictures, extractor=str(tmp_path / "nowhere")))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_learns(tmp_path, pictures):
    """More than the mean image: 100 tiny steps beat the best constant picture."""
    data = dataclasses.replace(pictures, crop="center", image_size=8)
    recipe = tiny_recipe(tmp_path, data, batch_size=8, max_steps=100, plain_steps=30, warmup_steps=5)
    recipe = dataclasses.replace(recipe, learning_rate=2e-2, checkpoint_every=1000, log_every=50, revive_after=40)
    recipe.model.block_out_channels = [8, 8]
    training = TokenizerTraining(recipe)
    training.run()
    training.finish()
    train = open_images(data, "train")
    report = measure_tokenizer(load_tokenizer(tmp_path), train, 40)
    raw = torch.stack([train.raw(i) for i in range(len(train))]).double()
    constant = 10 * math.log10(255**2 / float((raw - raw.mean(0)).square().mean()))
    assert report["psnr_of_mean_error"] > constant + 1.5
    assert report["codes_used"] >= 14


def test_measuring_uses_the_tokenizer_once_an_image_and_gives_the_rfid_of_its_images(
    trained, tmp_path, pictures, monkeypatch
):
    data = dataclasses.replace(pictures, crop="center")
    recipe = ExtractorRecipe(str(tmp_path / "judge"), data, width=8, feature_dim=8, batch_size=8, epochs=1)
    extractor = load_extractor(train_extractor(recipe), "cpu")
    vqvae, test = load_tokenizer(trained), open_images(data, "test")
    encoded = []

    def counted(vqvae, images):
        encoded.append(len(images))
        return encode_images(vqvae, images)

    monkeypatch.setattr(measure_module, "encode_images", counted)
    report = measure_tokenizer(vqvae, test, 5, extractor)
    assert encoded == [5, 5, 2]
    raw = torch.stack([test.raw(i) for i in range(len(test))])
    again = to_uint8(decode_codes(vqvae, encode_images(vqvae, raw.float() / 127.5 - 1)))
    expected = fids(*(statistics_of(extractor, of) for of in (raw, again)))
    assert set(report["rfid"]) == {"pooled", "spatial"}
    for layer, value in expected.items():
        assert report["rfid"][layer] == pytest.approx(value, rel=1e-4, abs=1e-9)
