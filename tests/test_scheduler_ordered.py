"""Masks lifted in an order: which and how many, what they become, and how the scheduler is exchanged and saved."""

import functools
import json
import math
import re
from fractions import Fraction

import pytest
import torch
from test_hub_export import codes, run
from test_scheduler import DRAWS, assert_drawn_from, process_of
from tiny_parts import NUM_CODES, save_pipeline

from xdlm_image import XDLMOrderedScheduler, XDLMProcess, XDLMScheduler
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.schedulers import row_draw
from xdlm_image.schedulers.process_xdlm import UniformsAhead, draw_uniforms
from xdlm_image.schedulers.scheduling_xdlm_ordered import halton_order

UNMASKINGS = ["confidence", "halton"]
KS = [0.0, 0.1, 0.6]


def scheduler_of(k: float, K: int, unmasking: str, definition: str = "A", **kwargs) -> XDLMOrderedScheduler:
    return XDLMOrderedScheduler.from_process(process_of(k, K, definition), unmasking=unmasking, **kwargs)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def lifting_probability(process: XDLMProcess, t: float, s: float) -> float:
    """w_model + w_uniform of a mask, by hand: (a_s - a_t) / beta_t (1 + k beta_s / a_s)."""
    return (t - s) / t * (1 + process.k * s / (1 - s))


# --- how many leave -------------------------------------------------------------------------------


@pytest.mark.parametrize("unmasking", UNMASKINGS)
@pytest.mark.parametrize("k", KS)
def test_as_many_leave_as_the_ancestral_step_lifts_on_average_rounded(k: float, unmasking: str) -> None:
    """Where an image has n masks, n w rounded down or up in every image, n w in the mean over images."""
    scheduler, images, L = scheduler_of(k, 6, unmasking), 3000, 25
    scheduler.set_timesteps(timesteps=[0.8, 0.5])
    w = lifting_probability(scheduler.process, 0.8, 0.5)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, L, 6, generator=generator)
    for n in (25, 7, 1, 0):
        z = torch.randint(6, (images, L), generator=generator)
        z[torch.rand(images, L, generator=generator).argsort(1) < n] = 6
        left = (z == 6) & (scheduler.step(logits, 0.8, z, generator).prev_sample != 6)
        counts = left.sum(1)
        assert set(counts.tolist()) <= {math.floor(n * w), math.ceil(n * w)}
        spread = math.sqrt((n * w % 1) * (1 - n * w % 1) / images)
        assert counts.double().mean().item() == pytest.approx(n * w, abs=4.5 * spread + 1e-9)


@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("unmasking", UNMASKINGS)
@pytest.mark.parametrize("k", KS)
def test_all_leave_in_the_last_step_and_become_codes(k: float, unmasking: str, definition: str) -> None:
    scheduler = scheduler_of(k, 5, unmasking, definition)
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(0)
    width, z = scheduler.process.logits_width, scheduler.prior((40, 49), generator)
    for t in scheduler.timesteps:
        z = scheduler.step(torch.randn(40, 49, width, generator=generator), t, z, generator).prev_sample
    assert z.min() >= 0 and z.max() < 5


# --- who leaves -----------------------------------------------------------------------------------


@functools.cache
def visits(side: int) -> list[int]:
    """The Halton order, point by point in fractions."""

    def inverse(i: int, base: int) -> Fraction:
        return Fraction(0) if i == 0 else (i % base + inverse(i // base, base)) / base

    seen: dict[int, None] = {}
    i = 1
    while len(seen) < side * side:
        seen[math.floor(side * inverse(i, 2)) * side + math.floor(side * inverse(i, 3))] = None
        i += 1
    return list(seen)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 9, 16])
def test_the_halton_order_is_the_sequences_own(side: int) -> None:
    assert halton_order(side).tolist() == visits(side)


@pytest.mark.parametrize("shape", [(49,), (7, 7)])
def test_the_first_of_the_halton_order_that_are_masked_leave(shape: tuple[int, ...]) -> None:
    scheduler = scheduler_of(0.3, 6, "halton")
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(4, 7, (200, 49), generator=generator)  # a third are masks
    out = scheduler.step(torch.zeros(200, *shape, 6), 0.75, z.reshape(200, *shape), generator).prev_sample.flatten(1)
    for before, after in zip(z.tolist(), out.tolist()):
        masked = [place for place in visits(7) if before[place] == 6]
        left = [place for place in masked if after[place] != 6]
        assert left == masked[: len(left)] and 0 < len(left) < len(masked)


@pytest.mark.parametrize("fast", [False, True])
def test_without_noise_the_most_confident_leave_and_the_code_scored_is_the_code_placed(fast, monkeypatch) -> None:
    """Each code's place in p(code) among the masks of its image, found anew from the step's own numbers."""
    if fast:  # a kernel in our place, told of nothing else
        original = row_draw.draw_rows
        calls = []

        def kernel(*arguments):
            calls.append(arguments)
            with monkeypatch.context() as patch:
                patch.setattr(row_draw, "FAST", {})
                return original(*arguments)

        monkeypatch.setattr(row_draw, "FAST", {"cpu": kernel})
    scheduler = scheduler_of(0.0, 8, "confidence", choice_temperature=0.0)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 20, 8, generator=generator)
    z = torch.where(torch.rand(300, 20, generator=generator) < 0.7, 8, 3)
    state = generator.get_state()
    out = scheduler.step(logits, 0.75, z, generator, temperature=0.8).prev_sample
    _, v = draw_uniforms(z.shape, generator.set_state(state))
    p = (logits.double() / 0.8).softmax(-1)
    drawn = (p.cumsum(-1) <= v[..., None]).sum(-1)
    score = p.gather(-1, drawn[..., None])[..., 0]
    for before, after, codes_drawn, of in zip(z, out, drawn, score):
        masked, left = before == 8, (before == 8) & (after != 8)
        assert torch.equal(after[left], codes_drawn[left]) and torch.equal(after[~masked], before[~masked])
        assert 0 < left.sum() < masked.sum() and of[left].min() > of[masked & ~left].max()
    assert not fast or len(calls) == 3


def test_noise_of_the_choice_fades_with_the_time() -> None:
    """Two masks of confidence 0.9 and 0.1, one leaves: the Gumbel difference is logistic, with scale 4.5 s."""
    scheduler, images = scheduler_of(0.0, 2, "confidence"), 40_000
    logits = torch.tensor([[40.0, 0.0], [40.0, 0.0]]).expand(images, 2, 2)  # the code is certain to be 0 ...
    sure = torch.tensor([0.9, 0.1]).double()

    class Told(XDLMOrderedScheduler):  # ... so that its confidence can be told
        def _scores(self, logits, is_mask, v, noise, s, temperature):
            return super()._scores(logits, is_mask, v, noise, s, temperature) + sure.log()

    scheduler = Told.from_config(scheduler.config)
    for t, s in ((0.8, 0.4), (0.2, 0.1)):  # w = 1/2: one of two
        scheduler.set_timesteps(timesteps=[t, s])
        out = scheduler.step(logits, t, torch.full((images, 2), 2), torch.Generator().manual_seed(0)).prev_sample
        assert (out == 2).sum(1).eq(1).all()
        expected = 1 / (1 + math.exp(-math.log(9) / (4.5 * s)))
        assert (out[:, 0] == 0).double().mean().item() == pytest.approx(expected, abs=4.5 * 0.5 / math.sqrt(images))


# --- what they become -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("unmasking", UNMASKINGS)
@pytest.mark.parametrize("k", KS)
def test_a_single_token_with_the_true_distribution_gives_it_in_any_number_of_steps(k, unmasking, steps) -> None:
    """With one place an image there is nothing to order: the law is the ancestral one."""
    p_data = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    scheduler = scheduler_of(k, 6, unmasking)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(steps)
    z = scheduler.prior((100_000, 1), generator)
    for t in scheduler.timesteps:
        z = scheduler.step(p_data.log().float().expand(100_000, 1, -1), t, z, generator).prev_sample
    assert_drawn_from(z, p_data)


@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("unmasking", UNMASKINGS)
@pytest.mark.parametrize("k", KS)
def test_one_mask_among_visible_codes_moves_by_the_exact_posterior(k: float, unmasking: str, definition: str) -> None:
    process = process_of(k, 5, definition)
    scheduler = scheduler_of(k, 5, unmasking, definition)
    scheduler.set_timesteps(timesteps=[0.7, 0.2])
    generator = torch.Generator().manual_seed(1)
    z = torch.randint(5, (DRAWS, 4), generator=generator)
    z[:, 2] = process.mask
    logits = torch.tensor([2.0, 0.0, -1.0, 0.7, -4.0, 1.0, 3.0, -0.5])[: process.logits_width]
    scores = logits.double().clone()
    if process.excluded_column is not None:
        scores[process.excluded_column] = -torch.inf
    p = torch.zeros(process.num_ids, dtype=torch.float64)
    p[: process.logits_width] = scores.softmax(-1)
    times = [torch.tensor(a, dtype=torch.float64) for a in (0.3, 0.7, 0.8, 0.2)]
    w = process.mixture(torch.tensor(0.0).double(), torch.tensor(True), *times)
    expected = float(w.model) * p
    expected[: process.num_uniform] += float(w.uniform) / process.num_uniform
    expected[process.mask] += float(w.mask) + float(w.stay)
    out = scheduler.step(logits.expand(DRAWS, 4, -1), 0.7, z, generator).prev_sample
    assert_drawn_from(out[:, 2], expected)


@pytest.mark.parametrize("unmasking", UNMASKINGS)
def test_noise_stays_uniform_whatever_the_order_has_looked_at(unmasking: str) -> None:
    """The network knows codes 0 and 1 only: the others come from uniform noise, each as often as the next."""
    scheduler = scheduler_of(0.9, 10, unmasking)
    scheduler.set_timesteps(timesteps=[1.0, 0.7])
    logits = torch.tensor([0.9, 0.1, *[1e-30] * 8]).log().expand(2000, 36, 10)
    z = torch.full((2000, 36), 10)
    out = scheduler.step(logits, 1.0, z, torch.Generator().manual_seed(0)).prev_sample
    noise = out[(out > 1) & (out < 10)] - 2
    assert len(noise) > 10_000
    assert_drawn_from(noise, torch.full((8,), 1 / 8, dtype=torch.float64))


@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("unmasking", UNMASKINGS)
@pytest.mark.parametrize("k", KS)
def test_visible_codes_move_as_in_the_ancestral_step_of_the_same_numbers(k, unmasking, definition) -> None:
    ordered = scheduler_of(k, 6, unmasking, definition)
    ancestral = XDLMScheduler.from_process(ordered.process)
    moved = 0
    schedulers = (ordered, ancestral)
    for scheduler in schedulers:
        scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(0)
    z = ancestral.prior((300, 36), generator)
    z[:, ::2] = torch.randint(6, (300, 18), generator=generator)
    logits = torch.randn(300, 36, ordered.process.logits_width, generator=generator)
    for t in ordered.timesteps[:2]:
        ours, theirs = (s.step(logits, t, z, torch.Generator().manual_seed(7)).prev_sample for s in schedulers)
        visible = z != ordered.process.mask
        assert torch.equal(ours[visible], theirs[visible]) and not torch.equal(ours, theirs)
        moved += int((ours != z)[visible].sum())
    assert (moved > 500) == (k > 0)


# --- random numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("unmasking", UNMASKINGS)
def test_each_image_owns_its_generator(unmasking: str, ahead: bool) -> None:
    scheduler = scheduler_of(0.1, 16, unmasking)
    scheduler.set_timesteps(4)
    logits = torch.randn(3, 49, 16, generator=torch.Generator().manual_seed(0))

    def run_images(images: list[int], ahead: bool) -> tuple[torch.Tensor, list[torch.Generator]]:
        own = generators(*(100 + i for i in images))
        z = scheduler.prior((len(images), 49), own)
        numbers = scheduler.draw_ahead(own, z.shape) if ahead else own
        assert isinstance(numbers, UniformsAhead) == ahead
        for t in scheduler.timesteps:
            z = scheduler.step(logits[images], t, z, numbers).prev_sample
        if ahead:
            with pytest.raises(ValueError, match="used up"):
                numbers.take()
        return z, own

    together, left = run_images([0, 1, 2], ahead)
    for i in range(3):
        alone, of_one = run_images([i], False)
        assert torch.equal(alone[0], together[i]) and torch.equal(of_one[0].get_state(), left[i].get_state())


def test_no_image_needs_no_generator() -> None:
    for unmasking in UNMASKINGS:
        scheduler = scheduler_of(0.1, 16, unmasking)
        scheduler.set_timesteps(2)
        z = scheduler.prior((0, 49), [])
        assert scheduler.step(torch.zeros(0, 49, 16), 1.0, z, []).prev_sample.shape == (0, 49)


# --- exchanged and saved --------------------------------------------------------------------------


def test_each_scheduler_is_made_from_the_other_ones_configuration(tmp_path, caplog) -> None:
    process = XDLMProcess(0.5, 7, "B", 10, 8)
    base = XDLMScheduler.from_process(process, time_grid="cosine")
    ordered = XDLMOrderedScheduler.from_config(base.config, choice_temperature=2.0)
    assert ordered.process == process and ordered.config.time_grid == "cosine" and ordered.choice_temperature == 2.0
    assert ordered.config.unmasking == "confidence"
    back = XDLMScheduler.from_config(ordered.config)
    assert type(back) is XDLMScheduler and back.process == process and back.config.time_grid == "cosine"
    again = XDLMOrderedScheduler.from_config(back.config, unmasking="halton")  # the temperature was the other's
    assert again.config.unmasking == "halton" and again.process == process
    again.save_pretrained(tmp_path)
    loaded = XDLMOrderedScheduler.from_pretrained(tmp_path)
    assert loaded.process == process and dict(loaded.config)["unmasking"] == "halton"
    assert base.compatibles == ordered.compatibles and {XDLMScheduler, XDLMOrderedScheduler} <= set(base.compatibles)
    kept = XDLMOrderedScheduler.from_config(back.config)
    assert kept.choice_temperature == 2.0 == XDLMOrderedScheduler.from_config(ordered.config).choice_temperature
    with pytest.raises(ValueError, match="choice_temperature=2.0: does nothing with 'halton'"):
        XDLMOrderedScheduler.from_config(ordered.config, unmasking="halton", choice_temperature=2.0)
    assert not caplog.records
    assert XDLMOrderedScheduler.from_process(process).choice_temperature == 4.5  # MaskGIT's


@pytest.fixture(scope="module")
def ordered_pipeline(tmp_path_factory) -> XDLMPipeline:
    pipe = XDLMPipeline.from_pretrained(save_pipeline(tmp_path_factory.mktemp("p") / "pipeline", k=0.3))
    pipe.scheduler = XDLMOrderedScheduler.from_config(pipe.scheduler.config, choice_temperature=1.5)
    return pipe


def test_a_pipeline_keeps_its_order_when_it_is_saved(ordered_pipeline, tmp_path) -> None:
    ordered_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["xdlm_image.schedulers.scheduling_xdlm_ordered", "XDLMOrderedScheduler"]
    loaded = XDLMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is XDLMOrderedScheduler and loaded.scheduler.choice_temperature == 1.5
    assert codes(loaded) == codes(ordered_pipeline)
    loaded.scheduler = XDLMScheduler.from_config(loaded.scheduler.config)
    assert codes(loaded) != codes(ordered_pipeline)


def test_an_export_takes_the_order_along_where_it_is_used(ordered_pipeline, tmp_path) -> None:
    ordered_pipeline.save_for_hub(tmp_path / "ordered", card="x")
    names = {re.sub(r"_\d\w*?_[0-9a-f]{8}\.py$", "", p.name) for p in (tmp_path / "ordered/scheduler").glob("*.py")}
    assert names == {"scheduling_xdlm_ordered", "scheduling_xdlm", "process_xdlm", "row_draw"}
    plain = XDLMPipeline.from_pipe(ordered_pipeline, scheduler=XDLMScheduler(k=0.3, num_codes=NUM_CODES))
    plain.save_for_hub(tmp_path / "plain", card="x")
    assert len(list((tmp_path / "plain/scheduler").glob("*.py"))) == 3
    assert not [p for p in (tmp_path / "plain").rglob("*.py") if "ordered" in p.name]
    program = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("ordered", trust_remote_code=True)
found = {"codes": codes(pipe), "class": type(pipe.scheduler).__name__, "unmasking": pipe.scheduler.config.unmasking}
"""
    found, _ = run(program, tmp_path, clean=True)
    assert found == {"codes": codes(ordered_pipeline), "class": "XDLMOrderedScheduler", "unmasking": "confidence"}
    loaded = XDLMPipeline.from_pretrained(tmp_path / "ordered")  # the package runs its own code
    assert type(loaded.scheduler) is XDLMOrderedScheduler and codes(loaded) == found["codes"]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(k=1.0), r"k=1.0: uniform noise has no masks .*; use XDLMScheduler"),
        (dict(k=1.5), r"k=1.5: must lie in"),
        (dict(time_grid="spiral"), "time_grid='spiral'"),
        (dict(unmasking="random"), "unmasking='random': must be one of confidence, halton"),
        (dict(choice_temperature=-0.1), "choice_temperature=-0.1: must be finite and at least 0"),
        (dict(choice_temperature=math.inf), "choice_temperature=inf"),
        (dict(choice_temperature=math.nan), "choice_temperature=nan"),
        (dict(choice_temperature="hot"), "choice_temperature='hot'"),
        (dict(choice_temperature=True), "choice_temperature=True"),
        (dict(unmasking="halton", choice_temperature=4.5), "choice_temperature=4.5: does nothing with 'halton'"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XDLMOrderedScheduler(**arguments)


@pytest.mark.parametrize("shape", [(48,), (12, 3), (4, 3, 3), (2, 8)])
def test_halton_needs_a_square_grid_of_codes(shape: tuple[int, ...]) -> None:
    scheduler = scheduler_of(0.1, 8, "halton")
    scheduler.set_timesteps(2)
    z = torch.full((2, *shape), 8)
    for ask in (
        lambda: scheduler.step(torch.zeros(2, *shape, 8), 1.0, z),
        lambda: scheduler.check_shape(z.shape),  # by which a pipeline asks before a network runs
    ):
        with pytest.raises(ValueError, match=r"sample: codes of shape .* no square grid.*use unmasking='confidence'"):
            ask()


def test_logits_that_are_not_finite_are_refused() -> None:
    scheduler = scheduler_of(0.1, 8, "confidence")
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="model_output: holds NaN"):
        scheduler.step(torch.full((1, 64, 8), torch.nan), 1.0, torch.full((1, 64), 8))
