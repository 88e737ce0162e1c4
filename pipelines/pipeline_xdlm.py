"""XDLM's pipeline: class labels in, images out, in few steps.

This file owns the user's call: it checks arguments, runs the steps in order and turns codes into pictures. It
never decides how codes move (the scheduler does), and changes no component. It imports only torch, diffusers,
the standard library and its siblings, so that it can travel beside the weights.
"""

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .class_labels import ClassLabels, read_names, read_synsets, resolve
from .schedules import Interval, InTime, check_interval, check_setting, guidance_at, value_at
from .self_contained import SelfContainedPipeline

DEFAULT_STEPS = 8
MIN_TEMPERATURE = 1e-6  # the least temperature: the argmax
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generators = torch.Generator | list[torch.Generator] | None


class XDLMPipeline(SelfContainedPipeline):
    """Class-conditional image generation by mixed discrete diffusion (XDLM, arXiv 2602.01362) on VQ codes.

    Latents are grids of codes, int64 (batch, rows, columns).

    Args:
        transformer: `XDLMTransformer2DModel`, predicts clean codes from noisy ones.
        scheduler: `XDLMScheduler` or a subclass, owns the noise and the reverse step.
        vqvae: The VQ tokenizer whose codes the transformer learned.
        id2label: Class id -> name; a name may list synonyms, "goldfish, Carassius auratus". Saved with the
            pipeline.
        supports_guidance: Whether the transformer was trained with its null class (class dropout), which
            guidance needs. Saved with the pipeline.
        id2synset: Class id -> WordNet id, "n01443537", by which a class can be named too. Saved with the pipeline.

    Raises:
        ValueError: If transformer or scheduler is of another kind, a key of `id2label` or `id2synset` is no class id
            of the transformer, or a text no name.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    _callback_tensor_inputs = ["latents"]
    _optional_components = ["vqvae"]
    PARTS = ("transformer", "scheduler", "vqvae")

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vqvae: VQModel,
        id2label: dict | None = None,
        supports_guidance: bool = True,
        id2synset: dict | None = None,
    ):
        super().__init__()
        if transformer is not None:  # a part that was not loaded
            _check_transformer(transformer)
        if scheduler is not None:
            _check_scheduler(scheduler)
        self.register_modules(transformer=transformer, scheduler=scheduler, vqvae=vqvae)
        num_classes = None if transformer is None else transformer.config.num_classes or 0
        labels = read_names("id2label", id2label, num_classes)
        synsets = read_synsets(id2synset, num_classes)
        if supports_guidance not in (True, False):
            raise ValueError(f"supports_guidance={supports_guidance!r}: must be True or False")
        self.register_to_config(id2label=labels, id2synset=synsets, supports_guidance=bool(supports_guidance))
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=True)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """A pipeline of this class that shares the parts and the labels of another; the parts stay as they are.

        diffusers' own would share a part only if its class were the very one of the annotation, which files that
        travel cannot import, and would cast what is shared to one dtype, under the hands of the other pipeline.

        Args:
            pipeline: Whose parts and labels are taken.
            **kwargs: Of `__init__`, instead of the other's; `dtype` (or `torch_dtype`) casts the shared parts too.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        labels = {name: pipeline.config.get(name) for name in ("id2label", "id2synset", "supports_guidance")}
        known = {name: value for name, value in labels.items() if value is not None}
        parts = {name: part for name, part in pipeline.components.items() if name in cls.PARTS}
        shared = cls(**{**known, **parts, **kwargs})
        if "_name_or_path" in pipeline.config:
            shared.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        return shared if dtype is None else shared.to(dtype=dtype)

    # --- properties -------------------------------------------------------------------------------

    @property
    def id2label(self) -> dict[int, str]:
        """Class id -> name; empty where the pipeline was saved without names."""
        return dict(self.config.id2label or {})

    @property
    def id2synset(self) -> dict[int, str]:
        """Class id -> WordNet id; empty where the pipeline was saved without them."""
        return dict(self.config.id2synset or {})

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        rows, columns = self.transformer.grid
        factor = 2 ** (len(self._tokenizer().config.block_out_channels) - 1)
        return rows * factor, columns * factor

    def _tokenizer(self) -> VQModel:
        if self.vqvae is None:
            raise ValueError("vqvae is None: pictures need the tokenizer; load it, or take output_type='latent'")
        return self.vqvae

    @property
    def guidance_scale(self) -> float:
        """Guidance of the step that runs; read again at every step."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a step runs the network on the doubled batch."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Reverse steps of the call that runs."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True skips the steps that are left; set `pipe._interrupt = True` in a callback."""
        return self._interrupt

    # --- labels -----------------------------------------------------------------------------------

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """Class ids of labels: ids, names, synonyms and synsets, one or several, mixed (`class_labels.resolve`).

        Raises:
            ValueError: If a label is no class or fits several; the error lists the nearest, or the several.
        """
        return self._class_ids(class_labels) or []

    def _class_ids(self, class_labels: ClassLabels) -> list[int] | None:
        """Checked ids, one an image prompt; None for an unconditional model."""
        return resolve(class_labels, self.transformer.config.num_classes, self.id2label, self.id2synset)

    # --- the stages of a call ---------------------------------------------------------------------

    def check_inputs(
        self,
        guidance_scale: InTime,
        temperature: InTime,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        guidance_interval: Interval = None,
        callback_on_step_end: Any = None,
    ) -> None:
        """Refuse parts that do not fit each other and arguments out of range, before any work.

        Raises:
            ValueError: Names the argument, its value and the remedy.
        """
        _check_transformer(self.transformer)
        _check_scheduler(self.scheduler)
        self.check_labels()
        process, config = self.scheduler.process, self.transformer.config
        if config.num_embeds != process.num_ids or config.out_channels != process.logits_width:
            raise ValueError(
                f"transformer takes {config.num_embeds} ids and gives {config.out_channels} logits, "
                f"scheduler {process.num_ids} and {process.logits_width}: they do not belong together"
            )
        self.scheduler.check_shape((1, *self.transformer.grid))
        if self.vqvae is not None or output_type != "latent":
            known = self._tokenizer().config.num_vq_embeddings
            if process.num_codes > known:
                raise ValueError(
                    f"scheduler draws from {process.num_codes} codes, vqvae has {known}: they do not belong together"
                )
        count("num_images_per_prompt", num_images_per_prompt)
        check_setting("guidance_scale", guidance_scale, lowest=0.0)
        check_interval("guidance_interval", guidance_interval)
        is_guided = {value_at(guidance_scale, t) for t in (0.0, 1.0)} != {1.0}
        if is_guided:
            self._refuse_guidance(guidance_scale)
        if not is_guided and guidance_interval is not None:
            no_guidance = f"does nothing with guidance_scale={guidance_scale}; leave it out"
            raise ValueError(f"guidance_interval={guidance_interval!r}: {no_guidance}")
        check_setting("temperature", temperature, lowest=0.0)
        if value_at(temperature, 1.0) < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature={temperature!r}: must be at least 1e-6, the argmax; only a pair's second may be 0"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end={callback_on_step_end!r}: must be a function, or None")
        names = callback_on_step_end_tensor_inputs
        if not isinstance(names, list | tuple) or any(name not in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={names!r}: must be a list, of {self._callback_tensor_inputs} or []"
            )

    def _refuse_guidance(self, guidance_scale: InTime) -> None:
        if self.transformer.config.num_classes is None:
            raise ValueError(f"guidance_scale={guidance_scale}: an unconditional model takes 1 only")
        if not self.config.supports_guidance:
            raise ValueError(
                f"guidance_scale={guidance_scale}: this model was trained without its null class "
                "(class dropout 0), which guidance needs; use 1"
            )

    def prepare_latents(
        self,
        batch_size: int,
        generator: Generators = None,
        device: torch.device | str | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Codes at t = 1, drawn or given.

        Args:
            batch_size: Images B.
            generator: One, or one an image.
            device: Where the codes go.
            latents: (B, rows, columns) int64 ids to start from; None draws the prior.

        Returns:
            (B, rows, columns) int64.

        Raises:
            ValueError: If `latents` has the wrong shape, dtype or range, or generators are none or the wrong number.
        """
        shape = (batch_size, *self.transformer.grid)
        self.scheduler.check_generators(generator, batch_size)
        if latents is None:
            return self.scheduler.prior(shape, generator=generator, device=device)  # (B, h, w)
        self._check_latents(latents, shape)
        return latents.to(device)  # (B, h, w)

    def _check_latents(self, latents: torch.Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(latents, torch.Tensor):
            raise ValueError(f"latents is a {type(latents).__name__}: give a tensor {shape}, int64")
        if latents.shape != shape or latents.dtype != torch.int64:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)} and dtype {latents.dtype}: expected {shape}, int64"
            )
        lowest, highest = torch.stack(latents.aminmax()).tolist()
        num_ids = self.scheduler.process.num_ids
        if lowest < 0 or highest >= num_ids:
            raise ValueError(f"latents holds ids from {lowest} to {highest}: they must lie in [0, {num_ids})")

    def guide(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of a step from the network's: uncond + s (cond - uncond), float32, where the call is guided.

        Args:
            logits: (B, L, V), of a guided call (2B, L, V), the labelled half first.

        Returns:
            (B, L, V).
        """
        if not self.do_classifier_free_guidance:
            return logits
        cond, uncond = logits.float().chunk(2)  # 2 x (B, L, V)
        return uncond + self.guidance_scale * (cond - uncond)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of clean codes.

        Args:
            latents: (B, rows, columns) int64 codes, each below the size of the codebook.

        Returns:
            (B, channels, height, width) float32, about [-1, 1].

        Raises:
            ValueError: If they are no grids of int64, or an id is no code, such as the mask.
        """
        if latents.ndim != 3 or latents.dtype != torch.int64:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)} and dtype {latents.dtype}: expected (batch, rows, columns), "
                "int64"
            )
        config, quantize = self._tokenizer().config, self.vqvae.quantize
        lowest, highest = torch.stack(latents.aminmax()).tolist()
        if lowest < 0 or highest >= config.num_vq_embeddings:
            raise ValueError(
                f"latents holds ids from {lowest} to {highest}, the codebook has {config.num_vq_embeddings}: "
                "masks are left (were steps skipped, or did a callback put them?); "
                'output_type="latent" returns them'
            )
        shape = (*latents.shape, config.vq_embed_dim or config.latent_channels)
        if config.lookup_from_codebook:
            images = self.vqvae.decode(latents, force_not_quantize=True, shape=shape).sample
        else:  # decodes vectors only: look them up where the codebook lies, offloading may have moved it
            home = quantize.embedding.weight.device
            codes = latents if home.type == "meta" else latents.to(home)
            vectors = quantize.get_codebook_entry(codes, shape).to(latents.device)  # (B, d, h, w)
            images = self.vqvae.decode(vectors, force_not_quantize=True).sample
        return images.float()  # (B, C, H, W)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels = None,
        num_steps: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: InTime = 1.0,
        temperature: InTime = 1.0,
        generator: Generators = None,
        num_images_per_prompt: int = 1,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: Sequence[float] | None = None,
        guidance_interval: Interval = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: Id or name, or several in a list or a tensor; None for an unconditional model.
            num_steps: Reverse steps, 8 by default. Each runs the network once.
            num_inference_steps: Another name of `num_steps`.
            guidance_scale: s in logits = uncond + s (cond - uncond). 1 is none; any other doubles the batch. A pair
                runs linearly in time from its first, at t = 1 where noise is, to its second at t = 0.
            temperature: Divides the logits; at least 1e-6, the argmax. A pair as for `guidance_scale`, whose second may
                be 0; wherever it falls below 1e-6 it is the argmax.
            generator: One `torch.Generator`, or a list of one an image (batch x num_images_per_prompt): an
                image with its own generator does not depend on what else is in the batch.
            num_images_per_prompt: Images a label; those of one label stand together.
            latents: (B, rows, columns) int64 ids to start from instead of the prior.
            output_type: `pil` (mode L or RGB), `np` ((B, H, W, C) in [0, 1]), `pt` ((B, C, H, W) in [0, 1])
                or `latent` ((B, rows, columns) codes).
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: Called after step i as `callback(pipe, i, t, {"latents": ...})`; what it
                returns under "latents" replaces them, and must be ids too; to be able to tell, such a call waits for
                the device after each step.
            callback_on_step_end_tensor_inputs: Which of `_callback_tensor_inputs` it is given.
            timesteps: Own falling times in (0, 1] in the place of `num_steps`. Where the first is below 1, `latents`
                must be codes noised to that time (`scheduler.add_noise`).
            guidance_interval: (low, high): only steps from times low < t <= high are guided; None guides all. Where
                none is left to be guided, a warning says so.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple.

        Raises:
            ValueError: If an argument is out of range or the parts do not fit; before any work.
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
        num_steps = same_steps(num_steps, num_inference_steps, timesteps)
        ids = self._class_ids(class_labels)
        changes = guidance_interval is not None or isinstance(guidance_scale, list | tuple)
        self._guidance_scale = guidance_at(guidance_scale, guidance_interval, 1.0)
        self._interrupt = False

        # 2. Labels: each as often as images are wanted of it
        device = self._execution_device
        batch_size = num_images_per_prompt * (1 if ids is None else len(ids))
        labels = labels_and_null = None
        if ids is not None:
            labels = torch.tensor(ids, device=device).repeat_interleave(num_images_per_prompt)  # (B,)
            null = torch.full_like(labels, self.transformer.config.num_classes)  # (B,)
            labels_and_null = torch.cat([labels, null])  # (2B,)

        # 3. Times and noise
        self.scheduler.set_timesteps(num_steps, device=device, timesteps=timesteps)
        times = self.scheduler.timesteps
        if latents is None and times[0] < 1:
            raise ValueError(f"timesteps begins at {times[0]:g}: give latents noised to that time, or begin at 1")
        times_on_device = times.float().to(device)  # all at once: no step waits for its time to arrive
        self._num_timesteps = len(times)
        if changes and all(guidance_at(guidance_scale, guidance_interval, t) == 1 for t in times.tolist()):
            warnings.warn(  # once for many calls alike
                f"guidance_scale={guidance_scale} guides no step: they leave the times {_listed(times.tolist())}, "
                f"guidance_interval={guidance_interval}",
                # beyond torch.no_grad, and in pipelines that call this one beyond theirs
                stacklevel=3 if type(self).__call__ is XDLMPipeline.__call__ else 5,
            )
        latents = self.prepare_latents(batch_size, generator, device, latents)  # (B, h, w)
        generator = self.scheduler.draw_ahead(generator, latents.shape, device)

        # 4. Reverse steps
        with self.progress_bar(total=len(times)) as progress_bar:
            for i, t in enumerate(times):
                if self.interrupt:
                    continue
                if changes:  # else a callback may have set it
                    self._guidance_scale = guidance_at(guidance_scale, guidance_interval, float(t))
                codes = latents.flatten(1)  # (B, L)
                guided = self.do_classifier_free_guidance
                if guided:
                    self._refuse_guidance(self._guidance_scale)  # a callback's
                logits = self.transformer(
                    torch.cat([codes, codes]) if guided else codes,
                    timestep=times_on_device[i],
                    class_labels=labels_and_null if guided else labels,
                    return_dict=False,
                )[0]  # (B, L, V), guided (2B, L, V)
                logits = self.guide(logits)  # (B, L, V)
                now = max(value_at(temperature, float(t)), MIN_TEMPERATURE)
                step = {"generator": generator, "temperature": now, "return_dict": False}
                grids = logits.unflatten(1, latents.shape[1:])  # (B, h, w, V)
                latents = self.scheduler.step(grids, t, latents, **step)[0]  # (B, h, w)

                if callback_on_step_end is not None:
                    given = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    returned = callback_on_step_end(self, i, t, given)
                    if not isinstance(returned, dict):
                        raise ValueError(
                            f"callback_on_step_end returned a {type(returned).__name__}: return the dict it was given"
                        )
                    if "latents" in returned:  # others than were given, or written to in place
                        self._check_latents(returned["latents"], tuple(latents.shape))
                        latents = returned["latents"].to(device)
                progress_bar.update()
        self.scheduler.check_finite()  # where the last step was not taken

        # 5. Codes to pictures
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)

        # 6. Give offloaded models back
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)


def _listed(times: Sequence[float]) -> str:
    return ", ".join(f"{t:.4g}" for t in times[:8]) + (", ..." if len(times) > 8 else "")


def _check_scheduler(scheduler: Any) -> None:
    if getattr(scheduler, "process", None) is None:
        raise ValueError(f"scheduler is a {type(scheduler).__name__}: must be an XDLMScheduler, which knows the noise")


def _check_transformer(transformer: Any) -> None:
    if not hasattr(getattr(transformer, "config", None), "num_embeds"):
        raise ValueError(f"transformer is a {type(transformer).__name__}: must be an XDLMTransformer2DModel")


def count(name: str, value: Any) -> int:
    """An int of whatever stands for one (NumPy's and torch's do, bool does not); ValueError if it is none from 1 on."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number, at least 1")
    return number


def same_steps(num_steps: int | None, num_inference_steps: int | None, timesteps: Sequence[float] | None) -> int | None:
    """The step count that two names of one argument agree on; None where times are given instead."""
    names = (("num_steps", num_steps), ("num_inference_steps", num_inference_steps))
    given = [count(name, value) for name, value in names if value is not None]
    if given and timesteps is not None:
        raise ValueError(f"num_steps={given[0]} and timesteps: give the number of steps, or their times")
    if len(set(given)) == 2:
        raise ValueError(
            f"num_steps={num_steps} and num_inference_steps={num_inference_steps}: they are two names of one "
            "argument, give one"
        )
    if timesteps is not None:
        return None
    return given[0] if given else DEFAULT_STEPS
