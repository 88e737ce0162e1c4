"""The process and the reverse step against exact distributions: chi-square in every branch, and the closed forms."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from xdlm_image.objective import posterior
from xdlm_image.schedulers import (
    XDLMOrderedScheduler,
    XDLMProcess,
    XDLMPsiScheduler,
    XDLMScheduler,
    process_xdlm,
    row_draw,
    scheduling_xdlm,
)
from xdlm_image.schedulers.process_xdlm import UniformsAhead, draw_uniforms

KS = [0.0, 1e-3, 0.1, 0.5, 1.0]
DRAWS = 60_000


NO_CODES, ONE_TENTH = torch.zeros(2, 3, dtype=torch.int64), torch.full((2,), 0.1)


def process_of(k: float, K: int, definition: str) -> XDLMProcess:
    extra = {"vocab_size": K + 3, "mask_id": K + 1} if definition == "B" else {}
    return XDLMProcess(k, K, definition, **extra)


def assert_drawn_from(samples: torch.Tensor, probs: torch.Tensor) -> None:
    """Pearson's chi-square at p > 1e-6, and nothing where the probability is 0."""
    counts = torch.bincount(samples.flatten(), minlength=len(probs)).double()
    assert counts[probs <= 1e-15].sum() == 0
    likely = probs * samples.numel() >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([probs[likely], probs[~likely].sum()[None]]) * samples.numel()
    keep = expected > 0.5
    statistic = ((observed - expected) ** 2 / expected.clamp(min=0.5))[keep].sum().item()
    dof = max(1, int(keep.sum()) - 1)
    # Wilson-Hilferty: (chi2/dof)^(1/3) is near normal; 4.9 sigma is p about 1e-6
    sigmas = ((statistic / dof) ** (1 / 3) - (1 - 2 / (9 * dof))) / (2 / (9 * dof)) ** 0.5
    assert sigmas < 4.9, f"chi-square {statistic:.1f} at {dof} degrees of freedom"


@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("k", KS)
def test_step_draws_from_the_exact_posterior(k: float, definition: str) -> None:
    """Every kind of z (mask, a likely code, an unlikely one, a special id) at the first, a middle and an early time."""
    K = 5
    process = process_of(k, K, definition)
    scheduler = XDLMScheduler.from_process(process)
    scheduler.set_timesteps(timesteps=[1.0, 0.7, 0.2, 0.05])
    logits = torch.tensor([2.0, 0.0, -1.0, 0.7, -4.0, 1.0, 3.0, -0.5])[: process.logits_width]
    p = torch.zeros(process.num_ids, dtype=torch.float64)
    scores = logits.double().clone()
    if process.excluded_column is not None:
        scores[process.excluded_column] = -torch.inf
    p[: process.logits_width] = torch.softmax(scores, -1)
    generator = torch.Generator().manual_seed(2 * KS.index(k) + (definition == "B"))
    possible = [process.mask, 0, 4] + ([6] if definition == "B" else [])
    for t, s in ((1.0, 0.7), (0.7, 0.2), (0.2, 0.05)):
        for z_value in possible if k > 0 or t < 1 else [process.mask]:
            z = torch.full((1, DRAWS), z_value)
            prev = scheduler.step(logits.expand(1, DRAWS, -1), t, z, generator).prev_sample
            times = [torch.tensor(a, dtype=torch.float64) for a in (1 - t, t, 1 - s, s)]
            expected = posterior(p, torch.tensor(z_value), process, *times)
            assert expected.sum() == pytest.approx(1.0, abs=1e-12)
            assert_drawn_from(prev, expected)


@pytest.mark.parametrize("k", KS)
def test_last_step_leaves_only_codes(k: float) -> None:
    process = process_of(k, 5, "B")  # ids 5 and 7 are no codes, 6 is the mask
    scheduler = XDLMScheduler.from_process(process)
    scheduler.set_timesteps(1)
    z = process.prior((50, 200), torch.Generator().manual_seed(0))
    out = scheduler.step(torch.randn(50, 200, 8), 1.0, z, torch.Generator().manual_seed(1)).prev_sample
    assert out.min() >= 0 and out.max() < 5


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("k", KS)
def test_single_token_with_the_true_distribution_gives_it_in_any_number_of_steps(k: float, steps: int) -> None:
    p_data = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    process = process_of(k, 6, "A")
    scheduler = XDLMScheduler.from_process(process)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(steps)
    z = scheduler.prior((200, 500), generator)
    for t in scheduler.timesteps:
        z = scheduler.step(p_data.log().float().expand(200, 500, -1), t, z, generator).prev_sample
    assert_drawn_from(z, p_data)


@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("k", KS)
def test_noise_draws_from_the_marginal(k: float, definition: str) -> None:
    process = process_of(k, 5, definition)
    for t in (0.0, 0.3, 1.0):
        alpha, beta = process.alpha_beta(torch.tensor([t], dtype=torch.float64))
        x = torch.full((1, DRAWS), 2)
        z = process.noise(x, alpha, beta, torch.Generator().manual_seed(3))
        assert_drawn_from(z, process.marginal(torch.tensor(2), alpha[0], beta[0]))
    assert_drawn_from(process.prior((2, DRAWS), torch.Generator().manual_seed(4)), process.prior_probs())


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.full((2,), 2.0), r"alpha: runs from -1\.0 to -1\.0, must lie in \[0, 1\]"),
        (torch.full((2,), torch.nan), "alpha: runs from nan to nan"),
        (torch.rand(3), r"alpha \(3,\): for codes \(2, 6\) give one an image \(B,\), or one a code"),
        (torch.rand(2, 6, 1), r"alpha \(2, 6, 1\)"),
    ],
)
def test_times_that_are_none_are_refused(t, message):
    process = process_of(0.1, 5, "A")
    with pytest.raises(ValueError, match=message):
        process.noise(torch.zeros(2, 6, dtype=torch.int64), *process.alpha_beta(t))


@pytest.mark.parametrize("k", KS)
def test_chain_of_true_posteriors_keeps_the_marginal(k: float) -> None:
    """sum_z q(z_t = z | x) q(z_s | z, x) = q(z_s | x): the mixture is the process's own posterior."""
    process = process_of(k, 4, "A")
    at = [torch.tensor(a, dtype=torch.float64) for a in (0.3, 0.7, 0.8, 0.2)]
    x = torch.tensor(1)
    q_t = process.marginal(x, at[0], at[1])
    onehot = torch.nn.functional.one_hot(x, process.num_ids).double()
    possible = q_t > 0
    z = torch.arange(process.num_ids)[possible]
    onward = posterior(onehot.expand(len(z), -1).clone(), z, process, *at)
    assert torch.allclose(q_t[possible] @ onward, process.marginal(x, at[2], at[3]), atol=1e-14)


def test_each_image_owns_its_generator() -> None:
    process = process_of(0.1, 16, "A")
    scheduler = XDLMScheduler.from_process(process)
    scheduler.set_timesteps(4)
    logits = torch.randn(3, 49, 16, generator=torch.Generator().manual_seed(0))

    def run(images: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(100 + i) for i in images]
        z = scheduler.prior((len(images), 49), generators)
        for t in scheduler.timesteps:
            z = scheduler.step(logits[images], t, z, generators).prev_sample
        return z

    together = run([0, 1, 2])
    for i in range(3):
        assert torch.equal(run([i])[0], together[i])
    with pytest.raises(ValueError, match="list of 2 for 3 images: give one an image"):
        draw_uniforms((3, 49), [torch.Generator()] * 2)


def test_uniforms_stay_below_1_where_there_is_no_float64(monkeypatch):
    """As on Apple's GPUs with generators of the CPU: 1 would leave a mask standing in the last step."""
    monkeypatch.setattr(process_xdlm, "_uniform_dtype", lambda device: torch.float32)
    drawn = torch.tensor([1 - 2**-27, 1 - 2**-24, 0.5], dtype=torch.float64)
    assert process_xdlm._moved(drawn, torch.device("cpu")).tolist() == [1 - 2**-24, 1 - 2**-24, 0.5]


def test_temperature_sharpens() -> None:
    scheduler = XDLMScheduler(k=0.0, num_codes=3)
    scheduler.set_timesteps(1)
    logits = torch.tensor([1.0, 0.0, -1.0])
    z = scheduler.step(
        logits.expand(1, DRAWS, -1),
        1.0,
        torch.full((1, DRAWS), 3),
        torch.Generator().manual_seed(0),
        temperature=0.5,
    ).prev_sample
    assert_drawn_from(z, torch.softmax(2 * logits.double(), -1))


@pytest.mark.parametrize("ids", [2, 3])  # beside the codes, the mask among them
@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_the_last_codes_are_codes_where_all_of_them_underflow_beside_another_id(k: float, ids: int) -> None:
    scheduler = XDLMScheduler(k=k, num_codes=3, definition="B", vocab_size=3 + ids, mask_id=3)
    scheduler.set_timesteps(1)
    logits = torch.tensor([-201.0, -200.0, -400.0, *ids * [0.0]])  # e^-200 is 0 in float32
    z = torch.full((1, DRAWS), 3)
    z = scheduler.step(logits.expand(1, DRAWS, -1), 1.0, z, torch.Generator().manual_seed(0)).prev_sample
    assert_drawn_from(z, torch.softmax(logits[:3].double(), -1))


@pytest.mark.parametrize("grid", ["linear", "cosine", "arccos"])
def test_time_grids_fall_from_one(grid: str) -> None:
    scheduler = XDLMScheduler(time_grid=grid)
    for n in (1, 2, 8, 64):
        scheduler.set_timesteps(n)
        times = np.append(scheduler.timesteps.numpy(), 0.0)
        assert len(times) == n + 1 and times[0] == 1.0 and (np.diff(times) < 0).all()
        assert scheduler.next_timestep(times[-2]) == 0.0


def test_weights_of_the_mixture_at_its_edges() -> None:
    process, yes, no = XDLMProcess(0.1, 8), torch.tensor(True), torch.tensor(False)
    # betas close to 0, where alphas are all 1 in float32
    beta_t, beta_s = torch.tensor(6e-8), torch.tensor(2e-8)
    w = process.mixture(torch.tensor(0.0), yes, 1 - beta_t, beta_t, 1 - beta_s, beta_s)
    assert float(w.model) == pytest.approx(2 / 3, rel=1e-6)
    # the probability of a mask is not read
    times = [torch.tensor(value) for value in (0.3, 0.7, 0.6, 0.4)]
    assert process.mixture(torch.tensor(0.7), yes, *times) == process.mixture(torch.tensor(0.0), yes, *times)
    # without signal nothing moves
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    w = process.mixture(torch.tensor(0.5), no, zero, one, zero, one)
    assert [float(part) for part in (w.model, w.uniform, w.mask, w.stay)] == [0.0, 0.0, 0.0, 1.0]


def test_alpha_and_beta_are_exact_at_both_ends() -> None:
    alpha, beta = XDLMProcess.alpha_beta(torch.tensor([0.0, 1.0, 1e-9]))
    assert alpha.tolist()[:2] == [1.0, 0.0] and beta.tolist()[:2] == [0.0, 1.0]
    assert beta[2].item() == pytest.approx(1e-9, rel=1e-6)


def test_scheduler_saves_and_loads(tmp_path) -> None:
    XDLMScheduler(k=0.5, num_codes=7, definition="B", vocab_size=10, mask_id=8, time_grid="cosine").save_pretrained(
        tmp_path
    )
    loaded = XDLMScheduler.from_pretrained(tmp_path)
    assert loaded.process == XDLMProcess(0.5, 7, "B", 10, 8) and loaded.config.time_grid == "cosine"


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (XDLMScheduler, {}),
        (XDLMOrderedScheduler, {"choice_temperature": np.float32(2)}),
        (XDLMPsiScheduler, {"kappa": np.float32(0.5), "correct_within": (np.float32(0.25), np.float64(0.5))}),
    ],
)
def test_numbers_of_numpy_are_saved_as_plain_ones(kind, own, tmp_path) -> None:
    scheduler = kind(
        k=np.float32(0.25), num_codes=np.int64(7), definition="B", vocab_size=np.int32(10), mask_id=8, **own
    )
    scheduler.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.process == scheduler.process == XDLMProcess(0.25, 7, "B", 10, 8)
    plain = {name: [*value] if isinstance(value, tuple) else value for name, value in own.items()}
    assert {name: loaded.config[name] for name in own} == plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: XDLMProcess(1.5, 8), r"k=1.5: must lie in \[0, 1\]"),
        (lambda: XDLMProcess(float("nan"), 8), "k=nan"),
        (lambda: XDLMProcess(0.1, 1), "num_codes=1"),
        (lambda: XDLMProcess(0.1, 8, mask_id=3), "mask_id=3"),
        (lambda: XDLMProcess(0.1, 8, "B"), "vocab_size"),
        (lambda: XDLMProcess(0.1, 8, "B", 9, 7), "mask_id=7"),
        (lambda: XDLMProcess(0.1, 8, "C"), "definition='C'"),
        (lambda: XDLMScheduler(time_grid="spiral"), "time_grid='spiral'"),
        (lambda: XDLMScheduler().set_timesteps(0), "num_inference_steps=0"),
        (lambda: XDLMScheduler().set_timesteps(10**9), "num_inference_steps=1000000000: .* from 1 to 100,000"),
        (lambda: XDLMScheduler().set_timesteps(2.5), "num_inference_steps=2.5"),
        (lambda: XDLMScheduler().set_timesteps("abc"), "num_inference_steps='abc': must be a whole number"),
        (lambda: XDLMScheduler().set_timesteps(math.nan), "num_inference_steps=nan: must be a whole number"),
        (
            lambda: XDLMScheduler().add_noise(torch.zeros(2, 7, 7).long(), torch.rand(3)),
            r"timesteps: shape \(3,\) for codes \(2, 7, 7\)",
        ),
        (lambda: XDLMScheduler().set_timesteps(True), "num_inference_steps=True"),
        (lambda: XDLMScheduler(time_grid="arccos").set_timesteps(100_000, start=1e-6), "arccos grid are too short"),
        (lambda: XDLMScheduler().set_timesteps(timesteps=[0.5, 0.2], start=0.5), "start=0.5: is for num_inference_st"),
        (lambda: XDLMScheduler().set_timesteps(timesteps=0.5), "timesteps=0.5: give the times in a list"),
        (lambda: XDLMScheduler().set_timesteps(), "one of the two"),
        (lambda: XDLMScheduler().set_timesteps(timesteps=[1.0, 1.0]), "fall strictly"),
        (lambda: XDLMScheduler().set_timesteps(timesteps=[1.5, 0.5]), "from 1 at most"),
        (lambda: XDLMScheduler().set_timesteps(4, start="late"), "start='late': is no number"),
        (lambda: XDLMProcess(0.1, 8).noise(NO_CODES, ONE_TENTH, ONE_TENTH), "alpha, beta: do not sum to 1"),
        (lambda: XDLMProcess(0.1, 8).noise(NO_CODES, 0.5, ONE_TENTH), "alpha=0.5: no tensor"),
        (lambda: XDLMScheduler().add_noise(torch.zeros(1, 2).long(), torch.tensor([1.5])), r"\[0, 1\]"),
        (
            lambda: XDLMScheduler().step(torch.zeros(1, 2, 512), 0.5, torch.zeros(1, 2).long()),
            "set_timesteps",
        ),
    ],
)
def test_wrong_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_step_refuses_wrong_widths_and_temperatures() -> None:
    scheduler = XDLMScheduler(num_codes=8)
    scheduler.set_timesteps(2)
    z = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"expected \(1, 3, 8\)"):
        scheduler.step(torch.zeros(1, 3, 9), 1.0, z)
    for temperature, told in ((0, "temperature=0"), (1e-7, "temperature=1e-07"), ("hot", "'hot': is no number")):
        with pytest.raises(ValueError, match=told):
            scheduler.step(torch.zeros(1, 3, 8), 1.0, z, temperature=temperature)
    for t in (0.9, 0.999):
        with pytest.raises(ValueError, match="not on the grid"):
            scheduler.step(torch.zeros(1, 3, 8), t, z)
    with pytest.raises(ValueError, match=r"sample: ids run from 9 to 9, must lie in \[0, 9\)"):
        scheduler.step(torch.zeros(1, 3, 8), 1.0, z + 9)
    with pytest.raises(ValueError, match="model_output: holds NaN"):
        scheduler.step(torch.full((1, 64, 8), torch.nan), 1.0, torch.full((1, 64), 8))  # half of them draw
    with pytest.raises(ValueError, match="x: ids run from 8 to 8"):
        scheduler.add_noise(z + 8, torch.tensor([0.5]))


@pytest.mark.parametrize("odd", [None, 7, "cpu"])
def test_lists_hold_generators(odd) -> None:
    given = [odd, torch.Generator()]
    scheduler = XDLMScheduler()
    assert scheduler.draw_ahead(given, (2, 7)) is given
    with pytest.raises(ValueError, match=f"generator holds {odd!r}: give torch.Generator"):
        scheduler.prior((2, 7), given)


def test_no_image_needs_no_generator() -> None:
    scheduler = XDLMScheduler.from_process(process_of(0.1, 16, "A"))
    scheduler.set_timesteps(2)
    z = scheduler.prior((0, 49), [])
    assert z.shape == scheduler.step(torch.zeros(0, 49, 16), scheduler.timesteps[0], z, []).prev_sample.shape == (0, 49)


SAMPLERS = {
    "ancestral": XDLMScheduler,
    "psi": XDLMPsiScheduler,
    "confidence": XDLMOrderedScheduler,
    "halton": partial(XDLMOrderedScheduler, unmasking="halton"),
}
STEPS = [(k, sampler) for k in (0.0, 0.1, 1.0) for sampler in SAMPLERS if k < 1 or sampler in ("ancestral", "psi")]


@pytest.mark.parametrize(("k", "sampler"), STEPS)
@pytest.mark.parametrize("definition", ["A", "B"])
def test_no_step_but_the_last_waits_for_the_device(definition: str, k: float, sampler: str, monkeypatch) -> None:
    """Tensors of the device "meta" hold nothing: whatever asked them for a number would fail."""

    def kernel(logits, wanted, z, v, *_):
        return z.clone(), v.clone(), wanted.all()

    monkeypatch.setattr(row_draw, "FAST", {"meta": kernel})
    process = process_of(k, 16, definition)
    scheduler = SAMPLERS[sampler](**vars(process))
    scheduler.set_timesteps(3)
    z = scheduler.prior((2, 9), torch.Generator(), device="meta")
    numbers = scheduler.draw_ahead([torch.Generator(), torch.Generator()], (2, 9), "meta")
    logits = torch.zeros(2, 9, process.logits_width, device="meta")
    for t in scheduler.timesteps[:2]:
        z = scheduler.step(logits, t, z, numbers).prev_sample
        assert z.device.type == "meta" and z.shape == (2, 9)
    with pytest.raises(RuntimeError, match="meta"):  # here it looks whether all logits were finite
        scheduler.step(logits, scheduler.timesteps[2], z, numbers)


class OnAnotherDevice(torch.Tensor):
    """A number that says it lies elsewhere."""

    device = torch.device("meta")


def test_an_accelerator_tells_of_logits_that_are_not_finite_in_the_last_step(monkeypatch) -> None:
    scheduler = XDLMScheduler.from_process(process_of(0.1, 8, "A"))
    bad = torch.full((1, 64, 8), torch.nan)

    def told_elsewhere(*arguments):
        drawn, p_z, finite = row_draw.draw_rows(*arguments)
        return drawn, p_z, finite.as_subclass(OnAnotherDevice)

    monkeypatch.setattr(scheduling_xdlm, "draw_rows", told_elsewhere)
    good, noise = torch.zeros_like(bad), torch.full((1, 64), 8)
    scheduler.set_timesteps(3)
    for ask in (lambda: scheduler.step(good, scheduler.timesteps[2], noise), scheduler.check_finite):
        scheduler.step(bad, 1.0, noise)
        scheduler.step(good, scheduler.timesteps[1], noise)
        with pytest.raises(ValueError, match="model_output: holds NaN"):
            ask()
        scheduler.check_finite()  # told once
    for anew in (lambda: scheduler.set_timesteps(3), lambda: scheduler.step(good, 1.0, noise)):
        scheduler.step(bad, 1.0, noise)
        anew()  # a run does not inherit what another that was broken off had found
        scheduler.step(good, scheduler.timesteps[2], noise)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_gpu_steps_wait_for_nothing_and_give_the_codes_of_the_cpu(k: float) -> None:
    process = process_of(k, 300, "A")
    scheduler = XDLMScheduler.from_process(process)
    codes = []
    for device in ("cpu", "cuda"):
        scheduler.set_timesteps(4)
        logits = torch.randn(8, 49, 300, generator=torch.Generator().manual_seed(5)).to(device)
        numbers = scheduler.draw_ahead(torch.Generator().manual_seed(6), (8, 49), device)
        z = torch.full((8, 49), process.mask, device=device)
        scheduler.step(logits, 1.0, z, torch.Generator())  # compiles
        for t in scheduler.timesteps:
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" and t != scheduler.timesteps[-1] else "default")
            try:
                z = scheduler.step(logits, t, z, numbers).prev_sample
            finally:
                torch.cuda.set_sync_debug_mode("default")
        codes.append(z.cpu())
    assert (codes[0] != codes[1]).float().mean() < 0.01  # sums end an ulp apart


def test_what_belongs_on_the_cpu_is_there_whatever_the_default_device() -> None:
    scheduler = XDLMScheduler(k=0.1, num_codes=8)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    with torch.device("meta"):
        scheduler.set_timesteps(3)
        for ahead in (generators, generators[0]):
            assert UniformsAhead(ahead, (2, 5), 3).take().device.type == "cpu"
    assert scheduler.timesteps.device.type == "cpu"
    z = torch.full((2, 5), 8)
    with torch.device("meta"):
        z = scheduler.step(torch.zeros(2, 5, 8, device="cpu"), 1.0, z, generators).prev_sample
    assert z.device.type == "cpu"


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_numbers_drawn_ahead_are_those_of_the_calls_one_by_one(at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(process_xdlm, "AHEAD_ELEMENTS", at_once * 2 * 3 * 7)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (3, 1, 2)]

    one_by_one, ahead = generators(), generators()
    scheduler = XDLMScheduler()
    scheduler.set_timesteps(5)
    numbers = scheduler.draw_ahead(ahead, (3, 7))
    assert isinstance(numbers, UniformsAhead)
    for _ in range(5):
        for ours, theirs in zip(draw_uniforms((3, 7), numbers), draw_uniforms((3, 7), one_by_one)):
            assert torch.equal(ours, theirs)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ahead, one_by_one))
    with pytest.raises(ValueError, match=r"ahead for shape \(3, 7\), not for \(3, 8\)"):
        draw_uniforms((3, 8), numbers)
    with pytest.raises(ValueError, match="used up"):
        draw_uniforms((3, 7), numbers)
    one = torch.Generator()
    twice = [one, one, torch.Generator()]
    assert scheduler.draw_ahead(twice, (3, 7)) is twice  # drawn ahead, its two images would not take turns
    assert scheduler.draw_ahead(one, (3, 7)) is one and scheduler.draw_ahead(None, (3, 7)) is None
    elsewhere = scheduler.draw_ahead(one, (3, 7), "meta")  # nothing to gain on the CPU, a copy a step elsewhere
    assert isinstance(elsewhere, UniformsAhead) and elsewhere.take().shape == (3, 7, 2)
    numbers = UniformsAhead(torch.Generator().manual_seed(4), (3, 7), 5)
    one.manual_seed(4)
    for _ in range(5):
        assert torch.equal(torch.stack(draw_uniforms((3, 7), numbers)), torch.stack(draw_uniforms((3, 7), one)))
    scheduler.set_timesteps(100_000)
    assert scheduler.draw_ahead(ahead, (3, 49)).take().shape == (3, 49, 2)  # of numbers that nobody could hold at once
