"""diffusers' own testers, unmodified, on our transformer and our pipeline.

Holds only what the testers ask for: the class, how to build a small one, and an input. Run by
`test_diffusers_conformity.py` in a process of its own, with a checkout of diffusers' repository on the path (its
`tests` package is where the testers live); pytest does not collect this file by itself.
"""

import importlib
import re
import unittest

import pytest
import tests.models.testing_utils as model_testers
import tests.pipelines.testing_utils as pipeline_testers
import torch
from diffusers import VQModel
from tests.pipelines import pipeline_params
from tests.testing_utils import torch_device

from xdlm_image import XDLMPipeline, XDLMScheduler, XDLMTransformer2DModel

CONFIG = {
    "sample_size": [3, 4],
    "num_embeds": 17,
    "out_channels": 16,
    "num_classes": 5,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "time_conditioning": "time",
}


def draw_all_weights(model: XDLMTransformer2DModel) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


# A fresh transformer predicts zeros, on which two outputs agree whatever was done to the weights between them.
XDLMTransformer2DModel.initialize_weights = draw_all_weights


# --- the transformer ------------------------------------------------------------------------------


class TransformerConfig(model_testers.BaseModelTesterConfig):
    model_class = XDLMTransformer2DModel
    main_input_name = "hidden_states"
    output_shape = (12, 16)

    def get_init_dict(self) -> dict:
        return dict(CONFIG)

    def get_dummy_inputs(self) -> dict:
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randint(17, (2, 12), generator=generator),
            "timestep": torch.rand(2, generator=generator),
            "class_labels": torch.randint(6, (2,), generator=generator),
        }
        return {name: value.to(torch_device) for name, value in inputs.items()}


class TestTransformer(TransformerConfig, model_testers.ModelTesterMixin):
    pass


class TestTransformerMemory(TransformerConfig, model_testers.MemoryTesterMixin):
    pass


class TestTransformerAttention(TransformerConfig, model_testers.AttentionTesterMixin):
    pass


class TestTransformerAttentionBackends(TransformerConfig, model_testers.AttentionBackendTesterMixin):
    pass


class TestTransformerCompile(TransformerConfig, model_testers.TorchCompileTesterMixin):
    pass


class TestTransformerTraining(TransformerConfig, model_testers.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied(expected_set={"XDLMTransformer2DModel"})


# --- the pipeline ---------------------------------------------------------------------------------


def components() -> dict:
    torch.manual_seed(0)
    vqvae = VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=16,
        lookup_from_codebook=True,
    )
    transformer = XDLMTransformer2DModel(**CONFIG)
    return {"transformer": transformer.eval(), "vqvae": vqvae.eval(), "scheduler": XDLMScheduler(k=0.3, num_codes=16)}


class PipelineConfig(pipeline_testers.BasePipelineTesterConfig):
    pipeline_class = XDLMPipeline
    required_input_params_in_call_signature = pipeline_params.CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
    batch_input_params = pipeline_params.CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    output_shape = (3, 6, 8)

    def get_dummy_components(self) -> dict:
        return components()

    def get_dummy_inputs(self) -> dict:
        return {"class_labels": [1], "generator": self.get_generator(), "num_inference_steps": 2, "output_type": "pt"}


class TestPipeline(PipelineConfig, pipeline_testers.PipelineTesterMixin):
    pass


class TestPipelineMemory(PipelineConfig, pipeline_testers.MemoryTesterMixin):
    pass


# The mixin of the same name in diffusers' older style (unittest, arrays). Its module imports the tests of many other
# models, and so their packages: transformers, parameterized, requests_mock.
try:
    older = importlib.import_module("tests.pipelines.test_pipelines_common")
except ImportError as error:
    OLDER_MISSING = f"tests/pipelines/test_pipelines_common.py cannot be imported here: {error}"
else:
    OLDER_MISSING = ""

    class OlderConfig:
        pipeline_class = XDLMPipeline
        params = pipeline_params.CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS
        batch_params = pipeline_params.CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
        image_params = image_latents_params = frozenset()  # no image goes in
        test_layerwise_casting = test_group_offloading = True

        def get_dummy_components(self) -> dict:
            return components()

        def get_dummy_inputs(self, device: str, seed: int = 0) -> dict:
            generator = torch.Generator().manual_seed(seed)
            return {"class_labels": [1], "generator": generator, "num_inference_steps": 2, "output_type": "np"}

    class TestPipelineOlder(OlderConfig, older.PipelineTesterMixin, unittest.TestCase):
        pass


# --- testers that do not apply --------------------------------------------------------------------

DOES_NOT_APPLY = {
    "Cache|PyramidAttention": "a cache answers for the network with the step before, which supposes latents that move "
    "a little; ours are codes that jump, so the transformer is no CacheMixin",
    "Lora": "no LoRA loader is offered: the transformer is no PeftAdapterMixin, the pipeline no LoraBaseMixin",
    "IPAdapter": "an IP adapter acts on cross-attention; ours has self-attention only",
    "Parallel": "splits one call over several devices by a plan of the model; ours has none, ranks share the batch",
    "Quant|AutoRound|BitsAndBytes|GGUF|ModelOpt|Nunchaku|SDNQ|TorchAo": "loads a published checkpoint from the Hub "
    "through a package for quantisation; ours names none",
    "SingleFile": "reads one file of an original repository; ours are diffusers folders from the start",
    "FromPipe": "makes a variant of Stable Diffusion of its components; ours is a variant of no other pipeline",
}


def left_out() -> list:
    """Testers of this checkout that no class above runs, and why."""
    run = [value for name, value in globals().items() if name.startswith("Test")]
    found = []
    for kind, module in (("model", model_testers), ("pipeline", pipeline_testers)):
        for name in sorted(name for name in dir(module) if name.endswith("TesterMixin")):
            if any(issubclass(test, getattr(module, name)) for test in run):
                continue
            reasons = [reason for pattern, reason in DOES_NOT_APPLY.items() if re.search(pattern, name)]
            reason = reasons[0] if reasons else "new in this release of diffusers, and not looked at yet"
            found.append(pytest.param(reason, id=f"{kind} {name}"))
    if OLDER_MISSING:
        found.append(pytest.param(OLDER_MISSING, id="pipeline PipelineTesterMixin in the older style"))
    return found


@pytest.mark.parametrize("reason", left_out())
def test_left_out(reason: str) -> None:
    pytest.skip(reason)
