"""Transformers' common feature extractor tests, as they stand, on the log-mel front end."""

import random
import unittest

import numpy as np
from transformers_suites import suite

from modeling_lamb import LambFeatureExtractor


class LambFeatureExtractionTester:
    """What the suite pads are sequences `(length, feature_size)` or, of size 1, `(length,)`, as waveforms are."""

    def __init__(self, batch_size=7, min_seq_length=4000, max_seq_length=7000, feature_size=64):
        self.batch_size, self.feature_size = batch_size, feature_size
        self.min_seq_length, self.max_seq_length = min_seq_length, max_seq_length
        self.seq_length_diff = (max_seq_length - min_seq_length) // (batch_size - 1)

    def prepare_feat_extract_dict(self):
        return {"feature_size": self.feature_size, "sampling_rate": 16000, "hop_length": 160, "power": 1.0}

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        lengths = [self.min_seq_length + i * self.seq_length_diff for i in range(self.batch_size)]
        if equal_length:
            lengths = [self.max_seq_length] * self.batch_size
        generator = random.Random(0)
        clips = [[[generator.random()] * self.feature_size for _ in range(length)] for length in lengths]
        return [np.asarray(clip) for clip in clips] if numpify else clips


class LambFeatureExtractionTest(
    suite("test_sequence_feature_extraction_common").SequenceFeatureExtractionTestMixin, unittest.TestCase
):
    feature_extraction_class = LambFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = LambFeatureExtractionTester(min_seq_length=40, max_seq_length=70)
