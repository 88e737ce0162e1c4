"""The XDLM reverse step that unmasks in an order: the most confident positions first, or a fixed one that spreads.

Owns the order in which masked positions leave the mask. How many leave on average, what they become, and how visible
codes move stay `scheduling_xdlm`'s.

This file travels to the Hub beside weights: it imports torch, diffusers, the standard library and its siblings only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  # diffusers looks for the name here

from .process_xdlm import Generators, draw_ahead, draw_uniforms
from .scheduling_xdlm import XDLMScheduler

UNMASKING = ("confidence", "halton")
CHOICE_TEMPERATURE = 4.5  # MaskGIT's


class XDLMOrderedScheduler(XDLMScheduler):
    """Ancestral sampler that unmasks in an order instead of independently.

    In the ancestral step each of an image's n masks is lifted with the same probability w. Here it is those of rank
    r + u_0 < n w, r = 0 to n - 1, one uniform u_0 an image: n w of them, rounded up or down, exact on average. A lifted
    mask becomes what the ancestral step would have made of it. Where an image has one mask both samplers have one law.
    Where it has several, they no longer leave independently, so this is not the exact posterior; and `"confidence"`,
    which looks at what is drawn, favours likely codes as a low temperature does.

    - `"confidence"` (MaskGIT, arXiv 2202.04200): every mask draws its code; first are the highest
      log p(code) + choice_temperature * s * Gumbel noise, s being the time that the step leads to.
    - `"halton"` (Halton-MaskGIT, arXiv 2503.17076): first come the cells of the square grid that the Halton sequence
      visits first.

    Args:
        k: As in `XDLMScheduler`, but below 1: without masks there is nothing to order.
        num_codes, definition, vocab_size, mask_id, time_grid: As in `XDLMScheduler`.
        unmasking: `"confidence"` or `"halton"`.
        choice_temperature: Of `"confidence"` only, finite and at least 0, which is no noise; None is 4.5.

    Raises:
        ValueError: If k is 1, or an argument is out of range or would do nothing.
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
        unmasking: str = "confidence",
        choice_temperature: float | None = None,
    ) -> None:
        super().__init__(
            k=k, num_codes=num_codes, definition=definition, vocab_size=vocab_size, mask_id=mask_id, time_grid=time_grid
        )
        if k == 1:
            raise ValueError(f"k={k!r}: uniform noise has no masks to lift in an order; use XDLMScheduler (ancestral)")
        if unmasking not in UNMASKING:
            raise ValueError(f"unmasking={unmasking!r}: must be one of {', '.join(UNMASKING)}")
        if choice_temperature is not None and unmasking != "confidence":
            raise ValueError(f"choice_temperature={choice_temperature!r}: does nothing with {unmasking!r}; give None")
        temperature = CHOICE_TEMPERATURE if choice_temperature is None else choice_temperature
        is_number = isinstance(temperature, Real) and not isinstance(temperature, bool)
        if not is_number or not 0.0 <= temperature < math.inf:
            raise ValueError(f"choice_temperature={choice_temperature!r}: must be finite and at least 0 (no noise)")
        self.choice_temperature: float = float(temperature)
        if choice_temperature is not None:
            self.register_to_config(choice_temperature=self.choice_temperature)  # plain: JSON knows none of NumPy's

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers'; a choice temperature in the config is the confidence order's, and goes with it."""
        if kwargs.get("unmasking", "confidence") != "confidence":
            kwargs.setdefault("choice_temperature", None)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError if `"halton"` finds no square grid in images of codes (B, L) or (B, rows, columns)."""
        if self.config.unmasking == "halton":
            _side(shape)

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
        """As drawn for visible codes; a mask's u becomes 1 where it stays, u w where it leaves: below w, as always."""
        u, v = draw_uniforms(z.shape, generator, z.device)
        more, noise = draw_uniforms(z.shape, generator, z.device)
        if s == 0.0:  # all leave
            return u, v
        is_mask = z == self.process.mask
        shape = (z.shape[0], math.prod(z.shape[1:]))
        if self.config.unmasking == "halton":
            order = halton_order(_side(z.shape), z.device).expand(shape)  # (B, L)
        else:
            scores = self._scores(logits, is_mask, v, noise, s, temperature).reshape(shape)
            order = scores.argsort(dim=1, descending=True, stable=True)
        end_model, w, _ = ends
        masks = is_mask.reshape(shape).gather(1, order)  # (B, L), in the order, visible codes in between
        limit = masks.sum(1, keepdim=True) * w - more.reshape(shape)[:, :1]  # n w - u_0
        lifted = masks & (masks.cumsum(1) - 1 < limit)
        leaves = torch.empty_like(lifted).scatter_(1, order, lifted).reshape(z.shape)
        u = torch.where(is_mask, torch.where(leaves, u * w, 1.0), u)
        if w > end_model:  # the order may have looked at v, so uniform noise is drawn by what is left of u
            v = torch.where(leaves & (u >= end_model), (u - end_model) / (w - end_model), v)
        return u, v

    def _scores(
        self,
        logits: torch.Tensor,  # (B, ..., V)
        is_mask: torch.Tensor,  # (B, ...)
        v: torch.Tensor,
        noise: torch.Tensor,  # uniform
        s: float,
        temperature: float,
    ) -> torch.Tensor:
        """Noisy log-probability of the code that each mask would become, by the v that the step will use: (B, ...)."""
        flat, wanted, v = logits.reshape(-1, logits.shape[-1]), is_mask.flatten(), v.flatten()
        # two passes over these rows, as a draw gives the probability of a code that is known beforehand
        drawn, _ = self._draw(flat, wanted, torch.zeros_like(wanted, dtype=torch.int64), v, temperature)
        _, p = self._draw(flat, wanted, drawn, v, temperature)
        scores = torch.where(wanted, p.log(), 0.0).reshape(is_mask.shape)
        if self.choice_temperature > 0.0:
            scores -= self.choice_temperature * s * (-noise.log()).log()  # Gumbel: -log(-log(uniform))
        return scores


@functools.lru_cache(maxsize=16)
def halton_order(side: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Cells of a square grid, row * side + column, in the order of their first visit by the Halton sequence.

    Point i = 1, 2, ... is the pair of radical inverses of i, in base 2 (row) and base 3 (column); by integers, without
    rounding.

    Args:
        side: Rows, and columns.
        device: Where the result lies.

    Returns:
        int64 (side * side,), each cell once.
    """
    # in each axis a cell holds an interval b^-d <= 1 / (2 side) of the base's own, and as many points as there are
    # pairs of such intervals visit every pair
    widths = [base ** math.ceil(math.log(2 * side, base)) for base in (2, 3)]
    i = torch.arange(1, math.prod(widths) + 1, device="cpu")
    row, column = (_radical_inverse(i, base, side) for base in (2, 3))
    first = torch.full((side * side,), len(i), device="cpu").scatter_reduce_(0, row * side + column, i, "amin")
    return first.argsort().to(device)


def _radical_inverse(i: torch.Tensor, base: int, side: int) -> torch.Tensor:
    """floor(side * r), r in [0, 1) having the digits of i behind the point in reverse."""
    mirrored, end = torch.zeros_like(i), 1
    while bool((i > 0).any()):
        mirrored, i, end = mirrored * base + i % base, i // base, end * base
    return side * mirrored // end


def _side(shape: Sequence[int]) -> int:
    """Side of the square grid that images of codes are, (B, L) or (B, rows, columns)."""
    side = math.isqrt(math.prod(shape[1:]))
    if tuple(shape[1:]) not in ((side * side,), (side, side)):
        raise ValueError(
            f"sample: codes of shape {tuple(shape[1:])} an image are no square grid, which unmasking='halton' goes "
            "over; use unmasking='confidence'"
        )
    return side
