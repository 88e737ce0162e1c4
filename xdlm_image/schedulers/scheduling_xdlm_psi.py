"""The XDLM reverse step with a corrector in it: some tokens are predicted to the end and noised again (Psi-sampler).

Owns which tokens those are, and what noise they get. The prediction and all else stay `scheduling_xdlm`'s.

This file travels to the Hub beside weights: it imports torch, diffusers, the standard library and its siblings only.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  # diffusers looks for the name here

from .process_xdlm import Generators, draw_ahead, draw_uniforms
from .scheduling_xdlm import XDLMScheduler

KAPPA = 0.2  # near the best of six at 4 and 8 steps for every k tried (benchmarks/samplers.py)


class XDLMPsiScheduler(XDLMScheduler):
    """Ancestral sampler that draws a share of the tokens from the marginal at s instead of the posterior there.

    Psi-posteriors (arXiv 2602.21185), here for noise of any k:

        kappa q(z_s | z_t, p) + (1 - kappa) sum_x q(x | z_t, p) q(z_s | x)

    The second term lets go of what the token's noise was: its clean code x is drawn from the posterior at time 0 and
    noised to s. Both terms have the same marginal at s, and what an early step got wrong can be drawn again later: at
    k = 0, whose ancestral step keeps every visible code, by the mask (ReMDM, arXiv 2503.00307). The first and the last
    step of a grid from 1 to 0 are the ancestral ones, whatever kappa is: up to 2 steps nothing changes.

    Args:
        k, num_codes, definition, vocab_size, mask_id, time_grid: As in `XDLMScheduler`.
        kappa: Share of tokens that take the ancestral step, in [0, 1]; 1 is `XDLMScheduler`.
        correct_within: Times (low, high): steps that lead to a time s of low <= s <= high correct, the others are
            ancestral. None is all.

    Raises:
        ValueError: If an argument is out of range.
    """

    @register_to_config
    def __init__(
        self,
        *,
        k: float = 0.1,
        num_codes: int = 512,
        definition: str = "A",
        vocab_size: int | None = None,
        mask_id: int | None = None,
        time_grid: str = "linear",
        kappa: float = KAPPA,
        correct_within: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            k=k, num_codes=num_codes, definition=definition, vocab_size=vocab_size, mask_id=mask_id, time_grid=time_grid
        )
        if isinstance(kappa, bool) or not isinstance(kappa, Real) or not 0.0 <= kappa <= 1.0:
            raise ValueError(f"kappa={kappa!r}: must lie in [0, 1] (1 is ancestral)")
        within = (0.0, 1.0) if correct_within is None else correct_within
        pair = isinstance(within, list | tuple) and len(within) == 2 and all(isinstance(end, Real) for end in within)
        if not pair or not 0.0 <= within[0] < within[1] <= 1.0:
            raise ValueError(f"correct_within={correct_within!r}: must be two times, 0 <= low < high <= 1")
        plain = None if correct_within is None else [float(end) for end in within]  # JSON knows none of NumPy's
        self.register_to_config(kappa=float(kappa), correct_within=plain)

    def draw_ahead(
        self, generator: Generators, shape: Sequence[int], device: torch.device | str | None = None
    ) -> Generators:
        """As `XDLMScheduler.draw_ahead`; a step draws twice as many numbers here."""
        return draw_ahead(generator, shape, 2 * len(self.timesteps), device)

    def _uniforms(
        self,
        logits: torch.Tensor,
        z: torch.Tensor,
        ends: tuple[float, float, float],
        s: float,
        temperature: float,
        generator: Generators,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """u as drawn for an ancestral token; for a corrected one u is mapped so that `_step` takes the branch which its
        re-noised x calls for.

        If x stays visible at s: u end_model, which falls in the model's branch, with u as what remains of it. If x is
        replaced by noise: the first point of that noise branch, where every move is accepted.
        """
        u, v = draw_uniforms(z.shape, generator, z.device)
        share, noise = draw_uniforms(z.shape, generator, z.device)
        low, high = self.config.correct_within or (0.0, 1.0)
        if s == 0.0 or not low <= s <= high:
            return u, v
        end_model, end_uniform, _ = ends
        _, beta = self.process.alpha_beta(torch.tensor(s, dtype=torch.float64, device="cpu"))
        corrected = torch.where(noise < float(beta), end_uniform, u * end_model)
        corrected = torch.where(noise < self.process.k * float(beta), end_model, corrected)
        return torch.where(share < self.config.kappa, u, corrected), v

    def _step(
        self,
        logits: torch.Tensor,
        sample: torch.Tensor,
        u: torch.Tensor,
        v: torch.Tensor,
        ends: tuple[float, float, float],
        c: float,
        temperature: float,
        last: bool,
    ) -> torch.Tensor:
        """As the ancestral step, which at k = 0 takes no visible code back to the mask: done here."""
        codes = super()._step(logits, sample, u, v, ends, c, temperature, last)
        if self.process.k == 0.0 and not last:
            return torch.where(u == ends[1], self.process.mask, codes)
        return codes
