"""What tests of the objective's passes over the logits share: backends, cases, and small blocks."""

import importlib.util
import shutil

import pytest
import torch
from triton_here import kernel

from xdlm_image.objective import nelbo_eager
from xdlm_image.schedulers import XDLMProcess

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
on_the_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="the tensors of these tests are on the GPU")
cpp = pytest.param("cpp", marks=[needs_compiler, on_the_cpu])
backends = pytest.mark.parametrize("backend", ["eager", cpp, pytest.param("triton", marks=kernel)])
on_cpu_backends = pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_compiler)])


@pytest.fixture(autouse=True, name="small_blocks")
def small_blocks_fixture(monkeypatch) -> None:
    """Small vocabularies then take several blocks."""
    monkeypatch.setattr(nelbo_eager, "BLOCK_ELEMENTS_CPU", 200)
    if importlib.util.find_spec("triton") is not None:
        from xdlm_image.objective import nelbo_triton

        monkeypatch.setattr(nelbo_triton, "ROW_IN_REGISTERS", 16)
        monkeypatch.setattr(nelbo_triton, "BLOCK", 32)


def process_of(k: float, K: int, definition: str) -> XDLMProcess:
    extra = {"vocab_size": K + 3, "mask_id": K + 1} if definition == "B" else {}
    return XDLMProcess(k, K, definition, **extra)


def codes(process: XDLMProcess, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """z and x (1, rows): mask, right and (for k > 0) wrong in turn."""
    x = torch.randint(process.num_codes, (1, rows))
    kind = torch.arange(rows)[None] % 3
    wrong = (x + 1) % process.num_codes if process.k > 0 else torch.tensor(process.mask)
    return torch.where(kind == 0, process.mask, torch.where(kind == 1, x, wrong)), x


def loss_and_gradient(function, logits, z, x, process, alpha, beta, **options):
    """Loss (1, R) and the gradient of its sum weighted by 1, 2, 3, ..., both float64 on the CPU."""
    logits = logits.clone().requires_grad_()
    loss = function(logits, z, x, process, alpha, beta, **options)
    (loss * torch.arange(1, 1 + loss.shape[1], device=loss.device)).sum().backward()
    return loss.detach().double().cpu(), logits.grad.double().cpu()


def in_place_case():
    """A leaf (1, 6, 40) for the logits, and what else the objective takes."""
    torch.manual_seed(3)
    process = XDLMProcess(0.1, 40)
    z, x = (ids.to(DEVICE) for ids in codes(process, 6))
    half = torch.full((1,), 0.5, device=DEVICE)
    base = torch.randn(1, 6, 40, device=DEVICE, requires_grad=True)
    return base, z, x, process, half, half
