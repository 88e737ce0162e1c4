"""The tokenizers' converters: the same latents, codes and pictures as the originals, and strict about every key."""

import json
import warnings

import pytest
import torch
from diffusers import VQModel
from original_tokenizers import random_tokenizer
from safetensors.torch import save_file

from xdlm_image.conversion.vq_tokenizers import convert_llamagen, convert_taming
from xdlm_image.recipes import ConversionRecipe
from xdlm_image.tokenizer.codes import decode_codes, encode_images, load_tokenizer, tokenizer_info

VERBS = {"llamagen": convert_llamagen, "taming": convert_taming}
SIZES = {
    "f2": {},
    "f8, as VQ-8": {"widths": (32, 64, 64, 128)},
    "f16, as VQ-16 and f16": {"widths": (32, 32, 64, 64, 128), "codes": 64},
    "attention on two levels, three layers": {"attended": {0, 1}, "layers": 3},
    "grey": {"image": 1, "widths": (32, 64, 64), "attended": {1}},
}


def entry_of(style: str) -> str:
    return "model" if style == "llamagen" else "state_dict"


def convert(tmp_path, style, content, name="original.pt", **options):
    """Save as the original does, convert, load. Returns the tokenizer and the notes."""
    path = tmp_path / name
    torch.save(content, path)
    recipe = ConversionRecipe(checkpoint=str(path), output=str(tmp_path / "converted"), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = VERBS[style](recipe)
    return load_tokenizer(result.output), result.notes


@pytest.mark.parametrize("style", VERBS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_same_latents_codes_and_pictures(tmp_path, style, sizes):
    original = random_tokenizer(style, **sizes)
    levels = len(sizes.get("widths", (32, 64)))
    images = torch.randn(2, sizes.get("image", 3), 3 * 2 ** (levels - 1), 2 ** (levels - 1))
    latents = original.latents(images)
    rows = original.quantize.embedding.weight  # laid among the latents, so that several are in use
    rows.copy_(latents.mean((0, 2, 3)) + latents.std((0, 2, 3)) * torch.randn_like(rows))
    ours, _ = convert(tmp_path, style, {entry_of(style): original.state_dict()})
    codes = original.codes(images)
    assert torch.equal(encode_images(ours, images), codes) and len(codes.unique()) > 2
    torch.testing.assert_close(ours.encode(images).latents, latents, atol=1e-5, rtol=1e-5)
    drawn = torch.randint(original.rows().shape[0], (2, 3, 2))
    pictures = original.decode(drawn)
    torch.testing.assert_close(decode_codes(ours, drawn), pictures, atol=1e-4, rtol=1e-4)
    # in float64, what is left of the differences is the rounding of LlamaGen's normalised rows to float32
    ours, original = ours.double(), original.double()
    torch.testing.assert_close(
        ours.encode(images.double()).latents, original.latents(images.double()), atol=1e-12, rtol=0
    )
    pictures = original.decode(drawn)
    assert pictures.std() > 1e-2
    torch.testing.assert_close(decode_codes(ours, drawn), pictures, atol=1e-6 if original.unit else 1e-12, rtol=0)


def test_every_number_comes_from_the_file(tmp_path):
    """Not a tensor of `VQModel` is left as it was drawn, and none of the file's is used twice or dropped."""
    for style in VERBS:
        original = random_tokenizer(style)
        ours, _ = convert(
            tmp_path / style if (tmp_path / style).mkdir() else tmp_path / style, style, dict(original.state_dict())
        )
        expected = sorted(
            v.sum().item() for k, v in original.state_dict().items() if not k.endswith(("used", "embedding.weight"))
        )
        found = sorted(v.sum().item() for k, v in ours.state_dict().items() if not k.endswith("embedding.weight"))
        assert len(expected) == len(found) and expected == pytest.approx(found, abs=1e-5)


def test_llamagen_codebook_gets_unit_rows_and_a_warning_says_how_far_it_was(tmp_path):
    original = random_tokenizer("llamagen")
    rows = original.quantize.embedding.weight
    rows.copy_(torch.nn.functional.normalize(rows, dim=-1) * 1.25)
    rows[0] *= 1.2  # length 1.5
    torch.save({"model": original.state_dict()}, tmp_path / "vq.pt")
    with pytest.warns(UserWarning, match=r"off 1 by 0\.256 on average, 0\.5 at most"):
        result = convert_llamagen(ConversionRecipe(str(tmp_path / "vq.pt"), str(tmp_path / "out")))
    stored = load_tokenizer(tmp_path / "out").quantize.embedding.weight
    assert torch.equal(stored, torch.nn.functional.normalize(rows, dim=-1))
    assert "0.256 on average" in str(result)


def test_unit_rows_warn_of_nothing_and_taming_rows_stay(tmp_path):
    original = random_tokenizer("llamagen")
    original.quantize.embedding.weight.copy_(original.rows())
    torch.save({"model": original.state_dict()}, tmp_path / "vq.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = convert_llamagen(ConversionRecipe(str(tmp_path / "vq.pt"), str(tmp_path / "out")))
    assert "off 1 by" in str(result)
    original = random_tokenizer("taming")
    ours, _ = convert(tmp_path, "taming", {"state_dict": original.state_dict()})
    assert torch.equal(ours.quantize.embedding.weight, original.quantize.embedding.weight)


def test_llamagens_weights_may_lie_under_state_dict(tmp_path):
    original = random_tokenizer("llamagen")
    ours, _ = convert(tmp_path, "llamagen", {"state_dict": original.state_dict()})
    assert torch.equal(ours.encoder.conv_in.weight, original.encoder.conv_in.weight)


def test_averaged_weights_go_first_and_half_precision_is_widened(tmp_path):
    last, averaged = random_tokenizer("llamagen", seed=1), random_tokenizer("llamagen", seed=2).half()
    content = {"model": last.state_dict(), "ema": averaged.state_dict(), "steps": 3, "optimizer": {"state": {}}}
    ours, notes = convert(tmp_path, "llamagen", content)
    assert torch.equal(ours.encoder.conv_in.weight, averaged.encoder.conv_in.weight.float())
    assert any("averaged" in note for note in notes)


def test_taming_losses_are_left_out_and_counted(tmp_path):
    weights = random_tokenizer("taming").state_dict()
    weights |= {"loss.discriminator.main.0.weight": torch.randn(3, 3), "loss.logvar": torch.zeros(())}
    weights |= {"loss.discriminator.main.3.num_batches_tracked": torch.tensor(5)}
    _, notes = convert(tmp_path, "taming", {"state_dict": weights, "epoch": 1})
    assert any("left out 3 tensors" in note for note in notes)


def test_safetensors_and_plain_state_dicts_are_read_too(tmp_path):
    original = random_tokenizer("llamagen")
    save_file(dict(original.state_dict()), tmp_path / "vq.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert_llamagen(ConversionRecipe(str(tmp_path / "vq.safetensors"), str(tmp_path / "out")))
    assert torch.equal(load_tokenizer(tmp_path / "out").encoder.conv_in.weight, original.encoder.conv_in.weight)


def test_the_folder_says_where_it_comes_from(tmp_path):
    torch.save({"state_dict": random_tokenizer("taming").state_dict()}, tmp_path / "last.ckpt")
    recipe = ConversionRecipe(str(tmp_path / "last.ckpt"), str(tmp_path / "out"), licence="MIT")
    convert_taming(recipe)
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert set(told) == {"source_file", "source_sha256", "source_format", "licence", "url", "converted_by", "notes"}
    assert told["source_file"] == "last.ckpt" and len(told["source_sha256"]) == 64
    assert told["licence"] == "MIT" and told["url"] is None and "taming" in told["source_format"]
    assert tokenizer_info(tmp_path / "out")["num_codes"] == 40
    assert VQModel.from_pretrained(tmp_path / "out").config.lookup_from_codebook
    assert not any((tmp_path / "out").rglob("*.bin")) and not list(tmp_path.glob(".out*"))


# --- what does not fit ----------------------------------------------------------------------------


def refuse(tmp_path, style, content, match):
    path = tmp_path / "broken.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=match):
        VERBS[style](ConversionRecipe(str(path), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def without(weights, count):
    return dict(list(weights.items())[:-count])


@pytest.mark.parametrize("style", VERBS)
def test_missing_unexpected_and_misshapen_keys_are_named(tmp_path, style):
    weights = dict(random_tokenizer(style).state_dict())
    refuse(tmp_path, style, {entry_of(style): without(weights, 1)}, r"1 missing: post_quant_conv.bias$")
    # nine left out: eight are named
    missing = {k: v for k, v in weights.items() if not k.startswith("decoder.conv_") and "quant_conv" not in k}
    count = len(weights) - len(missing)
    if style == "taming":
        refuse(tmp_path, style, {"state_dict": missing}, rf"{count} missing: (\S+, ){{7}}\S+$")
    extra = weights | {"encoder.extra": torch.zeros(1)}
    refuse(tmp_path, style, {entry_of(style): extra}, r"1 unexpected: encoder.extra")
    bent = weights | {"quant_conv.weight": torch.zeros(8, 5, 1, 1)}
    refuse(
        tmp_path, style, {entry_of(style): bent}, r"1 of another shape: quant_conv.weight \(8, 5, 1, 1\), not \(8, 32"
    )


def test_long_lists_are_cut(tmp_path):
    weights = dict(random_tokenizer("taming").state_dict()) | {f"strange.{i}": torch.zeros(1) for i in range(20)}
    refuse(tmp_path, "taming", {"state_dict": weights}, r"20 unexpected: (strange.\d, ){7}strange.7 and 12 more$")


def test_the_wrong_converter_is_told_the_right_one(tmp_path):
    llamagen, taming = (dict(random_tokenizer(style).state_dict()) for style in ("llamagen", "taming"))
    refuse(tmp_path, "taming", {"model": llamagen}, "holds 'model'.*use convert-llamagen")
    refuse(tmp_path, "taming", llamagen, "looks like a LlamaGen tokenizer: use convert-llamagen")
    refuse(tmp_path, "llamagen", {"state_dict": taming}, "looks like a taming VQGAN: use convert-taming")
    xdlm = {"ema": {"decay": 0.9999, "num_updates": 1, "shadow_params": [torch.zeros(3)]}}
    refuse(tmp_path, "llamagen", xdlm, "looks like an official XDLM network: use convert-xdlm")
    gumbel = taming | {"quantize.embed.weight": torch.zeros(4, 4)}
    del gumbel["quantize.embedding.weight"]
    refuse(tmp_path, "taming", {"state_dict": gumbel}, "Gumbel")
    refuse(tmp_path, "taming", [1, 2], "it holds a list")


def test_numbers_that_are_no_weights_are_refused(tmp_path):
    weights = dict(random_tokenizer("taming").state_dict())
    bias = "post_quant_conv.bias"
    refuse(tmp_path, "taming", {"state_dict": weights | {bias: weights[bias] * float("nan")}}, f"{bias} holds NaN")
    refuse(tmp_path, "taming", {"state_dict": weights | {bias: weights[bias].long()}}, f"{bias} is torch.int64")
    huge = torch.zeros(1, 1).expand(10**9, 8)  # eight billion numbers out of one
    refuse(tmp_path, "taming", {"state_dict": weights | {"quantize.embedding.weight": huge}}, "claims .* does not hold")
    many = weights | {f"encoder.down.{i}.block.0.conv1.weight": torch.zeros(1) for i in range(20)}
    refuse(tmp_path, "taming", {"state_dict": many}, "20 levels")
    deep = weights | {f"encoder.down.0.block.{i}.conv1.weight": torch.zeros(1) for i in range(2, 20)}
    refuse(tmp_path, "taming", {"state_dict": deep}, "2 levels of 20 layers")
    odd = dict(random_tokenizer("taming").state_dict()) | {
        "encoder.down.0.block.0.conv1.weight": torch.zeros(33, 32, 3, 3)
    }
    refuse(tmp_path, "taming", {"state_dict": odd}, "not multiples of 32")


def test_a_taken_folder_is_refused_before_the_file_is_read(tmp_path):
    torch.save({"state_dict": random_tokenizer("taming").state_dict()}, tmp_path / "last.ckpt")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.txt").write_text("dear")
    recipe = ConversionRecipe(str(tmp_path / "missing.ckpt"), str(mine), overwrite=True)
    with pytest.raises(FileExistsError, match="holds other files"):
        convert_taming(recipe)
    recipe.output = str(mine / "photo.txt")
    with pytest.raises(FileExistsError, match="photo.txt.*: is a file; name a folder"):
        convert_taming(recipe)
    recipe = ConversionRecipe(str(tmp_path / "last.ckpt"), str(tmp_path / "out"))
    convert_taming(recipe)
    with pytest.raises(FileExistsError, match="overwrite: true"):
        convert_taming(recipe)
    recipe.overwrite = True
    convert_taming(recipe)
    assert (mine / "photo.txt").read_text() == "dear"
