"""One draw a row: torch's way and Triton's kernel (without a GPU in Triton's interpreter) against softmax and CDF in
float64."""

import importlib.util

import pytest
import torch
from triton_here import kernel

from xdlm_image.schedulers import row_draw

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", pytest.param("triton", marks=kernel), pytest.param("loop", marks=kernel)])
def draw(request, monkeypatch):
    """`draw_rows` in torch, as a kernel of one block, and as one of several."""
    if request.param == "torch":
        monkeypatch.setattr(row_draw, "FAST", {})
        monkeypatch.setattr(row_draw, "BLOCK_ELEMENTS_CPU", 1000)
        return row_draw.draw_rows
    from xdlm_image.schedulers import row_draw_triton

    if request.param == "loop":
        monkeypatch.setattr(row_draw_triton, "ROW_IN_REGISTERS", 1)
        monkeypatch.setattr(row_draw_triton, "BLOCK", 128)
    return row_draw_triton.draw_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5, 64, 130, 512])
def test_a_row_is_drawn_as_its_cdf_says(draw, width: int, dtype: torch.dtype) -> None:
    """With weights that differ by 30 orders of magnitude."""
    generator = torch.Generator().manual_seed(width)
    logits = (12 * torch.randn(60, width, generator=generator)).to(dtype)
    logits[:10] = 0.0
    wanted = torch.rand(60, generator=generator) < 0.7
    logits[(~wanted).nonzero()[:5, 0]] = torch.nan  # not read
    z = torch.randint(width + 1, (60,), generator=generator)
    v = torch.rand(60, generator=generator, dtype=torch.float64)
    v[:4] = torch.tensor([0.0, 1.0 - 2**-53, 2**-40, 0.5])
    for temperature, excluded in ((1.0, None), (0.7, 2)):
        arguments = (a.to(DEVICE) for a in (logits, wanted, z, v))
        drawn, p_z, finite = (result.cpu() for result in draw(*arguments, temperature, excluded))
        assert finite.shape == () and bool(finite)
        assert torch.equal(drawn[~wanted], z[~wanted]) and not p_z[~wanted].any()
        drawn, p_z, of, u = (value[wanted] for value in (drawn, p_z, z, v))
        scores = logits[wanted].double() / temperature
        if excluded is not None:
            scores[:, excluded] = -torch.inf
        p = scores.softmax(-1)
        cdf = torch.nn.functional.pad(p.cumsum(-1), (1, 0))
        low, high = cdf.gather(1, drawn[:, None])[:, 0], cdf.gather(1, drawn[:, None] + 1)[:, 0]
        assert bool(((low <= u + 1e-6) & (u <= high + 1e-6)).all()) and bool((p.gather(1, drawn[:, None]) > 0).all())
        expected = torch.where(of < width, torch.nn.functional.pad(p, (0, 1)).gather(1, of[:, None])[:, 0], 0.0)
        torch.testing.assert_close(p_z, expected, rtol=2e-5, atol=1e-30)


def test_rare_codes_are_drawn_as_often_as_they_should(draw) -> None:
    """A code of probability 1e-9: float32's CDF would give it 0 or 6e-8."""
    logits = torch.zeros(3, 256, device=DEVICE)
    logits[:, 100] = 20.7  # the other 255 have about 1e-9 each
    p = logits.double().softmax(-1)[0].cpu()
    inside = float(p[:30].sum()) + float(p[30]) * torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    z = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert draw(logits, z == 0, z, inside.to(DEVICE))[0].tolist() == [30, 30, 30]


def test_no_code_without_probability_is_drawn_where_sums_end_apart(draw) -> None:
    """A group's sum in float32 may end above its columns' CDF in float64: between lies the last likely code."""
    rows, v = [], []
    for seed in range(60):
        logits = 3 * torch.randn(128, generator=torch.Generator().manual_seed(seed))
        logits[63], logits[64:] = -80.0, -3.0
        weights = (logits - logits.max()).exp()
        rough, exact = weights[:64].sum().double(), weights[:63].double().sum()
        if rough > exact:
            rows.append(logits)
            v.append((rough + exact) / 2 / (rough + weights[64:].sum().double()))
    assert len(rows) > 10
    z = torch.zeros(len(rows), dtype=torch.int64, device=DEVICE)
    drawn = draw(torch.stack(rows).to(DEVICE), z == 0, z, torch.stack(v).to(DEVICE))[0]
    assert max(drawn.tolist()) < 63


def test_float64_logits_are_no_kernels(monkeypatch) -> None:
    monkeypatch.setattr(row_draw, "FAST", {"cpu": None})
    z, half = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0.5, dtype=torch.float64)
    assert row_draw.draw_rows(torch.zeros(1, 70, dtype=torch.float64), z == 0, z, half)[0].tolist() == [35]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_told_where_they_are_read(draw, bad: float) -> None:
    logits = torch.zeros(2, 70, device=DEVICE)
    logits[1] = bad
    z, half = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.full((2,), 0.5, dtype=torch.float64).to(DEVICE)
    first = torch.tensor([True, False], device=DEVICE)
    drawn, _, finite = draw(logits, ~first, z, half)
    assert not bool(finite) and 0 <= int(drawn[1]) < 70
    drawn, _, finite = draw(logits, first, z, half)
    assert drawn.tolist() == [35, 0] and bool(finite)


@pytest.mark.parametrize("rows", [0, 2])
def test_no_row_is_no_draw(draw, rows: int) -> None:
    z = torch.full((rows,), 7, device=DEVICE)
    drawn, p_z, finite = draw(torch.zeros(rows, 70, device=DEVICE), z == 0, z, 0.5 * z.double())
    assert drawn.tolist() == rows * [7] and p_z.tolist() == rows * [0.0] and bool(finite)


def test_a_kernel_that_cannot_run_gives_way_to_torch(monkeypatch) -> None:
    from xdlm_image.schedulers import kernels

    monkeypatch.setattr(row_draw, "FAST", {"cpu": kernels._first_draw})  # a device that the kernel cannot be on
    if importlib.util.find_spec("triton") is not None:
        from xdlm_image.schedulers import row_draw_triton

        def fails(*arguments):
            raise RuntimeError("no compiler")

        monkeypatch.setattr(row_draw_triton, "draw_rows", fails)
    row, half = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0.5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="sampling takes its slower path"):
        assert row_draw.draw_rows(torch.zeros(1, 64), row == 0, row, half)[0].item() == 32
    assert row_draw.FAST == {}
