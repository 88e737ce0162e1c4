"""XDLM from a picture instead of from noise: its codes are noised part of the way, and the steps lead back from there.

This file owns where such a call starts. The steps, the checks and the decoding are `XDLMPipeline`'s, what pictures may
be `init_images`'. It imports only torch, diffusers, the standard library and its siblings.
"""

import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from diffusers import VQModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .class_labels import ClassLabels
from .init_images import InitImages, preprocess
from .pipeline_xdlm import Generators, XDLMPipeline, same_steps
from .schedules import Interval, InTime

DEFAULT_STRENGTH = 0.6


class XDLMImg2ImgPipeline(XDLMPipeline):
    """Images of a class that begin at a picture: more of it is kept the lower `strength` is.

    The same parts and files as `XDLMPipeline`: `from_pretrained` loads the same folder, and
    `XDLMImg2ImgPipeline.from_pipe(pipe)` shares the parts of one that is loaded.
    """

    def _tokenizer(self) -> VQModel:
        if self.vqvae is None:
            raise ValueError("vqvae is None: a picture to begin at needs the tokenizer; load it")
        return self.vqvae

    @torch.no_grad()
    def encode_images(self, image: InitImages) -> torch.Tensor:
        """Clean codes of pictures; `decode_latents` of them is the tokenizer's reconstruction.

        Args:
            image: As in a call.

        Returns:
            (B, rows, columns) int64.

        Raises:
            ValueError: What `init_images.preprocess` refuses, or a tokenizer whose codes the scheduler does not know.
        """
        return self._encode(preprocess(image, *self.image_size, self.vqvae.config.in_channels))

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self._execution_device, self.vqvae.dtype)  # (B, C, H, W)
        latents = self.vqvae.encode(pixels).latents  # (B, D, h, w)
        # as `vqvae.quantize` does, but through the module of the codebook, which offloading may keep elsewhere
        codebook = self.vqvae.quantize.embedding(
            torch.arange(self.vqvae.config.num_vq_embeddings, device=latents.device)
        )
        vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, D)
        codes = torch.cdist(vectors.float(), codebook.float()).argmin(1)  # (B h w,)
        codes = codes.reshape(len(pixels), *self.transformer.grid)
        if int(codes.max()) >= self.scheduler.process.num_codes:
            raise ValueError(
                f"image became code {int(codes.max())}, the scheduler knows {self.scheduler.process.num_codes}: vqvae "
                "and scheduler do not belong together"
            )
        return codes

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: InitImages,
        class_labels: ClassLabels = None,
        strength: float = DEFAULT_STRENGTH,
        num_steps: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: InTime = 1.0,
        temperature: InTime = 1.0,
        generator: Generators = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        guidance_interval: Interval = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images from pictures.

        Args:
            image: One picture or several: Pillow pictures, arrays (B, H, W, C), tensors (B, C, H, W), floats in
                [0, 1] or uint8, or a list. Any size: scaled to cover the pipeline's, the middle is kept.
            class_labels: As in `XDLMPipeline`. As many as pictures, or one for all pictures, or several for one
                picture.
            strength: Time t in (0, 1] that the picture's codes are noised to: a code is lost with probability t. 1
                keeps nothing and is the same as `XDLMPipeline`.
            num_steps: Reverse steps from there, 8 by default. All of them are run, whatever the strength: they divide
                the time that is left.
            num_inference_steps: Another name of `num_steps`.
            guidance_scale, temperature, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, guidance_interval: As in `XDLMPipeline`.
            generator: One `torch.Generator`, or a list of one an image drawn: it draws the noise, then the steps.
            num_images_per_prompt: Images drawn of each pair of picture and label; they stand together.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple.

        Raises:
            ValueError: If an argument is out of range, a picture cannot be used, or the parts do not fit; before any
                network runs.
        """
        # 1. Check the arguments
        self.check_inputs(
            guidance_scale,
            temperature,
            num_images_per_prompt,
            output_type,
            callback_on_step_end_tensor_inputs,
            guidance_interval,
            callback_on_step_end,
        )
        num_images_per_prompt = operator.index(num_images_per_prompt)
        times = self._times(strength, num_steps, num_inference_steps)
        pixels = preprocess(image, *self.image_size, self.vqvae.config.in_channels)  # (B, C, H, W)
        ids = self._class_ids(class_labels)
        labels, number = self._pair({"pictures": len(pixels)}, ids, num_images_per_prompt, generator)

        # 2. Pictures to codes, noised to the first time
        codes = spread(self._encode(pixels), number, num_images_per_prompt)  # (number, h, w)
        latents = self.scheduler.add_noise(
            codes, torch.tensor(times[0], dtype=torch.float64, device="cpu"), generator
        )  # (number, h, w)

        # 3. The steps from there
        return super().__call__(
            labels,
            timesteps=times,
            guidance_scale=guidance_scale,
            temperature=temperature,
            generator=generator,
            num_images_per_prompt=number if ids is None else num_images_per_prompt,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance_interval=guidance_interval,
        )

    def _pair(
        self, given: dict[str, int], ids: list[int] | None, num_images_per_prompt: int, generator: Generators
    ) -> tuple[ClassLabels, int]:
        """A label for each pair of picture and label, and the number of images; `given` counts the pictures."""
        counts = given if ids is None else {**given, "labels": len(ids)}
        pairs = max(counts.values())
        if not all(count in (1, pairs) for count in counts.values()):
            names = {"pictures": "image holds", "masks": "mask_image", "labels": "class_labels"}
            said = ", ".join(f"{names[kind]} {count} {kind}" for kind, count in counts.items())
            raise ValueError(f"{said}: give as many, or one")
        number = pairs * num_images_per_prompt
        self.scheduler.check_generators(generator, number)
        labels: ClassLabels = None if ids is None else [*ids] * (pairs // len(ids))
        return labels, number

    def _times(self, strength: float, num_steps: int | None, num_inference_steps: int | None) -> list[float]:
        """The times of the steps, falling from `strength`."""
        check_strength(strength)
        steps = same_steps(num_steps, num_inference_steps, None)
        self.scheduler.set_timesteps(steps, start=float(strength))
        return self.scheduler.timesteps.tolist()


def check_strength(strength: float) -> None:
    """Raise ValueError unless it is a number in (0, 1]."""
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise ValueError(f"strength={strength!r}: must be a number in (0, 1]")
    if strength < 1e-6:
        raise ValueError(
            f"strength={strength!r} changes nothing; for the tokenizer's reconstruction use "
            "pipe.decode_latents(pipe.encode_images(image))"
        )


def spread(rows: torch.Tensor, number: int, num_images_per_prompt: int) -> torch.Tensor:
    """Rows (1, ...) or (pairs, ...) as one an image, (number, ...); those of one pair stand together."""
    pairs = rows.expand(number // num_images_per_prompt, *rows.shape[1:])
    return pairs.repeat_interleave(num_images_per_prompt, dim=0)
