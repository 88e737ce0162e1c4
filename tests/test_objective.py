"""The objective against golden numbers, brute force, the two end-to-end identities, and hostile floating point."""

import decimal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.objective import (
    XDLMLoss,
    backends,
    discrete_kl,
    posterior,
    reference_nelbo,
    row_scalars,
    xdlm_head_nelbo,
    xdlm_nelbo,
)
from xdlm_image.schedulers import XDLMProcess

GOLDEN = np.load(Path(__file__).parent / "golden" / "public.npz", allow_pickle=False)
KS = [float(k) for k in GOLDEN["k"]]


def golden(v: str, name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[f"{v}_{name}"]))


def golden_process(v: str, k: float) -> XDLMProcess:
    mask_id = int(golden(v, "mask_id"))
    return XDLMProcess(k, num_codes=mask_id, definition="B", vocab_size=golden(v, "logits").shape[-1], mask_id=mask_id)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs() / expected.abs().clamp(min=1.0)).max().item()


cases = pytest.mark.parametrize(("v", "i"), [(v, i) for v in ("v8", "v37", "v1025") for i in range(len(KS))])


@cases
def test_loss_and_gradient_equal_golden(v: str, i: int) -> None:
    process = golden_process(v, KS[i])
    x, z, weight = golden(v, "x"), golden(v, "z")[i], golden(v, "weight")
    for pair, alpha in enumerate(golden(v, "alpha_t")):
        logits = golden(v, "logits").clone().requires_grad_()
        loss = xdlm_nelbo(logits, z, x, process, alpha, 1.0 - alpha)
        assert relative(loss, golden(v, "loss")[i, pair]) < 1e-10
        assert relative(0.999 * loss, golden(v, "loss_kl")[i, pair]) < 1e-10
        (weight * loss).sum().backward()
        assert relative(logits.grad, golden(v, "grad")[i, pair]) < 1e-10


@cases
def test_posterior_and_discrete_kl_equal_golden(v: str, i: int) -> None:
    process = golden_process(v, KS[i])
    x, z, logits = golden(v, "x"), golden(v, "z")[i], golden(v, "logits")
    masked = logits.clone()
    masked[..., process.mask] = -torch.inf
    for pair, alpha_t in enumerate(golden(v, "alpha_t")):
        alpha_s = golden(v, "alpha_s")[pair]
        times = [a[:, None] for a in (alpha_t, 1 - alpha_t, alpha_s, 1 - alpha_s)]
        actual = posterior(torch.softmax(masked, -1), z, process, *times)
        assert (actual - golden(v, "posterior")[i, pair]).abs().max() < 1e-12
        alpha_s = golden(v, "alpha_s_disc")[pair]
        actual = discrete_kl(logits, z, x, process, alpha_t, 1 - alpha_t, alpha_s, 1 - alpha_s)
        assert relative(actual, golden(v, "loss_disc")[i, pair]) < 1e-10


@cases
def test_float32_loss_is_within_5e_6(v: str, i: int) -> None:
    process = golden_process(v, KS[i])
    x, z = golden(v, "x"), golden(v, "z")[i]
    logits = golden(v, "logits").float()
    for alpha in golden(v, "alpha_t").float():
        beta = 1.0 - alpha.double()
        exact = xdlm_nelbo(logits.double(), z, x, process, alpha.double(), beta)
        loss = xdlm_nelbo(logits, z, x, process, alpha, beta.float())
        assert loss.dtype == torch.float32
        assert relative(loss.double(), exact) < 5e-6
        assert loss.min() > -5e-6


def random_case(k: float, K: int, definition: str, alpha: float, scale: float, seed: int, rows: int = 64):
    generator = torch.Generator().manual_seed(seed)
    extra = {"vocab_size": K + 3, "mask_id": K + 1} if definition == "B" else {}
    process = XDLMProcess(k, K, definition, **extra)
    logits = scale * torch.randn(1, rows, process.logits_width, generator=generator, dtype=torch.float64)
    x = torch.randint(0, K, (1, rows), generator=generator)
    kind = torch.rand(1, rows, generator=generator)
    wrong = torch.randint(0, process.num_uniform, (1, rows), generator=generator)
    z = torch.where(kind < 0.35, process.mask, torch.where((kind < 0.7) & (k > 0), wrong, x))
    beta = torch.tensor([1.0 - alpha], dtype=torch.float64)
    return process, logits, x, z, torch.tensor([alpha], dtype=torch.float64), beta


@settings(max_examples=150, deadline=None)
@given(
    k=st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.999, 1.0]),
    K=st.sampled_from([2, 5, 97]),
    definition=st.sampled_from(["A", "B"]),
    alpha=st.one_of(st.floats(1e-6, 1 - 1e-6), st.sampled_from([1e-5, 1e-3, 0.5, 0.999, 1 - 1e-5])),
    scale=st.sampled_from([0.0, 1.0, 10.0, 60.0]),
    seed=st.integers(0, 10**6),
)
def test_float64_agrees_with_the_definition_and_autograd(k, K, definition, alpha, scale, seed) -> None:
    process, logits, x, z, alpha, beta = random_case(k, K, definition, alpha, scale, seed)
    loss = xdlm_nelbo(logits.requires_grad_(), z, x, process, alpha, beta)
    by_definition = logits.detach().clone().requires_grad_()
    expected = reference_nelbo(by_definition, z, x, process, alpha, beta)
    usable = torch.isfinite(expected)  # the definition itself overflows (log 0) where ours does not
    # the definition cancels (that is why ours exists): its own rounding bounds the comparison
    c = process.signal_ratio(alpha, beta).item()
    slack = 1e-8 + 1e-15 * (1 + K) * (1 + 1 / c) / (beta.item() * min(1.0, alpha.item()))
    assert torch.isfinite(loss).all()
    assert relative(loss[usable], expected[usable]) < slack
    assert loss.min() > -5e-6
    loss.sum().backward()
    expected[usable].sum().backward()
    assert relative(logits.grad[usable], by_definition.grad[usable]) < slack


@settings(max_examples=150, deadline=None)
@example(k=1e-12, K=2, definition="A", beta=0.0, scale=8.0, seed=0)  # kappa_1 c passes float32's largest
@example(k=1e-12, K=2, definition="B", beta=0.999, scale=8.0, seed=1)  # u is small, and az all but 1
@given(
    k=st.sampled_from([0.0, 1e-12, 1e-4, 0.1, 0.5, 1.0]),
    K=st.sampled_from([2, 31, 512]),
    definition=st.sampled_from(["A", "B"]),
    beta=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0 - 1e-6, 1.0]),
    scale=st.sampled_from([0.0, 1.0, 8.0, 200.0]),
    seed=st.integers(0, 10**6),
)
def test_float32_follows_float64_everywhere(k, K, definition, beta, scale, seed) -> None:
    process, logits, x, z, _, _ = random_case(k, K, definition, 0.5, scale, seed)
    beta64 = torch.tensor([beta], dtype=torch.float64)
    if beta == 0.0:
        z = x.clone()  # nothing else has any probability
        assume(scale <= 8.0)  # there l = w k / N, w = q / p_x, which no float32 holds for p_x = exp(-400)
    logits32 = logits.float().requires_grad_()
    logits64 = logits32.detach().double().requires_grad_()
    alpha32, beta32 = (1 - beta64).float(), beta64.float()
    loss32 = xdlm_nelbo(logits32, z, x, process, alpha32, beta32)
    loss64 = xdlm_nelbo(logits64, z, x, process, alpha32.double(), beta32.double())
    assert torch.isfinite(loss32).all() and torch.isfinite(loss64).all()
    # rounding of the inputs' own scale: a logit of size s is known to s 2^-24, and c scales the small terms
    assert relative(loss32.double(), loss64) < 5e-6 + 2e-7 * scale
    assert loss32.min() > -5e-6 * max(1.0, loss64.abs().max().item())
    loss32.sum().backward()
    loss64.sum().backward()
    assert torch.isfinite(logits32.grad).all()
    # terms are of size 1/beta; where c is small kappa is what they leave of each other
    largest = logits64.grad.abs().amax(-1, keepdim=True)
    bound = (2e-6 + 4e-7 * scale) * (largest + (1.0 if beta > 0.1 else 1e-3) / (beta or 1e-2))
    assert ((logits32.grad.double() - logits64.grad).abs() <= bound).all()


def test_gradcheck() -> None:
    for k in (0.0, 0.1, 1.0):
        for definition in ("A", "B"):
            process, logits, x, z, alpha, beta = random_case(k, 5, definition, 0.4, 1.0, seed=3, rows=12)
            logits.requires_grad_()
            assert torch.autograd.gradcheck(lambda a: xdlm_nelbo(a, z, x, process, alpha, beta), logits)  # noqa: B023


@pytest.mark.parametrize("through_head", [False, True])
def test_a_second_derivative_is_refused_where_it_would_pass_for_zero(through_head: bool) -> None:
    process, _, x, z, alpha, beta = random_case(0.1, 5, "A", 0.4, 1.0, seed=3, rows=12)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    features = torch.randn(*x.shape, 4, dtype=torch.float64, requires_grad=True)

    def mean() -> torch.Tensor:
        if through_head:
            return xdlm_head_nelbo(features, weight, None, z, x, process, alpha, beta).mean
        return xdlm_nelbo(features @ weight.T, z, x, process, alpha, beta).mean()

    with pytest.raises(RuntimeError, match="no second derivative .create_graph=True.; take objective.reference_nelbo"):
        torch.autograd.grad(mean() + features.square().sum(), features, create_graph=True)
    (first,) = torch.autograd.grad(mean(), features)
    assert first.abs().max() > 0


def test_underflowed_softmax_keeps_its_gradient() -> None:
    process = XDLMProcess(0.0, 4)
    logits = torch.tensor([[[0.0, 500.0, -300.0, 1.0]]], requires_grad=True)
    loss = xdlm_nelbo(
        logits, torch.tensor([[4]]), torch.tensor([[0]]), process, torch.tensor([0.5]), torch.tensor([0.5])
    )
    loss.sum().backward()
    assert loss.item() == pytest.approx(1000.0)
    assert logits.grad[0, 0].tolist() == pytest.approx([-2.0, 2.0, 0.0, 0.0])


def test_is_the_limit_of_the_discrete_kl() -> None:
    for k in (0.0, 0.1, 1.0):
        process, logits, x, z, alpha, beta = random_case(k, 7, "A", 0.37, 1.5, seed=5)
        step = 1e-6
        kl = discrete_kl(logits, z, x, process, alpha, beta, alpha + step, beta - step)
        assert relative(kl / step, xdlm_nelbo(logits, z, x, process, alpha, beta)) < 2e-4


@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("k", [0.0, 0.001, 0.1, 0.5, 1.0])
def test_integral_with_the_leave_one_out_denoiser_is_the_entropy(k: float, definition: str) -> None:
    """Two dependent tokens over three codes, every (x, z) enumerated: integral of E[l] over alpha = H(x) exactly."""
    K = 3
    extra = {"vocab_size": K + 1, "mask_id": K} if definition == "B" else {}
    process = XDLMProcess(k, K, definition, **extra)
    p_data = torch.tensor([[0.30, 0.05, 0.02], [0.01, 0.20, 0.12], [0.08, 0.02, 0.20]], dtype=torch.float64)
    entropy = -(p_data * p_data.log()).sum().item()
    nodes, weights = np.polynomial.legendre.leggauss(32)
    # t = s^4 resolves t = 0, where k > 0 has a logarithm; the last intervals resolve alpha near k/N
    total = 0.0
    pairs = torch.cartesian_prod(torch.arange(K), torch.arange(K))  # (9, 2) x
    ids = torch.cartesian_prod(torch.arange(process.num_ids), torch.arange(process.num_ids))  # z
    for node, weight in zip(nodes, weights):
        for low, high in pairwise((0.0, 0.02, 0.2, 0.8, 0.99, 0.9995, 1.0)):
            s = low + (high - low) * 0.5 * (node + 1)
            t = torch.tensor([s**4], dtype=torch.float64)
            alpha, beta = process.alpha_beta(t)
            q = process.marginal(torch.arange(K), alpha, beta)  # (K, ids)
            # leave-one-out: p(x_i | z_j) for j != i
            joint0 = torch.einsum("ab,bz->za", p_data, q)  # position 0 given z_1
            joint1 = torch.einsum("ab,az->zb", p_data, q)  # position 1 given z_0
            loo = torch.stack([joint0[ids[:, 1]], joint1[ids[:, 0]]], 1)  # (Z, 2, K)
            logits = torch.nn.functional.pad(loo.log(), (0, process.logits_width - K), value=-1e9)
            expected = 0.0
            for x in pairs:
                p_z = q[x[0], ids[:, 0]] * q[x[1], ids[:, 1]]
                possible = p_z > 0
                z = ids[possible]
                loss = xdlm_nelbo(
                    logits[possible],
                    z,
                    x.expand_as(z).contiguous(),
                    process,
                    alpha.expand(len(z)),
                    beta.expand(len(z)),
                )
                expected += p_data[x[0], x[1]] * (p_z[possible] * loss.sum(-1)).sum()
            total += weight * 0.5 * (high - low) * 4 * s**3 * float(expected)
    assert total == pytest.approx(entropy, abs=1e-6)


def test_wrong_shapes_are_named() -> None:
    process = XDLMProcess(0.1, 8)
    x = torch.zeros(2, 3, dtype=torch.long)
    half = torch.full((2,), 0.5)
    with pytest.raises(ValueError, match="logits_width=8"):
        xdlm_nelbo(torch.zeros(2, 3, 9), x, x, process, half, half)
    for wrong in ({"z": x + 9}, {"x": x + 8}, {"x": x - 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: ids run from"):
            xdlm_nelbo(torch.zeros(2, 3, 8), **({"z": x, "x": x} | wrong), process=process, alpha=half, beta=half)
    with pytest.raises(ValueError, match=r"need \(B, L, V\)"):
        xdlm_nelbo(torch.zeros(2, 4, 8), x, x, process, half, half)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logits": torch.zeros(2, 3, 8, dtype=torch.int64)}, "logits: dtype torch.int64, must be one of"),
        ({"logits": torch.zeros(2, 3, 8, dtype=torch.complex64)}, "logits: dtype torch.complex64"),
        ({"z": torch.zeros(2, 3)}, "z: dtype torch.float32, ids are torch.int64"),
        ({"x": torch.zeros(2, 3, dtype=torch.bool)}, "x: dtype torch.bool"),
        ({"z": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "z: on meta, must be on cpu"),
        ({"alpha": 0.5}, r"alpha=0.5: no tensor; need \(B,\)"),
        ({"alpha": torch.full((3,), 0.5)}, r"alpha \(3,\): need"),
        ({"alpha": torch.full((2,), 0.5, device="meta")}, "alpha: on meta, must be on cpu"),
        ({"alpha": torch.tensor([0.5, torch.nan])}, r"alpha: runs from nan to nan, must lie in \[0, 1\]"),
        ({"beta": torch.tensor([0.5, -1.0])}, r"beta: runs from -1.0 to 0.5, must lie in \[0, 1\]"),
        ({"beta": torch.tensor([0.9, 0.9])}, "alpha, beta: do not sum to 1"),
    ],
)
def test_what_cannot_be_meant_is_named(wrong, message) -> None:
    x, half = torch.zeros(2, 3, dtype=torch.long), torch.full((2,), 0.5)
    right = {"logits": torch.zeros(2, 3, 8), "z": x, "x": x, "alpha": half, "beta": half}
    with pytest.raises(ValueError, match=message):
        xdlm_nelbo(**(right | wrong), process=XDLMProcess(0.1, 8))


def test_a_process_of_numpys_numbers_holds_plain_ones() -> None:
    """Triton's launches take no others."""
    process = XDLMProcess(np.float32(0.5), np.int64(8), definition="B", vocab_size=np.int32(10), mask_id=np.int64(8))
    assert [type(v) for v in (process.k, process.num_codes, process.vocab_size, process.mask_id)] == [float] + [int] * 3
    assert process == XDLMProcess(0.5, 8, definition="B", vocab_size=10, mask_id=8)
    for wrong in ({"num_codes": 8.0}, {"num_codes": True}, {"num_codes": 8, "mask_id": "8"}):
        with pytest.raises(ValueError, match=r"(num_codes|mask_id)=.*: must be a whole number"):
            XDLMProcess(0.5, **wrong)


def test_times_that_were_rounded_are_refused() -> None:
    """FSDP's mixed precision casts what its module is called with."""
    network = XDLMTransformer2DModel(
        sample_size=2, num_embeds=9, out_channels=8, num_classes=2, num_layers=1, num_attention_heads=1,
        attention_head_dim=4,
    )  # fmt: skip
    codes = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="t: dtype torch.bfloat16.*cast_forward_inputs=False"):
        XDLMLoss(network, XDLMProcess(0.1, 8))(codes, codes, torch.rand(3).bfloat16(), torch.zeros(3).long())


@pytest.mark.parametrize("through_head", [False, True])
def test_transforms_of_torch_func_are_refused_and_change_nothing(through_head: bool) -> None:
    """A first call within one must not pass for a machine where nothing can be compiled."""
    process, x = XDLMProcess(0.1, 40), torch.zeros(1, 6, dtype=torch.long)
    rest = (torch.full_like(x, 40), x, process, torch.full((1,), 0.5), torch.full((1,), 0.5))
    passes = backends.passes_for(torch.device("cpu"), torch.float32, "auto")
    backends._cpp_runs.cache_clear()

    def loss(value: torch.Tensor) -> torch.Tensor:
        if through_head:
            return xdlm_head_nelbo(value[..., :3], torch.zeros(40, 3), None, *rest).mean
        return xdlm_nelbo(value, *rest).sum()

    with pytest.raises(RuntimeError, match="torch.func .*reference_nelbo"):
        torch.func.grad(loss)(torch.randn(1, 6, 40))
    assert backends.passes_for(torch.device("cpu"), torch.float32, "auto") is passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_noise_the_impossible_stays_finite(dtype: torch.dtype) -> None:
    """At beta = 0 a z other than x has no probability; its loss stands for infinity."""
    x = torch.zeros(1, 3, dtype=torch.long)
    z = torch.tensor([[8, 1, 0]])  # the mask, a wrong code, the right one
    one = torch.ones(1, dtype=dtype)
    loss = xdlm_nelbo(torch.zeros(1, 3, 8, dtype=dtype), z, x, XDLMProcess(0.1, 8), one, 0 * one)[0]
    assert bool(loss.isfinite().all()) and bool((loss[:2] > 1e20).all()) and float(loss[2]) < 100


def test_series_are_exact_in_float64() -> None:
    """float64 is what all else is held against."""
    decimal.getcontext().prec = 60
    for exponent in range(-60, -15):
        a = 10.0 ** (exponent / 10)
        exact = decimal.Decimal(a)
        log1p = (1 + exact).ln()
        given = torch.tensor([a], dtype=torch.float64)
        assert row_scalars._log1p_minus_ratio(given).item() == pytest.approx(
            float(log1p - exact / (1 + exact)), 1e-12, 0
        )
        assert row_scalars._w_minus_log1p(given).item() == pytest.approx(float(exact - log1p), 1e-12, 0)


def test_times_get_no_gradient() -> None:
    x, alpha = torch.zeros(2, 3, dtype=torch.long), torch.full((2,), 0.5, requires_grad=True)
    assert not xdlm_nelbo(torch.zeros(2, 3, 8), x, x, XDLMProcess(0.1, 8), alpha, 1 - alpha).requires_grad


def test_a_visible_code_costs_nothing_under_mdlm_even_where_it_is_impossible() -> None:
    x, half = torch.zeros(1, 1, dtype=torch.long), torch.full((1,), 0.5)
    logits = torch.tensor([[[-torch.inf, 0.0, 1.0]]], requires_grad=True)
    loss = xdlm_nelbo(logits, x, x, XDLMProcess(0.0, 3), half, half)
    loss.sum().backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros(1, 1, 3))
