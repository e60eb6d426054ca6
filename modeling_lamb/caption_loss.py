"""The two cross-entropies of training (Eq. 13) from one set of logits, without a second copy of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

_POSITIONS = 8  # whose logits are worked on at a time: few enough to stay in the cache of a CPU


class _DualCrossEntropy(torch.autograd.Function):
    """
    Summed cross-entropy of the logits z and of the guided logits z - bias.

    Only the log-normalisers are kept. The backward pass recomputes the probabilities, a few positions at a time, and writes
    the gradients of both losses into one tensor.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        valid, targets = labels != -100, labels.clamp(min=0)
        norms = torch.empty(2, *labels.shape, dtype=_precision(logits), device=logits.device)
        for row, part, z in _parts(logits, valid):
            norms[0, row, part] = z.logsumexp(-1)
            if bias is not None:
                norms[1, row, part] = (z - bias[row]).logsumexp(-1)
        chosen = logits.gather(2, targets[..., None])[..., 0]
        plain = (norms[0] - chosen)[valid].sum()
        guided = plain.clone() if bias is None else (norms[1] - chosen + bias.gather(1, targets))[valid].sum()
        norms.masked_fill_(~valid, torch.inf)  # where nothing is predicted, the probabilities of `backward` are 0
        ctx.save_for_backward(logits, bias, labels, norms)
        return plain, guided

    @staticmethod
    def backward(ctx, grad_plain: Tensor, grad_guided: Tensor):  # type: ignore[override]
        logits, bias, labels, norms = ctx.saved_tensors
        minus_one = -(labels != -100).to(norms.dtype)[..., None]
        targets = labels.clamp(min=0)[..., None]
        grad_logits = torch.empty_like(logits)
        grad_bias = None if bias is None else torch.zeros_like(bias)

        def gradient(row: int, part: slice, z: Tensor) -> Tensor:
            plain = (z - norms[0, row, part, None]).exp_().scatter_add_(1, targets[row, part], minus_one[row, part])
            if bias is None:
                return plain.mul_(grad_plain + grad_guided)
            guided = (z - bias[row]).sub_(norms[1, row, part, None]).exp_()
            guided.scatter_add_(1, targets[row, part], minus_one[row, part]).mul_(grad_guided)
            grad_bias[row] -= guided.sum(0)  # type: ignore[index]
            return plain.mul_(grad_plain).add_(guided)

        for row, part, z in _parts(logits, labels != -100):
            grad_logits[row, part] = gradient(row, part, z)
        return grad_logits, grad_bias, None


def _precision(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _parts(logits: Tensor, valid: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """
    A few positions of a row at a time: the row, their slice, and their logits in float32 at least; 0 where nothing is
    predicted, whatever stands there.
    """
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1], _POSITIONS):
            part = slice(start, start + _POSITIONS)
            z = logits[row, part].to(_precision(logits))
            yield row, part, z.masked_fill(~valid[row, part, None], 0)


def caption_losses(
    logits: Tensor, labels: Tensor, guide_bias: Tensor | None = None, num_items: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """
    Cross-entropy of the original and of the guided logits (Eq. 13), averaged over the batch's caption tokens.

    Eq. 13 averages per clip; the mean over all tokens is the library's convention and weighs long captions more.

    Args:
        logits: `(batch, length, vocab_size)`, aligned with `labels` (already shifted).
        labels: `(batch, length)`, -100 where nothing is predicted.
        guide_bias: beta times the guide scores, `(batch, vocab_size)`; None without a guide.
        num_items: what to divide the sums by instead of this batch's number of tokens (the Trainer's
            `num_items_in_batch` under gradient accumulation).

    Returns:
        L_dec and L_tg, float32 scalars; equal without a guide.
    """
    plain, guided = _DualCrossEntropy.apply(logits, guide_bias, labels)
    count = (labels != -100).sum().clamp(min=1) if num_items is None else num_items
    return plain / count, guided / count
