"""diffusers' DiTPipeline in a sweep beside ours."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from tiny_parts import SIZE

from xdlm_image import XDLMImg2ImgPipeline, XDLMInpaintPipeline, XDLMPipeline
from xdlm_image.drawing.foreign_pipelines import ForeignPipeline
from xdlm_image.drawing.opening import open_any_pipeline, pipeline_hash
from xdlm_image.drawing.sampler_settings import SamplerSettings
from xdlm_image.evaluation import sweep
from xdlm_image.evaluation.sweep import evaluate
from xdlm_image.seeds import image_generators

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few for the.*:UserWarning")


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A DiT of random weights for 16 x 16 images of 1,000 classes."""
    folder = str(tmp_path_factory.mktemp("dit"))
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=SIZE // 2, num_layers=1, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        block_out_channels=(8, 8), latent_channels=4, sample_size=SIZE,
    )  # fmt: skip
    DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:dit is a DiTPipeline.*taken on trust:UserWarning")
def test_a_dit_is_judged_beside_ours_and_its_images_are_its_own(parts, dit, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "GRID_IMAGES", 1)
    pipelines = {"mdlm": parts.pipelines["mdlm"], "dit": dit}
    recipe = parts.recipe(tmp_path / "out", pipelines=pipelines, num_steps=[2], seeds=[0], guidance_scale=[1.0, 3.0])
    content = json.loads(evaluate(recipe).read_text())
    cells = {(cell["pipeline"], cell["guidance_scale"]): cell for cell in content["cells"]}
    assert (
        [cells["dit", scale]["nfe"] for scale in (1.0, 3.0)] == [2, 4] == [cells["mdlm", s]["nfe"] for s in (1.0, 3.0)]
    )
    assert cells["dit", 1.0]["fid"]["pooled"] != cells["dit", 3.0]["fid"]["pooled"]
    assert cells["dit", 1.0]["code_pair_total_variation"] is None and cells["dit", 1.0]["precision"] is not None
    about = content["protocol"]["pipelines"]["dit"]
    assert about["class"] == "DiTPipeline" and about["scheduler"]["class"] == "DDIMScheduler"
    assert any("taken on trust" in warning for warning in content["warnings"])
    for name in ("grid_dit.png", "strip_dit.png", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 200

    theirs = DiTPipeline.from_pretrained(dit)
    theirs.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "np"}
    images = theirs([0, 1, 2], generator=image_generators(0, range(3)), **call).images
    opened = open_any_pipeline(dit, torch.device("cpu"))
    assert isinstance(opened, ForeignPipeline)
    drawn = opened.draw([0, 1, 2], range(3), 0, SamplerSettings(2, guidance_scale=3.0))
    assert np.array_equal(drawn.permute(0, 2, 3, 1).numpy(), (images * 255).round().astype(np.uint8))
    again = evaluate(dataclasses.replace(recipe, output_dir=str(tmp_path / "out")))  # finished cells are taken
    assert json.loads(again.read_text())["cells"] == content["cells"]


def test_what_is_no_class_conditional_pipeline_is_refused(parts, dit, tmp_path):
    unet = UNet2DModel(16, 3, 3, block_out_channels=(4, 4), norm_num_groups=2, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match="a DDPMPipeline, which is no class-conditional pipeline .*class_labels"):
        sweep.check(parts.recipe(tmp_path / "out", pipelines={"ddpm": str(tmp_path / "ddpm")}))
    for change, named in (
        ({"temperature": 0.5}, "temperature=0.5: a DiTPipeline has none"),
        ({"sampler": "ancestral"}, "sampler='ancestral': a DiTPipeline has none"),
        ({"guidance_scale": [(1.0, 2.0)]}, r"guidance_scale=\(1.0, 2.0\): a DiTPipeline takes a number"),
    ):
        with pytest.raises(ValueError, match=named):
            sweep.check(parts.recipe(tmp_path / "out", pipelines={"dit": dit}, **change))
    small = dataclasses.replace(parts.data, image_size=8)
    with pytest.raises(ValueError, match=r"3 x 16 x 16 images"):
        sweep.check(parts.recipe(tmp_path / "out", pipelines={"dit": dit}, data=small))


def test_numbers_of_other_classes_are_not_taken_for_these(parts, dit, tmp_path):
    """Its weights do not tell how many classes it was asked for."""
    with pytest.warns(UserWarning):
        plan = sweep.check(parts.recipe(tmp_path / "out", pipelines={"dit": dit, "mdlm": parts.pipelines["mdlm"]}))
    reference = SimpleNamespace(about={"images": {}}, reconstructions={}, images=SimpleNamespace(hashes={}))

    def cells():
        return [sweep._cell(plan, name, SamplerSettings(1), 0, reference).path.name for name in ("dit", "mdlm")]

    before = cells()
    plan.class_names.append("a fourth")
    assert cells()[0] != before[0] and cells()[1] == before[1]  # ours are bound to their classes by their weights


def test_every_pipeline_of_ours_is_known(parts, tmp_path):
    ours = XDLMPipeline.from_pretrained(parts.pipelines["mdlm"])
    for kind in (XDLMImg2ImgPipeline, XDLMInpaintPipeline):
        kind.from_pipe(ours).save_pretrained(tmp_path / kind.__name__)
        opened = open_any_pipeline(str(tmp_path / kind.__name__), torch.device("cpu"))
        assert type(opened) is XDLMPipeline and pipeline_hash(opened) == pipeline_hash(ours)


def test_a_scheduler_that_draws_by_itself_gives_the_same_images_again_and_is_told_of(parts, dit, tmp_path):
    theirs = DiTPipeline.from_pretrained(dit)
    theirs.scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    theirs.save_pretrained(tmp_path / "ddpm")
    ours, steady = (open_any_pipeline(str(folder), torch.device("cpu")) for folder in (tmp_path / "ddpm", dit))
    assert ours.draws_by_batches and not steady.draws_by_batches
    state = torch.get_rng_state()
    images = [ours.draw([0, 1], indices, 0, SamplerSettings(3)) for indices in ([0, 1], [2, 3], [0, 1])]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.warns(UserWarning):
        notes = sweep.check(parts.recipe(tmp_path / "out", pipelines={"x": str(tmp_path / "ddpm")})).warnings
    assert any("x draws by its scheduler (DDPMScheduler) without a generator an image" in note for note in notes)


def test_a_reference_of_more_classes_than_the_network_knows_is_refused(parts, dit, tmp_path, monkeypatch):
    monkeypatch.setattr(ForeignPipeline, "num_classes", 2)
    with pytest.raises(ValueError, match="it has 2 classes, the reference 3; name one of as many"):
        sweep.check(parts.recipe(tmp_path / "out", pipelines={"dit": dit}))
