"""Eq. 1-4 written out in float64, the masked GRU against PyTorch's packed one, and the two baselines."""

import pytest
import torch
from conftest import randomized, tiny_config
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from modeling_lamb import LambForAudioCaptioning, TwoStreamAdapter
from modeling_lamb.two_stream_adapter import ADAPTERS, LinearAdapter, MaskedBiGRU, QFormerAdapter

WIDTH, TEXT_WIDTH, BANDS = 32, 48, 4
LENGTHS = torch.tensor([9, 4, 1])


def adapter(adapter_type="two_stream", dtype=torch.float64, **kwargs):
    config = tiny_config(adapter_type=adapter_type, adapter_num_attention_heads=4, **kwargs)
    return randomized(ADAPTERS[adapter_type](config, WIDTH, TEXT_WIDTH).to(dtype), 0.3).eval()


def grid(dtype=torch.float64):
    return torch.randn(3, 9, BANDS, WIDTH, dtype=dtype), torch.arange(9) < LENGTHS[:, None]


def weighted(module, x):
    return x @ module.weight.T + module.bias


def layer_norm(module, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias


def attention(module, h):
    """LN(MHA(Q, h) + Q), Eq. 1 and 2, head by head, of one unpadded sequence (length, D)."""
    q, k, v = weighted(module.q_proj, module.query), weighted(module.k_proj, h), weighted(module.v_proj, h)
    size = q.shape[-1] // module.num_heads
    heads = []
    for i in range(0, q.shape[-1], size):
        scores = q[:, i : i + size] @ k[:, i : i + size].T / size**0.5
        heads.append(scores.softmax(-1) @ v[:, i : i + size])
    return layer_norm(module.norm, weighted(module.o_proj, torch.cat(heads, dim=-1)) + module.query)


def convolved(module, h):
    """The temporal front-end of one sequence (length, D): kernels over zero-padded time, projected, LN, GELU."""
    scales = []
    for conv in module.convs:
        size = conv.kernel_size[0]
        padded = nn.functional.pad(h, (0, 0, size // 2, size // 2))
        windows = [sum(padded[t + i] @ conv.weight[:, :, i].T for i in range(size)) + conv.bias for t in range(len(h))]
        scales.append(torch.stack(windows))
    return nn.functional.gelu(layer_norm(module.norm, weighted(module.proj, torch.cat(scales, dim=-1))))


def gru(module, h, reverse):
    """One direction of one GRU layer over one sequence, step by step."""
    order = range(len(h) - 1, -1, -1) if reverse else range(len(h))
    state, states = h.new_zeros(module.hidden_size), {}
    for t in order:
        r_x, z_x, n_x = (module.weight_ih_l0 @ h[t] + module.bias_ih_l0).chunk(3)
        r_h, z_h, n_h = (module.weight_hh_l0 @ state + module.bias_hh_l0).chunk(3)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        state = (1 - z) * torch.tanh(n_x + r * n_h) + z * state
        states[t] = state
    return torch.stack([states[t] for t in range(len(h))])


@torch.no_grad()
def oracle(module, tokens, semantic=True, temporal=True):
    """Eq. 1-4 of one clip's encoder tokens (steps, bands, D)."""
    streams = []
    if semantic:
        streams.append(attention(module.semantic, tokens.flatten(0, 1)))
    if temporal:
        h = convolved(module.temporal_encoder, tokens.mean(1))
        layers = module.temporal_encoder.gru
        for ahead, behind in zip(layers.forward_layers, layers.backward_layers, strict=True):
            h = torch.cat([gru(ahead, h, False), gru(behind, h, True)], dim=-1)
        streams.append(attention(module.temporal, h))
    return weighted(module.output_proj, attention(module.fusion, torch.cat(streams)))


@pytest.mark.parametrize("streams", [(True, True), (True, False), (False, True)])
@torch.no_grad()
def test_two_stream_adapter_is_equations_1_to_4(streams):
    semantic, temporal = streams
    module = adapter(num_semantic_queries=3 * semantic, num_temporal_queries=2 * temporal)
    tokens, mask = grid()
    z_a = module(tokens, mask)
    assert z_a.shape == (3, 4, TEXT_WIDTH)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(z_a[row], oracle(module, tokens[row, :length], *streams))


@torch.no_grad()
def test_without_a_stream_its_parameters_are_gone():
    names = {name.split(".")[0] for name, _ in adapter(num_temporal_queries=0).named_parameters()}
    assert names == {"semantic", "fusion", "output_proj"}
    with pytest.raises(ValueError, match="Both streams are off"):
        tiny_config(num_semantic_queries=0, num_temporal_queries=0)


@torch.no_grad()
def test_the_float32_adapter_agrees_with_float64():
    module = adapter()
    tokens, mask = grid()
    single = adapter(dtype=torch.float32)
    single.load_state_dict(module.state_dict())
    torch.testing.assert_close(single(tokens.float(), mask).double(), module(tokens, mask), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_masked_gru_is_the_packed_bidirectional_one():
    module = MaskedBiGRU(16, 2)
    reference = nn.GRU(16, 8, num_layers=2, bidirectional=True, batch_first=True)
    for layer in range(2):
        for direction, suffix in ((module.forward_layers, ""), (module.backward_layers, "_reverse")):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(reference, f"{name}_l{layer}{suffix}").copy_(getattr(direction[layer], f"{name}_l0"))
    states = torch.randn(3, 9, 16)
    mask = torch.arange(9) < LENGTHS[:, None]
    packed = pack_padded_sequence(states, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(reference(packed)[0], batch_first=True)
    result = module(states, mask)
    torch.testing.assert_close(result[mask], expected[mask])


@pytest.mark.parametrize("adapter_type", ADAPTERS)
@torch.no_grad()
def test_padding_never_reaches_z_a(adapter_type):
    module = adapter(adapter_type, torch.float32)
    tokens, mask = grid(torch.float32)
    expected = [module(tokens[i : i + 1, :length], mask[i : i + 1, :length]) for i, length in enumerate(LENGTHS)]
    tokens[~mask] = 100.0  # padding far larger than any token
    torch.testing.assert_close(module(tokens, mask), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter_type", ADAPTERS)
def test_every_parameter_learns(adapter_type):
    module = adapter(adapter_type).train()
    module(*grid()).square().sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_a_width_of_its_own_is_projected_to():
    module = adapter(adapter_hidden_size=64)
    tokens, mask = grid()
    projection, _, norm = module.input_proj
    h_a = layer_norm(norm, nn.functional.gelu(weighted(projection, tokens[0])))
    torch.testing.assert_close(module(tokens, mask)[0], oracle(module, h_a))


@pytest.mark.parametrize("build", [LambForAudioCaptioning, LambForAudioCaptioning.from_backbones])
@torch.no_grad()
def test_a_new_adapters_queries_tell_tokens_apart(build):
    semantic = build(tiny_config(adapter_hidden_size=64)).adapter.semantic
    keys, queries = semantic.k_proj(torch.randn(9, 64)), semantic.q_proj(semantic.query)
    scores = queries @ keys.T / 64**0.5
    assert scores.std() > 0.2  # 0.001 with the weights of an LLM, std 0.02


@torch.no_grad()
def test_order_matters_to_the_temporal_stream_only():
    tokens = torch.randn(1, 9, BANDS, WIDTH, dtype=torch.float64)
    mask = torch.ones(1, 9, dtype=torch.bool)
    semantic, temporal = adapter(num_temporal_queries=0), adapter(num_semantic_queries=0)
    torch.testing.assert_close(semantic(tokens.flip(1), mask), semantic(tokens, mask))
    assert not torch.allclose(temporal(tokens.flip(1), mask), temporal(tokens, mask), atol=1e-2)


@torch.no_grad()
def test_the_linear_baseline_averages_equal_spans_of_time():
    module = LinearAdapter(tiny_config(), WIDTH, TEXT_WIDTH).double()  # 4 audio tokens
    tokens = torch.randn(2, 8, BANDS, WIDTH, dtype=torch.float64)
    mask = torch.arange(8) < torch.tensor([8, 6])[:, None]
    z_a = module(tokens, mask)
    steps = tokens.mean(2)
    spans = [steps[0, 2 * i : 2 * i + 2].mean(0) for i in range(4)]
    torch.testing.assert_close(z_a[0], module.output_proj(torch.stack(spans)))
    second = steps[1]  # 6 steps: spans of one and a half
    spans = [(second[0] + second[1] / 2) / 1.5, (second[1] / 2 + second[2]) / 1.5]
    spans += [(second[3] + second[4] / 2) / 1.5, (second[4] / 2 + second[5]) / 1.5]
    torch.testing.assert_close(z_a[1], module.output_proj(torch.stack(spans)))


@torch.no_grad()
def test_the_qformer_baseline_is_blip_2s():
    module = adapter("qformer", torch.float32, qformer_num_layers=3)
    assert isinstance(module, QFormerAdapter) and len(module.qformer.encoder.layer) == 3
    assert all(layer.has_cross_attention for layer in module.qformer.encoder.layer)
    tokens, mask = grid(torch.float32)
    assert module(tokens, mask).shape == (3, 4, TEXT_WIDTH)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 32 does not divide into adapter_num_attention_heads=5"):
        tiny_config(adapter_num_attention_heads=5)
    assert isinstance(TwoStreamAdapter(tiny_config(adapter_num_attention_heads=2), WIDTH, 8), TwoStreamAdapter)
