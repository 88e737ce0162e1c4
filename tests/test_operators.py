"""Under torch.compile the objective is one operator of one graph, with the numbers that it has without."""

import copy

import pytest
import torch
from nelbo_cases import on_cpu_backends
from torch._dynamo.utils import counters
from torch.library import opcheck

from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.objective import XDLMLoss, head, operators, xdlm_head_nelbo, xdlm_nelbo
from xdlm_image.schedulers import XDLMProcess

B, L, D, K = 3, 10, 6, 21
PROCESSES = [XDLMProcess(0.1, K), XDLMProcess(0.0, K), XDLMProcess(0.5, K - 2, "B", vocab_size=K, mask_id=K - 1)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tokens(process: XDLMProcess, dtype: torch.dtype = torch.float32, batch: int = B):
    """z, x, process, alpha, beta."""
    torch.manual_seed(0)
    x = torch.randint(process.num_codes, (batch, L))
    alpha = torch.linspace(0.2, 0.8, batch, dtype=dtype)
    return process.noise(x, alpha, 1 - alpha), x, process, alpha, 1 - alpha


def leaves_of(dtype: torch.dtype = torch.float32, batch: int = B) -> list[torch.Tensor]:
    """features, weight and bias."""
    torch.manual_seed(1)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((batch, L, D), (K, D), (K,))]


def whole(function, **options):
    """As one graph, or an error."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@on_cpu_backends
@pytest.mark.parametrize("process", PROCESSES, ids=["XDLM", "MDLM", "definition B"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_objective_compiles_whole_to_the_same_numbers(backend: str, process: XDLMProcess, in_place: bool) -> None:
    given = tokens(process)
    torch.manual_seed(1)
    base, weight = torch.randn(B, L, K, requires_grad=True), torch.rand(B, L)

    def loss(a):
        return (weight * xdlm_nelbo(2.0 * a, *given, in_place=in_place, backend=backend)).sum()

    found = []
    for function in (loss, whole(loss)):
        value = function(base)
        found += [value, *torch.autograd.grad(value, base)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_logits_that_a_graph_is_given_can_be_overwritten() -> None:
    given, compiled = tokens(PROCESSES[0]), []
    torch.manual_seed(1)
    base = torch.randn(B, L, K, requires_grad=True)
    for in_place in (False, True):
        loss = whole(lambda a, in_place=in_place: xdlm_nelbo(a, *given, in_place=in_place).sum())
        logits = base * 1.0
        compiled += torch.autograd.grad(loss(logits), base)
    assert torch.equal(*compiled)
    assert torch.equal(logits, compiled[1])


def test_the_fastest_passes_run_under_torch_compile(monkeypatch) -> None:
    """The last compiled operation of a training step must not cost several times what it costs alone."""
    asked = []
    original = operators.passes_for
    monkeypatch.setattr(operators, "passes_for", lambda *given: asked.append(original(*given)) or asked[-1])
    given = tokens(PROCESSES[0])
    logits = torch.randn(B, L, K, requires_grad=True)
    torch.compile(lambda a: xdlm_nelbo(a, *given).mean(), fullgraph=True)(logits).backward()
    assert asked == [original(logits.device, logits.dtype, "auto")] * 2


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False), (False,) * 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_head_compiles_whole_to_the_same_numbers(wanted: tuple[bool, ...], dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(head, "BLOCK_BYTES", 8 * 4 * 24)  # some blocks
    given, token_weight = tokens(PROCESSES[0]), torch.rand(B, L)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [value.detach().requires_grad_(is_wanted) for value, is_wanted in zip(leaves_of(wide), wanted)]

    def loss(*values):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return xdlm_head_nelbo(*values, *given, token_weight=token_weight)

    found = []
    for function in (loss, whole(loss)):
        mean, per_token = function(*leaves)
        assert mean.requires_grad == any(wanted) and not per_token.requires_grad
        found.append([mean, per_token])
        if any(wanted):
            found[-1] += torch.autograd.grad(3.0 * mean, [value for value in leaves if value.requires_grad])
    for ours, compiled in zip(*found, strict=True):
        assert ours.dtype == compiled.dtype and torch.equal(ours, compiled)


def test_the_head_without_a_bias_compiles() -> None:
    given, (features, weight, _) = tokens(PROCESSES[0]), leaves_of()
    loss = lambda a: xdlm_head_nelbo(a, weight, None, *given).mean
    assert torch.equal(whole(loss)(features), loss(features))


def test_the_network_with_its_loss_is_one_graph() -> None:
    torch.manual_seed(0)
    network = XDLMTransformer2DModel(
        num_embeds=K + 1, out_channels=K, num_classes=4, sample_size=5, num_layers=1, num_attention_heads=2,
        attention_head_dim=8,
    )  # fmt: skip
    loss = XDLMLoss(network, PROCESSES[0])
    x, t, labels = torch.randint(K, (2, 25)), torch.tensor([0.3, 0.9]), torch.tensor([0, 3])
    z = PROCESSES[0].noise(x, *PROCESSES[0].alpha_beta(t))
    twin = copy.deepcopy(loss)
    compiled = torch.compile(twin, fullgraph=True)
    means = [function(z, x, t, labels).mean for function in (loss, compiled)]
    for mean in means:
        mean.backward()
    torch.testing.assert_close(*means)
    for ours, other in zip(loss.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, ours.grad, rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_noise_and_objective_are_one_graph() -> None:
    process = PROCESSES[0]
    logits = torch.randn(B, L, K, requires_grad=True)

    def loss(a, x, t):
        alpha, beta = process.alpha_beta(t)
        return xdlm_nelbo(a, process.noise(x, alpha, beta), x, process, alpha, beta).mean()

    value = whole(loss)(logits, torch.randint(K, (B, L)), torch.rand(B))
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


def test_batches_of_other_sizes_need_no_new_graph() -> None:
    compiled = whole(lambda *given: xdlm_head_nelbo(*given).mean, dynamic=True)
    for batch in (2, 3, 5):
        leaves, given = leaves_of(batch=batch), tokens(PROCESSES[0], batch=batch)
        assert torch.equal(compiled(*leaves, *given), xdlm_head_nelbo(*leaves, *given).mean)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["x", "z", "alpha"])
def test_values_are_checked_when_the_graph_runs(name: str) -> None:
    z, x, process, alpha, beta = tokens(PROCESSES[0])
    compiled = whole(lambda a, *given: xdlm_nelbo(a, given[0], given[1], process, *given[2:]).sum())
    given = {"z": z, "x": x, "alpha": alpha, "beta": beta}
    logits = torch.randn(B, L, K)
    compiled(logits, *given.values())
    given[name] = given[name] + K
    with pytest.raises(ValueError, match=f"{name}: .*must lie in"):
        compiled(logits, *given.values())


def test_tensors_that_hold_nothing_get_shapes() -> None:
    z, x, process, alpha, beta = tokens(PROCESSES[0])
    given = (z.to("meta"), x.to("meta"), process, alpha.to("meta"), beta.to("meta"))
    logits = torch.empty(B, L, K, device="meta", dtype=torch.bfloat16, requires_grad=True)
    loss = xdlm_nelbo(logits, *given)
    assert loss.is_meta and loss.shape == (B, L) and loss.dtype == torch.float32
    loss.sum().backward()
    assert logits.grad.shape == logits.shape and logits.grad.dtype == torch.bfloat16
    leaves = [value.detach().to("meta").requires_grad_() for value in leaves_of()]
    xdlm_head_nelbo(*leaves, *given).mean.backward()
    assert [value.grad.shape for value in leaves] == [value.shape for value in leaves]


@pytest.mark.parametrize("process", PROCESSES, ids=["XDLM", "MDLM", "definition B"])
def test_operators_are_what_they_tell_torch(process: XDLMProcess) -> None:
    z, x, _, alpha, beta = (value if isinstance(value, XDLMProcess) else value for value in tokens(process))
    rows = [z.reshape(-1), x.reshape(-1), *(value.repeat_interleave(L) for value in (alpha, beta))]
    rows.append(process.signal_ratio(rows[2], rows[3]))
    constants = operators.constants_of(process)
    logits, grad_loss = torch.randn(B * L, K), torch.rand(B * L)
    opcheck(operators._forward, (logits, *rows, "eager", *constants))
    _, scalars = operators._forward(logits, *rows, "eager", *constants)
    given = (logits, *rows, scalars, grad_loss, "eager", *constants)
    opcheck(operators._backward, (*given, torch.empty_like(logits)))
    opcheck(operators._backward_in_place, given)
    features, weight, bias = (value.detach() for value in leaves_of())
    for wanted in ((True, True, True), (False, True, False)):
        settings = ("eager", torch.float32, *wanted, *constants)
        opcheck(head._head_operator, (features.reshape(-1, D), weight, bias, grad_loss, *rows, *settings))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gpu_kernels_run_in_compiled_graphs(mode: str) -> None:
    """With CUDA graphs too: what an operator asks once, it asks before they are recorded."""
    given = [value.to("cuda") if isinstance(value, torch.Tensor) else value for value in tokens(PROCESSES[0])]
    leaves = [value.detach().to("cuda").requires_grad_() for value in leaves_of()]
    compiled = torch.compile(lambda *values: xdlm_head_nelbo(*values, *given).mean, fullgraph=True, mode=mode)
    expected = torch.autograd.grad(xdlm_head_nelbo(*leaves, *given).mean, leaves)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for ours, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
            torch.testing.assert_close(ours, wanted)
