"""Every way to read the logits gives the same loss and gradient: plain torch, compiled C++, and Triton's kernels
(without a GPU, in Triton's interpreter, which is slow: cases are few and tiny)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nelbo_cases import (  # noqa: F401
    DEVICE,
    backends,
    codes,
    in_place_case,
    loss_and_gradient,
    needs_compiler,
    on_cpu_backends,
    process_of,
    small_blocks_fixture,
)
from triton_here import needs_triton

from xdlm_image.objective import nelbo_cpu, nelbo_eager, reference_nelbo, xdlm_nelbo
from xdlm_image.objective.backends import _cpp_runs, _triton_runs, passes_for
from xdlm_image.objective.row_scalars import Rows
from xdlm_image.schedulers import XDLMProcess


@backends
@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("k", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("K", "dtype"), [(13, torch.float32), (70, torch.float32), (70, torch.bfloat16)], ids=str)
def test_equals_the_definition(backend: str, k: float, definition: str, K: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    process = process_of(k, K, definition)
    z, x = codes(process, 6)
    logits = (2.0 * torch.randn(1, 6, process.logits_width)).to(dtype)
    alpha = torch.tensor([[0.7, 0.7, 0.7, 0.3, 0.05, 0.95]], dtype=torch.float64)
    expected = loss_and_gradient(reference_nelbo, logits.double(), z, x, process, alpha, 1 - alpha)
    given = (a.to(DEVICE) for a in (logits, z, x))
    times = (a.float().to(DEVICE) for a in (alpha, 1 - alpha))
    actual = loss_and_gradient(
        lambda *a, **o: xdlm_nelbo(*a[:3], process, *a[4:], **o), *given, process, *times, backend=backend
    )
    torch.testing.assert_close(actual[0], expected[0], rtol=5e-6, atol=5e-6)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 0.0  # Triton's interpreter cuts off where others round
    torch.testing.assert_close(actual[1], expected[1], rtol=5e-6 + rounding, atol=2e-5)


def hostile_logits(x: torch.Tensor, z: torch.Tensor, width: int) -> torch.Tensor:
    """(1, R, width), each three rows: all zeros, +-1e4, x all but impossible, x all but certain, z likewise."""
    logits = torch.randn(x.shape[1], width)
    logits[0:3] = 0.0
    logits[3:6] = 1e4 * logits[3:6].sign()
    rows = torch.arange(x.shape[1])
    logits[rows[6:9], x[0, 6:9]] = -1e4
    logits[rows[9:12], x[0, 9:12]] = 1e4
    logits[rows[12:15], z[0, 12:15].clamp(max=width - 1)] = 20.0
    return logits[None]


@backends
@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.5, 1.0 - 1e-6, 1.0])
@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_hostile_numbers_follow_float64(backend: str, k: float, beta: float) -> None:
    torch.manual_seed(2)
    process = process_of(k, 40, "A")
    z, x = codes(process, 15)
    if beta == 0.0:
        z = x.clone()  # nothing else has any probability
    logits = hostile_logits(x, z, 40)
    if beta == 0.0:
        logits[:, 3:9] = 0.0  # an impossible truth is infinitely wrong there
    beta64 = torch.tensor([beta], dtype=torch.float64)
    alpha32, beta32 = (1 - beta64).float(), beta64.float()
    expected = loss_and_gradient(
        xdlm_nelbo, logits.double(), z, x, process, alpha32.double(), beta32.double(), backend="eager"
    )
    given = [a.to(DEVICE) for a in (logits, z, x)]
    actual = loss_and_gradient(xdlm_nelbo, *given, process, alpha32.to(DEVICE), beta32.to(DEVICE), backend=backend)
    assert all(torch.isfinite(value).all() for value in actual)
    error = (actual[0] - expected[0]).abs() / expected[0].abs().clamp(min=1.0)
    assert error.max() < 1e-5
    largest = expected[1].abs().amax(-1, keepdim=True)
    weight = torch.arange(1.0, 16.0)[:, None]
    flat = (1.0 if beta > 0.1 else 1e-3) * weight / (beta or 1e-2)  # see `test_float32_follows_float64_everywhere`
    assert ((actual[1] - expected[1]).abs() <= 4e-6 * (largest + flat)).all()


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.5])
def test_plain_torch_on_an_accelerator_is_as_exact_and_waits_for_no_row(alpha: float, monkeypatch) -> None:
    monkeypatch.setattr(nelbo_eager, "_may_wait", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("which an accelerator would be waited for"))
    torch.manual_seed(2)
    process = process_of(0.1, 4096, "A")
    z, x = codes(process, 15)
    logits, shares = torch.randn(1, 15, 4096), torch.tensor([alpha, 1 - alpha])
    expected = xdlm_nelbo(logits.double(), z, x, process, *shares.double().split(1), backend="eager")
    actual = xdlm_nelbo(logits, z, x, process, *shares.split(1), backend="eager")
    assert ((actual - expected).abs() <= 5e-6 * expected.abs().clamp(min=1.0)).all()


@backends
@pytest.mark.parametrize("width", [12, 70, 96, 101])
@pytest.mark.parametrize("definition", ["A", "B"])
@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_both_passes_at_once_are_the_two(backend: str, k: float, definition: str, width: int, monkeypatch) -> None:
    if backend == "triton" and width > 90:  # several blocks, which end with the row or beyond it
        monkeypatch.setattr("xdlm_image.objective.nelbo_triton.ROW_BYTES_IN_CACHE", 4 * 100)
        monkeypatch.setattr("xdlm_image.objective.nelbo_triton.ROW_IN_REGISTERS", 32)
        monkeypatch.setattr("xdlm_image.objective.nelbo_triton.BLOCK", 32)
    torch.manual_seed(6)
    process = process_of(k, width, definition)
    z, x = codes(process, 9)
    alpha = torch.linspace(0.0, 1.0 - 1e-6, 9)
    wide = 3.0 * torch.randn(9, process.logits_width + 5, device=DEVICE)  # with something between the rows
    logits, between = wide[:, : process.logits_width], wide[:, process.logits_width :].clone()
    rows = Rows(*(value.to(DEVICE) for value in (z[0], x[0], alpha, 1 - alpha, process.signal_ratio(alpha, 1 - alpha))))
    weight = torch.linspace(-1.0, 2.0, 9, device=DEVICE)
    passes = passes_for(DEVICE, torch.float32, backend)
    loss, scalars = passes.forward(logits, rows, process)
    passes.backward(logits, rows, scalars, weight, process, gradient := torch.empty_like(logits))
    at_once = passes.forward_backward(logits, rows, weight, process)
    torch.testing.assert_close(at_once, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, gradient, rtol=1e-5, atol=1e-7)
    assert torch.equal(wide[:, process.logits_width :], between)


@backends
def test_no_tokens_are_no_loss(backend: str) -> None:
    process = XDLMProcess(0.1, 5)
    logits = torch.zeros(0, 4, 5, device=DEVICE, requires_grad=True)
    ids, alpha = torch.zeros(0, 4, dtype=torch.long, device=DEVICE), torch.zeros(0, device=DEVICE)
    loss = xdlm_nelbo(logits, ids, ids, process, alpha, alpha, backend=backend)
    loss.sum().backward()
    assert loss.shape == (0, 4) and logits.grad.shape == (0, 4, 5)


@backends
def test_the_mask_has_no_probability_however_large_its_logit(backend: str) -> None:
    torch.manual_seed(5)
    process = process_of(0.1, 37, "B")
    z, x = (ids.to(DEVICE) for ids in codes(process, 9))
    half = torch.full((1,), 0.5, device=DEVICE)
    logits = torch.randn(1, 9, 40, device=DEVICE)
    found = []
    for score in (0.0, 1e4):
        logits[..., process.mask] = score
        found.append(loss_and_gradient(xdlm_nelbo, logits, z, x, process, half, half, backend=backend))
    for low, high in zip(*found):
        assert torch.equal(low, high)


@backends
def test_logits_may_lie_in_any_order(backend: str) -> None:
    torch.manual_seed(6)
    process = XDLMProcess(0.1, 40)
    z, x = (ids.to(DEVICE) for ids in codes(process, 6))
    half = torch.full((1,), 0.5, device=DEVICE)
    columns_first = torch.randn(1, 40, 6, device=DEVICE).transpose(1, 2)
    rest = (z, x, process, half, half)
    found = loss_and_gradient(xdlm_nelbo, columns_first, *rest, backend=backend)
    for ours, expected in zip(found, loss_and_gradient(xdlm_nelbo, columns_first.contiguous(), *rest, backend=backend)):
        assert torch.equal(ours, expected)


# --- the choice -----------------------------------------------------------------------------------


def test_backends_are_chosen_by_device_and_refused_by_name() -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float64, torch.float16):
        assert passes_for(cpu, dtype, "auto") is nelbo_eager
    assert passes_for(torch.device("cuda"), torch.float64, "auto") is nelbo_eager
    with pytest.raises(ValueError, match="backend='cuda'.*auto, eager, cpp, triton"):
        passes_for(cpu, torch.float32, "cuda")
    with pytest.raises(ValueError, match="backend='triton'.*float64"):
        passes_for(cpu, torch.float64, "triton")
    with pytest.raises(ValueError, match="backend='cpp'.*float16"):
        passes_for(cpu, torch.float16, "cpp")
    with pytest.raises(ValueError, match="backend='cpp'.* on cuda"):
        passes_for(torch.device("cuda"), torch.float32, "cpp")


@needs_compiler
def test_a_cpu_takes_compiled_passes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert passes_for(torch.device("cpu"), dtype, "auto") is nelbo_cpu


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("no_such_compiler", "no_such_compiler.*install a C.. compiler.*CXX.*plain torch"),
        ("false", "false failed.*CXX.*plain torch"),
        ("c++ '", "CXX=.*quotation.*plain torch"),
    ],
)
def test_a_compiler_that_cannot_compile_is_told_and_done_without(compiler: str, told: str, monkeypatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    for cached in ("library", "self_check"):
        monkeypatch.setattr(nelbo_cpu, cached, getattr(nelbo_cpu, cached).__wrapped__)
    with pytest.warns(UserWarning, match=told):
        assert not _cpp_runs.__wrapped__()
    with pytest.raises((OSError, RuntimeError, ValueError), match=told.partition(".*plain")[0]):
        passes_for(torch.device("cpu"), torch.float32, "cpp")


@needs_compiler
def test_what_computes_something_else_is_not_used(monkeypatch) -> None:
    right = nelbo_cpu._call

    def wrong(name, logits, process, *given, out=None) -> None:
        right(name, logits, process, *given, out=out)
        if out is not None:
            out[1, 700] += 0.1

    monkeypatch.setattr(nelbo_cpu, "_call", wrong)
    monkeypatch.setattr(nelbo_cpu, "self_check", nelbo_cpu.self_check.__wrapped__)
    with pytest.warns(UserWarning, match="computes something else"):
        assert not _cpp_runs.__wrapped__()


@needs_compiler
def test_fast_math_that_a_compiler_is_given_does_no_harm() -> None:
    """In a process of its own: such a library would also set how the processor rounds small numbers to 0."""
    code = """
import torch
from xdlm_image.objective import nelbo_cpu
nelbo_cpu.self_check()
assert (torch.tensor([1e-40]) * 1).item() > 0
"""
    environment = {**os.environ, "CXX": "c++ -ffast-math"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --- compiled C++ ---------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "definition"), [(0.0, "A"), (0.1, "B")])
def test_rows_do_not_depend_on_threads_or_strides(k: float, definition: str, dtype: torch.dtype, monkeypatch) -> None:
    torch.manual_seed(6)
    process = process_of(k, 2500, definition)  # several of the chunks that sums are taken over
    z, x = codes(process, 7)
    padded = torch.randn(1, 7, process.logits_width + 5).to(dtype)
    half = torch.full((1,), 0.5)
    expected = loss_and_gradient(xdlm_nelbo, padded[..., :-5].contiguous(), z, x, process, half, half, backend="cpp")
    monkeypatch.setattr(nelbo_cpu, "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    leaf = padded.clone().requires_grad_()
    loss = xdlm_nelbo(leaf[..., :-5], z, x, process, half, half, backend="cpp")
    (loss * torch.arange(1, 8)).sum().backward()
    assert torch.equal(loss.double(), expected[0]) and torch.equal(leaf.grad[..., :-5].double(), expected[1])
    moved = padded * 1.0
    moved.requires_grad_()
    strided = (moved * 1.0)[..., :-5]
    loss = xdlm_nelbo(strided, z, x, process, half, half, backend="cpp", in_place=True)
    (loss * torch.arange(1, 8)).sum().backward()
    assert torch.equal(moved.grad[..., :-5].double(), expected[1]) and not moved.grad[..., -5:].any()


@needs_compiler
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_defaults_of_the_process_do_not_reach_the_compiled_passes(default: torch.dtype | str) -> None:
    process = process_of(0.1, 1000, "A")
    z, x = codes(process, 300)
    logits, half = torch.randn(1, 300, 1000), torch.full((1,), 0.5)
    expected = loss_and_gradient(xdlm_nelbo, logits, z, x, process, half, half, backend="cpp")
    weights = torch.arange(1, 301)
    leaf = logits.requires_grad_()
    try:
        torch.set_default_device(default) if isinstance(default, str) else torch.set_default_dtype(default)
        loss = xdlm_nelbo(leaf, z, x, process, half, half, backend="cpp")
        (loss * weights).sum().backward()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loss.double(), expected[0]) and torch.equal(leaf.grad.double(), expected[1])


@needs_compiler
def test_tensors_without_memory_of_their_own_are_read_right_or_refused() -> None:
    process = process_of(0.1, 40, "A")
    z, x = codes(process, 6)
    logits, half = torch.randn(1, 6, 40), torch.full((1,), 0.5)
    expected = xdlm_nelbo(logits, z, x, process, half, half, backend="cpp")
    assert torch.equal(xdlm_nelbo(torch._neg_view(-logits), z, x, process, half, half, backend="cpp"), expected)

    class Other(torch.Tensor):
        pass

    with pytest.raises(ValueError, match="backend='cpp'.*Other.*'eager'"):
        xdlm_nelbo(logits.as_subclass(Other), z, x, process, half, half, backend="cpp")
    assert torch.allclose(xdlm_nelbo(logits.as_subclass(Other), z, x, process, half, half), expected)  # plain torch can


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_compiled_passes_hide_no_numbers_gone_wrong(bad: float) -> None:
    process = process_of(0.1, 40, "A")
    z, x = codes(process, 6)
    logits = torch.randn(1, 6, 40)
    logits[0, 3, 7] = bad
    half = torch.full((1,), 0.5)
    loss, gradient = loss_and_gradient(xdlm_nelbo, logits, z, x, process, half, half, backend="cpp")
    assert loss.isnan()[0].tolist() == gradient.isnan().any(-1)[0].tolist() == [i == 3 for i in range(6)]


@on_cpu_backends
@pytest.mark.parametrize("logits_of", [torch.zeros, lambda *shape: 3.0 * torch.randn(*shape)], ids=["equal", "random"])
@pytest.mark.parametrize(("k", "definition"), [(0.1, "B"), (1.0, "A"), (0.0, "A")])
@pytest.mark.parametrize("width", [16387, 262144])
def test_wide_rows_follow_float64(width: int, k: float, definition: str, logits_of, backend: str, monkeypatch) -> None:
    """Equal logits are the hard ones: what adds one by one then errs the same way each time."""
    monkeypatch.undo()
    torch.manual_seed(4)
    process = process_of(k, width - 3 if definition == "B" else width, definition)
    z, x = codes(process, 6)
    logits = logits_of(1, 6, process.logits_width)
    logits[0, 2, z[0, 2].clamp(max=width - 1)] += 5.0
    alpha = torch.tensor([[0.9, 0.3, 0.7, 0.0063, 0.05, 0.0063]], dtype=torch.float64)
    times = [value.float() for value in (alpha, 1 - alpha)]
    expected = loss_and_gradient(xdlm_nelbo, logits.double(), z, x, process, *(value.double() for value in times))
    actual = loss_and_gradient(xdlm_nelbo, logits, z, x, process, *times, backend=backend)
    assert ((actual[0] - expected[0]).abs() / expected[0].abs().clamp(min=1.0)).max() < 2e-6
    assert ((actual[1] - expected[1]).abs().amax(-1) <= 4e-6 * expected[1].abs().amax(-1)).all()


@backends
@pytest.mark.parametrize("beta", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("k", [0.1, 1.0])
def test_gradient_is_as_exact_as_the_logits(backend: str, k: float, beta: float) -> None:
    """Late in the noise's day, c is large and kappa close to -1: rounding of the logits must be the larger error."""
    torch.manual_seed(5)
    process = XDLMProcess(k, 100)
    z, x = codes(process, 30)
    logits = 8.0 * torch.randn(1, 30, 100)
    beta32 = torch.tensor([beta])
    times = [(1 - beta32.double()).float(), beta32]
    expected = loss_and_gradient(xdlm_nelbo, logits.double(), z, x, process, *(value.double() for value in times))
    given = [value.to(DEVICE) for value in (logits, z, x)]
    actual = loss_and_gradient(xdlm_nelbo, *given, process, *(value.to(DEVICE) for value in times), backend=backend)
    largest = expected[1].abs().amax(-1)
    assert ((actual[1] - expected[1]).abs().amax(-1) <= 1e-5 * largest).all()


@backends
@pytest.mark.parametrize("apart", [1, 256], ids=["neighbours", "a_quarter_of_1024_apart"])
@pytest.mark.parametrize("beta", [1e-9, 1e-3])
def test_four_likely_codes_do_not_overflow(backend: str, apart: int, beta: float) -> None:
    """They share a logarithm where the product of their 1 + c p is finite; at beta = 1e-9 it would be 1e49."""
    process = XDLMProcess(0.1, 1024)
    logits = torch.full((1, 3, 1024), -30.0)
    logits[..., [0, apart, 2 * apart, 3 * apart]] = 0.0
    z, x = torch.tensor([[1024, 900, 901]]), torch.full((1, 3), 900)
    beta64 = torch.tensor([beta], dtype=torch.float64)
    times = [(1 - beta64).float(), beta64.float()]
    expected = loss_and_gradient(xdlm_nelbo, logits.double(), z, x, process, *(value.double() for value in times))
    given = [value.to(DEVICE) for value in (logits, z, x)]
    actual = loss_and_gradient(xdlm_nelbo, *given, process, *(value.to(DEVICE) for value in times), backend=backend)
    assert ((actual[0] - expected[0]).abs() <= 2e-6 * expected[0].abs()).all()
    assert ((actual[1] - expected[1]).abs().amax(-1) <= 1e-5 * expected[1].abs().amax(-1)).all()


@needs_triton
def test_a_triton_that_cannot_run_is_told_and_done_without(monkeypatch) -> None:
    from xdlm_image.objective import nelbo_triton

    def fail(*_) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(nelbo_triton, "self_check", fail)
    with pytest.warns(UserWarning, match="no C compiler"):
        assert not _triton_runs.__wrapped__(torch.device("cuda"), torch.float32)


def test_kernels_compile_for_a_gpu() -> None:
    """The interpreter forgives what the compiler does not; this needs no GPU."""
    pytest.importorskip("triton")
    subprocess.run([sys.executable, Path(__file__).parent / "compile_kernels.py"], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1000, 16387, 70_000])
def test_gpu_kernels_follow_float64_on_wide_rows(width: int, dtype: torch.dtype, monkeypatch) -> None:
    from xdlm_image.objective import nelbo_triton

    monkeypatch.undo()
    assert passes_for(DEVICE, dtype, "auto") is nelbo_triton
    process = process_of(0.1, width - 3, "B")
    z, x = (ids.to(DEVICE) for ids in codes(process, 96))
    logits = (3.0 * torch.randn(1, 96, width, device=DEVICE)).to(dtype)
    beta = torch.tensor([0.4], device=DEVICE)
    expected = loss_and_gradient(xdlm_nelbo, logits.double(), z, x, process, 1 - beta, beta)
    actual = loss_and_gradient(xdlm_nelbo, logits, z, x, process, 1 - beta, beta)
    torch.testing.assert_close(actual[0], expected[0], rtol=5e-6, atol=5e-6)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
    torch.testing.assert_close(actual[1], expected[1], rtol=5e-6 + rounding, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1000, 4096, 16387, 70_000])
def test_gpu_gradient_over_the_logits_that_are_read(width: int, dtype: torch.dtype, monkeypatch) -> None:
    """Row by row: a thread that wrote before another had read the logit of x or z would spoil a few of them."""
    from xdlm_image.objective import nelbo_triton

    monkeypatch.undo()
    process, count = XDLMProcess(0.1, width), 2000
    x = torch.randint(width, (count,))
    x[:200] = width - 1
    x[200:400] = 0
    z = torch.where(torch.rand(count) < 0.3, process.mask, torch.randint(width, (count,)))
    alpha = torch.rand(count) * 0.98 + 0.01
    rows = Rows(*(value.to(DEVICE) for value in (z, x, alpha, 1 - alpha, process.signal_ratio(alpha, 1 - alpha))))
    wide = (3.0 * torch.randn(count, width + 8, device=DEVICE)).to(dtype)
    exact = wide[:, :width].double()
    ones = torch.ones(count, device=DEVICE)
    loss = nelbo_triton.forward_backward(wide[:, :width], rows, ones, process)
    rows = Rows(rows.z, rows.x, *(value.double() for value in tuple(rows)[2:]))
    expected, scalars = nelbo_eager.forward(exact, rows, process)
    nelbo_eager.backward(exact, rows, scalars, ones.double(), process, out=exact)
    torch.testing.assert_close(loss.double(), expected, rtol=5e-6, atol=5e-6)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(wide[:, :width].double(), exact, rtol=5e-6 + rounding, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [False, True])
def test_gpu_memory_is_that_of_the_gradient_or_nothing(in_place: bool) -> None:
    process = XDLMProcess(0.1, 16384)
    base = torch.randn(4, 256, 16384, device=DEVICE, requires_grad=True)
    logits = base * 1.0
    z, x = (ids.view(4, 256).to(DEVICE) for ids in codes(process, 1024))
    beta = torch.full((4,), 0.5, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = xdlm_nelbo(logits, z, x, process, 1 - beta, beta, in_place=in_place).sum()
    torch.autograd.grad(loss, logits)
    size = logits.numel() * logits.element_size()
    assert torch.cuda.max_memory_allocated() - before < (0.01 if in_place else 1.01) * size
