"""The converter of official XDLM networks: the same logits, whatever layout of file, and pipelines that sample."""

import json
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from original_tokenizers import random_tokenizer
from original_xdlm import random_network

from xdlm_image import XDLMPipeline
from xdlm_image.cli import main
from xdlm_image.conversion.official_xdlm import convert_xdlm
from xdlm_image.conversion.vq_tokenizers import convert_llamagen, convert_taming
from xdlm_image.recipes import ConversionRecipe, ConvertXDLMRecipe

CODES = 32  # so that a network of 35 ids fits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of a tiny converted LlamaGen tokenizer, and the original."""
    folder = tmp_path_factory.mktemp("tokenizer")
    original = random_tokenizer("llamagen", codes=CODES)
    torch.save({"model": original.state_dict()}, folder / "vq.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert_llamagen(ConversionRecipe(str(folder / "vq.pt"), str(folder / "tokenizer")))
    return str(folder / "tokenizer"), original


def averaged(network) -> dict:
    """What the official class of averaged weights saves."""
    return {"decay": 0.9999, "num_updates": 7, "shadow_params": [p.clone() for p in network.parameters()]}


def official_settings(algorithm="xdlm", **changes):
    """Settings as omegaconf pickles them: containers of nodes, in classes of a module of that name."""
    module = types.ModuleType("omegaconf.dictconfig")
    for name in ("DictConfig", "AnyNode"):
        setattr(module, name, type(name, (), {"__module__": module.__name__}))

    def node(value):
        item = (module.DictConfig if isinstance(value, dict) else module.AnyNode)()
        item.__dict__ |= {"_metadata": None, "_parent": None}
        item.__dict__ |= (
            {"_content": {k: node(v) for k, v in value.items()}} if isinstance(value, dict) else {"_val": value}
        )
        return item

    algo = {"name": algorithm, "k1": 0.1, "time_conditioning": False} | changes.pop("algo", {})
    return node({"algo": algo, "model": {"n_heads": 3, "length": 16} | changes}), module


def save_with(module, content, path):
    stand_ins = {"omegaconf": types.ModuleType("omegaconf"), module.__name__: module}
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setitem(sys.modules, name, stand_in)
        torch.save(content, path)


def lightning(last, ema, tokenizer=None) -> dict:
    state = {f"backbone.{key}": value for key, value in last.state_dict().items()}
    if tokenizer is not None:
        state |= {f"image_tokenizer.vae.{key}": value for key, value in tokenizer.state_dict().items()}
    return {"epoch": 0, "state_dict": state, "ema": averaged(ema), "optimizer_states": [{"state": {}}]}


def convert(tmp_path, tokenizer, **options) -> XDLMPipeline:
    recipe = {"sample_size": 4, "k": 0.1, "num_attention_heads": 3} | options
    path = str(tmp_path / "official.ckpt")
    convert_xdlm(ConvertXDLMRecipe(checkpoint=path, output=str(tmp_path / "pipeline"), tokenizer=tokenizer, **recipe))
    return XDLMPipeline.from_pretrained(tmp_path / "pipeline")


def compare(pipeline, network, classes=9):
    """Logits to 1e-5, for every id and several classes, the null class among them."""
    torch.manual_seed(5)
    ids = torch.cat([torch.arange(35), torch.randint(35, (13,))]).reshape(3, 16)
    labels = None if classes is None else torch.tensor([0, 4, classes])
    expected = network(ids, labels)
    assert expected.std() > 0.5
    ours = pipeline.transformer(ids, timestep=0.3, class_labels=labels).sample
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_averaged_weights_alone(tmp_path, tokenizer):
    """Files whose `ema` entry holds `shadow_params`, a bare list in the official order."""
    network = random_network()
    torch.save({"ema": averaged(network)}, tmp_path / "official.ckpt")
    pipeline = convert(tmp_path, tokenizer[0])
    compare(pipeline, network)
    process = pipeline.scheduler.process
    assert (process.definition, process.k, process.mask_id, process.num_ids) == ("B", 0.1, CODES, CODES + 3)
    assert pipeline.config.supports_guidance and pipeline.transformer.config.num_classes == 9


@pytest.mark.parametrize("ema", [True, False])
def test_lightning_files_with_their_settings(tmp_path, tokenizer, ema):
    """Settings are read though their classes are nowhere to be imported; k, heads and grid come from them."""
    last, average = random_network(1), random_network(2)
    config, module = official_settings()
    content = lightning(last, average, tokenizer[1]) | {"hyper_parameters": {"config": config, "vocab_size": None}}
    save_with(module, content, tmp_path / "official.ckpt")
    pipeline = convert(tmp_path, tokenizer[0], k=None, num_attention_heads=None, ema=ema)
    compare(pipeline, average if ema else last)
    assert pipeline.scheduler.config.k == 0.1
    told = json.loads((tmp_path / "pipeline" / "provenance.json").read_text())
    assert "the checkpoint carries the very tokenizer that was given" in told["notes"]


@pytest.mark.parametrize(("algorithm", "k"), [("mdlm", 0.0), ("udlm", 1.0)])
def test_mdlm_and_udlm_say_their_k(tmp_path, tokenizer, algorithm, k):
    config, module = official_settings(algorithm)
    content = lightning(random_network(), random_network()) | {"hyper_parameters": {"config": config}}
    save_with(module, content, tmp_path / "official.ckpt")
    assert convert(tmp_path, tokenizer[0], k=None).scheduler.process.k == k


def test_plain_state_dicts_and_unconditional_networks(tmp_path, tokenizer):
    network = random_network(classes=None, blocks=3)
    torch.save(network.state_dict(), tmp_path / "official.ckpt")
    pipeline = convert(tmp_path, tokenizer[0], ema=False, num_attention_heads=None)  # heads from the frequencies
    compare(pipeline, network, classes=None)
    assert not pipeline.config.supports_guidance
    torch.save({"ema": averaged(network)}, tmp_path / "official.ckpt")
    pipeline = convert(tmp_path, tokenizer[0], overwrite=True)
    compare(pipeline, network, classes=None)


def test_a_network_in_half_precision_has_rounded_frequencies(tmp_path, tokenizer):
    network = random_network().bfloat16()
    torch.save(network.state_dict(), tmp_path / "official.ckpt")
    pipeline = convert(tmp_path, tokenizer[0], ema=False)
    assert torch.equal(pipeline.transformer.token_embed.weight, network.vocab_embed.embedding.float())


def test_a_network_of_codes_and_mask_alone(tmp_path, tokenizer):
    torch.save({"ema": averaged(random_network(vocabulary=CODES + 1))}, tmp_path / "official.ckpt")
    pipeline = convert(tmp_path, tokenizer[0])
    assert pipeline.scheduler.process.num_ids == CODES + 1
    assert pipeline([0, 8], num_steps=2, output_type="latent").images.max() < CODES


def test_a_taming_tokenizer_is_told_from_llamagens(tmp_path):
    original = random_tokenizer("taming", codes=CODES)
    torch.save({"state_dict": original.state_dict()}, tmp_path / "last.ckpt")
    convert_taming(ConversionRecipe(str(tmp_path / "last.ckpt"), str(tmp_path / "taming")))
    torch.save(lightning(random_network(), random_network(), original), tmp_path / "official.ckpt")
    convert(tmp_path, str(tmp_path / "taming"))
    told = json.loads((tmp_path / "pipeline" / "provenance.json").read_text())
    assert "the checkpoint carries the very tokenizer that was given" in told["notes"]


@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_the_pipeline_samples_codes_only(tmp_path, tokenizer, k):
    torch.save({"ema": averaged(random_network())}, tmp_path / "official.ckpt")
    pipeline = convert(tmp_path, tokenizer[0], k=k)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    codes = pipeline([0, 8] * 8, num_steps=3, temperature=100.0, generator=generator, output_type="latent").images
    assert codes.shape == (16, 4, 4) and codes.max() < CODES and len(codes.unique()) > 10  # no special ids
    images = pipeline([3], num_steps=2, guidance_scale=2.0, generator=generator, output_type="np").images
    assert images.shape == (1, 8, 8, 3)


def test_a_thousand_classes_are_imagenet(tmp_path, tokenizer):
    torch.save({"ema": averaged(random_network(classes=1000))}, tmp_path / "official.ckpt")
    pipeline = convert(tmp_path, tokenizer[0])
    assert pipeline.get_label_ids("goldfish") == [1] and len(pipeline.id2label) == 1000


# --- what does not fit ----------------------------------------------------------------------------


def refuse(tmp_path, tokenizer, content, match, **options):
    if content is not None:
        torch.save(content, tmp_path / "official.ckpt")
    with pytest.raises(ValueError, match=match):
        convert(tmp_path, tokenizer, **options)
    assert not (tmp_path / "pipeline").exists()


def test_lists_of_averaged_weights_are_checked_one_by_one(tmp_path, tokenizer):
    ema = averaged(random_network())
    shadow = ema["shadow_params"]
    refuse(tmp_path, tokenizer[0], {"ema": ema | {"shadow_params": shadow[:-2]}}, r"holds 29 tensors.*10 \+ 10 a block")
    refuse(tmp_path, tokenizer[0], {"ema": ema | {"shadow_params": shadow[:-1]}}, "of another shape: blocks.0")
    exchanged = [*shadow[:8], shadow[9], shadow[8], *shadow[10:]]
    refuse(
        tmp_path,
        tokenizer[0],
        {"ema": ema | {"shadow_params": exchanged}},
        "2 of another shape: blocks.0.attn_out.weight",
    )
    refuse(tmp_path, tokenizer[0], {"ema": ema | {"shadow_params": {"a": shadow[0]}}}, "no list of tensors")
    other = lightning(random_network(width=24), random_network())
    refuse(tmp_path, tokenizer[0], other, "of another shape")


def test_keys_are_strict(tmp_path, tokenizer):
    network = random_network()
    state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    short = {k: v for k, v in state.items() if "attn_qkv" not in k}
    message = "2 missing: blocks.0.attn_qkv.weight, blocks.1.attn_qkv.weight"
    refuse(tmp_path, tokenizer[0], {"state_dict": short}, message, ema=False)
    more = state | {"teacher.weight": torch.zeros(1), "backbone.extra": torch.zeros(1)}
    refuse(tmp_path, tokenizer[0], {"state_dict": more}, "2 unexpected: teacher.weight, extra", ema=False)
    turned = state | {"backbone.rotary_emb.inv_freq": torch.linspace(1, 2, 8)}
    refuse(tmp_path, tokenizer[0], {"state_dict": turned}, "not the frequencies", ema=False)
    refuse(tmp_path, tokenizer[0], {"state_dict": state}, "num_attention_heads=6.* 3", ema=False, num_attention_heads=6)
    deep = state | {f"backbone.blocks.{i}.norm1.weight": torch.zeros(1) for i in range(2, 1001)}
    refuse(tmp_path, tokenizer[0], {"state_dict": deep}, "1001 blocks and 9 classes", ema=False)
    none = state | {"backbone.y_embedder.embedding_table.weight": torch.zeros(1, 24)}
    refuse(tmp_path, tokenizer[0], {"state_dict": none}, "2 blocks and 0 classes", ema=False)
    refuse(tmp_path, tokenizer[0], {"state_dict": state}, "holds no averaged weights; pass --ema false")
    refuse(tmp_path, tokenizer[0], {"ema": averaged(network)}, "averaged weights only", ema=False)
    refuse(
        tmp_path, tokenizer[0], {"state_dict": tokenizer[1].state_dict()}, "LlamaGen tokenizer: use convert-llamagen"
    )
    refuse(tmp_path, tokenizer[0], {"weights": 3}, "holds 'weights'")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_no_size_is_believed_that_the_file_does_not_hold(tmp_path, tokenizer, capsys):
    """A few bytes that claim terabytes: anything made of that size would fail otherwise than by ValueError."""
    state = dict(random_network().state_dict())
    frequencies, embedding, one = "rotary_emb.inv_freq", "vocab_embed.embedding", torch.zeros(1)
    for name, tensor, message in (
        (frequencies, one.expand(10**13), "rotary_emb.inv_freq claims .10000000000000,. numbers"),
        (embedding, one.expand(35, 10**13), "vocab_embed.embedding claims .35, 10000000000000. numbers"),
        (frequencies, torch.ones(8).to_sparse(), "rotary_emb.inv_freq is torch.float32, torch.sparse_coo"),
        (frequencies, torch.ones(8, dtype=torch.complex64), "rotary_emb.inv_freq is torch.complex64"),
    ):
        refuse(tmp_path, tokenizer[0], state | {name: tensor}, message, ema=False)
    out = str(tmp_path / "pipeline")
    torch.save(state | {frequencies: torch.ones(8).to_sparse()}, tmp_path / "official.ckpt")
    verb = ["convert-xdlm", "--checkpoint", str(tmp_path / "official.ckpt"), "--tokenizer", tokenizer[0], "--ema=false"]
    assert main([*verb, "--k", "0.1", "--sample_size", "4", "--output", out]) == 2
    assert "rotary_emb.inv_freq is torch.float32" in capsys.readouterr().err


def test_views_of_the_same_numbers_are_refused(tmp_path, tokenizer):
    """Small on the disk, large in memory: each would get numbers of its own."""
    shadow = averaged(random_network())["shadow_params"]
    sizes = [tensor.numel() for tensor in shadow]
    for numbers, place in ((sum(sizes), "apart"), (max(sizes), "shared")):
        flat, starts = torch.randn(numbers), np.cumsum([0, *sizes]) if place == "apart" else [0] * len(sizes)
        views = [flat[start : start + size].view(like.shape) for start, size, like in zip(starts, sizes, shadow)]
        (tmp_path / place).mkdir()
        torch.save({"ema": {"shadow_params": views}}, tmp_path / place / "official.ckpt")
    convert(tmp_path / "apart", tokenizer[0])  # each number once
    refuse(
        tmp_path / "shared", tokenizer[0], None, f"claim {4 * sum(sizes):,} bytes out of the same {4 * max(sizes):,}"
    )


def test_what_the_file_says_and_what_the_user_says_must_agree(tmp_path, tokenizer):
    bare = {"ema": averaged(random_network())}
    refuse(tmp_path, tokenizer[0], bare, "k=None: .*pass --k", k=None)
    refuse(tmp_path, tokenizer[0], bare, "must divide the network's width 48", num_attention_heads=5)
    small = {"ema": averaged(random_network(vocabulary=20))}
    refuse(tmp_path, tokenizer[0], small, "has 32 codes, the network 20 ids")

    def settings(algorithm="xdlm", **changes):
        config, module = official_settings(algorithm, **changes)
        content = lightning(random_network(), random_network()) | {"hyper_parameters": {"config": config}}
        save_with(module, content, tmp_path / "official.ckpt")

    settings()
    refuse(tmp_path, tokenizer[0], None, "k=0.5: the settings .* say 0.1", k=0.5)
    refuse(tmp_path, tokenizer[0], None, "sample_size=8: .* say 16 codes", sample_size=8)
    refuse(tmp_path, tokenizer[0], None, "num_attention_heads=6: .* say 3", num_attention_heads=6)
    settings("gidd")
    refuse(tmp_path, tokenizer[0], None, "algo='gidd'")
    settings(algo={"time_conditioning": True})
    refuse(tmp_path, tokenizer[0], None, "time_conditioning")


def test_another_tokenizer_than_the_trainings_is_refused(tmp_path, tokenizer):
    other = random_tokenizer("llamagen", seed=9, codes=CODES)
    content = lightning(random_network(), random_network(), other)
    refuse(tmp_path, tokenizer[0], content, "is not the tokenizer that")
