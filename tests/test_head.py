"""Projection and loss as one: the numbers of the two layers apart, without ever holding all logits."""

import weakref

import head_rank
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.objective import XDLMLoss, head, nelbo_eager, xdlm_head_nelbo, xdlm_nelbo
from xdlm_image.schedulers import XDLMProcess

B, L, D, K = 3, 10, 6, 21
PROCESS = XDLMProcess(0.1, K)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(head, "BLOCK_BYTES", 8 * 4 * 24)  # 4 rows of float64: 30 rows end in half a block
    monkeypatch.setattr(head, "SHARE_BYTES", 2 * 5 * D)  # 5 rows of a half's weight gradient


def case(dtype: torch.dtype = torch.float64):
    """features, weight, bias with gradients; z, x, process, alpha, beta."""
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((B, L, D), (K, D), (K,))]
    x = torch.randint(K, (B, L))
    alpha = torch.tensor([0.8, 0.3, 0.6], dtype=dtype)
    return leaves, (PROCESS.noise(x, alpha, 1 - alpha), x, PROCESS, alpha, 1 - alpha)


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_and_gradients_equal_the_layers_apart(with_bias: bool, weighted: bool) -> None:
    leaves, rest = case()
    leaves = leaves[: 3 if with_bias else 2]
    bias = leaves[2] if with_bias else None
    token_weight = torch.rand(B, L, dtype=torch.float64) if weighted else None
    for factor in (1.0, -3.0):  # a factor may follow: gradient accumulation, loss scaling
        per_token = xdlm_nelbo(linear(leaves[0], leaves[1], bias), *rest)
        expected = (per_token if token_weight is None else token_weight * per_token).mean()
        output = xdlm_head_nelbo(leaves[0], leaves[1], bias, *rest, token_weight=token_weight)
        torch.testing.assert_close(output.mean, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(output.per_token, per_token.detach(), rtol=1e-12, atol=1e-12)
        assert not output.per_token.requires_grad
        for actual, wanted in zip(gradients(factor * output.mean, leaves), gradients(factor * expected, leaves)):
            torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-13)


def test_only_the_gradients_asked_for_are_computed(monkeypatch) -> None:
    (features, weight, bias), rest = case()
    frozen = xdlm_head_nelbo(features, weight.detach(), bias.detach(), *rest).mean
    assert [node is None for node, _ in frozen.grad_fn.next_functions[:3]] == [False, True, True]
    whole = gradients(xdlm_head_nelbo(features, weight, bias, *rest).mean, [features])[0]
    assert torch.equal(gradients(frozen, [features])[0], whole)
    passes = []
    monkeypatch.setattr(head, "passes_for", lambda *_: passes.append(NoBackward()) or passes[-1])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not xdlm_head_nelbo(features, weight, bias, *rest).mean.requires_grad


class NoBackward:
    """The passes over the logits, of which one is not wanted."""

    forward = staticmethod(nelbo_eager.forward)


def test_no_rows_give_no_gradient() -> None:
    leaves, (z, x, process, alpha, beta) = case()
    none = slice(0, 0)
    output = xdlm_head_nelbo(leaves[0][none], *leaves[1:], z[none], x[none], process, alpha[none], beta[none])
    assert output.per_token.shape == (0, L) and output.mean.isnan()
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(output.mean, leaves))


def test_float16_sums_beyond_its_range(monkeypatch) -> None:
    """Gradients of a sum over many rows before the loss's scale is known: 65,504 is soon passed."""
    monkeypatch.undo()  # one large block
    torch.manual_seed(0)
    rows, process = 40_000, XDLMProcess(0.1, 16)
    features, weight = 4 + torch.randn(1, rows, 8), torch.randn(16, 8, requires_grad=True)
    x = torch.zeros(1, rows, dtype=torch.long)
    z, alpha = torch.full_like(x, process.mask), torch.tensor([0.5])
    grads = []
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            mean = xdlm_head_nelbo(features, weight, None, z, x, process, alpha, 1 - alpha).mean
        grads += gradients(mean, [weight])
    assert (grads[0] - grads[1]).norm() < 1e-2 * grads[1].norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_tensor_is_larger_than_a_block_or_an_argument() -> None:
    leaves, rest = case()
    with LargestTensor() as largest:
        gradients(xdlm_head_nelbo(*leaves, *rest).mean, leaves)
    assert largest.elements <= max(B * L * D, K * D, 4 * K) < B * L * K


class LiveBytes(TorchDispatchMode):
    """The most bytes that operations' results held at once; those in the memory of `known` tensors do not count."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {value.untyped_storage().data_ptr() for value in known}
        self.live: dict[int, list[int]] = {}  # address -> [tensors, bytes]
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and (address := value.untyped_storage().data_ptr()) not in self.known:
                self.live.setdefault(address, [0, value.untyped_storage().nbytes()])[0] += 1
                weakref.finalize(value, self.forget, address)
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result

    def forget(self, address: int) -> None:
        self.live[address][0] -= 1
        if not self.live[address][0]:
            del self.live[address]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [3000, 12000])
def test_workspace_does_not_grow_with_the_vocabulary(width: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(head, "BLOCK_BYTES", 3 << 18)
    monkeypatch.setattr(head, "SHARE_BYTES", 1 << 18)
    monkeypatch.setattr(nelbo_eager, "BLOCK_ELEMENTS_CPU", 1 << 14)  # float16 takes its buffers of 1.5 MiB in all
    process = XDLMProcess(0.1, width)
    leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((1, 256, 64), (width, 64), (width,))]
    x, half = torch.zeros(1, 256, dtype=torch.long), torch.full((1,), 0.5)
    with LiveBytes(*leaves) as memory:
        xdlm_head_nelbo(*leaves, torch.full_like(x, process.mask), x, process, half, half)
    gradients = 256 * 64 * dtype.itemsize + 4 * (width * 64 + width)  # of features; of weights, in float32
    few = 256 * 4 * 50 + 4 * width  # numbers a row, and what a block adds to the bias
    assert memory.peak - gradients < (1 << 20) + few < memory.peak


@pytest.mark.parametrize(("capability", "is_one_product"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_before_ampere_get_no_product_of_mixed_types(monkeypatch, capability, is_one_product):
    """On tensors that hold nothing, which need no GPU."""
    asked = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: asked.append(options["out_dtype"]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        grads, h = (torch.empty(4, n, device="cuda", dtype=torch.bfloat16) for n in (8, 3))
        head._add_product(grads, h, to=torch.empty(8, 3, device="cuda"))
    assert asked == [torch.float32] * is_one_product


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1000, 16384])
def test_gpu_workspace_is_small_and_the_gradients_add_up_in_float32(
    width: int, dtype: torch.dtype, monkeypatch
) -> None:
    monkeypatch.undo()
    process, tokens, features = XDLMProcess(0.1, width), 4096, 256
    torch.manual_seed(0)
    leaves = [torch.randn(1, tokens, features), torch.randn(width, features) / 16, torch.zeros(width)]
    leaves = [value.to("cuda", dtype).requires_grad_() for value in leaves]
    x = torch.randint(width, (1, tokens))
    half = torch.full((1,), 0.5)
    rest = [value.to("cuda") for value in (process.noise(x, half, half), x, half, half)]
    rest = (rest[0], rest[1], process, *rest[2:])
    gradients(xdlm_head_nelbo(*leaves, *rest).mean, leaves)  # compiles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = xdlm_head_nelbo(*leaves, *rest)
    sums = tokens * features * dtype.itemsize + 4 * width * (features + 1)
    assert torch.cuda.max_memory_allocated() - before - sums < 32 << 20
    actual = gradients(output.mean, leaves)
    wide = [value.detach().double().requires_grad_() for value in leaves]
    wide_rest = (*rest[:3], *(value.double() for value in rest[3:]))
    for ours, exact in zip(actual, gradients(xdlm_nelbo(linear(*wide), *wide_rest).mean(), wide)):
        assert (ours - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_in_its_dtype_and_adds_in_float32(dtype: torch.dtype) -> None:
    leaves, rest = case(torch.float32)
    with torch.autocast("cpu", dtype):
        output = xdlm_head_nelbo(*leaves, *rest)
        apart = xdlm_nelbo(linear(*leaves), *rest)
    assert output.mean.dtype == output.per_token.dtype == torch.float32
    torch.testing.assert_close(output.per_token, apart, rtol=1e-5, atol=1e-5)
    exact = gradients(xdlm_nelbo(linear(*leaves), *rest).mean(), leaves)
    for actual, wanted in zip(gradients(output.mean, leaves), exact):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() < 2e-2 * wanted.norm()


def test_autocast_leaves_float64_alone() -> None:
    leaves, rest = case()
    expected = xdlm_head_nelbo(*leaves, *rest).mean
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(xdlm_head_nelbo(*leaves, *rest).mean, expected)


def test_one_over_the_number_of_rows_is_not_rounded_to_half_precision() -> None:
    grad, scale = torch.randn(1000).bfloat16(), torch.tensor(1 / 30)
    expected = (grad.float() * scale).bfloat16()
    assert torch.equal(head._scaled(grad, torch.bfloat16, scale), expected)
    assert not torch.equal(grad * scale.bfloat16(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_many_rows_add_up_in_float32(dtype: torch.dtype) -> None:
    """4,096 equal rows have the mean of one; sums of 8 bits would lose the most of them."""
    generator = torch.Generator().manual_seed(0)
    feature, *leaves = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((8,), (16, 8), (16,)))
    leaves = [value.requires_grad_() for value in leaves]
    process, half = XDLMProcess(0.1, 16), torch.full((1,), 0.5)
    found = []
    for rows in (1, 4096):
        x = torch.zeros(1, rows, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            rest = (torch.full_like(x, process.mask), x, process, half, half)
            found.append(gradients(xdlm_head_nelbo(feature.expand(1, rows, 8), *leaves, *rest).mean, leaves))
    (weight_of_one, bias_of_one), (weight, bias) = found
    rounding = 1e-5 if dtype == torch.float32 else 5e-3
    assert (bias - bias_of_one).norm() < rounding * bias_of_one.norm()
    assert (weight - weight_of_one).norm() < 5e-3 * weight_of_one.norm()  # a block's share is rounded on a CPU


def test_tied_weights_add_up() -> None:
    leaves, rest = case()
    table, z = leaves[1], rest[0].clamp(max=K - 1)

    def of(loss) -> torch.Tensor:
        return gradients(loss(torch.nn.functional.embedding(z, table), table, None), [table])[0]

    fused = of(lambda *layer: xdlm_head_nelbo(*layer, *rest).mean)
    torch.testing.assert_close(fused, of(lambda *layer: xdlm_nelbo(linear(*layer), *rest).mean()))


def test_checkpointing_changes_nothing() -> None:
    leaves, rest = case()
    expected = gradients(xdlm_head_nelbo(*leaves, *rest).mean, leaves)
    output = checkpoint(xdlm_head_nelbo, *leaves, *rest, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(output.mean, leaves), expected))


def test_what_does_not_fit_is_named() -> None:
    (features, weight, bias), rest = case()
    with pytest.raises(ValueError, match=r"weight \(21, 5\).*need \(V, D\) = \(21, 6\)"):
        xdlm_head_nelbo(features, weight[:, 1:], bias, *rest)
    with pytest.raises(ValueError, match=r"bias \(20,\)"):
        xdlm_head_nelbo(features, weight, bias[1:], *rest)
    with pytest.raises(ValueError, match=r"features \(3, 9, 6\)"):
        xdlm_head_nelbo(features[:, 1:], weight, bias, *rest)
    with pytest.raises(ValueError, match=r"token_weight \(3,\)"):
        xdlm_head_nelbo(features, weight, bias, *rest, token_weight=torch.ones(B))
    with pytest.raises(ValueError, match="weight: dtype torch.float64, the features have torch.float32; .*autocast"):
        xdlm_head_nelbo(features.float(), weight, bias, *rest)


# --- in XDLMLoss ----------------------------------------------------------------------------------


def network() -> XDLMTransformer2DModel:
    torch.manual_seed(1)
    model = XDLMTransformer2DModel(
        sample_size=[2, 5], num_embeds=K + 1, out_channels=K, num_classes=2, num_layers=1, num_attention_heads=2,
        attention_head_dim=4,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Wrapped(torch.nn.Module):
    """A network that XDLMLoss knows nothing of."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def batch() -> tuple[torch.Tensor, ...]:
    _, (z, x, _, _, beta) = case(torch.float32)
    return z, x, beta, torch.tensor([0, 1, 2])


def test_module_gives_the_same_with_the_head_inside_the_loss() -> None:
    results = []
    for wrap in (lambda model: model, Wrapped):
        model = network()
        output = XDLMLoss(wrap(model), PROCESS)(*batch())
        output.mean.backward()
        results.append([output.mean, output.per_token, *(p.grad for p in model.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


def test_what_took_the_place_of_the_plain_head_is_run() -> None:
    model = network()
    expected = XDLMLoss(model, PROCESS)(*batch()).per_token
    calls = []
    hook = model.proj_out.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(XDLMLoss(model, PROCESS)(*batch()).per_token, expected, rtol=1e-5, atol=1e-5)
    hook.remove()
    model.proj_out = torch.nn.Sequential(model.proj_out)  # an adapter, say
    torch.testing.assert_close(XDLMLoss(model, PROCESS)(*batch()).per_token, expected, rtol=1e-5, atol=1e-5)
    assert calls == [1]
    model = network()
    forward = model.proj_out.forward
    model.proj_out.forward = lambda h: calls.append(2) or forward(h)  # as accelerate's and diffusers' hooks do
    model.proj_out.register_full_backward_pre_hook(lambda *_: calls.append(3))
    XDLMLoss(model, PROCESS)(*batch()).mean.backward()
    assert calls == [1, 2, 3]
    del model.proj_out.forward
    XDLMLoss(model, PROCESS)(*batch()).mean.backward()
    assert calls == [1, 2, 3, 3]
    for register in ("register_forward_pre_hook", "register_full_backward_hook"):
        model = network()
        getattr(model.proj_out, register)(lambda *_: calls.append(4))
        XDLMLoss(model, PROCESS)(*batch()).mean.backward()
    assert calls == [1, 2, 3, 3, 4, 4]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp of the network"])
def test_two_processes_give_the_gradients_of_one(tmp_path, kind: str) -> None:
    """The output projection is read beside its layer's own forward: the gradients must be reduced all the same."""
    torch.multiprocessing.spawn(head_rank.train_on_rank, (str(tmp_path), kind), nprocs=2)
    module = head_rank.loss_module()
    module(*head_rank.batch(slice(None))).mean.backward()
    found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)
