"""Guide distances against float64, the processor in plain `generate`, and guided beams against exhaustive search."""

import itertools

import pytest
import torch
from conftest import VOCAB_SIZE, noise, randomized, tiny_config, tiny_text_config
from transformers import LlamaForCausalLM, LogitsProcessorList

from modeling_lamb import LambForAudioCaptioning, TokenGuideLogitsProcessor, guide_scores
from modeling_lamb import modeling_lamb as network
from modeling_lamb.token_guide import TokenGuide

METRICS = ["l2", "l1", "cosine"]


def oracle(z, v, metric):
    """Row by row in float64. z (B, N, D), v (K, D) -> (B, K)."""
    if len(v) > 2000:  # a float64 copy of a large table at once would be slow
        return torch.cat([oracle(z, part, metric) for part in v.split(2000)], dim=1)
    z_bar, v = z.double().mean(1), v.double()
    if metric == "l2":
        return torch.stack([(v - row).square().sum(1) for row in z_bar])
    if metric == "l1":
        return torch.stack([(v - row).abs().sum(1) for row in z_bar])
    return torch.stack([1 - (v @ row) / (v.norm(dim=1) * row.norm()) for row in z_bar])


@pytest.fixture(scope="module")
def llama_size():
    """z_a and a token table of LLaMA-2-7B's shape and scale, with an offset that all tokens share."""
    generator = torch.Generator().manual_seed(2)
    v = 0.017 * torch.randn(32000, 4096, generator=generator) + 0.02
    z = 0.1 * torch.randn(2, 4, 4096, generator=generator)
    z[1] = v[777] + 1e-3 * z[1]  # a clip that all but coincides with a token
    return z, v


def test_l2_at_the_size_of_llama(llama_size):
    z, v = llama_size
    scores = guide_scores(z, v)
    expected = oracle(z, v, "l2")
    assert scores.dtype == torch.float32 and scores.shape == (2, 32000)
    far = expected > 1e-2 * expected.max()  # all but the coinciding token, whose distance is next to nothing
    assert far.sum() == 2 * 32000 - 1
    assert ((scores - expected).abs() / expected)[far].max() < 1e-5
    assert scores[1].argmin() == 777 and (scores[1, 777] - expected[1, 777]).abs() < 1e-5


def test_l2_of_bfloat16_inputs_is_that_of_the_rounded_vectors(llama_size):
    z, v = (x[..., :8192, :].bfloat16() for x in llama_size)
    scores, expected = guide_scores(z[:1], v), oracle(z[:1].float(), v, "l2")
    assert scores.dtype == torch.float32
    assert ((scores - expected).abs() / expected).max() < 1e-5  # nothing is lost beyond the rounding of the inputs


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric(metric):
    z, v = torch.randn(3, 4, 64), torch.randn(9000, 64)
    torch.testing.assert_close(guide_scores(z, v, metric).double(), oracle(z, v, metric), rtol=1e-5, atol=1e-6)
    z, v = z.double()[:, :, :5].requires_grad_(), v.double()[:7, :5].requires_grad_()
    assert torch.autograd.gradcheck(lambda a: guide_scores(a, v, metric), (z,))


def test_the_full_distance_and_the_shortcut_are_one_distribution():
    z, v = torch.randn(2, 4, 32), torch.randn(100, 32)
    logits = torch.randn(2, 100)
    full = (logits - 0.1 * guide_scores(z, v)).softmax(-1)
    shortcut = (logits + 0.1 * (2 * z.mean(1) @ v.T - v.square().sum(1))).softmax(-1)
    torch.testing.assert_close(full, shortcut)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="metric='dot' is none of l2, l1, cosine"):
        guide_scores(torch.randn(1, 2, 4), torch.randn(5, 4), "dot")
    with pytest.raises(ValueError, match="width 3, token_embeddings 4"):
        guide_scores(torch.randn(1, 2, 3), torch.randn(5, 4))
    with pytest.raises(ValueError, match="shape"):
        TokenGuideLogitsProcessor(torch.randn(5), 0.1)
    with pytest.raises(ValueError, match="do not fit"):
        TokenGuideLogitsProcessor(torch.randn(2, 5), 0.1)(torch.zeros(3, 1), torch.randn(3, 5))
    assert TokenGuide(tiny_config(guide_metric="none"))(torch.randn(1, 2, 4), torch.randn(5, 4)) is None


def test_the_processor_is_equation_12_out_of_place_and_stateless():
    scores, logits = torch.rand(2, 10), torch.randn(6, 10)
    before = logits.clone(), scores.clone()
    processor = TokenGuideLogitsProcessor(scores, 0.3)
    first = processor(torch.zeros(6, 3), logits)
    torch.testing.assert_close(first, logits - 0.3 * scores[[0, 0, 0, 1, 1, 1]])  # rows of beams lie side by side
    assert torch.equal(logits, before[0]) and torch.equal(scores, before[1])
    processor(torch.zeros(2, 9), torch.randn(2, 10))  # other rows, another step
    assert torch.equal(processor(torch.zeros(6, 4), logits), first)
    normal = TokenGuideLogitsProcessor(scores, 0.3, renormalize=True)(torch.zeros(6, 3), logits)
    torch.testing.assert_close(normal, first.log_softmax(-1))


def test_the_processor_leaves_rows_of_a_padded_output_layer_alone():
    scores, logits = torch.rand(1, 4), torch.randn(1, 6)
    result = TokenGuideLogitsProcessor(scores, 1.0)(None, logits)
    torch.testing.assert_close(result, torch.cat([logits[:, :4] - scores, logits[:, 4:]], dim=1))


def test_the_processor_guides_any_causal_lm():
    llm = randomized(LlamaForCausalLM(tiny_text_config(vocab_size=20))).eval()
    scores = torch.full((2, 20), 50.0)
    scores[0, 7] = scores[1, 9] = 0
    guide = LogitsProcessorList([TokenGuideLogitsProcessor(scores, 5.0)])
    for beams in (1, 3):
        output = llm.generate(torch.tensor([[3, 4], [5, 6]]), num_beams=beams, max_new_tokens=3, logits_processor=guide)
        assert output[:, 2:].tolist() == [[7] * 3, [9] * 3]


# -- in the model's generate -------------------------------------------------------------------------------------------

TOY, EOS = 6, 1


@pytest.fixture
def toy():
    """Six tokens, so that every sequence can be scored; a guide strong enough to change the winner."""
    config = tiny_config(text_config=tiny_text_config(TOY), audio_token_id=TOY, guide_weight_init=0.7)
    model = randomized(LambForAudioCaptioning(config), 0.25).eval()
    ids = torch.tensor([[TOY] * 4 + [3, 4], [TOY] * 4 + [5, 3]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "audio_embeds": torch.randn(2, 4, 48)}


@torch.no_grad()
def exhaustive(model, inputs, row, length, weight):
    """Score (sum of log softmax of the guided logits) of every sequence that ends in EOS or is `length` long."""
    bias = -weight * guide_scores(inputs["audio_embeds"][row : row + 1], model.token_embeddings())
    prompt, z_a = inputs["input_ids"][row : row + 1], inputs["audio_embeds"][row : row + 1]
    tails = torch.tensor(list(itertools.product(range(TOY), repeat=length)))
    ids = torch.cat([prompt.expand(len(tails), -1), tails], dim=1)
    logits = model(input_ids=ids, audio_embeds=z_a.expand(len(tails), -1, -1)).logits[:, prompt.shape[1] - 1 : -1]
    log_probs = (logits + bias[:, None]).log_softmax(-1).gather(2, tails[..., None])[..., 0]
    best = {}
    for tail, steps in zip(tails.tolist(), log_probs.tolist(), strict=True):
        end = tail.index(EOS) + 1 if EOS in tail else length
        best[tuple(tail[:end])] = sum(steps[:end])
    return max(best.items(), key=lambda item: item[1])


@pytest.mark.parametrize("weight", [None, 0.0, 2.0])
def test_guided_beams_find_what_exhaustive_search_finds(toy, weight):
    model, inputs = toy
    length = 4
    output = model.generate(
        **inputs,
        num_beams=TOY**3,  # as many as there are prefixes: nothing can be pruned
        max_new_tokens=length,
        length_penalty=0.0,
        early_stopping="never",
        token_guide_weight=weight,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row in range(2):
        tokens, score = exhaustive(model, inputs, row, length, 0.7 if weight is None else weight)
        found = output.sequences[row, 6:].tolist()
        assert found[: len(tokens)] == list(tokens) and set(found[len(tokens) :]) <= {2}
        assert output.sequences_scores[row].item() == pytest.approx(score, abs=1e-4)


def test_the_guide_changes_the_winner(toy):
    model, inputs = toy
    winners = {exhaustive(model, inputs, row, 4, weight)[0] for row in range(2) for weight in (0.0, 0.7, 2.0)}
    assert len(winners) > 2


@pytest.mark.parametrize("beams", [1, 3])
def test_weight_0_is_the_plain_model(toy, beams):
    model, inputs = toy
    embeds = model._merge_embeds(inputs["input_ids"], inputs["audio_embeds"])
    options = {"num_beams": beams, "max_new_tokens": 6, "pad_token_id": 2, "eos_token_id": EOS}
    expected = model.language_model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
    result = model.generate(**inputs, token_guide_weight=0.0, **options)[:, 6:]
    assert torch.equal(result, expected)


def test_greedy_takes_the_guided_argmax_and_reports_guided_scores(toy):
    model, inputs = toy
    output = model.generate(
        **inputs,
        max_new_tokens=5,
        min_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    bias = 0.7 * guide_scores(inputs["audio_embeds"], model.token_embeddings())
    for step, (scores, logits) in enumerate(zip(output.scores, output.logits, strict=True)):
        guided = logits - bias
        guided[:, EOS] = -torch.inf  # min_new_tokens
        torch.testing.assert_close(scores, guided)
        assert torch.equal(output.sequences[:, 6 + step], guided.argmax(-1))


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}])
def test_distances_are_computed_once_a_generate(model, processor, monkeypatch, options):
    calls = []
    original = network.TokenGuide.forward

    def counted(self, z_a_bar, table):
        calls.append((z_a_bar.shape[0], table.shape[0]))
        return original(self, z_a_bar, table)

    monkeypatch.setattr(network.TokenGuide, "forward", counted)
    inputs = processor(audio=[noise(0.5, seed) for seed in range(3)], sampling_rate=16000)
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **options)
    assert calls == [(3, VOCAB_SIZE)]
    model.generate(**inputs, max_new_tokens=2, token_guide_weight=0.0)
    assert len(calls) == 1


def test_a_padding_row_counts_for_nothing_in_the_mean(toy):
    """A row with one clip beside a row with two: its guide is the mean over its own placeholders."""
    model, _ = toy
    z_a = torch.randn(2, 8, 48)
    z_a[0, 4:] = 0
    mask = torch.tensor([[True] * 4 + [False] * 4, [True] * 8])
    expected = guide_scores(z_a[:1, :4], model.token_embeddings()), guide_scores(z_a[1:], model.token_embeddings())
    torch.testing.assert_close(model._guide_bias(z_a, mask), torch.cat(expected))
