"""XDLM within a picture: what a mask shows white is redrawn, and fits what is kept.

This file owns how kept codes enter the steps. How masks are read is `mask_images`', the noise at the beginning and the
pairing with labels `XDLMImg2ImgPipeline`'s, everything else `XDLMPipeline`'s. It imports only torch, diffusers, the
standard library and its siblings.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .class_labels import ClassLabels
from .init_images import InitImages, preprocess
from .mask_images import fit_masks, read_masks, sizes
from .pipeline_xdlm import Generators, XDLMPipeline
from .pipeline_xdlm_img2img import XDLMImg2ImgPipeline, spread
from .schedules import Interval, InTime


class XDLMInpaintPipeline(XDLMImg2ImgPipeline):
    """Images of a class that are a picture but for what a mask shows white.

    Kept codes stand clean in every state that the network sees: for k = 0, where a visible code is always right, the
    steps are then those of the conditional distribution; for k > 0 the network doubts them a little, as it doubts any
    code (odds k beta / (alpha N), times those of its own prediction against it). Noised again at each time, as the
    replacement method does, they would be lost as often as others are, and what is drawn early would not know of them.

    The same parts and files as `XDLMPipeline`: `from_pretrained` loads the same folder, and
    `XDLMInpaintPipeline.from_pipe(pipe)` shares the parts of one that is loaded.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: InitImages,
        mask_image: InitImages,
        class_labels: ClassLabels = None,
        strength: float = 1.0,
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
        keep_pixels: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Redraw the white area of a mask, and keep the rest.

        Args:
            image: As in `XDLMImg2ImgPipeline`.
            mask_image: White (1, True; from 0.5 on) is redrawn, black is kept. Given as pictures are, or as bool;
                as many as pictures, or one. Any size of its picture's proportions: it is scaled and cut as the picture
                is. A code is redrawn if any pixel of its cell is.
            class_labels: As in `XDLMImg2ImgPipeline`.
            strength: Time t in (0, 1] that the codes under white are noised to; at 1 nothing of them is known.
            num_steps, num_inference_steps: As in `XDLMImg2ImgPipeline`.
            guidance_scale, temperature, output_type, return_dict, callback_on_step_end_tensor_inputs,
                guidance_interval: As in `XDLMPipeline`.
            generator: One `torch.Generator`, or a list of one an image drawn: it draws the noise, then the steps.
            num_images_per_prompt: Images drawn of each picture, mask and label; they stand together.
            callback_on_step_end: As in `XDLMPipeline`. It is given latents with the kept codes in their places; what it
                returns is taken as it is, and kept codes come back in the next step.
            keep_pixels: Lay the picture's own pixels over the result where the mask is black. False leaves what the
                tokenizer makes of them.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple.

        Raises:
            ValueError: If an argument is out of range, a picture or mask cannot be used, they do not belong together,
                or the parts do not fit; before any network runs.
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
        if keep_pixels not in (True, False):
            raise ValueError(f"keep_pixels={keep_pixels!r}: must be True or False")
        num_images_per_prompt = operator.index(num_images_per_prompt)
        times = self._times(strength, num_steps, num_inference_steps)
        pixels = preprocess(image, *self.image_size, self.vqvae.config.in_channels)  # (B, C, H, W)
        ids = self._class_ids(class_labels)
        masks = read_masks(mask_image)
        given = {"pictures": len(pixels), "masks": len(masks)}
        labels, number = self._pair(given, ids, num_images_per_prompt, generator)
        white, painted = fit_masks(masks, sizes(image), *self.image_size, *self.transformer.grid)

        # 2. Pictures to codes; those under the mask noised to the first time
        known = spread(self._encode(pixels), number, num_images_per_prompt)  # (number, h, w)
        painted = spread(painted, number, num_images_per_prompt).to(known.device)  # (number, h, w)
        noisy = self.scheduler.add_noise(known, torch.tensor(times[0], dtype=torch.float64, device="cpu"), generator)
        latents = torch.where(painted, noisy, known)

        # 3. The steps from there; kept codes return to their places after each
        def keep(pipe: XDLMPipeline, i: int, t: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
            after = given["latents"]
            after.copy_(torch.where(painted, after, known))  # in place
            if callback_on_step_end is None:
                return {}  # latents that were returned would be checked, for which the device would be waited for
            return callback_on_step_end(pipe, i, t, {name: given[name] for name in callback_on_step_end_tensor_inputs})

        lays_over = keep_pixels and output_type != "latent"
        images = XDLMPipeline.__call__(
            self,
            labels,
            timesteps=times,
            guidance_scale=guidance_scale,
            temperature=temperature,
            generator=generator,
            num_images_per_prompt=number if ids is None else num_images_per_prompt,
            latents=latents,
            output_type="pt" if lays_over else output_type,
            return_dict=False,
            callback_on_step_end=keep,
            guidance_interval=guidance_interval,
        )[0]

        # 4. Own pixels over the result
        if lays_over:
            white, pixels = (spread(rows, number, num_images_per_prompt).to(images.device) for rows in (white, pixels))
            images = torch.where(white, images, self.image_processor.denormalize(pixels))  # (number, C, H, W)
            images = self.image_processor.postprocess(images, output_type, do_denormalize=[False] * number)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
