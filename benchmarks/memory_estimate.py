"""The memory that `train.py --dry_run` foretells for one step of a small model, against what the step really takes."""

import sys

import torch
from interleave import peak_megabytes, report_peak
from smollm import VOCABULARY, smollm_config

from modeling_lamb import CedConfig, LambConfig, LambForAudioCaptioning

BATCH, SECONDS, TEXT = 8, 10.0, 40
MEGABYTE = 2**20


def settings() -> LambConfig:
    lora = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    return LambConfig(
        audio_config=CedConfig.of_size("tiny"), text_config=smollm_config(), peft_config=lora, audio_token_id=VOCABULARY
    )


def step_of_training() -> None:
    """A model, one step, and all of it dropped again."""
    model = LambForAudioCaptioning(settings()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    audio = torch.full((BATCH, model.config.num_audio_tokens), VOCABULARY)
    text = torch.randint(VOCABULARY, (BATCH, TEXT))
    tokens = torch.randn(BATCH, 62, 4, model.config.audio_hidden_size)
    for _ in range(2):
        output = model(
            torch.cat([audio, text], 1), labels=torch.cat([-100 + 0 * audio, text], 1), audio_hidden_states=tokens
        )
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        report_peak(step_of_training)
        return
    from training_lamb.memory import estimate_memory

    foretold = estimate_memory(settings(), BATCH, SECONDS, TEXT).total() / MEGABYTE
    measured = peak_megabytes("step")
    print(
        f"memory of a step: foretold {foretold:.0f} MB / measured {measured:.0f} MB = {foretold / measured:.2f} (goal: 0.85 to 1.15)"
    )


if __name__ == "__main__":
    main()
