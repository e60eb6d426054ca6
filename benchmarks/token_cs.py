"""Token-level CS divergence of a batch in one call, against a loop over its samples with cdist; forward and backward."""

import torch
from interleave import medians
from torch import Tensor

from modeling_lamb import cauchy_schwarz_divergence

BATCH, AUDIO, TEXT = 32, 32, 40


def loop(x: Tensor, y: Tensor) -> Tensor:
    def log_sum(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b).square() / 2).flatten().logsumexp(0)

    return torch.stack([(log_sum(a, a) + log_sum(b, b)) / 2 - log_sum(a, b) for a, b in zip(x, y, strict=True)]).mean()


def main() -> None:
    torch.manual_seed(0)
    for width, goal in ((576, 2.0), (4096, 1.0)):
        x = torch.nn.functional.normalize(torch.randn(BATCH, AUDIO, width), dim=-1).requires_grad_()
        y = torch.nn.functional.normalize(torch.randn(BATCH, TEXT, width), dim=-1)
        assert torch.allclose(loop(x, y), cauchy_schwarz_divergence(x, y).mean(), atol=1e-5)
        looped, batched = medians(
            lambda x=x, y=y: loop(x, y).backward(), lambda x=x, y=y: cauchy_schwarz_divergence(x, y).mean().backward()
        )
        print(f"token-level CS, D = {width}: loop / batched = {looped / batched:.2f} (goal: at least {goal})")


if __name__ == "__main__":
    main()
