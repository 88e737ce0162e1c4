"""The training loop: the order of things, and nothing but the order.

It opens the cache, builds the network, and for each step draws a batch, times and noise, takes the loss, steps
optimizer, schedule and average; now and then it logs, validates, samples and checkpoints. Everything random in a
step is a function of (seed, step, rank) (`batches.py`), so a killed run goes on bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from timm.optim import create_optimizer_v2
from tqdm.auto import tqdm

from xdlm_image.data.code_cache import CodeCache
from xdlm_image.data.labels import labels_of_folders
from xdlm_image.devices import uncompiled
from xdlm_image.drawing.grids import class_grid, save_grid
from xdlm_image.drawing.opening import class_names
from xdlm_image.drawing.sampler_settings import SamplerSettings
from xdlm_image.files import new_folder, write_text
from xdlm_image.metric_lines import MetricLines
from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.objective import XDLMLoss
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.processes import only_command
from xdlm_image.recipes import TrainRecipe
from xdlm_image.schedulers import XDLMProcess, XDLMScheduler
from xdlm_image.tokenizer.codes import load_tokenizer
from xdlm_image.tokenizer.measure import SHOWN_AT_ONCE
from xdlm_image.training.batches import batch_indices, rank_positions, step_seed, stratified_times
from xdlm_image.training.beginning import begin_at
from xdlm_image.training.checkpoints import Checkpoint, CheckpointFolder, TrainState, refuse_other_folders
from xdlm_image.training.going_on import IMAGES_A_STEP, changes_of, refuse_other_beginning, what_binds
from xdlm_image.training.launch import make_accelerator
from xdlm_image.training.meters import LossMeter
from xdlm_image.training.trackers import log_picture, refuse_missing, start_trackers
from xdlm_image.training.validation import validation_nelbo

SAMPLE_CLASSES, SAMPLES_PER_CLASS = 10, 8  # of the sample grids drawn while training
TIMM_OPTIMIZERS = {"adamw": "adamw", "muon": "nmuon"}  # Muon with Nesterov momentum, as its author uses it
ADAMW_UNDER_MUON = ("*_embed*", "*adaln*", "proj_out.*")  # tables, modulation and head are no maps between features


def train(recipe: TrainRecipe) -> Path:
    """Train as the recipe says and save the averaged weights as a pipeline.

    Returns:
        The folder of the saved pipeline, `output_dir/pipeline`.

    Raises:
        ValueError: Before any training, if caches, tokenizer, recipe and run folder do not fit together, or another
            command is at work in the folder.
        FileNotFoundError: If one of them is not there.
    """
    run = TrainingRun(recipe)
    with only_command(run.output_dir, run.accelerator.is_main_process):
        run.resume()
        run.go()
        pipeline = run.save_pipeline()
        run.accelerator.end_training()
    return pipeline


def refuse_other_images(codes: CodeCache, validation: CodeCache) -> list[str]:
    """Raise ValueError unless both caches hold other images of the same classes on the same grid.

    Returns:
        What cannot be checked, a sentence each.
    """
    argument = f"validation_codes={str(validation.path)!r}"
    for name in ("grid", "num_codes", "class_names"):
        ours, theirs = getattr(codes.manifest, name), getattr(validation.manifest, name)
        if ours != theirs:
            raise ValueError(
                f"{argument}: its {name} is {str(theirs)[:80]}, that of codes is "
                f"{str(ours)[:80]}; encode both with one recipe"
            )
    if codes.manifest.data_fingerprint == validation.manifest.data_fingerprint:
        raise ValueError(f"{argument}: the training images; name another split")
    ours, theirs = codes.manifest.cut, validation.manifest.cut
    if ours is None or theirs is None:
        return [
            f"{argument}: one of the caches was written before caches recorded how images were split, so an overlap of "
            "training and validation images cannot be ruled out"
        ]
    if ours != theirs and ours.get("of") == theirs.get("of"):
        raise ValueError(
            f"{argument}: cut off the same images with data.validation_fraction={theirs.get('validation')}, codes "
            f"with {ours.get('validation')}, so that some train and validate; encode both with one"
        )
    return []


class TrainingRun:
    """One run: its parts, its step counter, and what can be done with them.

    Args:
        recipe: The recipe. Everything is checked here, before any training.
    """

    def __init__(self, recipe: TrainRecipe) -> None:
        refuse_missing(recipe.trackers)
        self.accelerator = make_accelerator(recipe)
        self.recipe = recipe
        self.output_dir = Path(recipe.output_dir)
        self.checkpoints = CheckpointFolder(self.output_dir / "checkpoints", "train", recipe.keep_checkpoints)
        self.metrics = MetricLines(self.output_dir)
        if not recipe.resume and self.checkpoints.steps():
            raise ValueError(
                f"output_dir={recipe.output_dir!r}: already holds checkpoints; resume them (resume=true), remove them, "
                "or name another folder"
            )
        self.tokenizer = recipe.tokenizer or CodeCache.open(recipe.codes).manifest.tokenizer  # its folder
        if not recipe.tokenizer and not (self.tokenizer and Path(self.tokenizer).is_dir()):
            raise FileNotFoundError(
                f"tokenizer: left out, and the codes in {recipe.codes} were made by {self.tokenizer!r}, which is no "
                "folder here; name where it is"
            )
        self.vqvae = load_tokenizer(self.tokenizer)
        self.cache = self._open_cache(recipe.codes)
        self.validation_cache: CodeCache | None = None
        if recipe.validation_codes:
            self.validation_cache = self._open_cache(recipe.validation_codes, "validation_codes")
        notes = [] if self.validation_cache is None else refuse_other_images(self.cache, self.validation_cache)
        manifest = self.cache.manifest
        self.process = XDLMProcess(recipe.process.k, manifest.num_codes, recipe.process.definition, **self._ids())
        self.class_names = manifest.class_names if recipe.conditional else None
        torch.manual_seed(step_seed(recipe.seed, 0))
        transformer = XDLMTransformer2DModel(
            sample_size=list(manifest.grid),
            num_embeds=self.process.num_ids,
            out_channels=self.process.logits_width,
            num_classes=None if self.class_names is None else len(self.class_names),
            **dataclasses.asdict(recipe.model),
        )
        if recipe.init_from is not None and not self.checkpoints.steps():
            notes += begin_at(transformer, recipe.init_from, self.class_names, manifest.tokenizer_hash)
        for note in notes:
            self.accelerator.print(note)
        if recipe.attention_backend is not None:
            try:
                transformer.set_attention_backend(recipe.attention_backend)
            except (ValueError, RuntimeError, ImportError) as error:
                raise ValueError(f"attention_backend={recipe.attention_backend!r}: {error}") from error
        if recipe.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        optimizer = create_optimizer_v2(
            transformer,
            opt=TIMM_OPTIMIZERS[recipe.optimizer],
            fallback_list=ADAMW_UNDER_MUON if recipe.optimizer == "muon" else (),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
        )
        self.ema = EMAModel(transformer.parameters(), decay=recipe.ema_decay, foreach=True)
        self.ema.to(self.accelerator.device)
        if recipe.compile:
            transformer.compile(fullgraph=True)
        self.model, self.optimizer = self.accelerator.prepare(XDLMLoss(transformer, self.process), optimizer)
        self.schedule = get_scheduler(
            {"constant": "constant_with_warmup"}.get(recipe.lr_schedule, recipe.lr_schedule),
            self.optimizer.optimizer,
            num_warmup_steps=recipe.warmup_steps,
            num_training_steps=recipe.max_steps,
        )
        self.meter = LossMeter(self.process.mask, self.accelerator.device)
        self.step = 0
        self.init_from = recipe.init_from  # where the weights began, whatever a resumed run names
        self.timed_steps, self.seconds = 0, 0.0  # since the last log line
        self.began: float | None = None  # when the clock was started; None while it stands still
        self.loss = torch.zeros(())  # of the last step, on this process
        self.learning_rate = 0.0  # of the last step
        self.gradient_norm: torch.Tensor | None = None  # before clipping; None where nothing is clipped

    def _open_cache(self, path: str, argument: str = "codes") -> CodeCache:
        cache = CodeCache.open(path, argument)
        cache.check(tokenizer=self.vqvae)
        cache.verify()
        return cache

    def _ids(self) -> dict[str, int]:
        """Definition B gets one mask id above the codes, and uniform noise over it, as in the paper's code."""
        K = self.cache.manifest.num_codes
        return {"vocab_size": K + 1, "mask_id": K} if self.recipe.process.definition == "B" else {}

    @property
    def transformer(self) -> XDLMTransformer2DModel:
        """The network, without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model).transformer

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now (0: never but at the end)."""
        return every > 0 and self.step % every == 0

    def go(self) -> None:
        """Every step that is left, and what is due after it."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        stop = min(recipe.max_steps, recipe.stop_after or recipe.max_steps)
        with tqdm(total=recipe.max_steps, initial=self.step, desc="train", unit="step", disable=not main) as bar:
            while self.step < stop:
                loss = self.train_step()
                bar.update()
                if self.step % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                end = self.step == recipe.max_steps
                if self.due(recipe.log_every) or end:
                    self.log_training()
                if self.due(recipe.validate_every) or end:
                    self.validate()
                if self.due(recipe.sample_every) or end:
                    self.draw_samples()
                if self.due(recipe.pipeline_every):  # before the checkpoint, so that a killed run makes up for it
                    self.save_pipeline(f"pipelines/step-{self.step:08d}")
                if self.due(recipe.checkpoint_every) or self.step == stop:
                    self.save_checkpoint()

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self) -> torch.Tensor:
        """One optimizer step; returns the mean loss of this process, nats per token."""
        if self.began is None:
            self.began = time.perf_counter()
        recipe = self.recipe
        self.model.train()
        losses = []
        for micro_batch in range(recipe.gradient_accumulation_steps):
            *drawn, labels = self._draw(micro_batch)
            z, x, t = (self._on_device(value) for value in drawn)
            labels = None if labels is None else self._on_device(labels)
            with self.accelerator.accumulate(self.model):
                loss = self.model(z, x, t, labels)
                self.accelerator.backward(loss.mean)
                if self.accelerator.sync_gradients and recipe.gradient_clip > 0:
                    self.gradient_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.meter.update(loss.per_token, z, x, t)
            losses.append(loss.mean.detach())
        self.learning_rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.ema.step(self.transformer.parameters())
        self.step += 1
        self.timed_steps += 1
        self.loss = torch.stack(losses).mean()
        return self.loss

    def _on_device(self, value: torch.Tensor) -> torch.Tensor:
        device = self.accelerator.device
        if device.type == "cuda":  # a copy from memory that is not pinned would wait for the step before
            return value.pin_memory().to(device, non_blocking=True)
        return value.to(device)

    def _stop_clock(self) -> None:
        """Count the time since steps began, once the device has done them: whatever is no training comes next."""
        if self.began is not None:
            self.loss.item()  # waits
            self.seconds += time.perf_counter() - self.began
            self.began = None

    def _draw(self, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Noisy codes z, clean codes x (B, L), times (B,), labels with class dropout (B,) or None: on the CPU."""
        recipe, accelerator = self.recipe, self.accelerator
        size, rank, world = recipe.batch_size, accelerator.process_index, accelerator.num_processes
        seed = step_seed(recipe.seed, self.step + 1, rank, micro_batch)
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator().manual_seed(seed)
        first = rank_positions(self.step, micro_batch, size, recipe.gradient_accumulation_steps, world, rank)
        indices = batch_indices(len(self.cache), recipe.seed, first, size)
        flips = torch.rand(size, generator=generator) < (0.5 if self.cache.manifest.num_views > 1 else 0.0)
        x, labels = self.cache.batch(indices, flips.numpy())
        t = stratified_times(size, recipe.t_min, generator, rank, world)
        alpha, beta = self.process.alpha_beta(t)
        z = self.process.noise(x, alpha, beta, generator)
        if self.class_names is None:
            return z, x, t.float(), None
        dropped = torch.rand(size, generator=generator) < (recipe.class_dropout or 0.0)
        return z, x, t.float(), torch.where(dropped, len(self.class_names), labels)

    # -- now and then -------------------------------------------------------------------------------------------------

    def log_training(self) -> None:
        """Means since the last log line, to the trackers and `metrics.jsonl`."""
        self._stop_clock()
        self._refuse_divergence()
        values = {f"train/{name}": value for name, value in self.meter.take(self.accelerator).items()}
        images = self.recipe.batch_size * self.recipe.gradient_accumulation_steps * self.accelerator.num_processes
        if self.gradient_norm is not None:
            values["train/gradient_norm"] = float(self.gradient_norm)
        values["train/learning_rate"] = self.learning_rate
        values["train/images_per_second"] = images * self.timed_steps / max(self.seconds, 1e-9)
        values["train/images"] = float(images * self.step)
        self.timed_steps, self.seconds = 0, 0.0
        self._log(values)

    def _refuse_divergence(self) -> None:
        """Stop before weights that are lost push good ones out of the checkpoints."""
        if not bool(torch.isfinite(self.loss)):
            raise ValueError(
                f"step {self.step}: the loss is {self.loss.item()}; lower learning_rate={self.recipe.learning_rate} or "
                f"gradient_clip={self.recipe.gradient_clip} and begin again in another output_dir"
            )

    def validate(self) -> None:
        """NELBO of the averaged weights on the validation codes."""
        if self.validation_cache is None:
            return
        self._stop_clock()
        with self.averaged_weights():
            values = validation_nelbo(
                self.accelerator.unwrap_model(self.model),
                self.validation_cache,
                self.accelerator,
                self.recipe.validation_samples,
                self.recipe.batch_size,
            )
        self._log({f"validation/{name}": value for name, value in values.items()})
        accuracy = f", {100 * values['accuracy']:.2f} % of hidden codes guessed" if "accuracy" in values else ""
        error = f" (+- {values['bits_per_token_stderr']:.4f})" if "bits_per_token_stderr" in values else ""
        bits = f"{values['bits_per_token']:.4f} bits per token{error}"
        self.accelerator.print(f"step {self.step}: validation NELBO {bits}{accuracy}")

    def draw_samples(self) -> None:
        """A class grid from the averaged weights: `samples/step-N.png`."""
        self._stop_clock()
        if not self.accelerator.is_main_process:
            return
        pipeline = self._pipeline()
        pipeline.set_progress_bar_config(disable=True)
        names = class_names(pipeline)[:SAMPLE_CLASSES]
        ids = range(len(names)) if names else [0] * SAMPLE_CLASSES  # rows of an unconditional pipeline
        with self.averaged_weights():
            images = class_grid(
                pipeline,
                ids,
                per_class=SAMPLES_PER_CLASS,
                seed=0,
                settings=SamplerSettings(num_steps=self.recipe.sample_steps),
                batch_size=SHOWN_AT_ONCE,
            )
        path = save_grid(self.output_dir / "samples" / f"step-{self.step:08d}.png", images, row_names=names or None)
        log_picture(self.accelerator, "samples", path, self.step)

    def _log(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.step)
        if self.accelerator.is_main_process:
            self.metrics.append({"step": self.step, **values})

    # -- state --------------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The average in place of the trained weights, in evaluation mode."""
        parameters = list(self.transformer.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.transformer.eval()
        try:
            with uncompiled(self.recipe.compile):
                yield
        finally:
            self.ema.restore(parameters)
            self.transformer.train()

    def _bound(self) -> dict[str, Any]:
        accelerator = self.accelerator
        bound = what_binds(self.recipe, self.cache.manifest, accelerator.num_processes, accelerator.mixed_precision)
        return bound | {"init_from": self.init_from}

    def _train_state(self) -> TrainState:
        return TrainState(self.transformer, self.ema, self.optimizer, self.accelerator.scaler)

    def save_checkpoint(self) -> None:
        """Model, average, optimizer, schedule, meter and position; random numbers follow from the position."""
        self._stop_clock()
        self._refuse_divergence()
        meter = self.meter.totals(self.accelerator)
        if self.accelerator.is_main_process:
            state = {"schedule": self.schedule.state_dict(), "bound": self._bound()}
            self.checkpoints.save(self._train_state().pack(self.step, {"meter": meter}, state))
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; in either case write the recipe and start the trackers.

        Raises:
            ValueError: If processes see different checkpoints, or the newest is damaged, or the recipe changes what
                may not change (`going_on.py`), or a tracker cannot begin.
        """
        refuse_other_folders(self.checkpoints)
        newest = self.checkpoints.load_newest()
        if newest is None:
            cut = [self._bound()[name] for name in IMAGES_A_STEP]
            product = f"{' x '.join(IMAGES_A_STEP)} = {' x '.join(map(str, cut))}"
            number = f"{math.prod(cut):,} images a step, of {len(self.cache):,}"
            self.accelerator.print(f"begins {self.output_dir}: {product} = {number}")
        else:
            self._go_on(newest)
        resolved = dataclasses.asdict(self.recipe)
        resolved |= {"init_from": self.init_from, "mixed_precision": self.accelerator.mixed_precision}
        resolved["tokenizer"] = self.tokenizer
        start_trackers(self.accelerator, self.recipe.trackers, self.output_dir, self.step, resolved)
        if self.accelerator.is_main_process:
            self.metrics.forget_after(self.step)
            write_text(self.output_dir / "recipe.yaml", yaml.safe_dump(resolved, sort_keys=False))

    def _go_on(self, newest: Checkpoint) -> None:
        saved = newest.state["bound"]
        self.init_from = saved.get("init_from")
        notes = changes_of(saved, self._bound(), newest.step, self.output_dir)
        refuse_other_beginning(self.recipe.init_from, self.init_from, self.output_dir)
        if self.recipe.stop_after is not None and self.recipe.stop_after < newest.step:
            raise ValueError(
                f"stop_after={self.recipe.stop_after}: the run in {self.output_dir} has done {newest.step} steps "
                "already; name more, or leave it out"
            )
        self._train_state().unpack(newest)
        self.schedule.load_state_dict(newest.state["schedule"])
        self.meter.restore(newest.tensors["meter"], self.accelerator)
        self.step = newest.step
        if self.recipe.init_from is not None:
            notes.append(f"init_from={self.recipe.init_from!r} is not read again: the checkpoint's weights go on")
        self.accelerator.print("\n".join([f"resumed {self.output_dir} at step {self.step}", *notes]))

    # -- result -------------------------------------------------------------------------------------------------------

    def _pipeline(self) -> XDLMPipeline:
        return XDLMPipeline(
            transformer=self.transformer,
            scheduler=XDLMScheduler.from_process(self.process),
            vqvae=self.vqvae.to(self.accelerator.device),
            supports_guidance=bool(self.recipe.class_dropout),
            **({} if self.class_names is None else labels_of_folders(self.class_names)._asdict()),
        )

    def save_pipeline(self, name: str = "pipeline") -> Path:
        """The averaged weights as a pipeline folder, `output_dir/name`, whole or not at all."""
        self._stop_clock()
        final = self.output_dir / name
        if self.accelerator.is_main_process:
            with new_folder(final) as partial, self.averaged_weights():
                self._pipeline().save_pretrained(partial)
        self.accelerator.wait_for_everyone()
        return final
