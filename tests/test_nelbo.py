"""The verb `nelbo`: the estimate against entropies that are known, its intervals, and the verb as a user meets it."""

import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_parts import CLASSES, NUM_CODES, save_pipeline

from xdlm_image.cli import main, parse
from xdlm_image.data import image_batches
from xdlm_image.data.code_cache import Manifest, code_dtype, write_code_cache
from xdlm_image.evaluation import nelbo as verb
from xdlm_image.evaluation import nelbo_estimate
from xdlm_image.evaluation.nelbo import nelbo
from xdlm_image.evaluation.nelbo_estimate import (
    FLAT_SHARE,
    NUM_STRATA,
    Interval,
    NelboEstimator,
    TimeProposal,
    end_terms,
)
from xdlm_image.objective import XDLMLoss
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.recipes import NelboRecipe
from xdlm_image.schedulers import XDLMProcess
from xdlm_image.weights import weights_hash

P_DATA = torch.tensor([[0.30, 0.05, 0.02], [0.01, 0.20, 0.12], [0.08, 0.02, 0.20]], dtype=torch.float64)
PAIRS = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9, 2), in the order of P_DATA.flatten()
ENTROPY = float(-(P_DATA * P_DATA.log2()).sum()) / 2  # bits per token
LENGTH = 12  # tokens of an image: pairs from `P_DATA`, independent of each other


class Oracle(torch.nn.Module):
    """The exact leave-one-out posteriors of every pair: p(x_0 | z_1) and p(x_1 | z_0)."""

    def __init__(self, process: XDLMProcess) -> None:
        super().__init__()
        self.process = process

    def forward(self, z, timestep, class_labels):
        alpha, beta = (a[:, None] for a in self.process.alpha_beta(timestep.double()))  # (B, 1)
        q = self.process.marginal(torch.arange(3), alpha, beta)  # (B, 3, ids)
        likelihood = q.transpose(1, 2).gather(1, z[..., None].expand(-1, -1, 3))  # (B, L, 3): q(z_i | x_i)
        first = likelihood[:, 1::2] @ P_DATA.T  # (B, L/2, 3): position 0 given z_1
        second = likelihood[:, 0::2] @ P_DATA
        return SimpleNamespace(sample=torch.stack([first, second], 2).flatten(1, 2).log())  # (B, L, 3)


def oracle(k: float) -> XDLMLoss:
    process = XDLMProcess(k, 3)
    return XDLMLoss(Oracle(process), process)


def drawn(count: int, seed: int) -> torch.Tensor:
    """Images (count, LENGTH) of the distribution that `Oracle` knows."""
    generator = torch.Generator().manual_seed(seed)
    return PAIRS[torch.multinomial(P_DATA.flatten(), count * LENGTH // 2, True, generator=generator)].view(count, -1)


def surprise(codes: torch.Tensor) -> torch.Tensor:
    """-log2 p(x) / tokens of each image (n,)."""
    return -P_DATA[codes[:, 0::2], codes[:, 1::2]].log2().sum(1) / LENGTH


@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_of_the_exact_denoiser_is_the_entropy(k):
    """And image by image -log2 p(x): the bound is tight where the denoiser is exact."""
    codes = drawn(1500, seed=2)
    estimate = NelboEstimator(oracle(k), codes, seed=2).estimate(num_times=4)
    bits = estimate.bits_per_token
    assert bits.low < ENTROPY < bits.high and bits.high - bits.low < 0.06 * ENTROPY
    error = Interval.of(estimate.images - surprise(codes))
    assert error.low < 0 < error.high
    for images in (surprise(codes) < ENTROPY, surprise(codes) > ENTROPY):  # neither easy nor hard ones are off
        error = Interval.of((estimate.images - surprise(codes))[images])
        assert abs(error.mean) < 3 * error.stderr < 0.1
    widths = estimate.proposal.edges.diff()
    assert float(estimate.density @ widths) == pytest.approx(bits.mean, rel=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say():
    model, proposal = oracle(0.1), NelboEstimator(oracle(0.1), drawn(64, 0)).fit_proposal()
    hits = 0
    for seed in range(100):
        estimator = NelboEstimator(model, drawn(50, seed + 1), seed=seed)
        bits = estimator.estimate(num_times=2, proposal=proposal).bits_per_token
        hits += bits.low < ENTROPY < bits.high
    assert 88 <= hits <= 99  # 95, three standard deviations are 7


@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_proposal_beats_uniform_times(k):
    """Of one image, as many times, uniform and stratified: both find -log2 p(x), ours with less noise."""
    codes = drawn(1, seed=3).expand(1500, LENGTH)
    estimator = NelboEstimator(oracle(k), codes, seed=3)
    ours = estimator.estimate(num_times=4).images
    jitter = torch.rand(len(codes), 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    generators = [torch.Generator().manual_seed(i) for i in range(len(codes))]
    uniform = estimator.losses(range(len(codes)), (torch.arange(4) + jitter) / 4, generators).mean(1) / math.log(2)
    for values in (ours, uniform):
        error = Interval.of(values - surprise(codes))
        assert abs(error.mean) < 3 * error.stderr
    assert ours.var() < 0.75 * uniform.var()


def test_what_lies_below_t_min():
    """Against times drawn there alone."""
    codes = drawn(1500, seed=5)
    estimator = NelboEstimator(oracle(1.0), codes, seed=5)
    estimate = estimator.estimate(num_times=8, t_min=0.05)
    t = 0.05 * torch.rand(len(codes), 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    generators = [torch.Generator().manual_seed(i) for i in range(len(codes))]
    alone = Interval.of(0.05 * estimator.losses(range(len(codes)), t, generators).mean(1) / math.log(2))
    below = estimate.bits_below
    assert abs(below.mean - alone.mean) < 4 * math.hypot(below.stderr, alone.stderr)
    assert 0.02 < below.mean / estimate.bits_per_token.mean < 0.3


def test_draws_of_a_proposal_cover_all_times_with_the_right_weights():
    proposal = TimeProposal(torch.tensor([0.5, 0.125, 0.125, 0.25], dtype=torch.float64))
    t, weight = proposal.draw(100_000, torch.Generator().manual_seed(0))
    assert 0 < t.min() < 1e-8 and 0.9999 < t.max() <= 1
    for function, integral in ((lambda t: t**0, 1.0), (lambda t: t, 1 / 2), (lambda t: -t.log(), 1.0)):
        assert float((weight * function(t)).sum()) == pytest.approx(integral, rel=1e-4)
    strata = (t ** (1 / 3) * 4).long().clamp(max=3).bincount() / len(t)
    assert strata.tolist() == pytest.approx(proposal.probs.tolist(), abs=1e-4)


def test_pilot_has_noise_of_its_own_and_misses_no_stratum():
    estimator = NelboEstimator(oracle(0.0), drawn(200, 7), seed=7)
    probs = estimator.fit_proposal().probs
    assert len(probs) == NUM_STRATA and float(probs.sum()) == pytest.approx(1, abs=1e-12)
    assert float(probs.min()) >= FLAT_SHARE / NUM_STRATA * (1 - 1e-12)
    flat = TimeProposal.flat()
    pilot, estimate = (
        estimator._weighted_losses(64, flat, NUM_STRATA, stream)[0]
        for stream in (nelbo_estimate.PILOT, nelbo_estimate.ESTIMATE)
    )
    assert (pilot != estimate).all()


def test_end_terms_are_zero_and_other_schedules_are_refused():
    class Clipped(XDLMProcess):
        @staticmethod
        def alpha_beta(t):
            return 1 - 0.999 * t, 0.999 * t

    for k in (0.0, 0.1, 1.0):
        assert end_terms(XDLMProcess(k, 5)) == {"prior_kl": 0.0, "reconstruction": 0.0}
    assert end_terms(XDLMProcess(0.1, 5, "B", 8, 6)) == {"prior_kl": 0.0, "reconstruction": 0.0}
    with pytest.raises(ValueError, match="a_1 = 0"):
        NelboEstimator(XDLMLoss(Oracle(Clipped(1.0, 3)), Clipped(1.0, 3)), drawn(2, 0))


# -- with a network -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two pipelines of random weights and one tokenizer, a cache of 40 images, and the run of a training."""
    root = tmp_path_factory.mktemp("nelbo")
    for name, k, seed in (("mdlm", 0.0, 1), ("xdlm", 0.1, 2)):
        save_pipeline(root / name, k=k, seed=seed)
    write_cache(root, "codes", XDLMPipeline.from_pretrained(root / "mdlm").vqvae)
    (root / "run").mkdir()
    lines = [{"step": 1, "train/loss": 3.0}]
    lines += [{"step": s, verb.BITS: 5 - s / 10, f"{verb.BITS}_stderr": 0.1} for s in (1, 2)]
    lines += [{"step": 3, verb.BITS: None, f"{verb.BITS}_stderr": None}]  # infinite
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "va')
    return root


def write_cache(root, name, vqvae, grid=(4, 4), classes=tuple(CLASSES), split="validation"):
    codes = np.random.default_rng(0).integers(0, NUM_CODES, (40, 1, grid[0] * grid[1]))
    labels = np.arange(40) % len(classes)
    manifest = Manifest(
        weights_hash(vqvae), "images", split, 16, 3, "center", list(grid), NUM_CODES, 40, 1, list(classes),
        str(code_dtype(NUM_CODES)), "<i8",
    )  # fmt: skip
    return write_code_cache(root / name, manifest, [(codes, labels)])


def recipe_in(world, output, **changes) -> NelboRecipe:
    recipe = NelboRecipe(
        pipelines={name: str(world / name) for name in ("mdlm", "xdlm")},
        codes=str(world / "codes"),
        output_dir=str(output),
        num_images=12,
        num_times=3,
        device="cpu",
    )
    return dataclasses.replace(recipe, **changes)


def network(world, name="xdlm") -> XDLMLoss:
    pipeline = XDLMPipeline.from_pretrained(world / name)
    return XDLMLoss(pipeline.transformer, pipeline.scheduler.process)


def test_estimate_depends_neither_on_the_batch_nor_on_the_number_of_processes(world, monkeypatch):
    model = network(world)
    codes = torch.randint(NUM_CODES, (13, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(13) % 3
    proposal = NelboEstimator(model, codes, labels).fit_proposal()
    whole = NelboEstimator(model, codes, labels).estimate(3, proposal=proposal).images
    other = NelboEstimator(model, codes, labels, batch_size=50).fit_proposal()
    assert torch.allclose(other.probs, proposal.probs, rtol=1e-4)
    for batch_size in (1, 2, 7):
        other = NelboEstimator(model, codes, labels, batch_size=batch_size)
        assert torch.allclose(other.estimate(3, proposal=proposal).images, whole, rtol=1e-4)
    first = NelboEstimator(model, codes[:5], labels[:5]).estimate(3, proposal=proposal).images
    assert torch.allclose(first, whole[:5], rtol=1e-4)

    shares = []
    monkeypatch.setattr(nelbo_estimate.dist, "all_reduce", lambda tensor: None)
    for rank in (0, 1):
        for module in (image_batches, nelbo_estimate):
            monkeypatch.setattr(module, "rank_and_world", lambda rank=rank: (rank, 2))
        shares.append(NelboEstimator(model, codes, labels, batch_size=6).estimate(3, proposal=proposal).images)
    assert torch.allclose(sum(shares), whole, rtol=1e-4) and ((shares[0] == 0) != (shares[1] == 0)).all()


def test_network_is_left_in_its_mode_and_damaged_ones_are_refused(world):
    model, codes = network(world), torch.zeros(4, 16, dtype=torch.int64)
    model.transformer.train()
    NelboEstimator(model, codes, torch.zeros(4, dtype=torch.int64)).estimate(2, proposal=TimeProposal.flat())
    assert model.transformer.training
    model.transformer.proj_out.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="xdlm: the loss of image 0 at t=.* is not finite"):
        NelboEstimator(model, codes, torch.zeros(4, dtype=torch.int64), name="xdlm").fit_proposal()


def test_the_verb_from_the_command_line(world, tmp_path, capsys):
    output = tmp_path / "out"
    options = [f"--pipelines.{name}={world / name}" for name in ("mdlm", "xdlm")]
    options += [f"--codes={world / 'codes'}", f"--output_dir={output}", f"--runs.one={world / 'run'}"]
    assert main(["nelbo", *options, "--num_images=12", "--num_times=3", "--device=cpu"]) == 0
    assert str(output / "nelbo.json") in capsys.readouterr().out
    content = json.loads((output / "nelbo.json").read_text())
    protocol = content["protocol"]
    assert protocol["codes"]["sha256"] and protocol["codes"]["num_images"] == 40 and protocol["num_images"] == 12
    assert protocol["pipelines"]["mdlm"]["process"]["end_terms"] == {"prior_kl": 0.0, "reconstruction": 0.0}
    assert [result["k"] for result in content["results"]] == [0.0, 0.1]
    for result in content["results"]:
        bits, image = result["bits_per_token"], result["bits_per_image"]
        assert math.log2(NUM_CODES) < bits["mean"] < 30  # random weights are worse than knowing nothing
        assert bits["low"] < bits["mean"] < bits["high"] and image["mean"] == pytest.approx(16 * bits["mean"])
        assert len(result["density"]["edges"]) == NUM_STRATA + 1 and "bits_of_images" not in result
    (difference,) = content["differences"]
    a, b = (result["bits_per_token"]["mean"] for result in content["results"])
    assert difference["minus"] == "mdlm" and difference["mean"] == pytest.approx(b - a)

    rows = list(csv.DictReader((output / "nelbo.csv").open()))
    assert [row["pipeline"] for row in rows] == ["mdlm", "xdlm"] and float(rows[0]["bits_per_token"]) == a
    curve = list(csv.DictReader((output / "nelbo_training.csv").open()))
    assert [(row["run"], row["step"], row["bits_per_token"]) for row in curve] == [
        ("one", "1", "4.9"),
        ("one", "2", "4.8"),
    ]
    page = (output / "nelbo.md").read_text()
    assert "| xdlm | 0.1 |" in page and "xdlm - mdlm" in page and "do not compare" in page
    for name in ("nelbo.png", "nelbo_training.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert not list(output.rglob("*.partial*"))


def test_finished_pipelines_are_taken_and_nothing_else(world, tmp_path, monkeypatch):
    output, alone = tmp_path / "out", {"pipelines": {"mdlm": str(world / "mdlm")}, "num_images": 4}
    measured = []
    estimate = NelboEstimator.estimate
    monkeypatch.setattr(NelboEstimator, "estimate", lambda self, *a: measured.append(self.name) or estimate(self, *a))
    nelbo(recipe_in(world, output, **alone))
    first = json.loads((output / "nelbo.json").read_text())["results"]
    nelbo(recipe_in(world, output, num_images=4, batch_size=5))
    assert measured == ["mdlm", "xdlm"]
    assert json.loads((output / "nelbo.json").read_text())["results"][:1] == first
    nelbo(recipe_in(world, output, seed=1, **alone))
    assert measured == ["mdlm", "xdlm", "mdlm"]
    for cell in (output / "cells").glob("*.json"):
        cell.write_text("{")
    nelbo(recipe_in(world, output, **alone))
    assert measured == ["mdlm", "xdlm", "mdlm", "mdlm"]
    assert json.loads((output / "nelbo.json").read_text())["results"] == first


def test_wrong_input_is_explained_before_anything_is_measured(world, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "_cell", lambda *args: pytest.fail("measured"))
    vqvae = XDLMPipeline.from_pretrained(world / "mdlm").vqvae
    write_cache(tmp_path, "wide", vqvae, grid=(2, 8))
    write_cache(tmp_path, "birds", vqvae, classes=("owl", "emu", "hen"))
    write_cache(tmp_path, "one class", vqvae, classes=("ant",))
    damaged = write_cache(tmp_path, "damaged", vqvae)
    (damaged / "codes.bin").write_bytes(bytes(40 * 16 * 2))
    vqvae.quantize.embedding.weight.data.add_(1.0)
    write_cache(tmp_path, "other", vqvae)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "metrics.jsonl").write_text(f'{{"{verb.BITS}": 3.0}}\n')
    for changes, words in (
        ({"codes": str(tmp_path / "nowhere")}, "codes='.*nowhere': no code cache"),
        ({"codes": str(tmp_path / "other")}, "pipelines.mdlm='.*': tokenizer: its hash"),
        ({"codes": str(tmp_path / "wide")}, "pipelines.mdlm='.*': it has a grid of .4, 4."),
        ({"codes": str(tmp_path / "birds")}, r"pipelines.mdlm='.*': its 3 classes are not the 3 .*owl"),
        ({"codes": str(tmp_path / "one class")}, "pipelines.mdlm='.*': its 3 classes are not the 1"),
        ({"codes": str(damaged)}, "the file is damaged; encode again"),
        ({"num_images": 41}, "num_images=41: .* holds 40 images"),
        ({"pipelines": {"a": str(tmp_path / "gone")}}, "pipelines.a='.*gone': no saved pipeline"),
        ({"pipelines": {"a/b": str(world / "mdlm")}}, "pipelines: the name 'a/b'"),
        ({"runs": {"a": str(tmp_path / "gone")}}, "runs.a='.*gone': no metrics.jsonl"),
        ({"runs": {"a": str(tmp_path / "empty")}}, "runs.a='.*empty': it logged no validation"),
        ({"runs": {"a": str(tmp_path / "list")}}, "runs.a='.*list': .*metrics.jsonl: line 1 is"),
        ({"device": "nonsense"}, "device='nonsense'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            nelbo(recipe_in(world, tmp_path / "out", **changes))
    for changes in ({"pipelines": {}}, {"num_images": 1}, {"num_times": 0}, {"t_min": 1.0}, {"seed": -1}):
        ((name, value),) = changes.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            recipe_in(world, tmp_path / "out", **changes)


def test_codes_of_the_training_split_are_told(world, tmp_path):
    write_cache(tmp_path, "train", XDLMPipeline.from_pretrained(world / "mdlm").vqvae, split="train")
    changes = {"codes": str(tmp_path / "train"), "pipelines": {"mdlm": str(world / "mdlm")}}
    nelbo(recipe_in(world, tmp_path / "out", num_images=2, num_times=1, **changes))
    assert "**Warning:** the codes are of the split 'train'" in (tmp_path / "out" / "nelbo.md").read_text()


def test_shipped_recipe_measures_what_is_evaluated():
    recipe = parse("nelbo", ["--config", "fashion_mnist/nelbo"])
    evaluated = parse("evaluate", ["--config", "fashion_mnist/evaluate"])
    assert recipe.pipelines == evaluated.pipelines and recipe.runs.keys() == recipe.pipelines.keys()
