"""The pipeline that the documents' code finds: small, of random weights, with the classes of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import VQModel
from xdlm_image.pipelines import XDLMPipeline

from xdlm_image.models import XDLMTransformer2DModel
from xdlm_image.schedulers import XDLMScheduler

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
NUM_CODES = 32


def save_docs_pipeline(folder: Path, k: float = 0.1) -> Path:
    """Save a class-conditional pipeline: 28 x 28 grey images on 7 x 7 codes out of 32, trained for guidance."""
    torch.manual_seed(0)
    transformer = XDLMTransformer2DModel(
        sample_size=7,
        num_embeds=NUM_CODES + 1,
        out_channels=NUM_CODES,
        num_classes=len(CLASSES),
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
    )
    for parameter in transformer.parameters():  # those that start at zero too, so that labels and codes matter
        torch.nn.init.normal_(parameter, std=0.3)
    vqvae = VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=4,
        vq_embed_dim=4,
        sample_size=28,
    )
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    scheduler = XDLMScheduler(k=k, num_codes=NUM_CODES)
    XDLMPipeline(transformer, scheduler, vqvae, id2label=dict(enumerate(CLASSES))).save_pretrained(folder)
    return folder
