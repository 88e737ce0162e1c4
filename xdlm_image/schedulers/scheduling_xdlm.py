"""The XDLM reverse step for inference: a time grid and the exact ancestral step on it.

Owns which times are visited and how codes move from t to s (arXiv 2602.01362, the posterior as a mixture of four
scalar branches). The noise itself is `process_xdlm`'s. It never builds a (batch, length, vocabulary) posterior:
softmax and draw happen only in the rows that may move.

This file travels to the Hub beside weights: it imports torch, diffusers, the standard library and its siblings only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from .process_xdlm import Generators, XDLMProcess, check_generators, draw_ahead, draw_uniforms
from .row_draw import draw_rows

MAX_STEPS = 100_000  # a slip of the keyboard beyond that
TIME_GRIDS = {
    # progress r in [0, 1] -> t, from 1 to 0; alpha = 1 - t, so a grid in t is a grid in alpha
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: math.cos(0.5 * math.pi * r),
    "arccos": lambda r: 2.0 / math.pi * math.acos(r),
}


@dataclass
class XDLMSchedulerOutput(BaseOutput):
    """Output of `XDLMScheduler.step`.

    Attributes:
        prev_sample: Codes at the next time, int64, the shape of `sample`.
    """

    prev_sample: torch.Tensor


class XDLMScheduler(SchedulerMixin, ConfigMixin):
    """Exact ancestral sampler of the XDLM process.

    Args:
        k: Weight of uniform noise in [0, 1]; 0 is MDLM, 1 is UDLM. Must be the k of the training.
        num_codes: Codebook size K.
        definition: `"A"` or `"B"`, see `XDLMProcess`.
        vocab_size: Definition B: the logits' width.
        mask_id: Definition B: the mask id.
        time_grid: `"linear"`, `"cosine"` or `"arccos"`.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        *,  # by name: diffusers takes what is given by place for a default, and `from_config` would lose it
        k: float = 0.1,
        num_codes: int = 512,
        definition: str = "A",
        vocab_size: int | None = None,
        mask_id: int | None = None,
        time_grid: str = "linear",
    ) -> None:
        if time_grid not in [*TIME_GRIDS]:  # of a file: may be what no dict can be asked for
            raise ValueError(f"time_grid={time_grid!r}: must be one of {sorted(TIME_GRIDS)}")
        self.process = XDLMProcess(k, num_codes, definition, vocab_size, mask_id)
        given = {"k": k, "num_codes": num_codes, "vocab_size": vocab_size, "mask_id": mask_id}
        # as plain numbers: of NumPy's no JSON can be made
        self.register_to_config(
            **{name: getattr(self.process, name) for name, value in given.items() if value is not None}
        )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.float64)
        self._finite: torch.Tensor | None = None  # whether the logits were, since this was last asked

    @classmethod
    def from_process(cls, process: XDLMProcess, time_grid: str = "linear", **kwargs: Any) -> Self:
        """The scheduler of a process; further arguments are the class's own."""
        return cls(**vars(process), time_grid=time_grid, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [XDLMScheduler, *XDLMScheduler.__subclasses__()]  # `from_config` leads from each to each

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        start: float = 1.0,
    ) -> None:
        """Choose the times: `self.timesteps` (n,) float64, falling; step i goes from t_i to t_{i+1}, the last to 0.

        Args:
            num_inference_steps: Number of steps n, at least 1.
            device: Accepted for diffusers' sake; times are scalars of the host and stay there, so that reading one
                never waits for the device.
            timesteps: Own times instead: falling strictly, within (0, 1].
            start: Time of the first of n steps, in (0, 1]; codes noised less than wholly begin below 1. The n steps
                then divide the part of the time grid that is left, and none is skipped.

        Raises:
            ValueError: If neither or both are given, the values are out of range, or the times do not fall strictly,
                as rounding has it of very many steps from a very late start.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps: give num_inference_steps or timesteps, one of the two")
        if timesteps is None:
            assert num_inference_steps is not None
            n, grid = num_inference_steps, TIME_GRIDS[self.config.time_grid]
            is_number = isinstance(n, Real) and not isinstance(n, bool) and math.isfinite(n)
            if not is_number or n != int(n) or not 1 <= n <= MAX_STEPS:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps!r}: must be a whole number from 1 to {MAX_STEPS:,} "
                    "(num_steps of a pipeline)"
                )
            n = int(n)
            start = _number("start", start)
            if not 1e-6 <= start <= 1.0:  # below, no code of a million is noise, and steps cannot be told apart
                raise ValueError(f"start={start!r}: must lie in (0, 1], and not below 1e-6")
            first = _progress_at(grid, start)
            times = [start] + [grid(first + (1.0 - first) * i / n) for i in range(1, n)]
            if not _fall(times):
                raise ValueError(
                    f"num_inference_steps={n}: from start={start!r} the steps of the {self.config.time_grid} grid are "
                    "too short to be told apart; take fewer (num_steps of a pipeline)"
                )
        else:
            if start != 1.0:
                raise ValueError(f"start={start!r}: is for num_inference_steps; timesteps begin where their first says")
            try:
                times = [float(t) for t in timesteps]
            except (TypeError, ValueError) as error:
                raise ValueError(f"timesteps={timesteps!r}: give the times in a list") from error
            if not times or times[0] > 1.0 or not _fall(times):
                raise ValueError(f"timesteps={times!r}: must fall strictly, from 1 at most and staying above 0")
        self.timesteps = torch.tensor(times, dtype=torch.float64, device="cpu")
        self.num_inference_steps = len(times)
        self._finite = None

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Codes need no scaling; returns `sample`."""
        return sample

    def prior(
        self, shape: Sequence[int], generator: Generators = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Codes at t = 1: int64 of `shape`, images first."""
        return self.process.prior(shape, generator, device)

    def check_generators(self, generator: Generators, images: int) -> None:
        """Raise ValueError unless steps on so many images can draw from it: None, one, or a list of one an image."""
        check_generators(generator, images)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless steps can be taken on codes of this shape, (B, ...); here any will do."""

    def draw_ahead(
        self, generator: Generators, shape: Sequence[int], device: torch.device | str | None = None
    ) -> Generators:
        """Stands for `generator` in the steps to come on codes of `shape` on `device`, with the same result.

        A generator per image then costs one loop over the images instead of one a step, and numbers that the CPU draws
        for another device one copy (of many numbers several). The generators end where they would after all steps of
        the grid, or earlier if fewer are taken. Who draws from them between the steps, a callback, changes the numbers
        of later steps only where none are drawn ahead: callbacks should have generators of their own.
        """
        return draw_ahead(generator, shape, len(self.timesteps), device)

    def add_noise(
        self, original_samples: torch.Tensor, timesteps: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        """z ~ q(z_t | x) for codes (B, ...) at times (B,), (1,) or () in [0, 1]."""
        t = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"timesteps={timesteps!r}: times lie in [0, 1]")
        if t.shape not in ((), (1,), original_samples.shape[:1]):
            raise ValueError(
                f"timesteps: shape {tuple(t.shape)} for codes {tuple(original_samples.shape)}; give one time, or one "
                "an image"
            )
        alpha, beta = self.process.alpha_beta(t.expand(original_samples.shape[0]))
        dtype = torch.float32 if original_samples.device.type == "mps" else torch.float64
        device = original_samples.device
        return self.process.noise(original_samples, alpha.to(device, dtype), beta.to(device, dtype), generator)

    def next_timestep(self, timestep: float | torch.Tensor) -> float:
        """s, the time after `timestep` on the current grid; 0 after the last."""
        times = self.timesteps.tolist()
        if not times:
            raise ValueError("timestep: no grid yet; call set_timesteps first")
        t = float(timestep)
        i = min(range(len(times)), key=lambda j: abs(times[j] - t))
        if abs(times[i] - t) > 1e-6:
            raise ValueError(f"timestep={t!r}: not on the grid {times}; call set_timesteps for another grid")
        return times[i + 1] if i + 1 < len(times) else 0.0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        temperature: float = 1.0,
        return_dict: bool = True,
    ) -> XDLMSchedulerOutput | tuple[torch.Tensor]:
        """Draw z_s from the exact posterior q(z_s | z_t, p), p = softmax(logits / temperature).

        Args:
            model_output: Logits (B, ..., V), V = `process.logits_width`. Any float type; read in float32.
            timestep: t, one of `self.timesteps`.
            sample: z_t, int64 (B, ...).
            generator: None, one generator, or one per image.
            temperature: At least 1e-6. Acts on the network's (leave-one-out) prediction.
            return_dict: False returns a tuple.

        Raises:
            ValueError: If shapes, ids, temperature or time do not fit, or logits that were drawn from are not finite:
                on an accelerator those of all steps are told in the last one (or by `check_finite`), as no other waits
                for it.
        """
        process = self.process
        if model_output.shape != (*sample.shape, process.logits_width):
            raise ValueError(
                f"model_output: shape {tuple(model_output.shape)}, expected {(*sample.shape, process.logits_width)}"
            )
        temperature = _number("temperature", temperature)
        if not 1e-6 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature!r}: must be at least 1e-6, which is the argmax")
        process.check_ids("sample", sample, process.num_ids)
        s = self.next_timestep(timestep)
        if s == self.next_timestep(self.timesteps[0]):
            self._finite = None  # the first step knows of no other
        times = torch.tensor([float(timestep), s], dtype=torch.float64, device="cpu")
        alpha, beta = process.alpha_beta(times)
        ends = self._branch_ends(alpha, beta, last=s == 0.0)
        u, v = self._uniforms(model_output, sample, ends, s, temperature, generator)
        c = float(process.signal_ratio(alpha[0], beta[0]))
        prev_sample = self._step(model_output, sample, u, v, ends, c, temperature, last=s == 0.0)
        return XDLMSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def check_finite(self) -> None:
        """Raise ValueError if logits that steps have drawn from were not finite, where none has told of it yet: for who
        stops before the last step, which asks by itself. Waits for the device."""
        finite, self._finite = self._finite, None
        if finite is not None and not bool(finite):
            raise ValueError(
                "model_output: holds NaN or infinities; the network diverged, or overflowed in half precision"
            )

    def _branch_ends(self, alpha: torch.Tensor, beta: torch.Tensor, last: bool) -> tuple[float, float, float]:
        """Where the intervals of a mask's u end: [0, model), [model, uniform), [uniform, move), and it stays beyond.

        alpha and beta are (2,), at t and s.
        """
        if last:
            return 1.0, 1.0, 1.0  # w_model = 1 but for rounding: no mask may survive
        (alpha_t, alpha_s), (beta_t, beta_s) = alpha, beta
        one = torch.ones((), dtype=torch.float64, device="cpu")
        w = self.process.mixture(0.0 * one, one.bool(), alpha_t, beta_t, alpha_s, beta_s)
        end_model = float(w.model)
        end_uniform = end_model + float(w.uniform)
        return end_model, end_uniform, end_uniform + float(w.mask)

    def _uniforms(
        self,
        logits: torch.Tensor,  # (B, ..., V)
        z: torch.Tensor,  # (B, ...)
        ends: tuple[float, float, float],
        s: float,
        temperature: float,
        generator: Generators,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's u (branch) and v (inverse CDF), each (B, ...); where another sampler comes in."""
        return draw_uniforms(z.shape, generator, z.device)

    def _step(
        self,
        logits: torch.Tensor,  # (B, ..., V)
        sample: torch.Tensor,  # (B, ...) z
        u: torch.Tensor,  # (B, ...) branch
        v: torch.Tensor,  # (B, ...) inverse CDF
        ends: tuple[float, float, float],
        c: float,  # at t
        temperature: float,
        last: bool,
    ) -> torch.Tensor:
        """The mixture by exact thinning: the branch is drawn with D = beta_t, as if z were the mask; where z != m a
        move is then accepted with probability 1 / (1 + c p_z), c = a_t N / (beta_t k), by what is left of u.
        """
        process = self.process
        end_model, end_uniform, end_move = ends
        z, u, v = (value.flatten() for value in (sample, u, v))  # (N,)
        flat = logits.reshape(-1, logits.shape[-1])  # (N, V)
        is_mask = z == process.mask
        takes_model, takes_noise = u < end_model, u < end_uniform
        if process.k == 0.0:
            # visible codes stay; definition B: at the end, ids that are no codes are drawn anew as the mask is
            moves = takes_model & (z >= process.num_codes if last else is_mask)
            reads = moves
        else:
            moves = u < end_move
            reads = moves & (takes_model | ~is_mask)

        # thinning: given its branch, u is uniform on the branch's interval
        within_noise = (u - end_model) / (end_uniform - end_model or 1.0)
        within_mask = (u - end_uniform) / (end_move - end_uniform or 1.0)
        left_of_u = torch.where(takes_model, u / end_model, torch.where(takes_noise, within_noise, within_mask))
        drawn, p_z = self._draw(flat, reads, z, v, temperature)
        accepted = is_mask | (left_of_u * (1.0 + c * p_z) < 1.0)
        if last and process.num_ids > process.num_codes + 1:
            # definition B: the last draw is from the codes only, and so is the result; normalised among them, as all of
            # their p may have underflowed beside an id that is no code
            drawn, _ = self._draw(flat[:, : process.num_codes], reads, z, v, temperature)
            accepted |= z >= process.num_codes
        moved = torch.where(takes_model, drawn, torch.where(takes_noise, process._uniform_id(v), process.mask))
        if last or (self._finite is not None and self._finite.device.type == "cpu"):
            self.check_finite()
        return torch.where(moves & accepted, moved, z).reshape(sample.shape)

    def _draw(
        self, logits: torch.Tensor, wanted: torch.Tensor, z: torch.Tensor, v: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (N,) and p of z (N,) of the wanted rows, as `draw_rows` says, and a note of what was not finite."""
        excluded = self.process.excluded_column
        excluded = None if excluded is None or excluded >= logits.shape[-1] else excluded
        drawn, p_z, finite = draw_rows(logits, wanted, z, v, temperature, excluded)
        self._finite = finite if self._finite is None else self._finite & finite
        return drawn, p_z


def _number(name: str, value: float | torch.Tensor) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r}: is no number") from error


def _fall(times: Sequence[float]) -> bool:
    """Whether times fall strictly and stay above 0."""
    return all(a > b for a, b in zip(times, [*times[1:], 0.0]))


def _progress_at(grid: Callable[[float], float], t: float) -> float:
    """The progress r in [0, 1) at which a falling grid passes t in (0, 1], by halving; exactly 0 for t = 1."""
    low, high = 0.0, 1.0
    while t < 1.0 and low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if grid(middle) > t else (low, middle)
    return low
