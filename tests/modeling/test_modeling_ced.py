"""CED against the published architecture written out with fused qkv and frequency-major tokens, and its checkpoints."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import randomized
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from modeling_lamb import CedConfig, CedModel
from modeling_lamb.modeling_ced import convert_ced_state_dict

WIDTH, HEADS, LAYERS = 32, 2, 2


def tiny(**kwargs) -> CedModel:
    config = CedConfig(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=LAYERS, **kwargs)
    model = randomized(CedModel(config)).eval()
    bn = model.patch_embed.init_bn
    bn.running_mean.normal_(-30, 10)
    bn.running_var.uniform_(100, 300)
    return model


def log_mel(*shape):
    return torch.randn(*shape) * 15 - 40


def published(model: CedModel, form: str) -> dict[str, torch.Tensor]:
    """The model's weights as the original file or the Hub port names and fuses them."""
    own = model.state_dict()
    weights = {}
    for key, value in own.items():
        if ".q_proj." in key:
            parts = [own[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            weights[key.replace("q_proj", "qkv")] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            key = key.replace("o_proj", "proj")
            for name in ("init_bn", "time_pos_embed", "freq_pos_embed"):
                key = key.replace(f"patch_embed.{name}", name)
            weights[key] = value.clone()
    if form == "original":
        weights = {key.replace("init_bn.", "init_bn.1."): value for key, value in weights.items()}
        weights |= {
            "front_end.0.mel_scale.fb": torch.zeros(257, 64),
            "front_end.0.spectrogram.window": torch.zeros(512),
        }
    else:
        weights = {f"encoder.{key}": value for key, value in weights.items()}
    return weights | {"outputlayer.0.weight": torch.ones(WIDTH), "outputlayer.1.weight": torch.ones(527, WIDTH)}


def oracle(weights: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """The published forward pass of one window, in float64: (batch, 64, frames) -> frequency-major tokens."""
    w = {key.removeprefix("encoder."): value.double() for key, value in weights.items()}
    x = features.double()
    mean, var = w["init_bn.running_mean"][:, None], w["init_bn.running_var"][:, None]
    x = (x - mean) / (var + 1e-5).sqrt() * w["init_bn.weight"][:, None] + w["init_bn.bias"][:, None]
    x = F.conv2d(x[:, None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = x + w["time_pos_embed"][..., : x.shape[-1]] + w["freq_pos_embed"]
    x = x.flatten(2).transpose(1, 2)  # token f * steps + t

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for i in range(LAYERS):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        attended = (q * (WIDTH // HEADS) ** -0.5 @ k.mT).softmax(-1) @ v
        x = x + linear(f"blocks.{i}.attn.proj", attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
    return norm("norm", x)


def time_major(tokens, bands=4):
    return tokens.unflatten(1, (bands, -1)).transpose(1, 2).flatten(1, 2)


# -- the forward pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1001, 1012, 101, 16])
@torch.no_grad()
def test_forward_is_the_published_one(frames):
    model, features = tiny(), log_mel(2, 64, frames)
    output = model(features)
    expected = time_major(oracle(published(model, "port"), features))
    assert output.last_hidden_state.shape == (2, frames // 16 * 4, WIDTH)
    torch.testing.assert_close(output.last_hidden_state.double(), expected, atol=1e-5, rtol=1e-5)
    assert output.attention_mask.all()


def test_ten_seconds_are_248_tokens():
    assert tiny()(log_mel(1, 64, 1001)).last_hidden_state.shape[1] == 248
    assert CedModel(CedConfig.of_size("tiny", num_hidden_layers=1))(log_mel(1, 64, 1001)).last_hidden_state.shape == (
        1,
        248,
        192,
    )


@pytest.mark.parametrize("frames", [1013, 1028, 2024, 2025, 3001])
@torch.no_grad()
def test_long_clips_are_their_windows_end_to_end(frames):
    model, features = tiny(), log_mel(2, 64, frames)
    output = model(features)
    windows = [model(part).last_hidden_state for part in features.split(1012, dim=2) if part.shape[2] >= 16]
    expected = torch.cat(windows, dim=1)
    real = output.attention_mask[0].bool()
    assert torch.equal(real, output.attention_mask[1])
    assert int(real.sum()) == expected.shape[1] == 4 * model.count_steps(torch.tensor(frames))
    torch.testing.assert_close(output.last_hidden_state[:, real], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_batches_of_mixed_length_are_their_clips_alone():
    model = tiny()
    lengths = [3001, 2024, 1012, 1001, 1013, 101, 16, 2030]
    clips = [log_mel(1, 64, length) for length in lengths]
    features = torch.cat([F.pad(clip, (0, max(lengths) - clip.shape[2]), value=-100.0) for clip in clips])
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    output = model(features, mask.long())
    for row, clip in enumerate(clips):
        alone = model(clip)
        expected = alone.last_hidden_state[alone.attention_mask.bool()][None]
        result = output.last_hidden_state[row][output.attention_mask[row].bool()][None]
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert output.last_hidden_state.isfinite().all()


@torch.no_grad()
def test_padding_is_not_read():
    model, features = tiny(), log_mel(1, 64, 400)
    mask = torch.arange(400)[None] < 300
    expected = model(features, mask)
    features[..., 300:] = 1e4
    result = model(features, mask)
    real = result.attention_mask[0].bool()
    torch.testing.assert_close(result.last_hidden_state[:, real], expected.last_hidden_state[:, real])
    assert int(real.sum()) == 18 * 4


@pytest.mark.parametrize("frames", [500, 1500])
@torch.no_grad()
def test_eager_and_sdpa_agree(frames):
    model, features = tiny(), log_mel(2, 64, frames)
    mask = torch.arange(frames) < torch.tensor([[frames], [frames - 200]])
    model.set_attn_implementation("sdpa")
    expected = model(features, mask)
    model.set_attn_implementation("eager")
    result = model(features, mask)
    real = expected.attention_mask.bool()
    torch.testing.assert_close(result.last_hidden_state[real], expected.last_hidden_state[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_states_and_attentions():
    model = tiny(attn_implementation="eager")
    output = model(log_mel(2, 64, 1500), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == LAYERS + 1 and len(output.attentions) == LAYERS
    assert output.hidden_states[0].shape == (4, 252, WIDTH) and output.attentions[0].shape == (4, HEADS, 252, 252)
    rows = output.attentions[0].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    plain = model(log_mel(1, 64, 160))
    assert plain.hidden_states is None and plain.attentions is None


def test_gradient_checkpointing_changes_no_gradient():
    model, features = tiny().train(), log_mel(2, 64, 320)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(features).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(1, 80, 100), (1, 64, 15)])
def test_wrong_features_are_refused(shape):
    with pytest.raises(ValueError, match=r"expects features of shape \(batch, 64, at least 16 frames\)"):
        tiny()(torch.zeros(shape))


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="hidden_size=100 does not divide into num_attention_heads=3"):
        CedConfig(hidden_size=100, num_attention_heads=3)
    with pytest.raises(ValueError, match="no size 'huge'; choose one of tiny, mini, small, base"):
        CedConfig.of_size("huge")


def test_published_sizes():
    with torch.device("meta"):
        parameters = {
            size: CedModel(CedConfig.of_size(size)).num_parameters() for size in ("tiny", "mini", "small", "base")
        }
    assert [round(count / 1e6) for count in parameters.values()] == [5, 10, 21, 85]  # 5.5, 9.6, 22 and 86 with the head


def test_construction_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    CedModel(CedConfig(outputdim=527, hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=1))


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["port", "original"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_published_state_dicts_convert_both_ways(form, wrapped):
    model = tiny()
    weights = published(model, form)
    converted = convert_ced_state_dict({"model": weights} if wrapped else weights)
    assert converted.keys() == model.state_dict().keys()
    torch.testing.assert_close(converted, dict(model.state_dict()), atol=0, rtol=0)
    assert convert_ced_state_dict(converted).keys() == converted.keys()  # its own pass through


@pytest.mark.parametrize("key", ["decoder.weight", "encoder.blocks.0.attn.rel_pos", "blocks.0.mlp.fc3.weight"])
def test_an_unknown_weight_is_named(key):
    weights = published(tiny(), "port") | {key: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"'{key}' is not a weight of CED"):
        convert_ced_state_dict(weights)


def save_port(folder, model, **kwargs):
    """A folder as the Hub port's repositories are: its own config names, class names and code."""
    config = {
        "architectures": ["CedForAudioClassification"],
        "auto_map": {"AutoConfig": "configuration_ced.CedConfig", "AutoModel": "modeling_ced.CedModel"},
        "model_type": "ced",
        "embed_dim": WIDTH,
        "depth": LAYERS,
        "num_heads": HEADS,
        "mlp_ratio": 4.0,
        "n_mels": 64,
        "target_length": 1012,
        "patch_size": 16,
        "patch_stride": 16,
        "outputdim": 527,
        "pooling": "mean",
        "qkv_bias": True,
        "id2label": {str(i): f"class {i}" for i in range(527)},
        "torch_dtype": "float32",
        "transformers_version": "4.35.2",
    }
    (folder / "config.json").write_text(json.dumps(config | kwargs))
    save_file(published(model, "port"), folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_from_pretrained_reads_the_hub_port(tmp_path):
    model = tiny()
    save_port(tmp_path, model)
    loaded, report = CedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.config.hidden_size == WIDTH and loaded.config.num_hidden_layers == LAYERS
    assert loaded.config.intermediate_size == 4 * WIDTH and not loaded.training
    features = log_mel(1, 64, 500)
    assert torch.equal(loaded(features).last_hidden_state, model(features).last_hidden_state)


@torch.no_grad()
def test_save_and_load(tmp_path):
    model, features = tiny(), log_mel(1, 64, 500)
    model.save_pretrained(tmp_path / "1")
    again = CedModel.from_pretrained(tmp_path / "1")
    again.save_pretrained(tmp_path / "2")
    third = AutoModel.from_pretrained(tmp_path / "2", trust_remote_code=False)
    assert type(third) is CedModel
    assert torch.equal(third(features).last_hidden_state, model(features).last_hidden_state)
    config = AutoConfig.from_pretrained(tmp_path / "2", trust_remote_code=False)
    assert config.to_diff_dict() == again.config.to_diff_dict()


@torch.no_grad()
def test_half_precision_loads_and_runs(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = CedModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model(log_mel(1, 64, 160)).last_hidden_state.dtype == torch.bfloat16
