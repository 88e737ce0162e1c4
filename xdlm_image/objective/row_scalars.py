"""From the sums over a row of logits to its loss, and to the scalars that its gradient needs.

Owns the delicate part of the objective's arithmetic, which is per token and thus cheap: the sums over the vocabulary
are `nelbo_eager.py`'s or `nelbo_cpu.py`'s; `nelbo_triton.py` states the same equations for a GPU.

The definition (`reference.py`) cancels in floating point (1 - p_x, L(c) - L(c p_x)), so this file computes

    q = sum_{e != x} p_e,   w = c q / (1 + c p_x),   A = L(w),   S = (A - sum_{e != x} L(c p_e)) / c
    dl/dlogit_j = g p_j (kappa + kappa_1 c p_j) / (1 + c p_j)    for j not in {x, z}
    g     = 1/beta  or, at z = x, 1/(beta (1+c));       h = w/alpha at z = x, else 0
    az    = [z not in {m, x}] (u/(1+u))^2 / alpha,      u = c p_z,   r = c p_x / (1 + c p_x)
    kappa = sum_{e != x} p_e/(1 + c p_e) - q/(1 + c p_x) + r h - az,      kappa_1 = kappa + 1

which is the paper's loss and gradient (arXiv 2602.01362) with p_x - 1 written as -q. kappa_1 has sums of its own: where
c is large and p_x small, kappa is close to -1, and kappa + 1 would be what rounding has left of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xdlm_image.schedulers import XDLMProcess

TINY = 1e-30


class Rows(NamedTuple):
    """What stands beside R rows of logits, each (R,); floats in the dtype of the arithmetic."""

    z: torch.Tensor
    x: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor
    c: torch.Tensor  # alpha N / (beta k)

    def __getitem__(self, rows: slice) -> Rows:  # type: ignore[override]
        return Rows(*(value[rows] for value in self))


class RowSums(NamedTuple):
    """What a row's loss reads, each (R,); `others` are the ids that are neither x nor z."""

    top: torch.Tensor  # the largest logit
    norm: torch.Tensor  # sum of exp(logit_j - top)
    p_x: torch.Tensor
    p_z: torch.Tensor  # 0 unless z is a wrong code
    others: torch.Tensor  # sum of p_j over the others
    log_terms: torch.Tensor  # sum of L(c p_j) over the others; at k = 0: log p_x
    damped: torch.Tensor  # sum of p_j / (1 + c p_j) over the others; at k = 0 not read


class RowScalars(NamedTuple):
    """What the gradient of a row reads beside its logits, each (R,)."""

    top: torch.Tensor  # the largest logit
    inverse_norm: torch.Tensor  # p_j = exp(logit_j - top) inverse_norm
    g: torch.Tensor
    kappa: torch.Tensor  # at k = 0 the gradient is g p_j
    kappa_1: torch.Tensor
    grad_x: torch.Tensor  # dl/dlogit_x
    grad_z: torch.Tensor  # dl/dlogit_z, where z is a wrong code; else that at x


def columns_of(rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (R, 2) of x, and of z where z is a wrong code (of x again elsewhere); and where it is one, bool (R,)."""
    is_wrong = (rows.z != process.mask) & (rows.z != rows.x)
    return torch.stack([rows.x, torch.where(is_wrong, rows.z, rows.x)], dim=1), is_wrong


def loss_and_scalars(sums: RowSums, rows: Rows, process: XDLMProcess) -> tuple[torch.Tensor, RowScalars]:
    """Loss l (R,) and the row's scalars, by the equations above."""
    alpha, beta, c = rows.alpha, rows.beta, rows.c
    top, norm, p_x, p_z, others, log_terms, damped = sums
    inverse_norm = 1.0 / norm
    q = others + p_z
    one_over_beta = 1.0 / beta.clamp(min=TINY)

    if process.k == 0.0:
        log_p_x = log_terms
        nll = torch.where(q < 0.5, torch.log1p(q / p_x.clamp(min=0.25)), -log_p_x)
        is_mask = rows.z == process.mask
        g = torch.where(is_mask, one_over_beta, 0.0)
        zero = torch.zeros_like(g)
        return torch.where(is_mask, g * nll, 0.0), RowScalars(top, inverse_norm, g, zero, zero, -g * q, -g * q)

    u = c * p_z
    saturation = 1.0 / (1.0 + c * p_x)
    r = c * p_x * saturation
    w = c * q * saturation
    A = torch.log1p(w)
    S = (A - log_terms - torch.log1p(u)) / c.clamp(min=TINY)
    one_over_alpha = 1.0 / alpha.clamp(min=TINY)  # what it multiplies is 0 at alpha = 0
    is_right = rows.z == rows.x
    is_wrong = ~is_right & (rows.z != process.mask)
    # 1 / (beta (1 + c)) with beta c = alpha N / k, finite at beta = 0
    g = torch.where(is_right, 1.0 / (beta + alpha * (process.num_uniform / process.k)), one_over_beta)
    extra = torch.where(is_right, _w_minus_log1p(w), _log1p_minus_ratio(u)) * one_over_alpha  # 0 at z = m: u = 0
    loss = g * (A + S + extra)

    h = torch.where(is_right, w * one_over_alpha, 0.0)
    one_less_ratio = 1.0 / (1.0 + u)
    az = one_over_alpha * (u * one_less_ratio) ** 2
    one_less_az = torch.where(is_wrong, (one_less_ratio * (2.0 - one_less_ratio) - beta) * one_over_alpha, 1.0)
    damped = damped + p_z * one_less_ratio
    common, common_1 = damped - q * saturation, damped + p_x * (1.0 + c) * saturation
    kappa = common + r * h - az
    kappa_1 = torch.where(u > 1.0, common + one_less_az, common_1 + r * h - az)
    grad_x = g * (p_x * (common - az) - r * q * (1.0 + h))
    grad_z = g * (p_z * (common + common_1 * u) * one_less_ratio + az * (others + p_x))  # others + p_x = 1 - p_z
    return loss, RowScalars(top, inverse_norm, g, kappa, kappa_1, grad_x, torch.where(is_wrong, grad_z, grad_x))


def gradient_factors(rows: Rows, scalars: RowScalars, grad_loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """top, one, c', kappa', kappa_1' and g', each (R,), of the gradient in the columns other than x and z:

    e (kappa' + kappa_1' c' e) / (one + c' e) with e = exp(logit - top); at k = 0 g' e. Numerator and denominator are
    divided by c where it is large: kappa_1 c overflows.
    """
    one = 1.0 / rows.c.clamp(min=1.0)
    g = scalars.g * grad_loss * scalars.inverse_norm
    return scalars.top, one, rows.c * one * scalars.inverse_norm, scalars.kappa * one * g, scalars.kappa_1 * g, g


def _log1p_minus_ratio(u: torch.Tensor) -> torch.Tensor:
    """L(u) - u/(1+u) = sum_{n>=2} (-1)^n (n-1)/n u^n, without cancellation at small u >= 0."""
    return _series_or(u, [(n - 1) / n * (-1) ** n for n in range(2, 12)], torch.log1p(u) - u / (1.0 + u))


def _w_minus_log1p(w: torch.Tensor) -> torch.Tensor:
    """expm1(A) - A with A = L(w): w - L(w) = sum_{n>=2} (-1)^n w^n / n, without cancellation at small w >= 0."""
    return _series_or(w, [(-1) ** n / n for n in range(2, 12)], w - torch.log1p(w))


def _series_or(a: torch.Tensor, coefficients: list[float], direct: torch.Tensor) -> torch.Tensor:
    """sum_n coefficients[n-2] a^n where it has converged, `direct` elsewhere."""
    limit = 0.1 if a.dtype == torch.float32 else 1e-2
    series = torch.zeros_like(a)
    small = a.clamp(max=limit)
    for coefficient in reversed(coefficients):
        series = series * small + coefficient
    return torch.where(a < limit, series * small * small, direct)
