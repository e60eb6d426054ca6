"""What Transformers' generation and export suites ask of a model: ways to decode, to go on, to compile and to export."""

import copy

import pytest
import torch
from conftest import noise, randomized, tiny_config
from transformers import CompileConfig, GenerationConfig
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_for_generation, get_leaf_tensors

from modeling_lamb import LambForAudioCaptioning

GREEDY = {"do_sample": False, "max_new_tokens": 8}
BATCH, NEW = 3, 8


@pytest.fixture
def model(model):
    model.generation_config.eos_token_id = None  # every row runs to its full length
    return model


@pytest.fixture
def prompts(processor):
    return processor(audio=[noise(0.8, 0), noise(0.3, 1), noise(1.2, 2)], sampling_rate=16000)


@pytest.fixture
def greedy(model, prompts):
    return model.generate(**prompts, **GREEDY)


def longer(prompts, sequences):
    """The prompts with what was generated since, as one would give them to go on."""
    new = sequences.shape[1] - prompts["input_ids"].shape[1]
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, new), value=1)
    return dict(prompts) | {"input_ids": sequences, "attention_mask": mask}


METHODS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "constrained by processors": {
        "do_sample": False,
        "min_new_tokens": 5,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5, 6]],
    },
    "classifier-free guidance": {"do_sample": False, "guidance_scale": 1.5},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_output_of_every_method(model, prompts, method):
    model.set_attn_implementation("eager")  # the one that returns attentions
    options = METHODS[method]
    output = model.generate(
        **prompts,
        **options,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    rows = BATCH * options.get("num_beams", 1)
    prompt = prompts["input_ids"].shape[1]
    assert output.sequences.shape == (BATCH * options.get("num_return_sequences", 1), prompt + NEW)
    vocabulary = model.config.get_text_config().vocab_size
    assert [tuple(scores.shape) for scores in output.scores] == [(rows, vocabulary)] * NEW
    assert [tuple(logits.shape) for logits in output.logits] == [(rows, vocabulary)] * NEW
    layers = model.config.get_text_config().num_hidden_layers
    lengths = [prompt] + [1] * (NEW - 1)
    assert [len(step) for step in output.hidden_states] == [layers + 1] * NEW
    assert [step[-1].shape[:2] for step in output.hidden_states] == [(rows, length) for length in lengths]
    assert [step[-1].shape[-2:] for step in output.attentions] == [(n, prompt + i) for i, n in enumerate(lengths)]
    assert output.past_key_values.get_seq_length() == prompt + NEW - 1


def test_prompt_lookup_says_what_greedy_says(model, processor):
    prompt = processor(audio=noise(0.8), sampling_rate=16000)
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=30)
    assert torch.equal(
        model.generate(**prompt, do_sample=False, max_new_tokens=30, prompt_lookup_num_tokens=3), expected
    )


def test_prompt_lookup_may_find_placeholders(model, processor):
    clips = [noise(0.8), noise(0.4, 1)]
    prompt = processor(text="<|audio|> a <|audio|> a", audio=clips, sampling_rate=16000)
    settings = {"do_sample": False, "max_new_tokens": 12}
    looked_up = model.generate(**prompt, **settings, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
    assert torch.equal(looked_up, model.generate(**prompt, **settings))


@pytest.mark.parametrize("option", [{"encoder_repetition_penalty": 1.5}, {"encoder_no_repeat_ngram_size": 1}])
def test_what_looks_at_the_prompt_does_not_stumble_over_placeholders(model, prompts, option):
    words = model.generate(**prompts, **GREEDY, **option)[:, prompts["input_ids"].shape[1] :]
    assert words.shape == (BATCH, NEW)
    if "encoder_no_repeat_ngram_size" in option:
        assert not any(
            set(new) & set(old) for new, old in zip(words.tolist(), prompts["input_ids"].tolist(), strict=True)
        )


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("size", [2, 5, 64])
def test_the_prompt_may_be_read_in_chunks(model, processor, size, beams):
    settings = GREEDY | {"num_beams": beams}
    texts = ["x y <|audio|> and <|audio|> end", "<|audio|> what is this"]
    inputs = processor(text=texts, audio=[noise(0.8), noise(0.4, 1), noise(0.6, 2)], sampling_rate=16000)
    assert torch.equal(
        model.generate(**inputs, **settings, prefill_chunk_size=size), model.generate(**inputs, **settings)
    )


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", [0.5]])
def test_a_guide_weight_that_is_no_number_is_refused(model, prompts, weight):
    with pytest.raises(ValueError, match=r"token_guide_weight=.* must be a finite number"):
        model.generate(**prompts, token_guide_weight=weight)


def nearness(model, prompts, sequences):
    """Cosine of each prompt's mean audio embedding to the mean embedding of each of its captions, one by one."""
    names = ("input_features", "input_features_mask")
    z_a = model.get_audio_features(**{name: prompts[name] for name in names}).pooler_output.mean(1)
    captions = sequences[:, prompts["input_ids"].shape[1] :].unflatten(0, (len(z_a), -1))
    found = []
    for audio, texts in zip(z_a, captions.tolist(), strict=True):
        for text in texts:
            said = text[: text.index(4)] if 4 in text else text  # EOS below
            said = torch.tensor(said, dtype=torch.long)
            z_t = model.get_input_embeddings()(said).mean(0) if len(said) else torch.zeros_like(audio)
            found.append(torch.cosine_similarity(audio, z_t, dim=0))
    return torch.stack(found).unflatten(0, (len(z_a), -1))


@torch.no_grad()
@pytest.mark.parametrize("wanted", [1, 3])
def test_of_the_candidates_the_nearest_to_the_audio_are_returned(model, prompts, wanted):
    settings = GREEDY | {"eos_token_id": 4}
    model.generation_config.eos_token_id = 4
    beams = model.generate(**prompts, **settings, num_beams=5, num_return_sequences=5)
    order = nearness(model, prompts, beams).argsort(dim=-1, descending=True, stable=True)[:, :wanted]
    assert (order[:, 0] != 0).any()  # not just the likeliest ones
    expected = beams.unflatten(0, (BATCH, 5)).gather(1, order[..., None].expand(-1, -1, beams.shape[1])).flatten(0, 1)
    options = settings | {"num_candidates": 5, "num_return_sequences": wanted}
    assert torch.equal(model.generate(**prompts, **options), expected)
    alone = {name: value[2:] for name, value in prompts.items()}
    last = model.generate(**alone, **options)
    assert torch.equal(last, expected[2 * wanted :, : last.shape[1]])


@torch.no_grad()
def test_candidates_may_be_drawn_and_are_a_setting_of_the_model(model, prompts, tmp_path):
    drawn = {"max_new_tokens": 8, "do_sample": True}
    torch.manual_seed(0)
    one = nearness(model, prompts, model.generate(**prompts, **drawn)).mean()
    torch.manual_seed(0)
    assert nearness(model, prompts, model.generate(**prompts, **drawn, num_candidates=16)).mean() > one
    likeliest, nearest = (model.generate(**prompts, max_new_tokens=8, num_candidates=n) for n in (None, 6))
    model.generation_config.num_candidates = 6
    model.save_pretrained(tmp_path)
    loaded = LambForAudioCaptioning.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**prompts, max_new_tokens=8), nearest) and not torch.equal(nearest, likeliest)
    assert torch.equal(loaded.generate(**prompts, generation_config=GenerationConfig(max_new_tokens=8)), nearest)
    assert len(loaded.generate(**prompts, max_new_tokens=8, num_return_sequences=7)) == 7 * BATCH
    assert torch.equal(loaded.generate(**prompts, **GREEDY), likeliest)  # the call says how to search
    assert loaded.generate(**prompts, max_new_tokens=8, return_dict_in_generate=True).sequences.equal(likeliest)


@torch.no_grad()
def test_candidates_without_audio_come_by_likelihood(model, processor):
    text = dict(processor.tokenizer("x y z", return_tensors="pt"))
    beams = model.generate(**text, **GREEDY, num_beams=4, num_return_sequences=2)
    assert torch.equal(model.generate(**text, **GREEDY, num_candidates=4, num_return_sequences=2), beams)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "num_candidates=0 must be a whole number"),
        ({"num_candidates": 2.5}, "num_candidates=2.5 must be a whole number"),
        ({"num_candidates": 2, "num_return_sequences": 3}, "at least num_return_sequences=3"),
        ({"num_candidates": 2, "return_dict_in_generate": True}, "leave return_dict_in_generate out"),
    ],
)
def test_candidates_that_cannot_be_are_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts, **options)


@pytest.mark.parametrize("same", [True, False])
def test_an_assistant_changes_nothing(model, processor, same):
    prompt = processor(audio=noise(0.8), sampling_rate=16000)
    assistant = model if same else randomized(LambForAudioCaptioning(tiny_config()), std=0.2).eval()
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    assert torch.equal(
        model.generate(**prompt, do_sample=False, max_new_tokens=20, assistant_model=assistant), expected
    )


@pytest.mark.parametrize("cached", [True, False])
def test_going_on_is_as_if_never_stopped(model, prompts, greedy, cached):
    first = model.generate(**prompts, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    cache = {"past_key_values": first.past_key_values} if cached else {}
    output = model.generate(**longer(prompts, first.sequences), **cache, do_sample=False, max_new_tokens=5)
    assert torch.equal(output, greedy)


def test_going_on_without_the_audio_is_said_to_be_unguided(model, prompts, caplog):
    first = model.generate(**prompts, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    known = {name: longer(prompts, first.sequences)[name] for name in ("input_ids", "attention_mask")}
    for weight, warned in ((0.0, False), (0.5, True)):
        caplog.clear()
        cache = copy.deepcopy(first.past_key_values)
        model.generate(**known, **GREEDY, past_key_values=cache, token_guide_weight=weight)
        assert ("no audio was given" in caplog.text) == warned


def test_a_second_clip_after_the_first_caption(model, processor):
    clips = [noise(0.8, 0), noise(0.8, 1)]
    turns = [processor(text=f"{processor.audio_token} What is it?", audio=clip, sampling_rate=16000) for clip in clips]
    first = model.generate(**turns[0], do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, turns[1]["input_ids"]], dim=1)
    audio = {name: torch.cat([turn[name] for turn in turns]) for name in ("input_features", "input_features_mask")}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | audio
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=first.past_key_values), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_embeddings_instead_of_ids(model, prompts, cache):
    clips = model.get_audio_features(prompts["input_features"], prompts["input_features_mask"]).pooler_output
    embeds = model._merge_embeds(prompts["input_ids"], clips)
    mask = prompts["attention_mask"]
    expected = model.generate(**prompts, **GREEDY, token_guide_weight=0.0)  # embeddings do not say what is audio
    output = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, cache_implementation=cache)
    assert torch.equal(output, expected[:, -NEW:])
    ids = prompts["input_ids"]
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, attention_mask=mask, **GREEDY), expected)


def test_embeddings_and_audio_are_refused_together(model, prompts):
    with pytest.raises(ValueError, match="inputs_embeds, which hold theirs already"):
        model.generate(inputs_embeds=torch.zeros(BATCH, 5, 48), input_features=prompts["input_features"])


def test_nothing_but_a_text_and_nothing_at_all(model, processor):
    assert model.generate(**processor(text="What is heard?"), **GREEDY).shape[0] == 1
    assert model.generate(**GREEDY).shape == (1, NEW + 1)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 4, torch.tensor([2, 5])])
def test_logits_to_keep(model, prompts, keep):
    rows = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(model(**prompts, logits_to_keep=keep).logits, model(**prompts).logits[:, rows])


@torch.no_grad()
def test_left_padding_changes_no_logit(model, prompts):
    padded = dict(prompts)
    for name, value in (("input_ids", 2), ("attention_mask", 0)):
        padded[name] = torch.nn.functional.pad(prompts[name], (7, 0), value=value)
    position_ids = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**padded, position_ids=position_ids).logits[:, 7:]
    real = prompts["attention_mask"].bool()
    own = (prompts["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**prompts, position_ids=own).logits
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)


def test_a_decode_step_compiles_as_one_graph(model, prompts, greedy):
    compiled = CompileConfig(backend="eager", fullgraph=True, dynamic=False)
    compiled._compile_all_devices = True  # on a CPU, `generate` would not compile
    output = model.generate(**prompts, **GREEDY, cache_implementation="static", compile_config=compiled)
    assert torch.equal(output, greedy)
    torch.compiler.reset()


@pytest.mark.slow
def test_training_compiles(model, processor):
    batch = processor(audio=[noise(0.8), noise(0.5, 1)], sampling_rate=16000, captions=["A dog barks.", "Rain falls."])
    compiled = torch.compile(model.train(), backend="eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
    torch.compiler.reset()


# -- torch.export ------------------------------------------------------------------------------------------------------


def exported(module, inputs, dynamic):
    """Leaves of what a module's exported program returns, and of what the module itself does."""
    program = DynamoExporter().export(module, inputs, config=DynamoConfig(dynamic=dynamic))
    return [get_leaf_tensors(run(**copy.deepcopy(dict(inputs)))) for run in (program, module)]


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # nn.GRU's own
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_the_librarys_exporter_takes_the_model(model, prompts, dynamic):
    result, expected = exported(model, dict(prompts) | {"use_cache": False}, dynamic)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_librarys_exporter_takes_prefill_and_decode_steps(model, prompts):
    parts = decompose_for_generation(model, dict(prompts))
    assert list(parts) == ["language_model", "decode"]
    for module, inputs in parts.values():
        result, expected = exported(module, inputs, dynamic=False)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_encoder_exports_for_any_batch(model, prompts):
    inputs = {name: prompts[name] for name in ("input_features", "input_features_mask")}
    clips = torch.export.Dim("clips", min=2, max=64)
    program = torch.export.export(model.audio_encoder, (), inputs, dynamic_shapes={name: {0: clips} for name in inputs})
    more = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    output = program.module()(**more)
    torch.testing.assert_close(output.last_hidden_state, model.audio_encoder(**more).last_hidden_state)
