"""Both cross-entropies against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from modeling_lamb.caption_loss import caption_losses


def batch(dtype=torch.float32):
    logits = torch.randn(3, 6, 11, dtype=dtype, requires_grad=True)
    bias = torch.randn(3, 11, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 11, (3, 6))
    labels[0, 4:] = -100
    labels[1, :2] = -100
    labels[2] = -100  # a row without any caption token
    return logits, bias, labels


def plain(logits, labels, bias=None, **kwargs):
    guided = logits if bias is None else logits - bias[:, None]
    return F.cross_entropy(guided.flatten(0, 1), labels.flatten(), **kwargs)


def test_values_and_gradients_are_those_of_two_cross_entropies():
    logits, bias, labels = batch()
    decoder, guided = caption_losses(logits, labels, bias)
    expected = plain(logits, labels), plain(logits, labels, bias)
    torch.testing.assert_close((decoder, guided), expected)
    gradients = torch.autograd.grad(0.7 * decoder + 1.9 * guided, (logits, bias))
    torch.testing.assert_close(gradients, torch.autograd.grad(0.7 * expected[0] + 1.9 * expected[1], (logits, bias)))


def test_gradcheck():
    logits, bias, labels = batch(torch.float64)
    assert torch.autograd.gradcheck(lambda z, b: caption_losses(z, labels, b), (logits, bias))
    assert torch.autograd.gradcheck(lambda z: caption_losses(z, labels), (logits,))


@pytest.mark.parametrize("items", [37, torch.tensor(37)])
def test_num_items_replaces_the_batch_count(items):
    logits, bias, labels = batch()
    expected = [plain(logits, labels, b, reduction="sum") / 37 for b in (None, bias)]
    torch.testing.assert_close(list(caption_losses(logits, labels, bias, items)), expected)


def test_without_a_guide_both_are_the_same():
    logits, _, labels = batch()
    decoder, guided = caption_losses(logits, labels)
    assert decoder.item() == guided.item() == pytest.approx(plain(logits, labels).item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(2 * decoder + 3 * guided, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(5 * plain(logits, labels), logits)[0])


def test_no_labels_give_0_and_no_nan():
    logits, bias, labels = batch()
    decoder, guided = caption_losses(logits, torch.full_like(labels, -100), bias)
    assert decoder.item() == guided.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(decoder + guided, (logits, bias)))


def test_half_precision_logits_are_summed_in_float32():
    logits, bias, labels = batch()
    half = logits.detach().bfloat16().requires_grad_()
    losses = caption_losses(half, labels, bias)
    expected = plain(half.float(), labels), plain(half.float(), labels, bias)
    torch.testing.assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(sum(losses), half)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(expected), half)[0])


def test_what_stands_at_unlabelled_positions_does_not_matter():
    logits, bias, labels = batch()
    expected = torch.autograd.grad(sum(caption_losses(logits, labels, bias)), (logits, bias))
    with torch.no_grad():
        logits[labels == -100] = torch.tensor([torch.nan, torch.inf, -torch.inf] + [0.0] * 8)
    torch.testing.assert_close(torch.autograd.grad(sum(caption_losses(logits, labels, bias)), (logits, bias)), expected)
