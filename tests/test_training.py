"""The training room: a run killed anywhere goes on bit for bit, learns, and refuses what does not fit."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import VQModel

from xdlm_image.data.code_cache import CodeCache, Manifest, code_dtype, write_code_cache
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.recipes import ProcessOptions, TrainRecipe, TransformerOptions
from xdlm_image.training import loop
from xdlm_image.training.batches import batch_indices, rank_positions, step_seed, stratified_times
from xdlm_image.training.loop import TrainingRun, train
from xdlm_image.training.meters import LossMeter
from xdlm_image.weights import weights_hash

CODES, GRID, CLASSES = 16, [2, 2], ["odd", "even", "third"]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A tiny tokenizer, and caches whose four codes all equal the class's code or its neighbour."""
    torch.manual_seed(0)
    vqvae = VQModel(
        in_channels=1, out_channels=1, block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        num_vq_embeddings=CODES, vq_embed_dim=4, norm_num_groups=4, lookup_from_codebook=True,
    )  # fmt: skip
    vqvae.save_pretrained(tmp_path / "tokenizer")
    for split, number in (("train", 90), ("validation", 1000)):
        rng = np.random.default_rng(number)
        labels = rng.integers(0, len(CLASSES), number)
        codes = (4 * labels + rng.integers(0, 2, number))[:, None, None].repeat(2, 1).repeat(4, 2)
        manifest = Manifest(
            weights_hash(vqvae), "fingerprint of " + split, split, 8, 1, "center", GRID, CODES, number, 2, CLASSES,
            str(code_dtype(CODES)), "<i8", cut={},
        )  # fmt: skip
        write_code_cache(tmp_path / "codes" / split, manifest, [(codes, labels)])
    return tmp_path


def recipe_in(world: Path, name: str = "run", **changes) -> TrainRecipe:
    settings = dict(
        codes=str(world / "codes/train"), validation_codes=str(world / "codes/validation"),
        tokenizer=str(world / "tokenizer"), output_dir=str(world / name), process=ProcessOptions(k=0.1),
        model=TransformerOptions(num_layers=1, num_attention_heads=2, attention_head_dim=8, dropout=0.1),
        batch_size=8, gradient_accumulation_steps=2, max_steps=12, warmup_steps=2, learning_rate=3e-3, log_every=1,
        validate_every=0, validation_samples=50, sample_every=0, checkpoint_every=4,
    )  # fmt: skip
    return TrainRecipe(**(settings | changes))


def logged(folder: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return XDLMPipeline.from_pretrained(folder / "pipeline").transformer.state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_run_equals_an_unbroken_one_bit_for_bit(world: Path, optimizer: str) -> None:
    every = {"log_every": 3, "checkpoint_every": 4, "optimizer": optimizer}  # log lines that reach over a checkpoint
    train(recipe_in(world, "whole", **every))
    train(recipe_in(world, "broken", stop_after=5, **every))
    train(recipe_in(world, "broken", **every))
    for key in ("train/loss", "train/gradient_norm", "train/learning_rate", "validation/bits_per_token"):
        whole, broken = logged(world / "whole", key), logged(world / "broken", key)
        assert whole and broken == whole
    assert logged(world / "whole", "train/learning_rate")[3] == 3e-3  # of the first step after warm-up
    whole, broken = weights(world / "whole"), weights(world / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert len(list((world / "broken" / "checkpoints").glob("step-*"))) == 2


def test_stopping_before_what_is_done_is_refused(world: Path) -> None:
    train(recipe_in(world, stop_after=6))
    with pytest.raises(ValueError, match="stop_after=3: the run in .*run has done 6 steps already; name more"):
        train(recipe_in(world, stop_after=3))
    train(recipe_in(world, stop_after=6))  # nothing is left


def test_a_second_precision_in_one_python_process_is_refused(world: Path) -> None:
    Accelerator(mixed_precision="no")
    with pytest.raises(
        ValueError, match="mixed_precision='bf16': this Python process began with 'no', which accelerate"
    ):
        TrainingRun(recipe_in(world, mixed_precision="bf16"))


def test_pipelines_while_training_are_the_averages_of_their_steps(world: Path) -> None:
    """Each is what a run that stops there saves; a killed run makes up for one it lost; the training is the same."""
    train(recipe_in(world, "plain"))
    recipe = recipe_in(world, "whole", pipeline_every=3, checkpoint_every=6)
    train(dataclasses.replace(recipe, stop_after=6))
    shutil.rmtree(world / "whole" / "checkpoints")  # killed: everything is done again
    (world / "whole" / "pipelines" / "step-00000003" / "left").touch()
    train(recipe)
    names = [f"step-{step:08d}" for step in (3, 6, 9, 12)]
    assert sorted(path.name for path in (world / "whole" / "pipelines").iterdir()) == names
    assert not (world / "whole" / "pipelines" / names[0] / "left").exists()
    assert logged(world / "whole", "train/loss") == logged(world / "plain", "train/loss")
    train(recipe_in(world, "stopped", stop_after=6))
    saved = XDLMPipeline.from_pretrained(world / "whole" / "pipelines" / names[1]).transformer.state_dict()
    stopped, last = weights(world / "stopped"), weights(world / "whole")
    assert all(torch.equal(saved[name], stopped[name]) for name in stopped)
    assert not all(torch.equal(saved[name], last[name]) for name in last)


def test_gradient_checkpointing_computes_each_block_again_and_changes_no_number(world: Path) -> None:
    """With dropout, whose draws must be those of the first time."""
    model = TransformerOptions(num_layers=2, num_attention_heads=2, attention_head_dim=8, dropout=0.1)
    runs = [TrainingRun(recipe_in(world, gradient_checkpointing=again, model=model)) for again in (False, True)]
    calls = [[], []]
    for run, seen in zip(runs, calls):
        for block in run.transformer.transformer_blocks:
            forward = block.forward
            block.forward = lambda *a, seen=seen, forward=forward: (seen.append(1), forward(*a))[1]
        losses = [run.train_step().item() for _ in range(4)]
        assert len(set(losses)) == 4
    assert [len(seen) for seen in calls] == [4 * 2 * 2, 2 * 4 * 2 * 2]  # steps, batches, blocks
    plain, again = (run.transformer.state_dict() for run in runs)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_muon_turns_the_maps_between_features_and_adamw_the_rest(world: Path) -> None:
    """Muon's step is an orthogonal matrix times the learning rate: all its singular values are about equal."""
    run = TrainingRun(recipe_in(world, optimizer="muon", warmup_steps=0, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in run.transformer.named_parameters()}
    groups = [(g.get("use_fallback", False), {id(p) for p in g["params"]}) for g in run.optimizer.param_groups]
    muon = {
        name
        for name, p in run.transformer.named_parameters()
        if p.ndim == 2 and any(id(p) in members and not fallback for fallback, members in groups)
    }
    inner = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
    assert muon == {f"transformer_blocks.0.{name}.weight" for name in inner}
    for _ in range(4):  # head and gates begin at 0: what lies behind them moves a step or two later
        run.train_step()
        after = {name: p.detach().clone() for name, p in run.transformer.named_parameters()}
        steps, before = {name: after[name] - before[name] for name in muon}, after
    for name, step in steps.items():
        values = torch.linalg.svdvals(step)
        assert values[0] > 0 and values[len(values) // 2] > 0.5 * values[0], name


def test_killed_process_goes_on_bit_for_bit(world: Path) -> None:
    """SIGKILL in the middle of a step, through the command line."""
    options = ["--max_steps=60", "--checkpoint_every=5"]
    train(recipe_in(world, "whole", max_steps=60, checkpoint_every=5))
    recipe = world / "whole" / "recipe.yaml"
    command = [
        sys.executable,
        "-m",
        "xdlm_image.cli",
        "train",
        f"--config={recipe}",
        f"--output_dir={world / 'killed'}",
    ]
    for wanted in (10,):
        process = subprocess.Popen(command + options, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            if any(int(p.name[5:]) >= wanted for p in (world / "killed" / "checkpoints").glob("step-*")):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command + options, check=True)
    assert logged(world / "killed", "train/loss") == logged(world / "whole", "train/loss")


def test_learns_what_is_there_to_learn(world: Path) -> None:
    """Given the class, four tokens share one bit: 0.25 bits a token. A network that knows nothing needs 4 bits."""
    model = TransformerOptions(num_layers=2, num_attention_heads=2, attention_head_dim=16)
    changes = {"gradient_accumulation_steps": 1, "batch_size": 32, "validation_samples": 1000, "log_every": 50}
    train(recipe_in(world, max_steps=150, model=model, **changes))
    bits = logged(world / "run", "validation/bits_per_token")
    assert 0.2 < bits[150] < 0.6
    branches = {
        key for key in json.loads((world / "run" / "metrics.jsonl").read_text().splitlines()[-2]) if "branch" in key
    }
    assert {"train/loss_by_branch/mask", "train/loss_by_branch/wrong", "train/loss_by_branch/right"} <= branches
    assert list((world / "run").rglob("events.out.tfevents*"))
    assert list((world / "run" / "samples").glob("step-*150.png"))
    codes = XDLMPipeline.from_pretrained(world / "run" / "pipeline")(
        ["odd", 1, 2] * 20, num_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images
    right = (torch.as_tensor(codes).flatten(1) // 4 == torch.tensor([0, 1, 2] * 20)[:, None]).float().mean()
    assert right > 0.9


def test_training_without_classes_learns_the_codes_of_all_of_them(world: Path) -> None:
    """Four tokens share one of six codes: log2(6) / 4 = 0.65 bits a token."""
    model = TransformerOptions(num_layers=2, num_attention_heads=2, attention_head_dim=16)
    changes = {"gradient_accumulation_steps": 1, "batch_size": 32, "validation_samples": 1000, "log_every": 50}
    recipe = recipe_in(world, max_steps=200, model=model, conditional=False, **changes)
    assert recipe.class_dropout == 0
    train(dataclasses.replace(recipe, stop_after=100))
    train(recipe)
    assert 0.6 < logged(world / "run", "validation/bits_per_token")[200] < 1.0
    assert (world / "run" / "samples" / "step-00000200.png").exists()
    pipeline = XDLMPipeline.from_pretrained(world / "run" / "pipeline")
    assert pipeline.transformer.config.num_classes is None and not pipeline.id2label
    assert not [name for name in pipeline.transformer.state_dict() if "class" in name]
    codes = pipeline(
        num_images_per_prompt=100, num_steps=32, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images.flatten(1)
    agree = (codes == codes[:, :1]).all(1)
    assert agree.float().mean() > 0.6 and {0, 1, 4, 5, 8, 9} == set(codes[agree][:, 0].tolist())
    with pytest.raises(ValueError, match="conditional=True, but the run in .* began with False"):
        train(recipe_in(world, max_steps=200, model=model, **changes))
    with pytest.raises(ValueError, match="class_dropout=0.1: with conditional=false"):
        recipe_in(world, conditional=False, class_dropout=0.1)


@pytest.mark.parametrize("k", [0.0, 1.0])
def test_first_loss_is_that_of_the_uniform_prediction(world: Path, k: float) -> None:
    """The zero-initialised output predicts uniformly: the NELBO is at most log K, and is log K at k = 0."""
    train(
        recipe_in(
            world,
            max_steps=3,
            warmup_steps=1,
            validate_every=1,
            process=ProcessOptions(k=k),
            validation_samples=500,
            learning_rate=1e-9,
        )
    )
    bits = logged(world / "run", "validation/bits_per_token")[1]
    assert bits == pytest.approx(4.0, abs=0.6 if k == 0 else 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": "nowhere"}, "nowhere"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"validation_codes": "nowhere"}, "validation_codes='nowhere'"),
        ({"model": TransformerOptions(num_attention_heads=3, attention_head_dim=7)}, "attention_head_dim"),
    ],
)
def test_wrong_recipes_fail_before_training(world: Path, changes: dict, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TrainingRun(recipe_in(world, **changes))
    assert not (world / "run" / "checkpoints").exists()


def test_other_tokenizer_is_refused(world: Path) -> None:
    torch.manual_seed(1)
    vqvae = VQModel.from_pretrained(world / "tokenizer")
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    vqvae.save_pretrained(world / "other")
    with pytest.raises(ValueError, match="made by"):
        TrainingRun(recipe_in(world, tokenizer=str(world / "other")))


def test_validation_must_be_other_images_of_the_same_kind(world: Path) -> None:
    with pytest.raises(ValueError, match="the training images"):
        TrainingRun(recipe_in(world, validation_codes=str(world / "codes/train")))
    manifest = CodeCache.open(world / "codes/validation").manifest
    for changes, name in (({"class_names": CLASSES[::-1]}, "class_names"), ({"grid": [1, 4]}, "grid")):
        other = world / "codes" / name
        one_image = [(np.zeros((1, 2, 4), int), np.zeros(1, int))]
        write_code_cache(other, dataclasses.replace(manifest, num_images=1, **changes), one_image)
        with pytest.raises(ValueError, match=name):
            TrainingRun(recipe_in(world, validation_codes=str(other)))


def test_damaged_codes_are_found_before_training(world: Path) -> None:
    path = world / "codes" / "train" / "codes.bin"
    codes = np.fromfile(path, "<u2")
    codes[7] = (codes[7] + 1) % CODES  # still a code
    codes.tofile(path)
    with pytest.raises(ValueError, match="damaged"):
        TrainingRun(recipe_in(world))


def test_divergence_stops_the_run_and_keeps_the_good_checkpoints(world: Path) -> None:
    train(recipe_in(world, stop_after=4, gradient_clip=0.0))
    run = TrainingRun(recipe_in(world, gradient_clip=0.0))
    run.resume()
    with torch.no_grad():
        run.transformer.proj_out.weight.fill_(torch.nan)
    run.train_step()
    for act in (run.log_training, run.save_checkpoint):
        with pytest.raises(ValueError, match="learning_rate=0.003"):
            act()
    assert run.checkpoints.steps() == [4]


def test_weights_that_one_gradient_has_spoilt_push_no_good_ones_out(world: Path) -> None:
    """The loss before the update was finite."""
    train(recipe_in(world, stop_after=4))
    run = TrainingRun(recipe_in(world))
    run.resume()
    run.train_step()
    with torch.no_grad():
        run.transformer.proj_out.bias[3] = torch.inf
    with pytest.raises(ValueError, match=r"step 5: model holds NaN or infinity in proj_out.bias.*step 4 stays"):
        run.save_checkpoint()
    assert run.checkpoints.steps() == [4] and run.loss.isfinite()


def test_images_per_second_are_those_of_steps_alone(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def takes(seconds: float, method):
        def timed(self, *args):
            result = method(self, *args)
            clock[0] += seconds
            return result

        return timed

    monkeypatch.setattr(TrainingRun, "_draw", takes(0.25, TrainingRun._draw))
    for name in ("validate", "draw_samples", "save_checkpoint", "save_pipeline"):
        monkeypatch.setattr(TrainingRun, name, takes(100, getattr(TrainingRun, name)))
    train(recipe_in(world, log_every=3, validate_every=2, sample_every=5, checkpoint_every=4, pipeline_every=7))
    assert logged(world / "run", "train/images_per_second") == dict.fromkeys((3, 6, 9, 12), 2 * 8 / 0.5)


def test_meter_counts_every_token() -> None:
    """More tokens than float32 can count one by one."""
    meter = LossMeter(5, torch.device("cpu"))
    z = torch.full((1, 1 << 20), 5)
    for _ in range(18):
        meter.update(torch.full(z.shape, 3.0), z, torch.zeros_like(z), torch.tensor([0.35]))
    values = meter.take(Accelerator(cpu=True))
    assert values["loss"] == values["loss_by_alpha/0.6-0.7"] == values["share_by_branch/mask"] == 3.0


def test_run_goes_on_only_with_its_recipe_and_its_data(world: Path) -> None:
    train(recipe_in(world, stop_after=4))
    for changes, name in (
        ({"learning_rate": 1e-4}, "learning_rate"),
        ({"process": ProcessOptions(k=0.2)}, "process.k"),
        ({"codes": str(world / "codes/validation"), "validation_codes": None}, "the codes are not those"),
    ):
        with pytest.raises(ValueError, match=name):
            train(recipe_in(world, **changes))
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train(recipe_in(world, resume=False))
    newest = max((world / "run" / "checkpoints").iterdir())
    (newest / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged \(EOFError\(.*remove that folder to start afresh"):
        train(recipe_in(world))
    shutil.copytree(newest, newest.with_name("step-00000006"))
    with pytest.raises(ValueError, match="step-00000006 is damaged .*remove that folder to go on from step 4"):
        train(recipe_in(world))


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.0}, {"batch_size": 0}, {"class_dropout": 1.0}, {"t_min": 0.0}, {"warmup_steps": 99},
        {"validation_samples": 0}, {"sample_steps": 0}, {"stop_after": 0}, {"gradient_clip": -1.0}, {"log_every": 0},
        {"checkpoint_every": -1}, {"pipeline_every": -1}, {"seed": -1}, {"weight_decay": -0.1}, {"adam_beta1": 1.0},
        {"adam_beta2": -0.1},
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        TrainRecipe("codes", "out", "tokenizer", max_steps=10, **({"warmup_steps": 1} | settings))


def test_every_epoch_shows_every_image_once_whatever_the_ranks() -> None:
    seen = batch_indices(10, seed=3, first=0, count=30).reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in seen)
    assert not np.array_equal(seen[0], seen[1])
    one = [batch_indices(10, 3, rank_positions(s, m, 4, 2, 1, 0), 4) for s in range(3) for m in range(2)]
    two = [batch_indices(10, 3, rank_positions(s, 0, 4, 1, 2, r), 4) for s in range(3) for r in range(2)]
    assert np.array_equal(np.concatenate(one), np.concatenate(two))


@pytest.mark.parametrize("world_size", [1, 4])
def test_times_are_stratified_and_every_rank_covers_the_range(world_size: int) -> None:
    count, t_min = 50, 1e-3
    ranks = [stratified_times(count, t_min, torch.Generator().manual_seed(r), r, world_size) for r in range(world_size)]
    for t in ranks:
        assert t.min() >= t_min and t.max() <= 1.0 and t.max() - t.min() > 0.9
        assert not torch.equal(t, t.sort().values)
    strata = ((torch.cat(ranks) - t_min) / (1 - t_min) * count * world_size).long().sort().values
    assert torch.equal(strata, torch.arange(count * world_size))


@pytest.mark.slow
def test_two_processes_share_a_run(world: Path) -> None:
    """Each step logged once, both ranks' images in it, and the run goes on from its checkpoint."""
    recipe = TrainRecipe(**vars(recipe_in(world, "two", gradient_accumulation_steps=1, stop_after=6)))
    (world / "two.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "xdlm_image.cli",
    ]
    for stop in ("6", "12"):
        subprocess.run(
            [*launch, "train", f"--config={world / 'two.yaml'}", f"--stop_after={stop}", "--pipeline_every=5"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            check=True,
        )
    losses = logged(world / "two", "train/loss")
    assert list(losses) == list(range(1, 13)) and all(0 < loss < 10 for loss in losses.values())
    assert logged(world / "two", "train/images")[12] == 12 * 2 * 8
    assert len(list((world / "two" / "pipelines").glob("step-*/model_index.json"))) == 2
    weights(world / "two")


def test_step_seeds_differ() -> None:
    seeds = {step_seed(s, step, rank) for s in range(3) for step in range(200) for rank in range(4)}
    assert len(seeds) == 3 * 200 * 4


def test_cache_codes_outside_the_codebook_are_found(world: Path) -> None:
    cache = CodeCache.open(world / "codes" / "train")
    path = cache.path / "codes.bin"
    path.write_bytes(b"\xff\xff" * (path.stat().st_size // 2))
    with pytest.raises(ValueError, match="outside|damaged"):
        train(recipe_in(world))


def test_another_attention_backend_learns_the_same_and_a_wrong_one_is_refused(world: Path) -> None:
    train(recipe_in(world, "default"))
    train(recipe_in(world, "math", attention_backend="_native_math"))
    whole, other = (list(logged(world / name, "train/loss").values()) for name in ("default", "math"))
    assert whole == pytest.approx(other, rel=1e-4) and len(whole) > 1
    with pytest.raises(ValueError, match="(?s)attention_backend='fast'.*native"):
        train(recipe_in(world, "wrong", attention_backend="fast"))
    assert not (world / "wrong").exists()


@pytest.mark.slow  # minutes of a C++ compiler
def test_a_compiled_run_learns_the_same_and_resumes(world: Path) -> None:
    model = TransformerOptions(
        num_layers=1, num_attention_heads=2, attention_head_dim=8
    )  # no dropout: its draws differ
    changes = {"model": model, "validate_every": 4, "log_every": 1}
    train(recipe_in(world, "eager", **changes))
    recipe = recipe_in(world, "compiled", compile=True, **changes)
    train(dataclasses.replace(recipe, stop_after=6))
    train(recipe)
    for key in ("train/loss", "validation/bits_per_token"):
        eager, compiled = logged(world / "eager", key), logged(world / "compiled", key)
        assert eager.keys() == compiled.keys() and len(eager) > 1
        assert list(compiled.values()) == pytest.approx(list(eager.values()), rel=1e-3)


@pytest.mark.gpu
def test_gpu_training_compiled_in_bfloat16_learns_resumes_and_draws(world: Path) -> None:
    """As `shipped/train.sh gpu` trains, in processes of their own: one keeps the precision it began with."""
    recipe = recipe_in(world, max_steps=60, checkpoint_every=15, optimizer="muon")
    (world / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    ways = ["--mixed_precision=bf16", "--compile=true"]
    for stop in (30, 60):
        command = ["-m", "xdlm_image.cli", "train", f"--config={world / 'recipe.yaml'}", f"--stop_after={stop}", *ways]
        subprocess.run([sys.executable, *command], check=True)
    losses = list(logged(world / "run", "train/loss").values())
    assert len(losses) == 60 and sum(losses[-15:]) < 0.9 * sum(losses[:15])
    pipe = XDLMPipeline.from_pretrained(world / "run" / "pipeline").to("cuda")
    codes = pipe(["odd", "third"], num_steps=4, output_type="latent").images
    assert codes.device.type == "cuda" and codes.shape == (2, *GRID) and codes.max() < CODES
