"""Transformers' common processor tests, as they stand, on LAMB's processor."""

import unittest
from unittest.mock import patch

from conftest import tiny_tokenizer, tokenizer_json
from transformers_suites import suite

from modeling_lamb import LambFeatureExtractor, LambProcessor


class LambProcessorTest(suite("test_processing_common").ProcessorTesterMixin, unittest.TestCase):
    processor_class = LambProcessor

    @classmethod
    def _setup_feature_extractor(cls):
        return LambFeatureExtractor(min_length=400)  # the suite's clips have 1,000 samples

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer(tokenizer_json())

    @staticmethod
    def prepare_processor_dict():
        return {"num_audio_tokens": 4}

    # A class that is saved with its code gets `auto_map` from the library when it is saved, but not when it is loaded: as
    # the library's own classes, it is compared here without.

    @patch.object(LambProcessor, "_auto_class", None)
    def test_processor_from_and_save_pretrained(self):
        super().test_processor_from_and_save_pretrained()

    @patch.object(LambProcessor, "_auto_class", None)
    def test_processor_from_and_save_pretrained_as_nested_dict(self):
        super().test_processor_from_and_save_pretrained_as_nested_dict()
