"""NELBO of held-out codes, importance-sampled in t: an unbiased estimate for every image.

This file owns the times, the density they are drawn from, and the estimate; it never opens a file.

With -alpha'(t) = 1 the NELBO of an image is the integral over (0, 1] of E_z[l], l meaned over its L tokens. Near t = 0
about L t tokens are noised, each with a loss of about 1/t: E_z[l^2] grows like 1/(L t), and uniform times have an
infinite variance. So times are drawn through t = s^3,

    NELBO = integral over (0, 1] of E_z[f] ds,    f = 3 s^2 l(s^3),    E_z[f^2] ~ s/L and E_z[f^3] ~ 1/L^2 at s = 0

(k > 0: times powers of log s), so that normal intervals hold. The density of s is constant on equal strata: half of it
uniform, half proportional to the root mean square of f, which among such densities has the least variance for
independent times (arXiv 2102.09672, eq. 18). A pilot estimates it on noise of its own, so that the estimate stays
unbiased whatever the pilot finds. The times of an image are then stratified over the quantiles of the density.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from xdlm_image.data.image_batches import blocks_of_rank
from xdlm_image.objective import XDLMLoss
from xdlm_image.ranks import rank_and_world
from xdlm_image.schedulers import XDLMProcess
from xdlm_image.training.batches import POWER, step_seed

NUM_STRATA = 32  # equal ones of s
PILOT_IMAGES = 64  # each at one time of every stratum
FLAT_SHARE = 0.5  # of the density: what the pilot missed costs at most twice the variance of uniform s
NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)  # half of a 95 % interval, in standard errors
PILOT, ESTIMATE = 0, 1  # streams of random numbers
SEED_RULE = "image i of seed s: mt19937 seeded with numpy's SeedSequence([s, 0 (pilot) or 1 (estimate), i, 0])"


@dataclass(frozen=True)
class TimeProposal:
    """Density of t in (0, 1]: that of s, t = s^3, is constant on equal strata.

    Attributes:
        probs: Probability of each stratum (S,), float64, positive, of sum 1.
    """

    probs: torch.Tensor

    @classmethod
    def flat(cls) -> TimeProposal:
        """s uniform."""
        return cls(torch.full((NUM_STRATA,), 1.0 / NUM_STRATA, dtype=torch.float64))

    @property
    def edges(self) -> torch.Tensor:
        """Edges of the strata in t (S + 1,), from 0 to 1."""
        return torch.linspace(0.0, 1.0, len(self.probs) + 1, dtype=torch.float64) ** POWER

    def draw(self, num_times: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Stratified times t in (0, 1] and their weights, such that sum of weight l(t) estimates the integral of l.

            u_j = (j + U) / J,  s = F^-1(u),  t = s^3,  weight = 3 s^2 / (J p(s)),  p(s) = S probs[stratum]

        Returns:
            t and weight (J,), float64.
        """
        strata = len(self.probs)
        jitter = 1.0 - torch.rand(num_times, generator=generator, dtype=torch.float64)  # (0, 1]
        u = (torch.arange(num_times, dtype=torch.float64) + jitter) / num_times
        ends = self.probs.cumsum(0)
        stratum = torch.searchsorted(ends, u).clamp(max=strata - 1)
        probs = self.probs[stratum]
        s = ((stratum + 1.0 - (ends[stratum] - u) / probs) / strata).clamp(0.0, 1.0)  # the clamp is for rounding
        return s**POWER, POWER * s ** (POWER - 1) / (num_times * strata * probs)


@dataclass(frozen=True)
class Interval:
    """A mean over independent images with its 95 % confidence interval (normal approximation).

    Attributes:
        mean: The mean.
        stderr: Its standard error, sample deviation over sqrt(n).
        low, high: Ends of the interval.
    """

    mean: float
    stderr: float
    low: float
    high: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Interval:
        """Of one value an image (n,), n at least 2."""
        mean, stderr = float(values.mean()), float(values.std()) / math.sqrt(len(values))
        return cls(mean, stderr, mean - NORMAL_95 * stderr, mean + NORMAL_95 * stderr)


@dataclass(frozen=True)
class NelboEstimate:
    """NELBO of images, in bits per token.

    The images are the independent units: noise levels of one image share its difficulty, so intervals are over images.

    Attributes:
        images: Unbiased estimate for each image (n,), float64.
        images_below: What of it lies at t < t_min (n,).
        density: E_z[l] in each stratum of the proposal (S,), bits per token and unit of t.
        proposal: What the times were drawn from.
    """

    images: torch.Tensor
    images_below: torch.Tensor
    density: torch.Tensor
    proposal: TimeProposal

    @property
    def bits_per_token(self) -> Interval:
        """The NELBO over all of (0, 1]."""
        return Interval.of(self.images)

    @property
    def bits_below(self) -> Interval:
        """The part of it at t < t_min, which training never saw."""
        return Interval.of(self.images_below)


def end_terms(process: XDLMProcess) -> dict[str, float]:
    """The NELBO's terms beside the integral, bits per token: both are 0, since a_1 = 0 and a_0 = 1.

    Returns:
        `prior_kl`, KL(q(z_1 | x) || r), and `reconstruction`, -log q(z_0 = x | x): z_0 leaves nothing to tell of x.

    Raises:
        ValueError: A schedule that ends elsewhere, of which the integral would be a part only.
    """
    x, end = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    last, prior = process.marginal(x, *process.alpha_beta(end))[0], process.prior_probs()  # (num_ids,)
    first = process.marginal(x, *process.alpha_beta(0.0 * end))[0]
    prior_kl = float((torch.xlogy(last, last) - torch.xlogy(last, prior)).sum()) / math.log(2.0)
    reconstruction = -math.log2(float(first[0]))
    if prior_kl != 0.0 or reconstruction != 0.0:
        raise ValueError(
            f"process: its prior term is {prior_kl} and its reconstruction term {reconstruction} bits per token; "
            "the estimate is for schedules with a_1 = 0 and a_0 = 1, where both are 0"
        )
    return {"prior_kl": abs(prior_kl), "reconstruction": abs(reconstruction)}  # no -0.0


class NelboEstimator:
    """Estimates the NELBO of images under a network.

    Every image has its own random numbers: neither `batch_size` nor the number of processes changes an estimate,
    beyond rounding, and the first images of a larger set keep theirs. Several processes share the images.

    Args:
        model: Network and process; the network is run in evaluation mode.
        codes: Clean codes (n, L) int64, on the CPU.
        labels: Class ids (n,) int64; None for unconditional networks.
        seed: Of all noise, at least 0.
        batch_size: Noisy images that the network sees at once.
        device: Where the network is.
        name: Of the progress bars.

    Raises:
        ValueError: A process of which the integral is not the whole NELBO (`end_terms`).
    """

    def __init__(
        self,
        model: XDLMLoss,
        codes: torch.Tensor,
        labels: torch.Tensor | None = None,
        seed: int = 0,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
        name: str = "NELBO",
    ) -> None:
        end_terms(model.process)
        self.model = model
        self.codes = codes
        self.labels = labels
        self.seed = seed
        self.batch_size = batch_size
        self.device = device
        self.name = name

    def fit_proposal(self) -> TimeProposal:
        """Density proportional to the root mean square of f in each stratum, from the first `PILOT_IMAGES` images.

        Its noise is not that of `estimate`. Raises ValueError on losses that are not finite.
        """
        flat = TimeProposal.flat()
        # as many times as strata: one in each
        _, bits = self._weighted_losses(min(PILOT_IMAGES, len(self.codes)), flat, NUM_STRATA, PILOT)
        rms = bits.square().mean(0).sqrt()  # (S,), in proportion to that of f
        if rms.sum() == 0.0:  # these images are foretold without doubt
            return flat
        return TimeProposal((1.0 - FLAT_SHARE) * rms / rms.sum() + FLAT_SHARE * flat.probs)

    def estimate(self, num_times: int = 8, t_min: float = 1e-3, proposal: TimeProposal | None = None) -> NelboEstimate:
        """The NELBO over all of t in (0, 1].

        Args:
            num_times: Times J an image.
            t_min: Where `images_below` ends, in (0, 1).
            proposal: Of the times; None fits one.

        Raises:
            ValueError: Losses that are not finite.
        """
        proposal = proposal or self.fit_proposal()
        times, bits = self._weighted_losses(len(self.codes), proposal, num_times, ESTIMATE)
        edges = proposal.edges
        stratum = (torch.searchsorted(edges, times) - 1).clamp(min=0)
        in_strata = torch.zeros_like(proposal.probs).index_add_(0, stratum.flatten(), bits.flatten())
        return NelboEstimate(
            images=bits.sum(1),
            images_below=torch.where(times < t_min, bits, 0.0).sum(1),
            density=in_strata / len(self.codes) / edges.diff(),
            proposal=proposal,
        )

    @torch.no_grad()
    def losses(self, block: range, t: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """l of some images at times of their own, meaned over tokens.

        Args:
            block: Which images, b of them.
            t: Times (b, J) in (0, 1], float64.
            generators: One CPU generator an image, for its noise.

        Returns:
            (b, J) float64, nats per token and unit of t.
        """
        times, part = t.shape[1], slice(block.start, block.stop)
        x = self.codes[part].repeat_interleave(times, 0)  # (b J, L)
        labels = None if self.labels is None else self.labels[part].repeat_interleave(times, 0).to(self.device)
        alpha, beta = self.model.process.alpha_beta(t.flatten())
        z = self.model.process.noise(x, alpha, beta, [g for g in generators for _ in range(times)]).to(self.device)
        x, t_rows = x.to(self.device), t.flatten().float().to(self.device)
        losses = []
        for start in range(0, len(x), self.batch_size):
            rows = slice(start, start + self.batch_size)
            loss = self.model(z[rows], x[rows], t_rows[rows], None if labels is None else labels[rows])
            losses.append(loss.per_token.cpu().double().mean(1))  # (rows,)
        return torch.cat(losses).view_as(t)

    def _weighted_losses(
        self, num_images: int, proposal: TimeProposal, num_times: int, stream: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Times and weight l(t) in bits per token, both (n, J), the same on every rank."""
        found = torch.zeros(2, num_images, num_times, dtype=torch.float64)
        rank, world = rank_and_world()
        bar = tqdm(
            total=-(-num_images // world),
            desc=f"{self.name}, pilot" if stream == PILOT else self.name,
            unit="image",
            leave=False,
            disable=rank != 0,
        )
        training = self.model.transformer.training
        self.model.transformer.eval()
        with bar:
            for block in blocks_of_rank(num_images, max(1, self.batch_size // num_times)):
                generators = [torch.Generator().manual_seed(step_seed(self.seed, stream, i)) for i in block]
                t, weight = map(torch.stack, zip(*(proposal.draw(num_times, g) for g in generators)))  # (b, J)
                part = slice(block.start, block.stop)
                found[0, part] = t
                found[1, part] = weight * self.losses(block, t, generators) / math.log(2.0)
                bar.update(len(block))
        self.model.transformer.train(training)
        if world > 1:
            found = found.to(self.device)
            dist.all_reduce(found)
        times, bits = found.cpu()
        if not torch.isfinite(bits).all():
            image, time = (~torch.isfinite(bits)).nonzero()[0].tolist()
            raise ValueError(
                f"{self.name}: the loss of image {image} at t={float(times[image, time]):.3g} is not finite; its "
                "weights are damaged, or too large for its dtype"
            )
        return times, bits
