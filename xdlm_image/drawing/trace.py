"""What a pipeline did on its way: the codes at every step, what changed, and pictures of states that are not done.

This file owns the record of one call; it never changes what is drawn. `trace_pictures` lays it out as strip or GIF.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdlm_image.drawing.draw import decode
from xdlm_image.files import write_atomic
from xdlm_image.pipelines import XDLMPipeline

KEPT, MASK_TO_CODE, CODE_TO_CODE, CODE_TO_MASK = range(4)
HATCH = (104, 152)  # the two greys of a masked cell


@dataclass(frozen=True)
class Trace:
    """One call of a pipeline, state by state; state 0 is what the call began with, state T its result.

    Attributes:
        codes: int64 (T + 1, B, h, w) on the CPU; `mask` stands where there is no code.
        times: float64 (T + 1,), falling; the last is 0 unless the call was interrupted.
        predictions: int64 (T, B, h, w): the most probable clean code of each place of states 0 to T - 1, as the
            network saw it (guidance included; at a visible place together with the code that stands there).
        labels: int64 (B,) class ids; None for an unconditional pipeline.
        pipeline: The pipeline that was called; its tokenizer decodes the states.
    """

    codes: torch.Tensor
    times: torch.Tensor
    predictions: torch.Tensor
    labels: torch.Tensor | None
    pipeline: XDLMPipeline = field(repr=False)

    @property
    def mask(self) -> int:
        """The id that stands for no code."""
        return self.pipeline.scheduler.process.mask

    def changes(self) -> torch.Tensor:
        """uint8 (T, B, h, w): what step i did to each place, `KEPT`, `MASK_TO_CODE`, `CODE_TO_CODE`, `CODE_TO_MASK`."""
        return kinds_of_change(self.codes[:-1], self.codes[1:], self.mask)

    def images(self, states: Iterable[int] | None = None) -> torch.Tensor:
        """Pictures of states: decoded, with every place that holds no code hatched in grey.

        A convolutional decoder sees beyond one place: near masked places, which it is given the codebook's middle for,
        visible codes look somewhat other than in the finished image.

        Args:
            states: Which of 0 to T; None for all.

        Returns:
            uint8 (states, B, C, H, W).
        """
        wanted = range(len(self.codes)) if states is None else states
        process, rows = self.pipeline.scheduler.process, self.codes.shape[-2]
        pictures = []
        for state in wanted:
            codes = self.codes[state]  # (B, h, w)
            empty = codes >= process.num_codes  # masked; under definition B also ids that are no codes
            images = decode(self.pipeline, torch.where(empty, self._middle_code(), codes))  # (B, C, H, W)
            cell = images.shape[-2] // rows
            empty = empty.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None]  # (B, 1, H, W)
            pictures.append(torch.where(empty, hatch(images.shape[-2], images.shape[-1], cell), images))
        return torch.stack(pictures)

    def predicted_images(self, states: Iterable[int] | None = None) -> torch.Tensor:
        """Pictures of what the network took each state for: uint8 (states, B, C, H, W); state T is the result."""
        wanted = range(len(self.codes)) if states is None else states
        clean = torch.cat([self.predictions, self.codes[-1:]])  # (T + 1, B, h, w)
        return torch.stack([decode(self.pipeline, clean[state]) for state in wanted])

    def save_codes(self, path: str | Path) -> Path:
        """Write `codes`, `predictions`, `times`, `mask` and, where there are, `labels` to an .npz file, atomically."""
        arrays: dict[str, Any] = {
            "codes": self.codes.to(torch.int32).numpy(),
            "predictions": self.predictions.to(torch.int32).numpy(),
            "times": self.times.numpy(),
            "mask": np.int32(self.mask),
        }
        if self.labels is not None:
            arrays["labels"] = self.labels.to(torch.int32).numpy()
        return write_atomic(path, lambda temporary: np.savez_compressed(temporary, **arrays))

    def _middle_code(self) -> int:
        """The code whose vector lies nearest to the mean of the codebook."""
        codebook = self.pipeline.vqvae.quantize.embedding.weight.detach()
        codebook = codebook[: self.pipeline.scheduler.process.num_codes].float()
        return int((codebook - codebook.mean(0)).square().sum(-1).argmin())


def kinds_of_change(before: torch.Tensor, after: torch.Tensor, mask: int) -> torch.Tensor:
    """uint8, shape of the codes `before` and `after`: `KEPT` or which of the three kinds of change."""
    kinds = torch.full(before.shape, CODE_TO_CODE, dtype=torch.uint8)
    kinds[before == mask] = MASK_TO_CODE
    kinds[after == mask] = CODE_TO_MASK
    kinds[before == after] = KEPT
    return kinds


def hatch(height: int, width: int, cell: int) -> torch.Tensor:
    """uint8 (height, width): diagonal stripes in two greys, about a quarter of a cell wide."""
    diagonal = torch.arange(height)[:, None] + torch.arange(width)
    return torch.tensor(HATCH, dtype=torch.uint8)[diagonal // max(2, cell // 4) % 2]


def record(pipeline: XDLMPipeline, *args: Any, **kwargs: Any) -> Trace:
    """Call the pipeline and record every state; the same generators give the same images as without the record.

    Args:
        pipeline: What is called.
        *args, **kwargs: Of the call, but `output_type`, `return_dict` and the two callback arguments.

    Raises:
        ValueError: What the pipeline itself refuses.
        TypeError: An argument that `record` itself gives.
    """
    states: list[torch.Tensor] = []  # (B, h, w) each
    predictions: list[torch.Tensor] = []
    times: list[float] = []
    seen: dict[str, Any] = {}  # of the step that runs: the network's input and output

    def see(module: Any, inputs: tuple, keywords: dict, output: Any) -> None:
        seen.update(codes=inputs[0], logits=output[0], labels=keywords.get("class_labels"))

    def keep(pipe: XDLMPipeline, i: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        after = tensors["latents"]  # (B, h, w)
        before = seen["codes"][: len(after)]  # (B, L); guidance doubles it
        if i == 0:
            states.append(before.reshape(after.shape).cpu())
            times.append(float(t))
        states.append(after.cpu())
        times.append(pipe.scheduler.next_timestep(t))
        logits = pipe.guide(seen["logits"]).float()
        predictions.append(most_probable(pipe, logits, before, float(t)).reshape(after.shape).cpu())
        return tensors

    hook = pipeline.transformer.register_forward_hook(see, with_kwargs=True)
    try:
        pipeline(*args, **kwargs, output_type="latent", return_dict=True, callback_on_step_end=keep)
    finally:
        hook.remove()
    labels = seen["labels"]
    if labels is not None:
        labels = labels[: len(states[0])].cpu()
    times_kept = torch.tensor(times, dtype=torch.float64)
    return Trace(torch.stack(states), times_kept, torch.stack(predictions), labels, pipeline)


def most_probable(pipeline: XDLMPipeline, logits: torch.Tensor, z: torch.Tensor, t: float) -> torch.Tensor:
    """argmax over the codes of p(x_i | all of z): int64 (B, L).

    The network's own p(x_i) leaves z_i out; a visible z_i multiplies its odds by 1 + c, c = alpha N / (beta k).

    Args:
        pipeline: Its scheduler knows the process.
        logits: (B, L, V) float, leave-one-out.
        z: (B, L) ids at time t.
        t: In (0, 1].
    """
    process = pipeline.scheduler.process
    time = torch.tensor(t, dtype=torch.float64)
    gain = torch.log1p(process.signal_ratio(*process.alpha_beta(time))).to(logits.device, logits.dtype)
    logits = logits[..., : process.num_codes].clone()  # (B, L, K)
    visible = z < process.num_codes
    place = torch.where(visible, z, 0)[..., None]
    logits.scatter_add_(-1, place, torch.where(visible, gain, 0.0)[..., None])
    return logits.argmax(-1)
