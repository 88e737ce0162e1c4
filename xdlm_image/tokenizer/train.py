"""The verb `train-tokenizer`: train diffusers' `VQModel` on images, resumably, and save tokenizer and report.

This file owns the order of things: views of the data, step, checkpoint, end. It never measures a finished tokenizer
(`measure`) nor calls one (`codes`); the losses are in `losses`, the care of the codebook in `codebook`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from diffusers import VQModel
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from xdlm_image.data.image_check import check_images
from xdlm_image.data.images import ImageSet, normalise, open_images
from xdlm_image.devices import uncompiled
from xdlm_image.files import refuse_unwritable, share_permissions, write_json, write_text
from xdlm_image.metric_lines import MetricLines
from xdlm_image.processes import only_command
from xdlm_image.recipes import WHERE_IMAGES_ARE, TokenizerRecipe
from xdlm_image.tokenizer.codebook import draw_badly_served, kmeans, nearest
from xdlm_image.tokenizer.codes import INFO_FILE, grid_of, load_tokenizer, tokenizer_info
from xdlm_image.tokenizer.losses import PerceptualLoss, reconstruction_loss
from xdlm_image.tokenizer.measure import measure_tokenizer, save_reconstructions
from xdlm_image.training.batches import batch_indices, step_seed
from xdlm_image.training.checkpoints import (
    CheckpointFolder,
    TrainState,
    refuse_other_folders,
    refuse_other_recipe,
)
from xdlm_image.training.launch import make_accelerator
from xdlm_image.weights import weights_hash

REPORT_FILE = "report.json"
LATENTS_PER_CODE = 40  # for k-means
FREE_TO_CHANGE = ("output_dir", "num_workers", "log_every", "checkpoint_every", "resume", "extractor")


class TrainingViews(Dataset):
    """The endless stream of training images: position p -> float32 (C, S, S) in [-1, 1].

    Every position fixes its image (epoch p // N, reshuffled each epoch), its crop and its mirroring, so that a run
    that goes on from position p sees exactly what it would have seen, with any number of workers.
    """

    def __init__(self, images: ImageSet, seed: int, horizontal_flip: bool):
        self.images = images
        self.seed = seed
        self.horizontal_flip = horizontal_flip

    def __getitem__(self, position: int) -> torch.Tensor:
        index = batch_indices(len(self.images), self.seed, position, 1)[0]
        generator = torch.Generator().manual_seed(step_seed(self.seed, position))
        image = self.images.raw(int(index), generator)
        if self.horizontal_flip and float(torch.rand((), generator=generator)) < 0.5:
            image = image.flip(-1)
        return normalise(image)


class Positions(Sampler[int]):
    """The positions of one process from `first_step` on: step s of process r begins at (s * world + r) * batch."""

    def __init__(self, first_step: int, last_step: int, batch_size: int, rank: int, world: int):
        self.steps = range(first_step, last_step)
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        return len(self.steps) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            start = (step * self.world + self.rank) * self.batch_size
            yield from range(start, start + self.batch_size)


class Autoencoder(nn.Module):
    """A `VQModel` whose forward gives all that training needs, in one call that DDP can see."""

    def __init__(self, vqvae: VQModel):
        super().__init__()
        self.vqvae = vqvae

    def forward(
        self, images: torch.Tensor, quantise: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """images (B, C, S, S) -> reconstructions (B, C, S, S), codebook loss (), latents (M, D), codes (M,)."""
        vqvae = self.vqvae
        latents = vqvae.quant_conv(vqvae.encoder(images)).float()  # (B, D, h, w)
        flat = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)  # (M, D), M = B h w
        if quantise:
            with torch.autocast(images.device.type, enabled=False):  # distances between close rows need float32
                latents, loss, (_, _, codes) = vqvae.quantize(latents)
        else:
            loss = 0 * vqvae.quantize.embedding.weight.sum()  # DDP wants every weight in the graph
            codes = flat.new_zeros(0, dtype=torch.int64)
        sample = vqvae.decoder(vqvae.post_quant_conv(latents))
        return sample.float(), loss, flat, codes


def learning_rate_at(recipe: TokenizerRecipe, step: int) -> float:
    """Linear warm-up, then cosine decay to 0 at max_steps."""
    warm = min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.max_steps))


def build_vqvae(recipe: TokenizerRecipe) -> VQModel:
    """A fresh `VQModel` of the recipe's sizes."""
    options, levels = recipe.model, len(recipe.model.block_out_channels)
    vqvae = VQModel(
        in_channels=recipe.data.channels,
        out_channels=recipe.data.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(options.block_out_channels),
        layers_per_block=options.layers_per_block,
        latent_channels=options.latent_channels,
        sample_size=recipe.data.image_size,
        num_vq_embeddings=options.num_vq_embeddings,
        norm_num_groups=options.norm_num_groups,
        vq_embed_dim=options.vq_embed_dim,
        mid_block_add_attention=options.mid_block_add_attention,
        lookup_from_codebook=True,
    )
    vqvae.quantize.legacy = False  # the default puts the commitment weight on the codebook term
    vqvae.quantize.beta = recipe.commitment_weight
    return vqvae


def begin_at(vqvae: VQModel, folder: str) -> None:
    """Give it the weights and the codebook of the tokenizer in a folder. Raises ValueError if that has other sizes."""
    try:
        trained = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from={folder!r}: {error}") from error
    ours, theirs = (
        {name: [*value] if isinstance(value, tuple) else value for name, value in one.config.items() if name[0] != "_"}
        for one in (vqvae, trained)
    )
    other = [name for name in ours if name != "sample_size" and ours[name] != theirs[name]]
    if other:
        raise ValueError(
            f"init_from={folder!r}: its {other[0]} is {theirs[other[0]]}, this run's {ours[other[0]]}; give model and "
            "data those that it has"
        )
    vqvae.load_state_dict(trained.state_dict())


class TokenizerTraining:
    """One run: model, optimizer, weight average, use of codes, and their checkpoints."""

    def __init__(self, recipe: TokenizerRecipe):
        self.recipe = recipe
        self.output = Path(recipe.output_dir)
        self.checkpoints = CheckpointFolder(self.output / "checkpoints", "train-tokenizer")
        self.metrics = MetricLines(self.output)
        if not recipe.resume and (self.checkpoints.steps() or (self.output / INFO_FILE).exists()):
            raise ValueError(
                f"resume=False, but output_dir={recipe.output_dir!r} holds a run: remove it, or name another folder"
            )
        self.accelerator = make_accelerator(recipe)
        self.device = self.accelerator.device
        self.processes = self.accelerator.num_processes  # that train; any number may measure
        self.images = open_images(recipe.data, "train")
        self.test_images = open_images(recipe.data, "test")
        self.extractor = None
        if recipe.extractor is not None:  # now, in case it fails
            from xdlm_image.features.extractor import load_extractor

            self.extractor = load_extractor(recipe.extractor, self.device)
            self.extractor.check_images(recipe.data.channels, recipe.data.image_size)
        self.perceptual = None
        if recipe.perceptual is not None:
            perceptual = PerceptualLoss(recipe.perceptual, recipe.data.channels, recipe.data.image_size)
            self.perceptual = perceptual.to(self.device)
        set_seed(recipe.seed)
        vqvae = build_vqvae(recipe)
        if recipe.init_from is not None and not self.checkpoints.steps():
            begin_at(vqvae, recipe.init_from)
        self.grid = grid_of(vqvae, recipe.data.image_size)
        if self.accelerator.is_main_process:
            refuse_unwritable(self.output, "output_dir")
        for images in (self.images, self.test_images):
            check_images(images, recipe.num_workers)
        if self.device.type in ("cpu", "cuda"):
            vqvae.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(
            vqvae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
        if recipe.compile:  # not the quantizer, which is a lookup
            vqvae.encoder.compile()
            vqvae.decoder.compile()
        self.network, self.optimizer = self.accelerator.prepare(Autoencoder(vqvae), optimizer)
        self.vqvae: VQModel = self.accelerator.unwrap_model(self.network).vqvae
        self.ema = EMAModel(self.vqvae.parameters(), decay=recipe.ema_decay, foreach=True)
        names = [name for name, _ in self.vqvae.named_parameters()]
        self.ema_codebook = self.ema.shadow_params[names.index("quantize.embedding.weight")]
        self.last_use = torch.zeros(recipe.model.num_vq_embeddings, dtype=torch.int64, device=self.device)
        self.step = 0
        self.seconds = 0.0  # spent in training, over all resumes

    # ------------------------------------------------------------------------------------------ one step

    def train_step(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """One optimizer step on images (B, C, S, S); returns scalars as tensors, so that nothing waits for them."""
        recipe = self.recipe
        quantise = self.step >= recipe.plain_steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(recipe, self.step)
        with self.accelerator.autocast():
            sample, codebook_loss, latents, codes = self.network(images, quantise)
            perceptual = 0.0 if self.perceptual is None else self.perceptual(sample, images)
        loss = reconstruction_loss(recipe, sample, images) + codebook_loss + recipe.perceptual_weight * perceptual
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), recipe.gradient_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.vqvae.parameters())
        self.step += 1
        if quantise:
            self._note_use(latents, codes)
        squared = (sample.detach() - images).square().mean()
        return {"loss": loss.detach(), "squared_error": squared, "codebook_loss": codebook_loss.detach(), "norm": norm}

    def _note_use(self, latents: torch.Tensor, codes: torch.Tensor) -> None:
        """Remember which codes were used now; put latents in the place of codes that long were not."""
        every = self.recipe.revive_after
        used = torch.zeros_like(self.last_use).scatter_add_(0, codes, torch.ones_like(codes))  # bincount would wait
        counts = self.accelerator.reduce(used, "sum")
        self.last_use[counts > 0] = self.step
        if every == 0 or self.step % max(every // 4, 1):
            return
        dead = (self.step - self.last_use >= every).nonzero()[:, 0]
        if len(dead):
            generator = torch.Generator().manual_seed(step_seed(self.recipe.seed, self.step, micro_batch=1))
            _, distances = nearest(latents, self.vqvae.quantize.embedding.weight.detach())
            self._set_rows(dead, draw_badly_served(latents, distances, len(dead), generator))

    @torch.no_grad()
    def _set_rows(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Put rows (n, D) into the codebook and its average, the same on all processes; forget their moments."""
        rows = broadcast(rows.contiguous())
        weight = self.vqvae.quantize.embedding.weight
        weight[ids] = rows
        self.ema_codebook[ids] = rows
        self.last_use[ids] = self.step
        state = self.optimizer.state.get(weight, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name][ids] = 0

    @torch.no_grad()
    def init_codebook(self, views: TrainingViews) -> None:
        """k-means on the encoder's latents of the first training images (the same on every process)."""
        size = self.recipe.model.num_vq_embeddings
        number = -(-LATENTS_PER_CODE * size // math.prod(self.grid))
        latents = []
        for first in range(0, number, self.recipe.batch_size):
            positions = range(first, min(first + self.recipe.batch_size, number))
            batch = torch.stack([views[p] for p in positions]).to(self.device)
            with uncompiled(self.recipe.compile):
                latents.append(self.vqvae.encode(batch).latents.permute(0, 2, 3, 1).flatten(0, 2))
        generator = torch.Generator().manual_seed(self.recipe.seed)
        self._set_rows(torch.arange(size, device=self.device), kmeans(torch.cat(latents).float(), size, generator))

    # ------------------------------------------------------------------------------------------ checkpoints

    def _train_state(self) -> TrainState:
        return TrainState(self.vqvae, self.ema, self.optimizer, self.accelerator.scaler)

    def save_checkpoint(self) -> None:
        """Model, average, use of codes, optimizer and position."""
        if not self.accelerator.is_main_process:
            return
        state = {"seconds": self.seconds, "bound": self._bound()}
        self.checkpoints.save(self._train_state().pack(self.step, {"use": {"last_use": self.last_use}}, state))

    def resume(self) -> bool:
        """Load the newest checkpoint, if there is one; True if there was.

        Raises:
            ValueError: Processes see different ones; it is damaged, or was written by another recipe, on other images,
                or on the way by another number of processes.
        """
        refuse_other_folders(self.checkpoints)
        newest = self.checkpoints.load_newest()
        if newest is None:
            return False
        if newest.step == self.recipe.max_steps:  # only measuring is left
            self.processes = newest.state["bound"]["number of processes"]
        refuse_other_recipe(newest.state["bound"], self._bound(), self.output)
        self._train_state().unpack(newest)
        self.last_use.copy_(newest.tensors["use"]["last_use"])
        self.step, self.seconds = newest.step, newest.state["seconds"]
        return True

    def _bound(self) -> dict:
        """What must not change between checkpoint and resume, as JSON gives it back."""
        options = {k: v for k, v in dataclasses.asdict(self.recipe).items() if k not in FREE_TO_CHANGE}
        for group in ("data", "model"):
            options |= {f"{group}.{k}": v for k, v in options.pop(group).items() if k not in WHERE_IMAGES_ARE}
        options |= {
            "mixed_precision": self.accelerator.mixed_precision,
            "images": self.images.fingerprint,
            "perceptual": None if self.perceptual is None else self.perceptual.weights_hash,
            "number of processes": self.processes,
        }
        return dict(json.loads(json.dumps(options)))

    # ------------------------------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train to max_steps, with checkpoints and lines in `metrics.jsonl`."""
        recipe, accelerator = self.recipe, self.accelerator
        if self.resume():
            accelerator.print(f"going on from step {self.step} of {recipe.max_steps}")
        else:
            number = f"{self.processes} x {recipe.batch_size} = {self.processes * recipe.batch_size:,} images a step"
            number += f", of {len(self.images):,} in {recipe.data.root or recipe.data.name}"
            accelerator.print(f"begins {self.output}: number of processes x batch_size = {number}")
        if accelerator.is_main_process:
            self.metrics.forget_after(self.step)
            write_text(self.output / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
        views = TrainingViews(self.images, recipe.seed, recipe.horizontal_flip)
        positions = Positions(
            self.step, recipe.max_steps, recipe.batch_size, accelerator.process_index, accelerator.num_processes
        )
        loader = DataLoader(
            views,
            recipe.batch_size,
            sampler=positions,
            num_workers=recipe.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        bar = tqdm(
            total=recipe.max_steps,
            initial=self.step,
            desc="tokenizer",
            unit="step",
            disable=not accelerator.is_main_process,
            mininterval=1,
        )
        self.network.train()
        started = time.monotonic() - self.seconds
        layout = torch.channels_last if self.device.type in ("cpu", "cuda") else torch.contiguous_format
        for batch in loader:
            if self.step == recipe.plain_steps and recipe.init_from is None:
                self.init_codebook(views)
            scalars = self.train_step(batch.to(self.device, memory_format=layout, non_blocking=True))
            self.seconds = time.monotonic() - started
            bar.update()
            if self._due(recipe.log_every):
                bar.set_postfix(self._log(scalars))
            if self._due(recipe.checkpoint_every):
                self.save_checkpoint()
        bar.close()

    def _due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: only at the end) happens after this one."""
        return self.step == self.recipe.max_steps or (every > 0 and self.step % every == 0)

    def _log(self, scalars: dict[str, torch.Tensor]) -> dict[str, str]:
        values = {name: float(value) for name, value in scalars.items()}
        if not math.isfinite(values["loss"]):
            raise ValueError(f"step {self.step}: the loss is {values['loss']}: lower learning_rate")
        recent = self.last_use > max(
            self.recipe.plain_steps, self.step - (self.recipe.revive_after or TokenizerRecipe.revive_after)
        )
        used = int(recent.sum())
        psnr = 10 * math.log10(4 / max(values["squared_error"], 1e-12))  # the range of pixels is 2, its square 4
        if self.accelerator.is_main_process:
            line = {"step": self.step, "images": self.step * self.recipe.batch_size * self.accelerator.num_processes}
            self.metrics.append(line | values | {"psnr": psnr, "codes_alive": used, "seconds": round(self.seconds, 3)})
        return {"loss": f"{values['loss']:.4f}", "psnr": f"{psnr:.2f}", "codes": str(used)}

    def finish(self) -> None:
        """Save the averaged weights as the tokenizer, with `tokenizer.json`; then `report.json` and the picture.

        The processes share the measuring. Where it is killed, the same command, on any number of them, does it again;
        where it was done, with this extractor, all is kept.
        """
        recipe, main = self.recipe, self.accelerator.is_main_process
        vqvae = build_vqvae(recipe).to(self.device)
        self.ema.copy_to(vqvae.parameters())
        vqvae.eval().requires_grad_(False)
        measured = {
            "tokenizer_hash": weights_hash(vqvae),
            "images": self.test_images.fingerprint,
            "extractor": None if self.extractor is None else self.extractor.weights_hash,
        }
        [is_done] = broadcast_object_list([main and self._is_measured(measured)])
        if is_done:
            self.accelerator.print(f"{self.output}: trained and measured; kept")
            return
        if main:
            (self.output / REPORT_FILE).unlink(missing_ok=True)  # of a tokenizer that was here
            (self.output / INFO_FILE).unlink(missing_ok=True)  # written last: a tokenizer with it is whole
            vqvae.save_pretrained(self.output)
            share_permissions(self.output)
            write_json(
                self.output / INFO_FILE,
                {
                    "image_size": recipe.data.image_size,
                    "channels": recipe.data.channels,
                    "grid": list(self.grid),
                    "num_codes": recipe.model.num_vq_embeddings,
                    "tokenizer_hash": measured["tokenizer_hash"],
                    "data_fingerprint": self.images.fingerprint,
                    "data": dataclasses.asdict(recipe.data),
                },
            )
        report = measure_tokenizer(vqvae, self.test_images, recipe.batch_size, self.extractor, recipe.num_workers)
        if not main:
            return
        save_reconstructions(vqvae, self.test_images, self.output / "reconstructions.png")
        report |= {
            "measured": measured,
            "training": {
                "steps": self.step,
                "images_seen": self.step * recipe.batch_size * self.processes,
                "seconds": round(self.seconds, 1),
                "device": str(self.device),
                "parameters": sum(p.numel() for p in vqvae.parameters()),
            },
            "recipe": dataclasses.asdict(recipe) | {"mixed_precision": self.accelerator.mixed_precision},
        }
        write_json(self.output / REPORT_FILE, report)

    def _is_measured(self, measured: dict[str, str | None]) -> bool:
        """Whether the folder holds these weights, whole, and their report."""
        try:
            load_tokenizer(self.output)
            held = tokenizer_info(self.output) or {}
            report = json.loads((self.output / REPORT_FILE).read_text(encoding="utf-8"))
            return report["measured"] == measured and held.get("tokenizer_hash") == measured["tokenizer_hash"]
        except (OSError, ValueError, LookupError, TypeError):
            return False


def train_tokenizer(recipe: TokenizerRecipe) -> Path:
    """Train a tokenizer; returns its folder: a saved `VQModel`, `tokenizer.json`, `report.json`, a picture.

    Called again after a kill it goes on from the newest checkpoint and, on a CPU, computes the very same losses. A
    tokenizer that is trained but not measured can be measured by any number of processes.

    Raises:
        ValueError, FileNotFoundError: Options or files that cannot work, or another command at work in the folder;
            before any training.
    """
    training = TokenizerTraining(recipe)
    with only_command(training.output, training.accelerator.is_main_process):
        training.run()
        training.finish()
        training.accelerator.wait_for_everyone()
    return training.output
