"""The transformer against an independent statement of the official network, then as users see it."""

import copy
import math

import pytest
import torch
from torch.nn.functional import embedding, gelu, linear

from xdlm_image.models import SIZES, XDLMTransformer2DModel
from xdlm_image.models.transformer_xdlm import rotary_embedding

OFFICIAL = SIZES["xdlm-official"] | {"num_embeds": 16387, "out_channels": 16387, "num_classes": 1000}
TINY = {
    "sample_size": [3, 5],
    "num_embeds": 12,
    "out_channels": 11,
    "num_classes": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}


def tiny(seed: int = 0, **config) -> XDLMTransformer2DModel:
    """A small model whose every parameter is random, so that nothing hides behind a zero gate."""
    torch.manual_seed(seed)
    model = XDLMTransformer2DModel(**(TINY | config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def codes_and_labels(model: XDLMTransformer2DModel, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, columns = model.grid
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(model.config.num_embeds, (batch, rows * columns), generator=generator)
    if model.config.num_classes is None:
        return codes, None
    return codes, torch.randint(model.config.num_classes + 1, (batch,), generator=generator)


# --- the official network -------------------------------------------------------------------------


def official_logits(w: dict[str, torch.Tensor], codes: torch.Tensor, labels: torch.Tensor, heads: int):
    """The network of arXiv 2602.01362 over a plain dict of weights: no module, no diffusers, no SDPA."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (B, L, H, d): pairs (j, j + d/2) are complex numbers
        length, half = x.shape[1], x.shape[-1] // 2
        speed = 10_000.0 ** (-torch.arange(half) / half)
        turn = torch.exp(1j * torch.arange(length)[:, None] * speed)[:, None]  # (L, 1, d/2)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    silu = lambda x: x * torch.sigmoid(x)
    time = torch.cat([torch.ones(128), torch.zeros(128)])  # cosines and sines of t = 0
    time = silu(time @ w["time.0"].T + w["time.0b"]) @ w["time.1"].T + w["time.1b"]
    c = silu(time + w["classes"][labels])
    x = w["codes"][codes]
    for i in range(int(w["layers"])):
        p = {key.removeprefix(f"{i}."): value for key, value in w.items() if key.startswith(f"{i}.")}
        shift1, scale1, gate1, shift2, scale2, gate2 = (c @ p["adaln"].T + p["adalnb"])[:, None].split(x.shape[-1], -1)
        h = norm(x, p["norm1"]) * (1 + scale1) + shift1
        q, k, v = (h @ p["qkv"].T).unflatten(-1, (3, heads, -1)).unbind(2)  # (B, L, H, d)
        scores = torch.einsum("blhd,bmhd->bhlm", rotate(q), rotate(k)) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).flatten(2)
        x = x + gate1 * (mixed @ p["out"].T)
        h = norm(x, p["norm2"]) * (1 + scale2) + shift2
        h = gelu(h @ p["mlp.0"].T + p["mlp.0b"], approximate="tanh") @ p["mlp.1"].T + p["mlp.1b"]
        x = x + gate2 * h
    shift, scale = (c @ w["adaln"].T + w["adalnb"])[:, None].split(x.shape[-1], -1)
    return linear(norm(x, w["norm"]) * (1 + scale) + shift, w["head"], w["headb"])


def official_weights(model: XDLMTransformer2DModel) -> dict[str, torch.Tensor]:
    """Every parameter of ours under the names above, once each (fused queries, keys and values)."""
    s = dict(model.state_dict())
    w = {"layers": torch.tensor(model.config.num_layers)}
    pairs = [
        ("codes", "token_embed.weight"),
        ("classes", "conditioning.class_embed.weight"),
        ("norm", "norm_out.weight"),
    ]
    pairs += [("head", "proj_out.weight"), ("headb", "proj_out.bias")]
    pairs += [("adaln", "adaln_out.weight"), ("adalnb", "adaln_out.bias")]
    for j in (0, 1):
        pairs += [(f"time.{j}", f"conditioning.time_embed.linear_{j + 1}.weight")]
        pairs += [(f"time.{j}b", f"conditioning.time_embed.linear_{j + 1}.bias")]
    for i in range(model.config.num_layers):
        block = f"transformer_blocks.{i}."
        w[f"{i}.qkv"] = torch.cat([s.pop(f"{block}attn.to_{name}.weight") for name in "qkv"])
        names = {"adaln": "adaln", "mlp.0": "ff.net.0.proj", "mlp.1": "ff.net.2"}
        for ours, theirs in names.items():
            pairs += [(f"{i}.{ours}", f"{block}{theirs}.weight"), (f"{i}.{ours}b", f"{block}{theirs}.bias")]
        pairs += [(f"{i}.norm{n}", f"{block}norm{n}.weight") for n in (1, 2)]
        pairs += [(f"{i}.out", f"{block}attn.to_out.0.weight")]
    w |= {ours: s.pop(theirs) for ours, theirs in pairs}
    assert not s, f"parameters the official network does not have: {list(s)}"
    return w


def test_official_parameter_count():
    with torch.device("meta"):
        model = XDLMTransformer2DModel(sample_size=16, **OFFICIAL)
    assert sum(p.numel() for p in model.parameters()) == 117_695_619


def test_official_computation():
    """Same weights, same logits to 1e-5: small in width, depth and grid, in all else the official one."""
    small = {"num_layers": 3, "num_attention_heads": 3, "attention_head_dim": 16, "conditioning_dim": 24}
    small |= {"num_embeds": 35, "out_channels": 35, "num_classes": 9}
    model = tiny(**(OFFICIAL | small | {"sample_size": [4, 7]}))
    codes, labels = codes_and_labels(model)
    with torch.no_grad():
        ours = model(codes, timestep=torch.tensor(0.7), class_labels=labels).sample
        expected = official_logits(official_weights(model), codes, labels, heads=3)
    assert expected.std() > 0.5
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_constant_time_ignores_t_and_time_reads_it():
    codes, labels = codes_and_labels(tiny())
    for kind, equal in (("constant", True), ("none", True), ("time", False)):
        model = tiny(time_conditioning=kind)
        a, b = (model(codes, timestep=t, class_labels=labels).sample for t in (0.25, 0.75))
        assert torch.equal(a, b) == equal
    per_image = model(codes, timestep=torch.tensor([0.25, 0.75, 0.25]), class_labels=labels).sample
    torch.testing.assert_close(per_image, torch.stack([a[0], b[1], a[2]]), atol=1e-5, rtol=1e-5)
    double = model(codes, timestep=torch.tensor(0.25, dtype=torch.float64), class_labels=labels).sample
    assert torch.equal(double, a)


def test_time_turns_a_thousandfold():
    conditioning = tiny(time_conditioning="time").conditioning
    angles = 500.0 * 10000.0 ** (-torch.arange(128) / 128)
    frequencies = conditioning.time_proj(torch.tensor([0.5]))[0]
    torch.testing.assert_close(frequencies, torch.cat([angles.cos(), angles.sin()]), atol=1e-4, rtol=0)


def test_small_queries_are_normalised_too():
    norm = tiny(qk_norm=True).transformer_blocks[0].attn.norm_q
    x = 1e-2 * torch.randn(5, norm.weight.shape[0], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


# --- rotary positions -----------------------------------------------------------------------------


@pytest.mark.parametrize("rope_type", ["1d", "2d"])
def test_rotary_products_depend_on_the_offset_alone(rope_type):
    rows, columns, dim = 4, 5, 16
    cos, sin = rotary_embedding(rows, columns, dim, rope_type)
    torch.manual_seed(0)
    q, k = torch.randn(2, dim)
    turn = lambda x: x * cos + torch.cat([-x[dim // 2 :], x[: dim // 2]]) * sin  # (L, D)
    products = (turn(q) @ turn(k).T).reshape(rows, columns, rows, columns)
    seen: dict = {}
    for r1 in range(rows):
        for c1 in range(columns):
            for r2 in range(rows):
                for c2 in range(columns):
                    raster = (r2 - r1) * columns + c2 - c1
                    offset = raster if rope_type == "1d" else (r2 - r1, c2 - c1)
                    seen.setdefault(offset, []).append(products[r1, c1, r2, c2])
    spread = max((torch.stack(v).max() - torch.stack(v).min()).item() for v in seen.values())
    assert spread < 1e-4
    means = torch.stack([torch.stack(v).mean() for v in seen.values()])
    assert torch.pdist(means[:, None]).min() > 1e-6  # no two offsets look alike


def test_the_first_half_of_the_pairs_turns_with_the_row():
    """As trained weights have it, which both axes exchanged would load without a word."""
    cos, _ = rotary_embedding(2, 3, 8, "2d")  # (6, 8)
    slow = 10000**-0.5
    for place, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        angles = torch.tensor([row, slow * row, column, slow * column])
        torch.testing.assert_close(cos[place], angles.cos().repeat(2), atol=1e-6, rtol=0)


def test_transposed_grid_is_another_picture():
    model = tiny(sample_size=4)
    codes, labels = codes_and_labels(model)
    flip = lambda x: x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    a = model(codes, class_labels=labels).sample
    b = flip(model(flip(codes), class_labels=labels).sample)
    assert (a - b).abs().max() > 1e-2


# --- every configuration --------------------------------------------------------------------------

VARIANTS = [
    {},
    {"norm_type": "layer_norm"},
    {"activation_fn": "gelu-approximate", "mlp_ratio": 4.0},
    {"rope_type": "1d", "attention_head_dim": 6},
    {"qk_norm": False, "dropout": 0.2},
    {"conditioning_dim": 24, "time_conditioning": "time"},
    {"sample_size": 1, "num_layers": 1},
    {"sample_size": [1, 9], "num_attention_heads": 1},
    {"sample_size": [7, 2], "num_embeds": 11},
    {"num_classes": None},
    {"num_classes": None, "time_conditioning": "time"},
    {"num_classes": None, "time_conditioning": "constant"},
    {"num_classes": 1},
]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_every_variant_runs_forward_and_backward(config):
    model = tiny(**config).train()
    codes, labels = codes_and_labels(model)
    output = model(codes, timestep=torch.rand(3), class_labels=labels)
    assert output.sample.shape == (*codes.shape, model.config.out_channels)
    output.sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # one position attends to itself alone; without any conditioning only the biases of adaLN matter
        if model.grid != (1, 1) and not (config == {"num_classes": None} and "adaln" in name):
            assert parameter.grad.abs().max() > 0, name


def test_conditioning_changes_the_prediction_of_its_own_image_only():
    model = tiny()
    codes, labels = codes_and_labels(model)
    other = labels.clone()
    other[1] = (other[1] + 1) % 5
    difference = (model(codes, class_labels=labels).sample - model(codes, class_labels=other).sample).abs()
    assert difference[1].max() > 1e-2
    assert difference[[0, 2]].max() < 1e-5


def test_fresh_model_predicts_uniformly_and_learns():
    torch.manual_seed(0)
    model = XDLMTransformer2DModel(**TINY)
    codes, labels = codes_and_labels(model)
    assert model(codes, class_labels=labels).sample.abs().max() == 0
    assert model.token_embed.weight.abs().max() <= 1 / math.sqrt(model.inner_dim)
    target = codes.clamp(max=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(15):
        logits = model(codes, class_labels=labels).sample
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 < math.log(11)


def test_swiglu_width_is_rounded_and_bias_free():
    feed_forward = tiny(num_attention_heads=3, attention_head_dim=12).transformer_blocks[0].ff
    assert feed_forward.net[0].proj.weight.shape == (2 * 96, 36)  # 36 x 8/3 = 96
    assert feed_forward.net[0].proj.bias is None and feed_forward.net[2].bias is None


# --- precision, memory, speed switches ------------------------------------------------------------


def test_features_are_all_but_the_projection():
    model = tiny()
    codes, labels = codes_and_labels(model)
    features = model(codes, class_labels=labels, project=False).sample
    assert features.shape == (3, 15, 16)
    assert torch.equal(model.proj_out(features), model(codes, class_labels=labels, return_dict=False)[0])


@pytest.mark.parametrize("config", [{}, {"norm_type": "layer_norm", "time_conditioning": "time"}], ids=str)
def test_gradient_checkpointing_changes_nothing(config):
    model = tiny(**config).train()
    codes, labels = codes_and_labels(model)
    gradients = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        model.zero_grad()
        model(codes, timestep=0.5, class_labels=labels).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_half_precision_stays_close(dtype, norm_type):
    model = tiny(norm_type=norm_type, time_conditioning="time")
    codes, labels = codes_and_labels(model)
    exact = model(codes, timestep=0.5, class_labels=labels).sample
    with torch.autocast("cpu", dtype=dtype):
        mixed = model(codes, timestep=0.5, class_labels=labels).sample
    half = model.to(dtype)(codes, timestep=0.5, class_labels=labels).sample
    assert half.dtype == mixed.dtype == dtype
    for output in (half, mixed):
        assert (output.float() - exact).abs().mean() < 0.03 * exact.std()


def test_fused_projections_agree():
    model = tiny()
    codes, labels = codes_and_labels(model)
    expected = model(codes, class_labels=labels).sample
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(codes, class_labels=labels).sample, expected)


def test_dropout_acts_in_training_only_and_on_both_branches():
    for silent in ("attn.to_out.0", "ff.net.2", "none"):
        model = tiny(dropout=0.5, num_layers=1)
        codes, labels = codes_and_labels(model)
        if silent != "none":
            torch.nn.init.zeros_(model.transformer_blocks[0].get_submodule(silent).weight)
        a, b = (model(codes, class_labels=labels).sample for _ in range(2))
        assert torch.equal(a, b)
        model.train()
        a, b = (model(codes, class_labels=labels).sample for _ in range(2))
        assert not torch.equal(a, b), silent
        for name in ("attn.to_out.0", "ff.net.2"):
            torch.nn.init.zeros_(model.transformer_blocks[0].get_submodule(name).weight)
        a, b = (model(codes, class_labels=labels).sample for _ in range(2))
        assert torch.equal(a, b)  # nowhere else


def test_save_and_load_are_exact(tmp_path):
    model = tiny(time_conditioning="time", conditioning_dim=20)
    model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded = XDLMTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.grid == (3, 5)
    codes, labels = codes_and_labels(model)
    loaded = copy.deepcopy(loaded)  # some CPUs round by where weights lie in memory: there, as the model's own do
    a, b = (m(codes, timestep=0.5, class_labels=labels).sample for m in (model, loaded))
    assert torch.equal(a, b)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": 0},
        {"sample_size": [3]},
        {"sample_size": 2.5},
        {"num_embeds": 1},
        {"out_channels": 13},
        {"out_channels": 0},
        {"num_classes": 0},
        {"num_layers": 0},
        {"num_attention_heads": -1},
        {"attention_head_dim": 6},
        {"rope_type": "1d", "attention_head_dim": 5},
        {"mlp_ratio": 0},
        {"mlp_ratio": "x"},
        {"mlp_ratio": float("inf")},
        {"dropout": 1.0},
        {"dropout": "x"},
        {"qk_norm": "no"},
        {"conditioning_dim": 0},
        {"norm_type": "batch_norm"},
        {"activation_fn": "relu"},
        {"rope_type": "3d"},
        {"time_conditioning": "sometimes"},
    ],
    ids=str,
)
def test_impossible_configurations_name_the_argument(config):
    name = list(config)[-1] if "attention_head_dim" not in config else "attention_head_dim"
    with pytest.raises(ValueError, match=rf"^{name}="):
        XDLMTransformer2DModel(**(TINY | config))


def test_wrong_inputs_are_named():
    model, free = tiny(time_conditioning="time"), tiny(num_classes=None)
    codes, labels = codes_and_labels(model)
    good = {"hidden_states": codes, "class_labels": labels, "timestep": 0.5}
    for bad in (
        {"hidden_states": codes[:, :-1]},
        {"hidden_states": codes[None]},
        {"hidden_states": codes.float()},
        {"class_labels": None},
        {"class_labels": labels[:2]},
        {"class_labels": labels.float()},
        {"timestep": None},
        {"timestep": torch.zeros(2)},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            model(**(good | bad))
    with pytest.raises(ValueError, match="unconditional"):
        free(codes, class_labels=labels)


def test_ids_are_looked_up_as_they_are():
    """The mask is the last id and has its own row; no id is folded onto another."""
    model = tiny()
    rows = embedding(torch.arange(12), model.token_embed.weight)
    assert torch.pdist(rows).min() > 0


def test_only_learned_positions_tell_places_apart_under_masks():
    """Rotary positions see distances only: an all-mask grid, where MDLM begins, gives one prediction for all places."""
    for kind, differs in (("learned", True), ("none", False)):
        model = tiny(position_embedding=kind)
        masks = torch.full((1, math.prod(model.grid)), model.config.num_embeds - 1)
        with torch.no_grad():
            logits = model(masks, class_labels=torch.zeros(1, dtype=torch.long)).sample[0]  # (L, V)
        assert ((logits - logits[:1]).abs().max() > 1e-2) == differs
