"""Under torch.compile the objective is one operator of one graph, with the numbers that it has without."""

import copy
from contextlib import nullcontext

import pytest
import torch
from nelbo_cases import on_cpu_backends
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
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


def head_of(features, weight, bias, *given):
    return xdlm_head_nelbo(features, weight, bias, *given).mean


def nelbo_of(features, weight, bias, *given):
    return xdlm_nelbo(features @ weight.T + bias, *given).mean()


@pytest.mark.parametrize("objective", [head_of, nelbo_of])
def test_batches_of_other_sizes_need_no_new_graph(objective) -> None:
    compiled = whole(objective, dynamic=True)
    for batch in (2, 3, 5):
        leaves, given = leaves_of(batch=batch), tokens(PROCESSES[0], batch=batch)
        ours, expected = compiled(*leaves, *given), objective(*leaves, *given)
        assert torch.equal(ours, expected)
        for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves)):
            torch.testing.assert_close(one, other)
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


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_that_hold_nothing_get_shapes(kind: str) -> None:
    """As whoever estimates memory asks for."""
    z, x, process, *shares = tokens(PROCESSES[0])
    features, weight, bias = leaves_of(torch.bfloat16)
    mode = FakeTensorMode() if kind == "fake" else None

    def emptied(value):
        return value.detach().to("meta") if mode is None else mode.from_tensor(value.detach())

    given = (emptied(z), emptied(x), process, *map(emptied, shares))
    leaves = [emptied(value).requires_grad_() for value in (features, weight, bias)]
    logits = emptied(torch.randn(B, L, K, dtype=torch.bfloat16)).requires_grad_()
    with mode or nullcontext():
        loss = xdlm_nelbo(logits, *given)
        assert loss.shape == (B, L) and loss.dtype == torch.float32 and type(loss) is type(logits)
        loss.sum().backward()
        xdlm_head_nelbo(*leaves, *given).mean.backward()
    for value in (logits, *leaves):
        assert value.grad.shape == value.shape and value.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="backend='tritno': must be one of"):
        xdlm_nelbo(logits, *given, backend="tritno")


@pytest.mark.parametrize("objective", [head_of, nelbo_of])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_second_derivatives_are_refused_in_graphs(objective, compiler: str) -> None:
    """torch 2.11 by itself would take the gradient for a constant."""
    leaves, given = leaves_of(), tokens(PROCESSES[0])
    mean = torch.compile(objective, fullgraph=True, backend=compiler)(*leaves, *given)
    with pytest.raises(RuntimeError, match="second derivative|double backward"):
        grads = torch.autograd.grad(mean, leaves, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("objective", [head_of, nelbo_of])
@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.grad], ids=["jacfwd", "grad"])
def test_transforms_of_torch_func_are_refused_in_graphs(objective, transform) -> None:
    leaves, given = [value.detach() for value in leaves_of()], tokens(PROCESSES[0])
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.compile(transform(lambda a: objective(a, *leaves[1:], *given)), backend="aot_eager")(leaves[0])


@pytest.mark.parametrize("objective", [head_of, nelbo_of])
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_objective_keeps_its_backend_and_takes_other_batches(objective, strict: bool) -> None:
    class Loss(torch.nn.Module):
        def forward(self, features, weight, bias, z, x, alpha, beta):
            return objective(features, weight, bias, z, x, PROCESSES[0], alpha, beta)

    def inputs(batch):
        z, x, _, alpha, beta = tokens(PROCESSES[0], batch=batch)
        return *(value.detach() for value in leaves_of(batch=batch)), z, x, alpha, beta

    batch = {0: torch.export.Dim("batch", min=2)}
    shapes = (batch, None, None, *(batch,) * 4)
    exported = torch.export.export(Loss(), inputs(3), strict=strict, dynamic_shapes=shapes)
    called = [node.args for node in exported.graph.nodes if "xdlm_image" in str(node.target)]
    assert called and all("auto" in arguments for arguments in called)
    torch.testing.assert_close(exported.module()(*inputs(5)), Loss()(*inputs(5)))


def test_sharded_logits_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        logits = torch.distributed.tensor.distribute_tensor(torch.randn(B, L, K), mesh)
        with pytest.raises(ValueError, match="logits: a DTensor.*full_tensor"):
            xdlm_nelbo(logits, *tokens(PROCESSES[0]))
    finally:
        torch.distributed.destroy_process_group()


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
    with torch.no_grad():
        opcheck(operators._backward, (*given, torch.empty_like(logits)))
        opcheck(operators.first_derivative, (grad_loss,))
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
