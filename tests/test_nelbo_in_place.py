"""The objective's gradient written over the logits: the same numbers, the memory, and what is refused."""

import pytest
import torch
from nelbo_cases import DEVICE, backends, in_place_case, small_blocks_fixture  # noqa: F401

from xdlm_image.objective import xdlm_nelbo


@backends
def test_in_place_gradient_is_the_gradient_and_takes_the_memory_of_the_logits(backend: str) -> None:
    base, *rest = in_place_case()
    xdlm_nelbo(base * 2.0, *rest, backend=backend).sum().backward()
    expected, base.grad = base.grad, None
    logits = base * 2.0
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss = xdlm_nelbo(logits, *rest, in_place=True, backend=backend)
    address = logits.data_ptr()
    loss.sum().backward(retain_graph=True)
    assert torch.equal(base.grad, expected) and seen == [address]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@backends
def test_in_place_is_refused_where_it_would_destroy_something(backend: str) -> None:
    base, *rest = in_place_case()
    view = torch.randn(6, 40, device=DEVICE).view(1, 6, 40).requires_grad_()  # a leaf that is a view
    product = base * 2.0
    with torch.no_grad():
        leaf_of_none = product.view(1, 6, 40)
    for leaf in (base, base.view(6, 40)[None], view, view.view(6, 40)[None], leaf_of_none.requires_grad_()):
        with pytest.raises(ValueError, match="in_place=True"):
            xdlm_nelbo(leaf, *rest, in_place=True, backend=backend)
    overlapping = (base * 2.0)[0].flatten().unfold(0, 40, 20)[None, :6]
    with pytest.raises(ValueError, match="in_place=True: rows of the logits share memory"):
        xdlm_nelbo(overlapping, *rest, in_place=True, backend=backend)
    logits = base * 2.0
    other = logits.square().sum()  # its backward pass reads the logits after ours has overwritten them
    ours = xdlm_nelbo(logits, *rest, in_place=True, backend=backend).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (ours + other).backward()


@backends
def test_in_place_takes_whatever_nothing_is_lost_by(backend: str) -> None:
    base, z, x, *rest = in_place_case()
    plain = base.detach().clone()
    xdlm_nelbo(plain, z, x, *rest, in_place=True, backend=backend)  # nobody asks for a gradient
    assert torch.equal(plain, base.detach())
    row = torch.randn(40, device=DEVICE, requires_grad=True) * 1.0
    row = row.as_strided((1, 1, 40), (1, 1, 1))  # the next row would begin one element later; there is none
    xdlm_nelbo(row, z[:, :1], x[:, :1], *rest, in_place=True, backend=backend).sum().backward()
