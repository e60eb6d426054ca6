"""Transformers' common model tests, as they stand, on LAMB and on its CED encoder."""

import tempfile
import unittest

import pytest
import torch
from conftest import tiny_config
from transformers_suites import shipped, suite

from modeling_lamb import CedConfig, CedModel, LambConfig, LambForAudioCaptioning

common = suite("test_modeling_common")
ConfigTester = suite("test_configuration_common").ConfigTester
GenerationTesterMixin = suite("generation.test_utils").GenerationTesterMixin


class CedModelTester:
    """Two windows and a half of 32 frames; the second clip ends within the second one."""

    batch_size, is_training = 2, False  # an encoder has no loss
    num_mel_bins, frames, patch_size, max_frames = 16, 80, 8, 32
    hidden_size, num_hidden_layers, num_attention_heads = 16, 2, 2
    seq_length = key_length = encoder_seq_length = 8  # tokens of one window

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> CedConfig:
        return CedConfig(
            num_mel_bins=self.num_mel_bins,
            patch_size=self.patch_size,
            max_frames=self.max_frames,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
        )

    def prepare_config_and_inputs_for_common(self):
        features = common.floats_tensor([self.batch_size, self.num_mel_bins, self.frames])
        mask = torch.ones(self.batch_size, self.frames, dtype=torch.long)
        mask[1, 50:] = 0
        return self.get_config(), {"input_features": features, "input_features_mask": mask}


class CedModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CedModel,)
    test_resize_embeddings = False  # patches are no tokens
    test_can_init_all_missing_weights_before_2023 = True  # which is how the suite reads a file that names no year

    def setUp(self):
        self.model_tester = CedModelTester(self)
        self.config_tester = ConfigTester(self, config_class=CedConfig, has_text_modality=False, hidden_size=24)

    def test_config(self):
        self.config_tester.run_common_tests()

    @pytest.mark.skip("the input embedding is a layer of patches, not an nn.Embedding")
    def test_model_get_set_embeddings(self):
        pass

    @pytest.mark.skip("loads a file without one weight of CED, which from_pretrained refuses")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass


class LambModelTester:
    """Two prompts with the audio placeholder inside the LLM's table, as the library's own audio LLMs have it."""

    batch_size, seq_length, is_training = 7, 12, True  # to fewer rows the suite would add some with stray placeholders
    num_audio_tokens, audio_token_id, pad_token_id = 4, 3, 2
    num_mel_bins, frames = 64, 64
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 48, 2, 4, 99

    def __init__(self, parent):
        self.parent = parent
        # Embeddings hold their audio already, and the model refuses to be given both.
        self.with_audio = "inputs_embeds" not in parent._testMethodName
        # The suite goes on from the cache without the audio, and so without the guide.
        going_on = parent._testMethodName == "test_generate_continue_from_past_key_values"
        self.guide_metric = "none" if going_on else "l2"

    def get_config(self) -> LambConfig:
        text_config = {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 64,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": self.pad_token_id,
            "max_position_embeddings": 64,
        }
        return tiny_config(
            text_config=text_config,
            audio_token_id=self.audio_token_id,
            num_audio_tokens=self.num_audio_tokens,
            guide_metric=self.guide_metric,
            freeze_audio_encoder=False,  # a frozen encoder has no gradient to checkpoint
            freeze_text_model=False,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 4) + 4
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.with_audio:
            ids[:, 1 : 1 + self.num_audio_tokens] = self.audio_token_id
            inputs["input_features"] = common.floats_tensor([self.batch_size, self.num_mel_bins, self.frames])
            inputs["input_features_mask"] = torch.ones(self.batch_size, self.frames, dtype=torch.long)
            inputs["input_features_mask"][1:2, 40:] = 0  # the second clip, where there is one, is shorter
        return self.get_config(), inputs


class LambModelTest(common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (LambForAudioCaptioning,)
    additional_model_inputs = ["input_features", "input_features_mask"]
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True

    def setUp(self):
        self.model_tester = LambModelTester(self)
        self.config_tester = ConfigTester(self, config_class=LambConfig, has_text_modality=False, common_properties=[])

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:  # the suite knows the labels of the library's classes only
            after_audio = torch.arange(inputs["input_ids"].shape[1]) > self.model_tester.num_audio_tokens + 1
            inputs["labels"] = torch.where(after_audio, inputs["input_ids"], -100)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_sdpa_can_dispatch_composite_models(self):
        """As the suite's, which asks models whose parts have other names than it knows to write it anew."""
        model = LambForAudioCaptioning(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for asked, expected in ((None, "sdpa"), ("eager", "eager")):
                options = {} if asked is None else {"attn_implementation": asked}
                loaded = LambForAudioCaptioning.from_pretrained(folder, **options)
                for part in (loaded.audio_encoder, loaded.language_model):
                    assert part.config._attn_implementation == expected

    @pytest.mark.skip("there is one class: the LLM inside brings its own head, so nothing is left for a base model")
    def test_model_base_model_prefix(self):
        pass

    @pytest.mark.skip(
        "loads a file without the backbones' weights, which from_pretrained refuses unless they are named"
    )
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass

    @pytest.mark.skipif(not shipped("tests.generation.test_utils"), reason="the suite of generation is not at hand")
    def test_generation_tester_mixin_inheritance(self):
        super().test_generation_tester_mixin_inheritance()
