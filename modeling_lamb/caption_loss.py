"""The two cross-entropies of training (Eq. 13) from one set of logits, without a second copy of them."""

from collections.abc import Iterator

import torch
from torch import Tensor


class _DualCrossEntropy(torch.autograd.Function):
    """
    Summed cross-entropy of the logits z and of the guided logits z - bias.

    Only the log-normalisers are kept. The backward pass recomputes the probabilities, one clip at a time, and writes
    the gradients of both losses into one tensor.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        norms = torch.zeros(2, *labels.shape, dtype=dtype, device=logits.device)
        plain, guided = norms.new_zeros(()), norms.new_zeros(())
        for row, valid, z, label in _clips(logits, labels):
            norms[0, row, valid] = z.logsumexp(-1)
            chosen = z.gather(1, label)[:, 0]
            plain += (norms[0, row, valid] - chosen).sum()
            if bias is None:
                guided = plain.clone()
            else:
                norms[1, row, valid] = (z - bias[row]).logsumexp(-1)
                guided += (norms[1, row, valid] - chosen + bias[row, label[:, 0]]).sum()
        ctx.save_for_backward(logits, bias, labels, norms)
        return plain, guided

    @staticmethod
    def backward(ctx, grad_plain: Tensor, grad_guided: Tensor):  # type: ignore[override]
        logits, bias, labels, norms = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for row, valid, z, label in _clips(logits, labels):
            minus_one = -torch.ones_like(label, dtype=z.dtype)
            gradient = (z - norms[0, row, valid, None]).exp_().scatter_add_(1, label, minus_one)
            if bias is None:
                gradient *= grad_plain + grad_guided
            else:
                guided = (z - bias[row]).sub_(norms[1, row, valid, None]).exp_()
                guided.scatter_add_(1, label, minus_one).mul_(grad_guided)
                grad_bias[row] = -guided.sum(0)  # type: ignore[index]
                gradient.mul_(grad_plain).add_(guided)
            grad_logits[row, valid] = gradient.to(logits.dtype)
        return grad_logits, grad_bias, None


def _clips(logits: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of each row: its number, the positions with a label, their logits in float32 at least, and their labels."""
    for row, row_labels in enumerate(labels):
        valid = (row_labels != -100).nonzero()[:, 0]
        if valid.numel():
            z = logits[row, valid].to(torch.promote_types(logits.dtype, torch.float32))
            yield row, valid, z, row_labels[valid, None]


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
