"""The XDLM noise process: alpha, beta, k, N and U, and pure functions on them.

Owns the noise (arXiv 2602.01362, section 3): what a clean code turns into at time t, and with which weights one
reverse step mixes its four branches. It never sees a network, a time grid or a loss.

Notation: alpha = a_t is the signal kept, beta = 1 - a_t (carried beside alpha, never recomputed from it), x the clean
code, z the noisy one, m the mask id, v the number of ids that a z may take.

    q(z_t | x) = alpha * onehot(x) + beta * r,       r(e) = (k/N) [e in U] + (1-k) [e = m]

| definition | U, what uniform noise draws from             | N | a network's logits       |
|------------|----------------------------------------------|---|--------------------------|
| A, ours    | the K codes                                  | K | K wide: the codes        |
| B, paper's | every id below v, mask and special ids too   | v | v wide, mask excluded    |

This file travels to the Hub beside weights: it imports torch and the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensor


class UniformsAhead:
    """What `draw_uniforms` would give in the next calls, as many at once as `AHEAD_ELEMENTS` hold: one loop over the
    images' generators and one asynchronous copy to the device. The first call of `take` draws: by then the device is
    busy with the network.

    Call i gives the very numbers that it would give without this. Whoever stops early leaves the generators further on.

    Args:
        generator: One, or a list of one per image, on the CPU.
        shape: Shape of one of the two results of a call, images first.
        calls: How many calls.
        device: Where the numbers go.
    """

    def __init__(
        self,
        generator: torch.Generator | Sequence[torch.Generator],
        shape: Sequence[int],
        calls: int,
        device: torch.device | str | None = None,
    ) -> None:
        self.generator = generator
        self.shape = tuple(shape)
        self.calls = calls
        self.device = torch.device(device or "cpu")
        self._numbers: Iterator[torch.Tensor] | None = None

    def take(self) -> torch.Tensor:
        """The numbers of the next call, (*shape, 2). Raises ValueError after the last."""
        if self._numbers is None:
            self._numbers = self._draw()
        numbers = next(self._numbers, None)
        if numbers is None:
            raise ValueError("generator: the numbers that were drawn ahead are used up; give the generators themselves")
        return numbers

    def _draw(self) -> Iterator[torch.Tensor]:  # (*shape, 2) each
        at_once = max(1, AHEAD_ELEMENTS // max(1, 2 * math.prod(self.shape)))
        for start in range(0, self.calls, at_once):
            numbers = _rand(self.generator, min(at_once, self.calls - start), self.shape, self.device)
            if self.device.type == "cuda":  # a copy from memory that is not pinned would wait for the network
                yield from numbers.pin_memory().to(self.device, non_blocking=True)
            else:
                yield from _moved(numbers, self.device)


Generators = torch.Generator | Sequence[torch.Generator] | UniformsAhead | None
AHEAD_ELEMENTS = 1 << 24  # numbers drawn at once: 128 MiB


def draw_ahead(
    generator: Generators, shape: Sequence[int], calls: int, device: torch.device | str | None = None
) -> Generators:
    """`UniformsAhead` where that saves time, else `generator`.

    It does for one generator on the CPU if the numbers go elsewhere, and for generators there of which each image has
    its own. Where they are drawn ahead, draws of others from them between the steps no longer change later steps.
    """
    if isinstance(generator, torch.Generator):
        helps = generator.device.type == "cpu" and torch.device(device or "cpu").type != "cpu"
    elif isinstance(generator, list | tuple):
        helps = len({id(g) for g in generator}) == shape[0] > 0
        helps &= all(isinstance(g, torch.Generator) and g.device.type == "cpu" for g in generator)
    else:
        return generator
    return UniformsAhead(generator, shape, calls, device) if helps else generator


class MixtureWeights(NamedTuple):
    """Weights of the four branches of a reverse step; they sum to 1. Shapes follow `p_z`."""

    model: torch.Tensor  # draw from the network's p
    uniform: torch.Tensor  # draw uniformly from U
    mask: torch.Tensor  # go to (back to) the mask
    stay: torch.Tensor  # keep z


@dataclass(frozen=True)
class XDLMProcess:
    """Noise that mixes random codes and `[MASK]` with weight k; k = 0 is MDLM, k = 1 is UDLM.

    Args:
        k: Weight of uniform noise, in [0, 1].
        num_codes: Codebook size K; codes are 0..K-1.
        definition: `"A"` or `"B"`, see the table above.
        vocab_size: v. Definition A: K + 1 (the default). Definition B: the logits' width (required).
        mask_id: m. Definition A: K (the default). Definition B: required, at least K.

    Raises:
        ValueError: If k lies outside [0, 1], K < 2, or the ids do not fit the definition.
    """

    k: float
    num_codes: int
    definition: str = "A"
    vocab_size: int | None = None
    mask_id: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, Real):
            raise ValueError(f"k={self.k!r}: must be a number in [0, 1]")
        if not 0.0 <= self.k <= 1.0:  # also refuses NaN
            raise ValueError(f"k={self.k!r}: must lie in [0, 1] (0 is MDLM, 1 is UDLM)")
        if 0.0 < self.k < 1e-20:
            raise ValueError(f"k={self.k!r}: smaller than float32 arithmetic carries; use k=0 (MDLM)")
        for name in ("num_codes", "vocab_size", "mask_id"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral | None):
                raise ValueError(f"{name}={value!r}: must be a whole number")
        if self.num_codes < 2:
            raise ValueError(f"num_codes={self.num_codes!r}: a codebook has at least 2 codes")
        if self.definition == "A":
            for name, expected in (("vocab_size", self.num_codes + 1), ("mask_id", self.num_codes)):
                value = getattr(self, name)
                if value not in (None, expected):
                    raise ValueError(f"{name}={value!r}: definition A has {name}={expected} for {self.num_codes} codes")
                object.__setattr__(self, name, expected)
        elif self.definition == "B":
            if self.vocab_size is None or self.mask_id is None:
                raise ValueError("definition='B': vocab_size (the logits' width) and mask_id must be given")
            if not self.num_codes <= self.mask_id < self.vocab_size:
                raise ValueError(
                    f"mask_id={self.mask_id!r}: definition B needs num_codes={self.num_codes} <= mask_id "
                    f"< vocab_size={self.vocab_size}"
                )
        else:
            raise ValueError(f"definition={self.definition!r}: must be 'A' (codes only) or 'B' (the paper's code)")
        for name in ("k", "num_codes", "vocab_size", "mask_id"):  # plain numbers: kernels take none of NumPy's
            object.__setattr__(self, name, (float if name == "k" else int)(getattr(self, name)))

    @property
    def num_ids(self) -> int:
        """Number of ids a noisy code may take (A: K + 1; B: v)."""
        assert self.vocab_size is not None
        return self.vocab_size

    @property
    def mask(self) -> int:
        """The mask id m as a plain int."""
        assert self.mask_id is not None
        return self.mask_id

    @property
    def num_uniform(self) -> int:
        """N, the number of ids uniform noise draws from: 0..N-1 (A: K; B: v)."""
        return self.num_codes if self.definition == "A" else self.num_ids

    @property
    def logits_width(self) -> int:
        """Width of a network's logits (A: K; B: v)."""
        return self.num_uniform

    @property
    def excluded_column(self) -> int | None:
        """Logits column that the softmax leaves out (B: the mask; A: none)."""
        return None if self.definition == "A" else self.mask_id

    def check_ids(self, name: str, ids: torch.Tensor, end: int) -> None:
        """Raise ValueError if ids are not int64, or some lie outside [0, end), which is looked at where that is free:
        on the CPU, and not while torch.compile traces."""
        if ids.dtype != torch.int64:
            raise ValueError(f"{name}: dtype {ids.dtype}, ids are torch.int64")
        if _can_be_looked_at(ids) and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= end):
            raise ValueError(f"{name}: ids run from {int(ids.min())} to {int(ids.max())}, must lie in [0, {end})")

    # -- schedule: log-linear, alpha_t = 1 - t, -alpha'(t) = 1 --------------------------------------------------------

    @staticmethod
    def alpha_beta(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, beta) at t in [0, 1]; exact at both ends: a_0 = 1, a_1 = 0. Any shape."""
        return 1.0 - t, t

    def signal_ratio(self, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """c = alpha N / (beta k), held finite where k or beta vanish (there c stands for infinity). Any shape."""
        limit = torch.full_like(beta, 1e35 if beta.dtype != torch.float64 else 1e280)
        if self.k == 0.0:
            return torch.where(alpha > 0, limit, torch.zeros_like(beta))
        ratio = alpha * (self.num_uniform / self.k)  # finite: k >= 1e-20
        return torch.where(ratio < limit * beta, ratio / beta, limit)

    # -- forward ------------------------------------------------------------------------------------------------------

    def prior_probs(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """r, the noise distribution and the marginal at t = 1. Shape (num_ids,)."""
        r = torch.zeros(self.num_ids, dtype=dtype)
        r[: self.num_uniform] = self.k / self.num_uniform
        r[self.mask] += 1.0 - self.k
        return r

    def marginal(self, x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """Dense q(z_t | x) for checks on small vocabularies. x, alpha, beta broadcast; shape (..., num_ids)."""
        onehot = torch.nn.functional.one_hot(x, self.num_ids).to(alpha.dtype)
        return alpha[..., None] * onehot + beta[..., None] * self.prior_probs(alpha.dtype).to(x.device)

    def noise(
        self, x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        """Draw z ~ q(z_t | x).

        Args:
            x: Clean codes, int64 (B, ...).
            alpha: Signal kept, one per image (B,) or broadcastable to x.
            beta: 1 - alpha, same shape.
            generator: One generator, or one per image.

        Returns:
            Noisy codes, int64, the shape of x.

        Raises:
            ValueError: If x holds ids that are no codes, or alpha and beta lie outside [0, 1] or do not sum to 1 (all
                looked for on the CPU only), or their shape does not fit.
        """
        self.check_ids("x", x, self.num_codes)
        check_shares(alpha, beta)
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value.ndim > x.ndim or any(m not in (1, n) for m, n in zip(value.shape, x.shape)):
                raise ValueError(
                    f"{name} {tuple(value.shape)}: for codes {tuple(x.shape)} give one an image (B,), or one a code"
                )
        u, v = draw_uniforms(x.shape, generator, x.device)
        beta = _per_image(beta, x).to(u.dtype)
        drawn = self._uniform_id(v)
        z = torch.where(u < beta, self.mask, x)
        return torch.where(u < self.k * beta, drawn, z)

    def prior(
        self, shape: Sequence[int], generator: Generators = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Draw z_1 ~ r: int64 codes of `shape` (first axis: images)."""
        u, v = draw_uniforms(shape, generator, device)
        return torch.where(u < self.k, self._uniform_id(v), self.mask)

    def _uniform_id(self, v: torch.Tensor) -> torch.Tensor:
        return (v * self.num_uniform).long().clamp_(max=self.num_uniform - 1)  # v < 1; the clamp is for float32

    # -- reverse ------------------------------------------------------------------------------------------------------

    def mixture(
        self,
        p_z: torch.Tensor,
        is_mask: torch.Tensor,
        alpha_t: torch.Tensor,
        beta_t: torch.Tensor,
        alpha_s: torch.Tensor,
        beta_s: torch.Tensor,
    ) -> MixtureWeights:
        """Branch weights of the exact reverse step q(z_s | z_t = z, p) for a_s >= a_t.

            D       = beta_t + (a_t N / k) p_z         (z = m: D = beta_t)
            w_model = (a_s - a_t) / D
            w_unif  = k beta_s b_ts / D,  w_mask = (1-k) beta_s b_ts / D,  b_ts = (a_s - a_t) / a_s
            w_stay  = 1 - the rest                      k = 0: z != m stays

        Args:
            p_z: The network's probability of z itself; ignored where `is_mask`. Any shape.
            is_mask: z = m, bool, shape of p_z.
            alpha_t, beta_t, alpha_s, beta_s: Broadcastable to p_z; beta_t > 0.
        """
        gain = (beta_t - beta_s).clamp(min=0.0)  # a_s - a_t, without cancellation near a = 1
        p_z = torch.where(is_mask, torch.zeros_like(p_z), p_z)
        if self.k == 0.0:
            share = torch.where(is_mask, 1.0 / beta_t, torch.zeros_like(p_z))  # 1 / D
        else:
            share = 1.0 / (beta_t + alpha_t * (self.num_uniform / self.k) * p_z)
        w_model = gain * share
        w_noise = beta_s * torch.where(alpha_s > 0, gain / alpha_s, torch.zeros_like(gain)) * share
        w_uniform, w_mask = self.k * w_noise, (1.0 - self.k) * w_noise
        return MixtureWeights(w_model, w_uniform, w_mask, (1.0 - w_model - w_noise).clamp(min=0.0))


def check_shares(alpha: torch.Tensor, beta: torch.Tensor) -> None:
    """Raise ValueError unless alpha and beta are tensors in [0, 1], no NaN, that sum to 1; `XDLMProcess.check_ids` says
    when values are looked at."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}={value!r}: no tensor; give one value an image, (B,)")
        if _can_be_looked_at(value) and not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"{name}: runs from {float(value.min())} to {float(value.max())}, must lie in [0, 1]")
    both = _can_be_looked_at(alpha) and _can_be_looked_at(beta)
    if both and alpha.shape == beta.shape and not bool(((alpha + beta - 1.0).abs() < 0.01).all()):
        raise ValueError("alpha, beta: do not sum to 1; beta is 1 - alpha, see XDLMProcess.alpha_beta")


def _can_be_looked_at(value: torch.Tensor) -> bool:
    """Whether there are numbers, asking for which waits for no accelerator and breaks no graph of torch.compile."""
    holds_numbers = value.device.type == "cpu" and not isinstance(value, FakeTensor)
    return holds_numbers and not torch.compiler.is_compiling()


def _per_image(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value per image (B,) broadcast against (B, ...)."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim < like.ndim else value


def draw_uniforms(
    shape: Sequence[int], generator: Generators, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two uniforms in [0, 1) a token: one for the branch, one for the inverse CDF.

    With a list of generators, image i owns the i-th: its numbers depend on nothing else in the batch. float64,
    because float32 uniforms sit on a lattice of 2^-24 that starves rare codes (float32 only on devices without it).

    Args:
        shape: Shape of one of the two results, images first.
        generator: None (torch's global one), one generator, or one per image.
        device: Where the results go.

    Raises:
        ValueError: What `check_generators` refuses, or numbers were drawn ahead for another shape or fewer calls.
    """
    device = torch.device(device or "cpu")
    check_generators(generator, shape[0])
    if isinstance(generator, UniformsAhead):
        if generator.shape != tuple(shape):
            raise ValueError(f"generator: numbers were drawn ahead for shape {generator.shape}, not for {tuple(shape)}")
        u = generator.take()
    else:
        u = _rand(generator, 1, shape, device)[0]
    u = _moved(u, device)
    return u[..., 0], u[..., 1]


def check_generators(generator: Generators, images: int) -> None:
    """Raise ValueError unless it is None, numbers drawn ahead, one generator, or one for each image, of one device."""
    if generator is None or isinstance(generator, UniformsAhead):
        return
    is_list = isinstance(generator, list | tuple)
    given: list[Any] = [*generator] if isinstance(generator, list | tuple) else [generator]
    for one in given:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator holds {one!r}: give torch.Generator().manual_seed(...), one, or a list of one an image"
            )
    if is_list and len(given) != images:
        raise ValueError(f"generator is a list of {len(given)} for {images} images: give one an image, or one")
    devices = sorted({str(one.device) for one in given})
    if len(devices) > 1:
        raise ValueError(f"generator holds some of {' and '.join(devices)}: give generators of one device")


def _rand(
    generator: torch.Generator | Sequence[torch.Generator] | None,
    calls: int,
    shape: Sequence[int],
    device: torch.device,
) -> torch.Tensor:
    """The numbers of so many calls, (calls, *shape, 2), where the generators are; without one on `device`."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.rand((calls, *shape, 2), generator=generator, device=source, dtype=_uniform_dtype(source))
    drawn = [_rand(one, calls, shape[1:], device) for one in generator]  # an image's are its own generator's
    return torch.stack(drawn, dim=1) if drawn else torch.empty(calls, *shape, 2, device=device)


def _moved(u: torch.Tensor, device: torch.device) -> torch.Tensor:
    dtype = _uniform_dtype(device)
    if dtype == torch.float32 and u.dtype == torch.float64:
        u = u.clamp(max=1 - 2**-24)  # rounding would make the greatest 1
    return u.to(device, dtype)


def _uniform_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
