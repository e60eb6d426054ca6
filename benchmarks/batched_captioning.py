"""Eight clips captioned in one batch, against one by one; a CED-tiny encoder and a 135-million-parameter LLM."""

import torch
from interleave import medians
from smollm import smollm_config

from modeling_lamb import CedConfig, LambConfig, LambForAudioCaptioning

CLIPS, NEW_TOKENS = 8, 16


def main() -> None:
    torch.manual_seed(0)
    text = smollm_config(eos_token_id=None, pad_token_id=0)
    config = LambConfig(audio_config=CedConfig.of_size("tiny"), text_config=text, audio_token_id=49152)
    model = LambForAudioCaptioning(config).eval()
    features = torch.randn(CLIPS, 64, 1001)
    ids = torch.cat([torch.full((CLIPS, 32), 49152), torch.randint(49152, (CLIPS, 10))], dim=1)

    def caption(rows: slice) -> None:
        model.generate(
            ids[rows],
            attention_mask=torch.ones_like(ids[rows]),
            input_features=features[rows],
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )

    singly, batched = medians(
        lambda: [caption(slice(row, row + 1)) for row in range(CLIPS)], lambda: caption(slice(None)), rounds=3
    )
    print(f"{CLIPS} clips: one by one {singly:.1f} s / in a batch {batched:.1f} s = {singly / batched:.2f}")


if __name__ == "__main__":
    main()
