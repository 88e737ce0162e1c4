"""The step that corrects: its law against the dense Psi-posterior, where it is ancestral, and how it is kept."""

import math

import pytest
import torch
from test_hub_export import codes, run
from test_scheduler import DRAWS, assert_drawn_from, process_of
from tiny_parts import save_pipeline

from xdlm_image import XDLMProcess, XDLMPsiScheduler, XDLMScheduler
from xdlm_image.objective import posterior
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.schedulers.process_xdlm import UniformsAhead

KS = [0.0, 0.1, 0.6, 1.0]


def scheduler_of(k: float, K: int, definition: str = "A", **kwargs) -> XDLMPsiScheduler:
    return XDLMPsiScheduler.from_process(process_of(k, K, definition), **kwargs)


def dense_posterior(p: torch.Tensor, z: int, process: XDLMProcess, t: float, s: float) -> torch.Tensor:
    times = [torch.tensor(value, dtype=torch.float64) for value in (1 - t, t, 1 - s, s)]
    return posterior(p, torch.tensor(z), process, *times)


@pytest.mark.parametrize("kappa", [0.0, 0.7])
@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("k", KS)
def test_a_step_draws_from_the_psi_posterior(k: float, definition: str, kappa: float) -> None:
    """A mask, a likely code, an unlikely one and a special id, against both terms written out densely."""
    scheduler = scheduler_of(k, 5, definition, kappa=kappa)
    process = scheduler.process
    scheduler.set_timesteps(timesteps=[1.0, 0.7, 0.2])
    logits = torch.tensor([2.0, 0.0, -1.0, 0.7, -4.0, 1.0, 3.0, -0.5])[: process.logits_width]
    scores = logits.double().clone()
    if process.excluded_column is not None:
        scores[process.excluded_column] = -torch.inf
    p = torch.zeros(process.num_ids, dtype=torch.float64)
    p[: process.logits_width] = scores.softmax(-1)
    generator = torch.Generator().manual_seed(0)
    for t, s in ((1.0, 0.7), (0.7, 0.2)):
        possible = [process.mask, 0, 4, process.num_ids - 1] if k > 0 or t < 1 else [process.mask]
        for z in sorted({*possible}):
            ancestral, to_the_end = (dense_posterior(p, z, process, t, to) for to in (s, 0.0))
            noised = (1 - s) * to_the_end + s * process.prior_probs()
            out = scheduler.step(logits.expand(1, DRAWS, -1), t, torch.full((1, DRAWS), z), generator).prev_sample
            assert_drawn_from(out, kappa * ancestral + (1 - kappa) * noised)


@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("k", KS)
def test_a_single_token_with_the_true_distribution_gives_it_in_any_number_of_steps(k, kappa, steps) -> None:
    p_data = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    scheduler = scheduler_of(k, 6, kappa=kappa)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(steps)
    z = scheduler.prior((100_000, 1), generator)
    for t in scheduler.timesteps:
        z = scheduler.step(p_data.log().float().expand(100_000, 1, -1), t, z, generator).prev_sample
    assert_drawn_from(z, p_data)


@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("k", KS)
def test_steps_that_do_not_correct_are_ancestral_ones_of_the_same_numbers(k: float, definition: str) -> None:
    """All of kappa = 1, those outside of `correct_within`, and the last one; within it the step differs."""
    generator = torch.Generator().manual_seed(0)
    process = process_of(k, 6, definition)
    z = torch.randint(process.num_ids, (300, 36), generator=generator)
    logits = torch.randn(300, 36, process.logits_width, generator=generator)

    def stepped(scheduler: XDLMScheduler, t: torch.Tensor) -> torch.Tensor:
        return scheduler.step(logits, t, z, torch.Generator().manual_seed(7)).prev_sample

    ancestral = XDLMScheduler.from_process(process)
    ancestral.set_timesteps(4)
    for kappa, within, corrects in (
        (1.0, None, [False] * 4),
        (0.3, None, [True, True, True, False]),
        (0.3, (0.25, 0.5), [False, True, True, False]),  # by the times that they lead to, 0.75, 0.5, 0.25 and 0
        (0.3, (0.3, 0.7), [False, True, False, False]),
    ):
        scheduler = XDLMPsiScheduler.from_process(process, kappa=kappa, correct_within=within)
        scheduler.set_timesteps(4)
        for t, differs in zip(scheduler.timesteps, corrects):
            assert torch.equal(stepped(scheduler, t), stepped(ancestral, t)) != differs


def test_masked_diffusion_takes_visible_codes_back_and_gives_other_ones() -> None:
    """k = 0: the ancestral step never does; here 1 - kappa of them times beta_s, and all leave in the last step."""
    scheduler, z = scheduler_of(0.0, 8, kappa=0.25), torch.full((500, 64), 3)
    scheduler.set_timesteps(timesteps=[0.8, 0.4])
    logits = torch.full((500, 64, 8), -20.0).index_fill_(-1, torch.tensor(5), 20.0)
    generator = torch.Generator().manual_seed(0)
    out = scheduler.step(logits, 0.8, z, generator).prev_sample
    share, spread = 0.75 * 0.4, math.sqrt(0.3 * 0.7 / z.numel())
    assert set(out.unique().tolist()) == {3, 8}
    assert (out == 8).double().mean().item() == pytest.approx(share, abs=4.5 * spread)
    assert set(scheduler.step(logits, 0.4, out, generator).prev_sample[out == 8].tolist()) == {5}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("k", [0.0, 0.3])
def test_each_image_owns_its_generator(k: float, ahead: bool) -> None:
    scheduler = scheduler_of(k, 16, kappa=0.5)
    scheduler.set_timesteps(4)
    logits = torch.randn(3, 49, 16, generator=torch.Generator().manual_seed(0))

    def drawn(images: list[int], ahead: bool) -> torch.Tensor:
        own = [torch.Generator().manual_seed(100 + i) for i in images]
        z = scheduler.prior((len(images), 49), own)
        numbers = scheduler.draw_ahead(own, z.shape) if ahead else own
        assert isinstance(numbers, UniformsAhead) == ahead
        for t in scheduler.timesteps:
            z = scheduler.step(logits[images], t, z, numbers).prev_sample
        return z

    assert torch.equal(drawn([0, 1, 2], ahead), torch.cat([drawn([i], False) for i in range(3)]))


def test_a_pipeline_keeps_its_corrector_when_it_is_saved_and_exported(tmp_path) -> None:
    pipe = XDLMPipeline.from_pretrained(save_pipeline(tmp_path / "plain", k=0.3))
    plain = codes(pipe)
    pipe.scheduler = XDLMPsiScheduler.from_config(pipe.scheduler.config, kappa=0.25, correct_within=(0.1, 0.9))
    assert codes(pipe) != plain
    pipe.save_pretrained(tmp_path / "saved")
    pipe.save_for_hub(tmp_path / "exported", card="x")
    for folder in ("saved", "exported"):
        loaded = XDLMPipeline.from_pretrained(tmp_path / folder)
        assert type(loaded.scheduler) is XDLMPsiScheduler and codes(loaded) == codes(pipe)
        loaded.scheduler = XDLMScheduler.from_config(loaded.scheduler.config)
        assert codes(loaded) == plain
    program = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
config = pipe.scheduler.config
found = {"codes": codes(pipe), "kappa": config.kappa, "within": config.correct_within}
"""
    found, _ = run(program, tmp_path, clean=True)
    assert found == {"codes": codes(pipe), "kappa": 0.25, "within": [0.1, 0.9]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kappa=-0.1), r"kappa=-0.1: must lie in \[0, 1\]"),
        (dict(kappa=math.nan), "kappa=nan"),
        (dict(kappa="all"), "kappa='all'"),
        (dict(kappa=True), "kappa=True"),
        (dict(correct_within=(0.5,)), "correct_within=.*two times"),
        (dict(correct_within=(0.5, 0.5)), "correct_within=.*low < high"),
        (dict(correct_within=(-1, 0.5)), "correct_within"),
        (dict(correct_within=(0.1, math.nan)), "correct_within"),
        (dict(correct_within=("a", "b")), "correct_within"),
        (dict(correct_within=0.5), "correct_within=0.5: must be two times"),
        (dict(k=1.5), "k=1.5"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XDLMPsiScheduler(**arguments)
