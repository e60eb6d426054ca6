"""A training step of the small model from cached encoder tokens, against one from waveforms; and the data's share of it."""

import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from interleave import medians
from smollm import VOCABULARY, smollm_config
from training_lamb.data import CaptionCollator, EncodedClips, OneRowPerCaption, WaveformClips
from training_lamb.readers import Clip
from transformers import AutoTokenizer

from modeling_lamb import (
    CedConfig,
    LambConfig,
    LambFeatureExtractor,
    LambForAudioCaptioning,
    LambProcessor,
    default_checkpoint,
)

BATCH, SECONDS = 4, 10


def main() -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    processor = LambProcessor(LambFeatureExtractor(), tokenizer)
    config = LambConfig(
        audio_config=CedConfig.of_size("base"),  # the paper's encoder
        text_config=smollm_config(),
        peft_config={"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        audio_token_id=processor.audio_token_id,
    )
    assert processor.audio_token_id >= VOCABULARY
    model = LambForAudioCaptioning(config).train()
    collate = CaptionCollator(processor)
    with tempfile.TemporaryDirectory() as folder:
        clips = []
        for number in range(BATCH):
            path = Path(folder) / f"{number}.flac"
            soundfile.write(path, np.random.default_rng(number).normal(0, 0.1, SECONDS * 16000), 16000)
            clips.append(Clip(str(path), ["A dog barks while rain falls on a tin roof."], str(number)))
        read = OneRowPerCaption(WaveformClips(clips, 16000), [1] * BATCH)
        kept = OneRowPerCaption(EncodedClips(clips, processor, model.eval(), folder, "clips"), [1] * BATCH)
        model.train()

        def step(rows: OneRowPerCaption) -> float:
            loss = model(**collate([rows[number] for number in range(BATCH)])).loss
            loss.backward()
            return loss.item()

        assert abs(step(read) / step(kept) - 1) < 2e-3  # tokens are kept in half precision
        waves, cached, loading = medians(
            lambda: step(read), lambda: step(kept), lambda: collate([kept[number] for number in range(BATCH)]), rounds=5
        )
    print(f"a training step, CED-base: from waveforms / from cached tokens = {waves / cached:.2f} (goal: at least 2)")
    print(f"a training step: reading cached tokens / the whole step = {loading / cached:.4f}")


if __name__ == "__main__":
    main()
