"""Cost of the Token Guide in decoding: distances once a clip, then one addition a step, of a 135-million-parameter LLM."""

import torch
from interleave import medians
from smollm import smollm_config
from transformers import LlamaForCausalLM

from modeling_lamb import TokenGuideLogitsProcessor, guide_scores


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(smollm_config()).eval()
    table = model.get_input_embeddings().weight.detach()
    audio_embeds = torch.randn(1, 32, 576)
    guide = TokenGuideLogitsProcessor(guide_scores(audio_embeds, table), 0.1)
    ids = torch.randint(49152, (1, 1))

    with torch.inference_mode():
        cache = model(torch.randint(49152, (1, 42))).past_key_values
        logits = model(ids, past_key_values=cache).logits[:, -1]

        def step() -> None:
            model(ids, past_key_values=cache)
            cache.crop(-1)

        decode, added, distances = medians(step, lambda: guide(ids, logits), lambda: guide_scores(audio_embeds, table))
    print(f"token guide: one step of it / one decode step = {added / decode:.4f} (goal: at most 0.01)")
    print(f"token guide: distances of a clip, once / one decode step = {distances / decode:.2f}")


if __name__ == "__main__":
    main()
