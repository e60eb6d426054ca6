"""
Both cross-entropies of training: at caption positions without a second copy of the logits, against every position with
two float32 softmaxes, and against one plain cross-entropy at caption positions. Time and peak memory.
"""

import sys

import torch
from interleave import medians, peak_megabytes, report_peak
from torch.nn.functional import cross_entropy, linear

from modeling_lamb.caption_loss import caption_losses

BATCH, PREFIX, CAPTION, VOCABULARY, WIDTH = 8, 42, 32, 49152, 576


def functions() -> dict:
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, PREFIX + CAPTION, WIDTH, requires_grad=True)
    table = torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5
    bias = torch.rand(BATCH, VOCABULARY, requires_grad=True)
    labels = torch.full((BATCH, PREFIX + CAPTION), -100)
    labels[:, PREFIX:] = torch.randint(VOCABULARY, (BATCH, CAPTION))
    caption = torch.arange(
        PREFIX - 1, PREFIX + CAPTION - 1
    )  # the positions that predict the caption, as the model says them

    def naive() -> torch.Tensor:
        logits = linear(hidden, table)
        shifted = labels.roll(-1, 1).index_fill(1, torch.tensor([PREFIX + CAPTION - 1]), -100).flatten()
        losses = [
            torch.nn.functional.nll_loss(z.float().log_softmax(-1).flatten(0, 1), shifted)
            for z in (logits, logits - bias[:, None])
        ]
        return losses[0] + losses[1]

    def ours() -> torch.Tensor:
        plain, guided = caption_losses(linear(hidden[:, caption], table), labels[:, PREFIX:], bias)
        return plain + guided

    def one() -> torch.Tensor:
        return cross_entropy((linear(hidden[:, caption], table)).flatten(0, 1), labels[:, PREFIX:].flatten())

    return {"naive": naive, "ours": ours, "one": one}


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        run = functions()[sys.argv[2]]
        report_peak(lambda: run().backward())
        return
    choices = functions()
    assert torch.allclose(choices["naive"](), choices["ours"](), rtol=1e-5)
    naive, ours, one = medians(*(lambda f=f: f().backward() for f in choices.values()), rounds=5)
    print(f"both cross-entropies: all positions / ours = {naive / ours:.2f} (goal: at least 2.5)")
    print(f"both cross-entropies: ours / one plain at caption positions = {ours / one:.2f} (goal: at most 1.3)")
    memory = peak_megabytes("ours") / peak_megabytes("naive")
    print(f"both cross-entropies: peak memory of ours / all positions = {memory:.2f} (goal: at most 0.25)")


if __name__ == "__main__":
    main()
