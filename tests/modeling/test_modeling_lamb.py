"""The whole model: placeholders, batches, decoders, losses, what trains, and every way to decode."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, DECODERS, VOCAB_SIZE, noise, randomized, tiny_config, tiny_text_config
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from modeling_lamb import LambForAudioCaptioning, guide_scores

SECONDS = (10.5, 0.3, 10.12, 2.0, 20.3, 1.0, 4.7, 10.0)


def audio(count=3, seconds=(0.8, 0.3, 1.2)):
    return [noise(seconds[i % len(seconds)], i) for i in range(count)]


@pytest.fixture
def prompts(processor):
    return processor(audio=audio(), sampling_rate=16000)


@pytest.fixture
def training_batch(processor):
    return processor(audio=audio(4), sampling_rate=16000, captions=CAPTIONS)


def model_of(**kwargs):
    return randomized(LambForAudioCaptioning(tiny_config(**kwargs))).eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# -- batches and placeholders ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_eight_clips_of_mixed_length_are_eight_single_clips(model, processor):
    clips = [noise(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    questions = ["What is heard?" if i % 3 else "Tell me at some length what it is that you hear." for i in range(8)]
    batch = processor(text=questions, audio=clips, sampling_rate=16000)
    assert (batch["attention_mask"][:, 0] == 0).any() and batch["attention_mask"][:, -1].all()  # padded on the left
    tokens = model.audio_encoder(batch["input_features"], batch["input_features_mask"])
    together = model(**batch)
    captions = model.generate(**batch, max_new_tokens=8)
    texts = processor.batch_decode(captions, skip_special_tokens=True)
    beams = model.generate(**batch, max_new_tokens=5, num_beams=3)
    for row in range(8):
        single = processor(text=questions[row], audio=clips[row], sampling_rate=16000)
        alone = model.audio_encoder(single["input_features"], single["input_features_mask"])
        close(
            tokens.last_hidden_state[row][tokens.attention_mask[row].bool()],
            alone.last_hidden_state[alone.attention_mask.bool()],
        )
        output = model(**single)
        close(together.audio_embeds[row], output.audio_embeds[0])
        length = single["input_ids"].shape[1]
        close(together.logits[row, -length:], output.logits[0])
        assert texts[row] == processor.decode(model.generate(**single, max_new_tokens=8)[0], skip_special_tokens=True)
        alone = model.generate(**single, max_new_tokens=5, num_beams=3)[0, length:]
        found = beams[row, batch["input_ids"].shape[1] :]
        assert torch.equal(found[: len(alone)], alone) and (found[len(alone) :] == 2).all()


@torch.no_grad()
def test_two_clips_give_different_logits(model, prompts):
    logits = model(**prompts).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-2 and (logits[1] - logits[2]).abs().max() > 1e-2


@torch.no_grad()
def test_embeddings_lie_at_the_placeholders_in_order(model, processor):
    inputs = processor(audio=audio(2), sampling_rate=16000)
    z_a = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
    assert z_a.shape == (2, 4, 48)
    embeds = model.get_input_embeddings()(inputs["input_ids"].clamp(max=VOCAB_SIZE - 1))
    embeds[inputs["input_ids"] == VOCAB_SIZE] = z_a.flatten(0, 1)
    expected = model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    close(model(**inputs).logits, expected)
    close(model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, expected)
    hidden = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).last_hidden_state
    cached = model(**{k: v for k, v in inputs.items() if "features" not in k}, audio_embeds=z_a)
    close(cached.logits, expected)
    assert hidden.shape[2] == 32


@torch.no_grad()
def test_a_frozen_encoders_tokens_may_be_given_instead(model, prompts):
    output = model.audio_encoder(prompts["input_features"], prompts["input_features_mask"])
    text = {name: prompts[name] for name in ("input_ids", "attention_mask")}
    given = {
        "audio_hidden_states": output.last_hidden_state.unflatten(1, (-1, 4)),
        "audio_hidden_mask": output.attention_mask[:, ::4],
    }
    expected = model(**prompts)
    close(model(**text, **given).logits, expected.logits)
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    assert torch.equal(model.generate(**text, **given, **options), model.generate(**prompts, **options))


@pytest.mark.parametrize("change", ["too few", "too many", "no audio"])
def test_placeholders_that_do_not_match_are_refused(model, prompts, change):
    ids = prompts["input_ids"]
    if change == "too few":
        ids[1, ids[1].tolist().index(VOCAB_SIZE)] = 5
    elif change == "too many":
        ids[1, -1] = VOCAB_SIZE
    else:
        del prompts["input_features"], prompts["input_features_mask"]
    expected = "no input_features were given" if change == "no audio" else r"placeholders \(id 369\) by row"
    with pytest.raises(ValueError, match=expected):
        model(**prompts)
    with pytest.raises(ValueError, match=expected):
        model.generate(**prompts, max_new_tokens=2)


def test_ids_and_embeddings_exclude_each_other(model, prompts):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(**prompts, inputs_embeds=torch.zeros(3, 4, 48))
    with pytest.raises(ValueError, match="hold theirs already"):
        model(inputs_embeds=torch.zeros(3, 4, 48), input_features=prompts["input_features"])


@torch.no_grad()
def test_text_alone_is_the_llm_alone(model, processor):
    inputs = processor(text=["A dog", "Rain falls on a tin roof"])
    expected = model.language_model(**inputs)
    close(model(**inputs).logits, expected.logits)
    options = {"max_new_tokens": 4, "pad_token_id": 2, "eos_token_id": 1}
    assert torch.equal(model.generate(**inputs, **options), model.language_model.generate(**inputs, **options))


@torch.no_grad()
def test_a_row_of_text_beside_a_row_of_audio(model, processor):
    """And a row with two clips: each as it is alone, unguided where there is no audio."""
    one, two = "<|audio|>What is heard?", "<|audio|> and <|audio|>: what differs?"
    texts, clips = ["Rain falls on", one, two], audio(3)
    batch = processor(text=texts, audio=clips, sampling_rate=16000)
    singles = [
        processor(text=texts[:1]),
        processor(text=texts[1], audio=clips[:1], sampling_rate=16000),
        processor(text=texts[2], audio=clips[1:], sampling_rate=16000),
    ]
    output = model(**batch)
    assert output.audio_embeds.shape == (3, 8, 48)
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "token_guide_weight": 3.0}
        generated = model.generate(**batch, **options)[:, -5:]
        for row, single in enumerate(singles):
            length = single["input_ids"].shape[1]
            close(output.logits[row, -length:], model(**single).logits[0])
            assert torch.equal(generated[row], model.generate(**single, **options)[0, -5:])


def test_losses_with_a_row_of_text_are_finite(model, processor, training_batch):
    text = "<|audio|>USER: Describe the audio you hear.\nASSISTANT:"
    batch = processor(
        text=[text, "USER: Say a sentence.\nASSISTANT:"], audio=audio(1), sampling_rate=16000, captions=CAPTIONS[:2]
    )
    output = model(**batch)
    output.loss.backward()
    assert output.loss.isfinite() and output.cs_token_loss.isfinite()
    text_only = {name: training_batch[name] for name in ("input_ids", "attention_mask", "labels")}
    text_only["input_ids"] = text_only["input_ids"].masked_fill(text_only["input_ids"] == VOCAB_SIZE, 5)
    output = model(**text_only)
    assert output.loss.isfinite() and output.guided_loss is None and output.cs_global_loss is None


# -- decoders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=DECODERS)
def decoder(request):
    text_config, targets = DECODERS[request.param]
    return model_of(text_config=text_config, peft_config={"r": 4, "lora_alpha": 8, "target_modules": targets})


@torch.no_grad()
def test_every_decoder_captions_a_batch_as_its_clips(decoder, processor, prompts):
    logits = decoder(**prompts).logits
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    greedy = decoder.generate(**prompts, **options)
    beams = decoder.generate(**prompts, **options, num_beams=3)
    assert not torch.allclose(logits[0, -1], logits[1, -1], atol=1e-3)
    for row, clip in enumerate(audio()):
        single = processor(audio=clip, sampling_rate=16000)
        close(logits[row, -1], decoder(**single).logits[0, -1])
        assert torch.equal(greedy[row, -5:], decoder.generate(**single, **options)[0, -5:])
        assert torch.equal(beams[row, -5:], decoder.generate(**single, **options, num_beams=3)[0, -5:])


def test_every_decoder_trains_lora_and_nothing_else_of_itself(decoder, training_batch):
    decoder.train()
    output = decoder(**training_batch)
    output.loss.backward()
    assert output.loss.isfinite()
    learning = {name for name, p in decoder.language_model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {name for name, _ in decoder.language_model.named_parameters() if "lora_" in name} != set()


@torch.no_grad()
def test_the_guide_measures_what_the_decoder_looks_up(decoder):
    """Gemma scales its embeddings: distances are to the scaled ones, in whose space the audio embeddings lie."""
    looked_up = decoder.get_input_embeddings()(torch.arange(VOCAB_SIZE))
    close(decoder.token_embeddings(), looked_up)
    name = decoder.config.text_config.model_type
    scale = 48**0.5 if name.startswith("gemma") else 1
    close(looked_up, decoder.get_input_embeddings().weight * scale)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_equation_14(training_batch):
    model = model_of(
        cs_global_weight=0.5,
        cs_token_weight=2.0,
        info_nce_weight=0.25,
        alignment_weight=3.0,
        guided_loss_weight=0.7,
        decoder_loss_weight=1.5,
    )
    output = model(**training_batch)
    labels, ids = training_batch["labels"], training_batch["input_ids"]
    logits = model(**{name: value for name, value in training_batch.items() if name != "labels"}).logits
    target = labels[:, 1:].flatten()
    decoder_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target)
    bias = 0.1 * guide_scores(output.audio_embeds, model.token_embeddings())
    guided_loss = F.cross_entropy((logits[:, :-1] - bias[:, None]).flatten(0, 1), target)
    close(output.decoder_loss, decoder_loss)
    close(output.guided_loss, guided_loss)
    caption = (labels != -100) & (labels != 1)  # without EOS
    z_t = model.get_input_embeddings()(ids.clamp(max=VOCAB_SIZE - 1))
    terms = model.aligner(output.audio_embeds, z_t, caption)
    for name in ("cs_global_loss", "cs_token_loss", "info_nce_loss", "modality_gap", "modality_cosine"):
        close(output[name], terms[name])
    alignment = 0.5 * terms["cs_global_loss"] + 2 * terms["cs_token_loss"] + 0.25 * terms["info_nce_loss"]
    close(output.alignment_loss, alignment)
    close(output.loss, 3 * alignment + 0.7 * guided_loss + 1.5 * decoder_loss)


def test_names_of_the_losses(model, training_batch):
    output = model(**training_batch)
    losses = {name for name in output if name.endswith("loss")}
    assert losses == {
        "loss",
        "decoder_loss",
        "guided_loss",
        "alignment_loss",
        "cs_global_loss",
        "cs_token_loss",
        "info_nce_loss",
    }
    assert output.logits.shape[1] < training_batch["input_ids"].shape[1]  # of caption positions only
    del training_batch["labels"]
    assert not [name for name in model(**training_batch) if name.endswith("loss")]


def test_alignment_alone_runs_no_llm(model, training_batch, monkeypatch):
    expected = model(**training_batch)
    monkeypatch.setattr(model.language_model, "forward", None)
    output = model(**training_batch, alignment_only=True)
    close(output.loss, expected.alignment_loss)
    assert output.logits is None and output.decoder_loss is None


def test_eos_is_learnt_but_is_no_part_of_the_caption(model, training_batch):
    assert (training_batch["labels"] == 1).sum() == 4
    whole = model(**training_batch)
    shorter = dict(training_batch) | {
        "labels": training_batch["labels"].masked_fill(training_batch["labels"] == 1, -100)
    }
    cut = model(**shorter)
    close(whole.cs_token_loss, cut.cs_token_loss)
    assert (whole.decoder_loss - cut.decoder_loss).abs() > 1e-3


def test_gradient_accumulation_counts_tokens(model, training_batch):
    total = int((training_batch["labels"][:, 1:] != -100).sum())
    output = model(**training_batch, num_items_in_batch=torch.tensor(2 * total))
    expected = model(**training_batch)
    close(2 * output.decoder_loss, expected.decoder_loss)
    close(2 * output.guided_loss, expected.guided_loss)


ABLATIONS = {
    "w/o TSA": {"adapter_type": "linear"},
    "q-former": {"adapter_type": "qformer"},
    "no semantic stream": {"num_semantic_queries": 0},
    "no temporal stream": {"num_temporal_queries": 0},
    "adapter width": {"adapter_hidden_size": 64},
    "w/o L_CS": {"cs_global_weight": 0, "cs_token_weight": 0},
    "w/o CS-global": {"cs_global_weight": 0},
    "w/o CS-token": {"cs_token_weight": 0},
    "w/o InfoNCE": {"info_nce_weight": 0},
    "w/o CMA": {"alignment_weight": 0},
    "w/o L_tg": {"guided_loss_weight": 0},
    "w/o L_dec": {"decoder_loss_weight": 0},
    "w/o TG": {"guide_metric": "none"},
    "l1": {"guide_metric": "l1"},
    "cosine": {"guide_metric": "cosine"},
    "centred": {"kernel_space": "centred"},
    "raw median": {"kernel_space": "raw", "kernel_width": "median"},
    "no LoRA": {"peft_config": None},
    "LoRA on both": {"audio_peft_config": {"r": 2, "target_modules": ["q_proj"]}},
    "all trained": {"freeze_audio_encoder": False, "freeze_text_model": False, "peft_config": None},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_a_step(name, training_batch):
    settings = ABLATIONS[name]
    model = model_of(**settings).train()
    output = model(**training_batch)
    output.loss.backward()
    assert output.loss.isfinite()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trained and all(model.get_parameter(name).grad.isfinite().all() for name in trained)
    parts = {name.split(".")[0] for name in trained if "lora_" not in name}
    expected = {"adapter"} | ({"audio_encoder", "language_model"} if name == "all trained" else set())
    guided = settings.get("guide_metric") != "none" and settings.get("guided_loss_weight") != 0
    assert parts == (expected | {"token_guide"} if guided else expected)
    adapted = {name.split(".")[0] for name in trained if "lora_" in name}
    by_default = set() if "peft_config" in settings else {"language_model"}
    assert adapted == (by_default | {"audio_encoder"} if "audio_peft_config" in settings else by_default)
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained and "adapter.output_proj.weight" in moved
    assert model.generate(**{k: v for k, v in training_batch.items() if k != "labels"}, max_new_tokens=2).numel()


def test_the_guides_weight_starts_where_the_config_says():
    assert model_of(guide_weight_init=0.3).token_guide.beta.item() == pytest.approx(0.3)


# -- what is frozen ----------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_stays_in_evaluation(model, training_batch):
    statistics = model.audio_encoder.patch_embed.init_bn.running_mean.clone()
    model.train()
    model(**training_batch).loss.backward()
    assert model.adapter.training and model.language_model.training
    assert not any(module.training for module in model.audio_encoder.modules())
    assert torch.equal(model.audio_encoder.patch_embed.init_bn.running_mean, statistics)
    assert all(parameter.grad is None for parameter in model.audio_encoder.parameters())


def test_a_frozen_encoder_with_lora_keeps_its_batch_norm(training_batch):
    model = model_of(audio_peft_config={"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.5}).train()
    statistics = model.audio_encoder.patch_embed.init_bn.running_mean.clone()
    model(**training_batch).loss.backward()
    assert torch.equal(model.audio_encoder.patch_embed.init_bn.running_mean, statistics)
    learning = {name for name, p in model.audio_encoder.named_parameters() if p.grad is not None}
    assert learning and all("lora_" in name for name in learning)
    assert model.audio_encoder.blocks[0].attn.q_proj.lora_dropout["default"].training


def test_a_trained_encoder_trains(training_batch):
    model = model_of(freeze_audio_encoder=False).train()
    statistics = model.audio_encoder.patch_embed.init_bn.running_mean.clone()
    model(**training_batch).loss.backward()
    assert model.audio_encoder.training
    assert not torch.equal(model.audio_encoder.patch_embed.init_bn.running_mean, statistics)


def test_gradient_checkpointing_changes_no_gradient(model, training_batch):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**training_batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


def test_a_new_models_lora_changes_nothing():
    """B starts at zero, whatever the backbone's own initialisation does with Linear layers."""
    model = LambForAudioCaptioning(tiny_config(audio_peft_config={"r": 2, "target_modules": ["q_proj"]}))
    matrices = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert all(p.any() == ("lora_A" in name) for name, p in matrices.items())
    assert {name.split(".")[0] for name in matrices} == {"language_model", "audio_encoder"}


# -- decoding ----------------------------------------------------------------------------------------------------------

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6}


def test_greedy_is_one_beam_and_agrees_without_a_cache(model, prompts):
    expected = model.generate(**prompts, **OPTIONS)
    assert torch.equal(expected[:, : prompts["input_ids"].shape[1]], prompts["input_ids"])
    assert torch.equal(model.generate(**prompts, **OPTIONS, num_beams=1), expected)
    assert torch.equal(model.generate(**prompts, **OPTIONS, use_cache=False), expected)
    assert torch.equal(model.generate(**prompts, **OPTIONS, cache_implementation="static"), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_static_and_dynamic_caches_agree(model, prompts, beams):
    expected = model.generate(**prompts, **OPTIONS, num_beams=beams)
    result = model.generate(**prompts, **OPTIONS, num_beams=beams, cache_implementation="static")
    assert torch.equal(result, expected)
    result = model.generate(**prompts, **OPTIONS, num_beams=beams, use_cache=False)
    assert torch.equal(result, expected)


@torch.no_grad()
def test_every_step_is_the_guided_model(model, prompts):
    """What generate adds up step by step is what one forward pass over the finished caption says."""
    output = model.generate(**prompts, **OPTIONS, num_beams=4, return_dict_in_generate=True, output_scores=True)
    mask = F.pad(prompts["attention_mask"], (0, 6), value=1)
    features = {name: prompts[name] for name in ("input_features", "input_features_mask")}
    whole = model(input_ids=output.sequences, attention_mask=mask, **features)
    guided = whole.logits - 0.1 * guide_scores(whole.audio_embeds, model.token_embeddings())[:, None]
    length = prompts["input_ids"].shape[1]
    guided = guided.log_softmax(-1)[:, length - 1 : -1]
    score = guided.gather(2, output.sequences[:, length:, None])[..., 0].sum(1) / 6
    close(output.sequences_scores, score)


@pytest.mark.parametrize("beams", [1, 4])
def test_several_sequences_a_clip(model, prompts, beams):
    options = {"num_return_sequences": 3} | ({"do_sample": True} if beams == 1 else {"num_beams": beams})
    output = model.generate(**prompts, **OPTIONS, **options)
    assert output.shape == (9, prompts["input_ids"].shape[1] + 6)
    for row in range(3):
        assert len({tuple(candidate) for candidate in output[3 * row : 3 * row + 3].tolist()}) == 3
    if beams > 1:
        assert torch.equal(output[::3], model.generate(**prompts, **OPTIONS, num_beams=beams))


def test_sampling_draws_from_the_guided_distribution(model, prompts):
    """A guide so strong that one token is left: sampling must take it, in every clip its own."""
    clips = {name: value[:2] for name, value in prompts.items()}
    embeds = model(**clips).audio_embeds
    nearest = guide_scores(embeds, model.token_embeddings()).argmin(1)
    output = model.generate(
        **clips, max_new_tokens=3, do_sample=True, num_return_sequences=5, token_guide_weight=1e4, eos_token_id=None
    )
    assert output[:, -3:].tolist() == [[int(nearest[0])] * 3] * 5 + [[int(nearest[1])] * 3] * 5


def test_sampling_repeats_with_its_seed(model, prompts):
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(**prompts, **OPTIONS, do_sample=True, top_p=0.9))
    assert torch.equal(*draws)


def test_a_streamer_sees_every_token(model, processor):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    single, streamer = processor(audio=audio(1)[0], sampling_rate=16000), Collector()
    output = model.generate(**single, **OPTIONS, streamer=streamer)
    assert streamer.tokens == output[0].tolist() and streamer.ended


def guided(model, prompts, **kwargs):
    output = model.generate(**prompts, **OPTIONS, return_dict_in_generate=True, output_scores=True, **kwargs)
    return output.scores[0]


@torch.no_grad()
def test_the_guides_weight_a_call_and_in_the_generation_config(model, prompts, tmp_path):
    output = model(**prompts)
    distance = guide_scores(output.audio_embeds, model.token_embeddings())

    def expected(weight):
        scores = output.logits[:, -1] - weight * distance
        scores[:, 1] = -torch.inf  # min_new_tokens
        return scores

    close(guided(model, prompts), expected(0.1))  # the learnt weight
    close(guided(model, prompts, token_guide_weight=0.0), expected(0.0))
    close(guided(model, prompts, token_guide_weight=0.7), expected(0.7))
    close(guided(model, prompts), expected(0.1))  # one call's weight is not the next one's
    close(guided(model, prompts, generation_config=GenerationConfig(token_guide_weight=0.4)), expected(0.4))
    model.generation_config.token_guide_weight = 0.3
    close(guided(model, prompts), expected(0.3))
    close(guided(model, prompts, token_guide_weight=0.0), expected(0.0))
    model.save_pretrained(tmp_path)
    loaded = LambForAudioCaptioning.from_pretrained(tmp_path)
    assert loaded.generation_config.token_guide_weight == 0.3
    assert torch.equal(guided(loaded, prompts), guided(model, prompts))
    loaded.generation_config.token_guide_weight = 0.0  # and off for good
    loaded.save_pretrained(tmp_path)
    close(guided(LambForAudioCaptioning.from_pretrained(tmp_path), prompts), expected(0.0))


def test_generation_says_nothing_unusual(model, prompts, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**prompts, max_new_tokens=2, token_guide_weight=0.2)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_a_placeholder_inside_the_table_is_never_generated(processor, prompts):
    """A tokenizer may keep a spare token for audio: then its row exists, and must not be said."""
    model = model_of(text_config=tiny_text_config(VOCAB_SIZE + 1))
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB_SIZE] = 100 * model.get_output_embeddings().weight[5]
    for options in ({}, {"num_beams": 3}, {"token_guide_weight": 0.0}):
        output = model.generate(**prompts, **OPTIONS, **options)[:, prompts["input_ids"].shape[1] :]
        assert (output != VOCAB_SIZE).all()


def test_training_never_looks_the_placeholder_up(processor, training_batch):
    model = model_of(text_config=tiny_text_config(VOCAB_SIZE + 1), freeze_text_model=False, guide_metric="none")
    model(**training_batch).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[5:].any() and not gradient[VOCAB_SIZE].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_semantic_queries": -1}, "num_semantic_queries=-1 must be at least 0"),
        ({"conv_kernel_sizes": []}, "must be odd numbers"),
        ({"conv_kernel_sizes": [-1]}, "must be odd numbers"),
        ({"adapter_num_attention_heads": -2}, "adapter_num_attention_heads=-2"),
        ({"gru_num_layers": 0}, "gru_num_layers=0 must be at least 1"),
        ({"guide_weight_init": float("nan")}, "guide_weight_init=nan"),
        ({"info_nce_temperature": float("nan")}, "info_nce_temperature=nan"),
        ({"audio_config": {"model_type": "ced", "num_attention_heads": 0}}, "num_attention_heads=0 must be at least 1"),
        (
            {"text_config": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}},
            "keeps no key-value cache",
        ),
    ],
)
def test_wrong_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LambForAudioCaptioning(tiny_config(**settings))


def test_placeholders_among_the_labels_are_not_predicted(model, training_batch):
    labels = training_batch["labels"].masked_fill(
        training_batch["input_ids"] == model.config.audio_token_id, VOCAB_SIZE
    )
    assert torch.equal(model(**training_batch | {"labels": labels}).loss, model(**training_batch).loss)
