"""Guidance and temperature that change in the course of a call: what they are at a step, and that a step sees them."""

import warnings

import pytest
import torch
from test_pipeline import draw, make_pipe, seeded

from xdlm_image.drawing.sampler_settings import SamplerSettings, nfe
from xdlm_image.pipelines.schedules import guidance_at, value_at
from xdlm_image.recipes import EvaluateRecipe
from xdlm_image.schedulers import XDLMScheduler

STEPS = 4  # from times 1, 0.75, 0.5 and 0.25
TIMES = (1.0, 0.75, 0.5, 0.25)


def test_a_pair_runs_linearly_in_time_and_a_number_stays():
    assert [value_at((3.0, 1.0), t) for t in TIMES] == [3.0, 2.5, 2.0, 1.5]
    assert [value_at(2, t) for t in TIMES] == [2.0] * 4
    assert [guidance_at((4, 0), (0.25, 0.75), t) for t in TIMES] == [1.0, 3.0, 2.0, 1.0]  # open below, closed above
    assert [guidance_at(3, (0.5, 1), t) for t in TIMES] == [3.0, 3.0, 1.0, 1.0]
    scheduler = XDLMScheduler()
    scheduler.set_timesteps(10)  # among them 0.30000000000000004
    guided = [t for t in scheduler.timesteps.tolist() if guidance_at(3, (0.3, 0.8), t) == 3]
    assert guided == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4])
    assert guidance_at(3, (0.1, 0.3), 0.1 + 0.2) == 3  # the end that is closed


@pytest.fixture
def seen(monkeypatch):
    """A pipeline, and what its steps and its network were given."""
    pipe, temperatures, batches = make_pipe(), [], []
    step = pipe.scheduler.step

    def recorded(*args, temperature, **kwargs):
        temperatures.append(temperature)
        return step(*args, temperature=temperature, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", recorded)
    pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    return pipe, temperatures, batches


def test_every_step_gets_its_temperature_and_only_guided_ones_a_doubled_batch(seen):
    pipe, temperatures, batches = seen
    scales = []

    def callback(pipe, i, t, tensors):
        scales.append(pipe.guidance_scale)
        return tensors

    arguments = {"guidance_scale": (5.0, 1.0), "guidance_interval": (0.25, 0.75), "temperature": (1.0, 0.0)}
    draw(pipe, [0, 1, 2], num_steps=STEPS, callback_on_step_end=callback, **arguments)
    assert temperatures == [1.0, 0.75, 0.5, 0.25]
    assert scales == [1.0, 4.0, 3.0, 1.0]
    assert batches == [3, 6, 6, 3]
    settings = SamplerSettings(STEPS, **arguments)
    assert nfe(pipe, settings) == 6 and nfe(pipe, SamplerSettings(STEPS, guidance_scale=2.0)) == 8
    cosine = SamplerSettings(STEPS, 2.0, time_grid="cosine", guidance_interval=(0.3, 0.95))
    assert nfe(pipe, cosine) == 7  # times 1, 0.92, 0.71 and 0.38
    for strength, evaluations in ((1.0, 7), (0.6, 8)):  # the first step is guided unless it begins at t = 1
        ever_more = SamplerSettings(STEPS, (1.0, 4.0), start={"strength": strength})
        assert nfe(pipe, ever_more) == evaluations


@pytest.mark.parametrize("arguments", [{"num_steps": 16}, {"timesteps": [1, 1e-7]}], ids=str)
def test_a_temperature_that_falls_to_0_ends_as_the_argmax(seen, arguments):
    pipe, temperatures, _ = seen
    draw(pipe, [0], temperature=(1e-5, 0), **arguments)
    assert temperatures[0] == 1e-5 and temperatures[-1] == 1e-6 == min(temperatures)


def test_a_pair_of_equals_is_the_number_and_a_schedule_changes_what_is_drawn():
    pipe = make_pipe()
    generator = lambda: [seeded(i) for i in range(4)]  # noqa: E731
    draws = [
        draw(pipe, [0, 1, 2, 3], num_steps=STEPS, generator=generator(), **arguments)
        for arguments in (
            {"guidance_scale": 3.0, "temperature": 0.7},
            {"guidance_scale": (3.0, 3.0), "temperature": [0.7, 0.7], "guidance_interval": (0, 1)},
            {"guidance_scale": (1.0, 5.0), "temperature": 0.7},
            {"guidance_scale": 3.0, "temperature": (1.0, 0.1)},
        )
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


@pytest.mark.parametrize(
    "arguments", [{"guidance_scale": 2.0, "guidance_interval": (0.1, 0.7)}, {"guidance_scale": (1, 3)}], ids=str
)
def test_guidance_that_guides_no_step_is_told_once(seen, arguments):
    pipe, _, batches = seen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, [0], num_steps=2, **arguments)
    assert 2 in batches
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            draw(pipe, [0], num_steps=1, **arguments)
    scale, interval = arguments["guidance_scale"], arguments.get("guidance_interval")
    told = f"guidance_scale={scale} guides no step: they leave the times 1, guidance_interval={interval}"
    assert [str(warning.message) for warning in caught] == [told] and batches[-1] == 1
    assert caught[0].filename.endswith(".py") and "torch" not in caught[0].filename


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": (1.0, 2.0, 3.0)},
        {"guidance_scale": (1.0, float("inf"))},
        {"guidance_scale": (1.0, "strong")},
        {"guidance_scale": True},
        {"guidance_scale": 2.0, "guidance_interval": (0.5, 0.5)},
        {"guidance_scale": 2.0, "guidance_interval": (0.5, 1.1)},
        {"guidance_scale": 2.0, "guidance_interval": 0.5},
        {"guidance_interval": (0.1, 0.5)},  # of nothing
        {"guidance_scale": (1.0, 1.0), "guidance_interval": (0.1, 0.5)},
        {"temperature": (0.0, 1.0)},
        {"temperature": (1.0, -0.1)},
        {"temperature": 0.0},
        {"temperature": []},
    ],
    ids=str,
)
def test_wrong_schedules_are_refused_before_any_step(seen, arguments):
    pipe, temperatures, batches = seen
    with pytest.raises(ValueError, match=[*arguments][-1]):
        pipe([0], **arguments)
    assert not temperatures and not batches


def test_a_model_without_guidance_takes_no_schedule_of_it():
    for pipe in (make_pipe(num_classes=None), make_pipe(supports_guidance=False)):
        labels = None if pipe.transformer.config.num_classes is None else [0]
        with pytest.raises(ValueError, match="guidance_scale="):
            pipe(labels, guidance_scale=(1.0, 2.0))
        draw(pipe, labels, num_steps=1, guidance_scale=(1.0, 1.0))  # which is none


def test_pairs_are_values_of_a_sweep_like_numbers():
    recipe = EvaluateRecipe(
        output_dir="here",
        pipelines={"a": "b"},
        guidance_scale=[1.0, (1.0, 3.0)],
        temperature=[0.6, (1.0, 0.3)],
        guidance_interval=(0.1, 0.7),
    )
    assert len(recipe.variants) == 4
    assert [variant[4] for variant in recipe.variants] == [None, None, (0.1, 0.7), (0.1, 0.7)]  # of no guidance none
    listed = EvaluateRecipe("here", {"a": "b"}, temperature=[[1, 0.3], 1.0], guidance_scale=[[1.0, 2.0]])
    assert listed.settings["temperature"] == [(1, 0.3), 1.0] and listed.settings["guidance_scale"] == [(1.0, 2.0)]
    baselines = EvaluateRecipe("here", {"a": "b"}, guidance_scale=[1.0, 2.0], guidance_interval=[None, (0.1, 0.7)])
    assert [(v[0], v[4]) for v in baselines.variants] == [(1.0, None), (2.0, None), (2.0, (0.1, 0.7))]
    with pytest.raises(ValueError, match="guidance_interval=.*does nothing"):
        EvaluateRecipe("here", {"a": "b"}, guidance_interval=(0.1, 0.7))
    with pytest.raises(ValueError, match="temperature"):
        EvaluateRecipe(output_dir="here", pipelines={"a": "b"}, temperature=[(1.0, float("nan"))])
