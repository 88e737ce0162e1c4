"""The XDLM objective for training: loss and gradient from five scalars per token, by blocks of rows.

Owns `xdlm_nelbo` and its own backward (arXiv 2602.01362; the equations stand in `reference.py`). It reads the
process and never an inference scheduler; no vocabulary-wide tensor outlives a block but the logits and their gradient.

The definition cancels in floating point (1 - p_x, L(c) - L(c p_x)), so this file computes

    q = sum_{e != x} p_e,   w = c q / (1 + c p_x),   A = L(w),   S = (A - sum_{e != x} L(c p_e)) / c
    dl/dlogit_j = p_j (K + g c p_j / (1 + c p_j))    for j not in {x, z}
    g  = 1/beta  or, at z = x, 1/(beta (1+c));       h = w/alpha at z = x, else 0
    az = [z not in {m, x}] (g/alpha) (u/(1+u))^2,    u = c p_z
    K  = g (sum_{e != x} p_e/(1 + c p_e) - q/(1 + c p_x) + r h) - az,   r = c p_x / (1 + c p_x)

which is the paper's gradient with p_x - 1 written as -q. The scalars kept are logsumexp, g, K and the two gradients
at x and at z.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..schedulers import XDLMProcess

BLOCK_ELEMENTS = {"cpu": 1 << 18}  # logits a block: 1 MiB of float32 stays in a core's cache
BLOCK_ELEMENTS_DEVICE = 1 << 24


def xdlm_nelbo(
    logits: torch.Tensor,
    z: torch.Tensor,
    x: torch.Tensor,
    process: XDLMProcess,
    alpha: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """The NELBO's density l(x, z, alpha) per token; NELBO = E_x integral of -alpha'(t) E_z[l] dt (nats a token).

    Args:
        logits: (B, L, V), V = `process.logits_width`; float64, float32, bfloat16 or float16 (the last two are read in
            float32). Definition B excludes the mask's column, whose gradient is 0.
        z: Noisy codes, int64 (B, L), drawn by `process.noise`.
        x: Clean codes, int64 (B, L), in 0..K-1.
        process: The noise process.
        alpha: Signal kept, in [0, 1]: (B,) or (B, 1) or (B, L).
        beta: 1 - alpha, computed from t and not from alpha; same shape.

    Returns:
        (B, L), float32 (float64 for float64 logits), never below -5e-6. Finite for alpha and beta in [0, 1] and
        finite logits. At beta = 0 a z other than x has no probability; its loss then stands for infinity.

    Raises:
        ValueError: If shapes do not fit, or ids are out of range (looked for on the CPU only).
    """
    if logits.ndim != 3 or logits.shape[:2] != x.shape or z.shape != x.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, z {tuple(z.shape)}, x {tuple(x.shape)}: need (B, L, V), (B, L), (B, L)"
        )
    if logits.shape[-1] != process.logits_width:
        raise ValueError(f"logits: width {logits.shape[-1]}, but the process has logits_width={process.logits_width}")
    process.check_ids("x", x, process.num_codes)
    process.check_ids("z", z, process.num_ids)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    alpha, beta = (
        a.to(dtype).reshape(a.shape + (1,) * (x.ndim - a.ndim)).expand(x.shape).reshape(-1) for a in (alpha, beta)
    )
    loss = _XDLMNelbo.apply(logits.reshape(-1, logits.shape[-1]), z.reshape(-1), x.reshape(-1), alpha, beta, process)
    return loss.view(x.shape)


class _XDLMNelbo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, z, x, alpha, beta, process):  # (R, V), (R,), (R,), (R,), (R,)
        c = process.signal_ratio(alpha, beta)
        loss = torch.empty_like(alpha)
        scalars = torch.empty(5, len(alpha), dtype=alpha.dtype, device=alpha.device)
        for rows in _row_blocks(logits):
            loss[rows], scalars[:, rows] = _forward_rows(
                logits[rows], z[rows], x[rows], alpha[rows], beta[rows], c[rows], process
            )
        ctx.save_for_backward(logits, z, x, c, scalars)
        ctx.process = process
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):  # (R,)
        logits, z, x, c, scalars = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            grad[rows] = _backward_rows(
                logits[rows], z[rows], x[rows], c[rows], scalars[:, rows], grad_loss[rows], ctx.process
            )
        return grad, None, None, None, None, None


def _row_blocks(logits: torch.Tensor) -> list[slice]:
    rows, width = logits.shape
    step = max(1, BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS_DEVICE) // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _forward_rows(logits, z, x, alpha, beta, c, process):
    """Loss (r,) and the five scalars (5, r) of rows (r, V)."""
    tiny = 1e-30
    scores = _scores(logits, c.dtype, process)  # (r, V)
    top = scores.amax(-1, keepdim=True)
    p = (scores - top).exp_()
    norm = p.sum(-1, keepdim=True)
    p /= norm
    log_norm = norm[:, 0].log()
    logsumexp = top[:, 0] + log_norm

    is_mask, is_right = z == process.mask, z == x
    is_wrong = ~(is_mask | is_right)
    x_column = x[:, None]
    z_column = z.clamp(max=p.shape[-1] - 1)[:, None]
    p_x = p.gather(-1, x_column)[:, 0]
    p_z = torch.where(is_wrong, p.gather(-1, z_column)[:, 0], 0.0)
    p.scatter_(-1, x_column, 0.0)
    others = p.sum(-1)  # q
    one_over_beta = 1.0 / beta.clamp(min=tiny)

    if process.k == 0.0:
        log_p_x = scores.gather(-1, x_column)[:, 0] - top[:, 0] - log_norm
        nll = torch.where(others < 0.5, torch.log1p(others / p_x.clamp(min=0.25)), -log_p_x)
        g = torch.where(is_mask, one_over_beta, 0.0)
        grad_x = -g * others
        return g * nll, torch.stack([logsumexp, g, torch.zeros_like(g), grad_x, grad_x])

    cp = p * c[:, None]
    log_terms = torch.log1p(cp).sum(-1)
    damped = (p / (1.0 + cp)).sum(-1)
    p.scatter_(-1, torch.where(is_wrong[:, None], z_column, x_column), 0.0)
    others_than_z = p.sum(-1) + p_x  # 1 - p_z, summed

    saturation = 1.0 / (1.0 + c * p_x)
    r = c * p_x * saturation
    w = c * others * saturation
    u = c * p_z
    A = torch.log1p(w)
    S = torch.where(c > 0, (A - log_terms) / c.clamp(min=tiny), 0.0)
    one_over_alpha = torch.where(alpha > 0, 1.0 / alpha.clamp(min=tiny), 0.0)
    # 1 / (beta (1 + c)) with beta c = alpha N / k, finite at beta = 0
    g = torch.where(is_right, 1.0 / (beta + alpha * (process.num_uniform / process.k)), one_over_beta)
    extra = torch.where(is_right, _w_minus_log1p(w), _log1p_minus_ratio(u)) * one_over_alpha
    loss = g * (A + S + torch.where(is_mask, 0.0, extra))

    h = torch.where(is_right, w * one_over_alpha, 0.0)
    az = g * one_over_alpha * (u / (1.0 + u)) ** 2  # 0 unless z is wrong: p_z = 0
    common = g * (damped - others * saturation)
    K = common + g * r * h - az
    grad_x = p_x * (common - az) - g * r * others * (1.0 + h)
    grad_z = p_z * (common + g * u / (1.0 + u)) + az * others_than_z
    return loss, torch.stack([logsumexp, g, K, grad_x, torch.where(is_wrong, grad_z, grad_x)])


def _backward_rows(logits, z, x, c, scalars, grad_loss, process):
    """Gradient (r, V): one elementwise pass, then the entries at x and z."""
    logsumexp, g, K, grad_x, grad_z = scalars
    p = (_scores(logits, c.dtype, process) - logsumexp[:, None]).exp_()
    if process.k == 0.0:
        grad = p * g[:, None]
    else:
        cp = p * c[:, None]
        grad = p * (K[:, None] + g[:, None] * (cp / (1.0 + cp)))
    x_column = x[:, None]
    is_wrong = (z != process.mask)[:, None]
    grad.scatter_(-1, torch.where(is_wrong, z.clamp(max=p.shape[-1] - 1)[:, None], x_column), grad_z[:, None])
    grad.scatter_(-1, x_column, grad_x[:, None])
    return (grad * grad_loss[:, None]).to(logits.dtype)


def _scores(logits: torch.Tensor, dtype: torch.dtype, process: XDLMProcess) -> torch.Tensor:
    scores = logits.to(dtype)
    if process.excluded_column is not None:
        scores = scores.clone() if scores is logits else scores
        scores[:, process.excluded_column] = -torch.inf
    return scores


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
