"""The objective written as its definition: the yardstick that every fast path is held against.

Owns dense, readable forms of the loss, the posterior and the discrete KL (arXiv 2602.01362). They build
(batch, length, vocabulary) tensors and lean on autograd, so they are for checks in float64; training uses `nelbo.py`.
"""

from __future__ import annotations

import torch

from xdlm_image.schedulers import XDLMProcess


def model_probs(logits: torch.Tensor, process: XDLMProcess) -> torch.Tensor:
    """p = softmax over the support (definition B leaves the mask out). (..., V) -> (..., V)."""
    if process.excluded_column is not None:
        excluded = torch.arange(logits.shape[-1], device=logits.device) == process.excluded_column
        logits = logits.masked_fill(excluded, -torch.inf)
    return torch.softmax(logits, dim=-1)


def _padded(p: torch.Tensor, process: XDLMProcess) -> torch.Tensor:
    """p over every id a z may take: definition A adds the mask's column of zeros. (..., V) -> (..., num_ids)."""
    missing = process.num_ids - p.shape[-1]
    return torch.nn.functional.pad(p, (0, missing)) if missing else p


def reference_nelbo(
    logits: torch.Tensor,
    z: torch.Tensor,
    x: torch.Tensor,
    process: XDLMProcess,
    alpha: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """The NELBO's density l per token as defined, 0 < alpha < 1; arguments and shapes of `xdlm_nelbo`;
    differentiable by autograd.

        A = L(c) - L(c p_x),  T = sum_e L(c p_e),  S = (L(c) - T) / c,  L = log1p,  c = alpha N / (beta k)
        z = m            l = (A + S) / beta
        z not in {x, m}  l = (A + S + [L(u) - u/(1+u)] / alpha) / beta,  u = c p_z
        z = x            l = (A + S + [expm1(A) - A] / alpha) / (beta (1 + c))
        k = 0            z = m: -log p_x / beta;  z = x: 0
    """
    p = model_probs(logits, process)
    p_x = p.gather(-1, x[..., None])[..., 0]
    alpha, beta = (a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) for a in (alpha, beta))
    if process.k == 0.0:
        return torch.where(z == process.mask, -p_x.log() / beta, torch.zeros_like(p_x))
    c = alpha * process.num_uniform / (beta * process.k)
    p_z = _padded(p, process).gather(-1, z[..., None])[..., 0]
    u = c * p_z
    A = torch.log1p(c) - torch.log1p(c * p_x)
    S = (torch.log1p(c) - torch.log1p(c[..., None] * p).sum(-1)) / c
    at_mask = (A + S) / beta
    at_wrong = (A + S + (torch.log1p(u) - u / (1 + u)) / alpha) / beta
    at_right = (A + S + (torch.expm1(A) - A) / alpha) / (beta * (1 + c))
    return torch.where(z == process.mask, at_mask, torch.where(z == x, at_right, at_wrong))


def posterior(
    probs: torch.Tensor,
    z: torch.Tensor,
    process: XDLMProcess,
    alpha_t: torch.Tensor,
    beta_t: torch.Tensor,
    alpha_s: torch.Tensor,
    beta_s: torch.Tensor,
) -> torch.Tensor:
    """Dense q(z_s | z_t = z, p): the four-branch mixture spread over the ids.

    Args:
        probs: p, (..., num_ids) with p_m = 0 (one-hot of x gives the true posterior).
        z: (...) int64.
        alpha_t, beta_t, alpha_s, beta_s: Broadcastable to z.

    Returns:
        (..., num_ids), sums to 1.
    """
    p_z = probs.gather(-1, z[..., None])[..., 0]
    w = process.mixture(p_z, z == process.mask, alpha_t, beta_t, alpha_s, beta_s)
    out = w.model[..., None] * probs
    out[..., : process.num_uniform] += w.uniform[..., None] / process.num_uniform
    out[..., process.mask] += w.mask
    return out.scatter_add(-1, z[..., None], w.stay[..., None])


def discrete_kl(
    logits: torch.Tensor,
    z: torch.Tensor,
    x: torch.Tensor,
    process: XDLMProcess,
    alpha_t: torch.Tensor,
    beta_t: torch.Tensor,
    alpha_s: torch.Tensor,
    beta_s: torch.Tensor,
) -> torch.Tensor:
    """KL(q(z_s | z_t, x) || q(z_s | z_t, p)) per token, nats; over (a_s - a_t) it tends to `reference_nelbo`."""
    p = _padded(model_probs(logits, process), process)
    alpha_t, beta_t, alpha_s, beta_s = (
        a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) for a in (alpha_t, beta_t, alpha_s, beta_s)
    )
    truth = posterior(
        torch.nn.functional.one_hot(x, process.num_ids).to(p.dtype),
        z,
        process,
        alpha_t,
        beta_t,
        alpha_s,
        beta_s,
    )
    model = posterior(p, z, process, alpha_t, beta_t, alpha_s, beta_s)
    return (torch.xlogy(truth, truth) - torch.xlogy(truth, model)).sum(-1)
