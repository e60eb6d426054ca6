"""Log-mel features of eight clips of 10 s, against the same spectrogram by transformers' numpy functions."""

import numpy as np
from interleave import medians
from transformers.audio_utils import spectrogram, window_function

from modeling_lamb import LambFeatureExtractor

CLIPS, SECONDS = 8, 10


def main() -> None:
    extractor = LambFeatureExtractor()
    generator = np.random.default_rng(0)
    clips = [generator.standard_normal(SECONDS * 16000).astype(np.float32) / 10 for _ in range(CLIPS)]
    window = window_function(extractor.win_length, "hann")

    def numpy() -> np.ndarray:
        settings = {"frame_length": 512, "hop_length": 160, "fft_length": 512, "mel_filters": extractor.mel_filters}
        return np.stack([spectrogram(c, window, power=2.0, log_mel="dB", db_range=120.0, **settings) for c in clips])

    def ours() -> np.ndarray:
        return extractor(clips, sampling_rate=16000, return_tensors="np")["input_features"]

    assert np.abs(numpy() - ours()).max() < 0.1
    baseline, own = medians(numpy, ours)
    print(f"log-mel, {CLIPS} clips of {SECONDS} s: numpy {baseline:.3f} s / ours {own:.3f} s = {baseline / own:.2f}")


if __name__ == "__main__":
    main()
