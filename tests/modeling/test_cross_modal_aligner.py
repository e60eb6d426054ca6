"""Equations 6-9 against loops in float64, and what the losses must not do: overflow, see padding, heed the order."""

import math

import pytest
import torch
from conftest import tiny_config
from torch.nn.functional import normalize

from modeling_lamb import CrossModalAligner, cauchy_schwarz_divergence, info_nce
from modeling_lamb.cross_modal_aligner import masked_mean


def kernel_sum(x, y, sigma):
    return sum(math.exp(-sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / (2 * sigma**2)) for u in x for v in y)


def cs_oracle(x, y, sigma=1.0) -> float:
    """Eq. 6, pair by pair; x, y: (n, D), (m, D)."""
    x, y = x.double().tolist(), y.double().tolist()
    return -math.log(kernel_sum(x, y, sigma) / math.sqrt(kernel_sum(x, x, sigma) * kernel_sum(y, y, sigma)))


def info_nce_oracle(x, y, temperature, same=None) -> float:
    """Eq. 8 and 9, term by term."""
    x, y = x.double(), y.double()

    def one_way(m, n):
        total = 0.0
        for i in range(len(m)):
            similar = [math.exp(float(m[i] @ n[j] / (m[i].norm() * n[j].norm())) / temperature) for j in range(len(n))]
            others = [s for j, s in enumerate(similar) if j == i or same is None or not same[i, j]]
            total -= math.log(similar[i] / sum(others))
        return total / len(m)

    return (one_way(x, y) + one_way(y, x)) / 2


def unit(*shape):
    return normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("counts", [(8, 8), (32, 13), (1, 5), (1, 1)])
@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_global_cs_is_equation_6(counts, sigma):
    x, y = unit(counts[0], 64), unit(counts[1], 64)
    result = cauchy_schwarz_divergence(x, y, sigma)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(cs_oracle(x, y, sigma), abs=1e-5)


def test_token_cs_is_equation_7_with_masks():
    x, y = unit(4, 6, 32), unit(4, 9, 32)
    x_mask = torch.arange(6) < torch.tensor([6, 2, 1, 5])[:, None]
    y_mask = torch.arange(9) < torch.tensor([3, 9, 1, 7])[:, None]
    result = cauchy_schwarz_divergence(x, y, 1.0, x_mask, y_mask)
    expected = [cs_oracle(x[i, x_mask[i]], y[i, y_mask[i]]) for i in range(4)]
    torch.testing.assert_close(result, torch.tensor(expected), atol=1e-5, rtol=0)
    only_y = cauchy_schwarz_divergence(x, y, 1.0, y_mask=y_mask)
    expected = [cs_oracle(x[i], y[i, y_mask[i]]) for i in range(4)]
    torch.testing.assert_close(only_y, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_info_nce_is_equation_8(temperature):
    x, y = unit(16, 128), unit(16, 128)
    result = info_nce(x, y, temperature)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(info_nce_oracle(x, y, temperature), rel=1e-6)


def test_info_nce_measures_the_cosine():
    x, y = torch.randn(6, 32), torch.randn(6, 32)
    assert info_nce(7 * x, y / 3).item() == pytest.approx(info_nce(x, y).item(), rel=1e-5)


def test_info_nce_leaves_captions_of_the_same_clip_out_of_the_negatives():
    x, y = unit(5, 32), unit(5, 32)
    ids = torch.tensor([0, 0, 1, 2, 1])
    same = ids[:, None] == ids
    assert info_nce(x, y, 0.1, same).item() == pytest.approx(info_nce_oracle(x, y, 0.1, same), rel=1e-6)
    assert info_nce(x, y, 0.1, same).item() < info_nce(x, y, 0.1).item()
    assert info_nce(x, y, 0.1, torch.ones(5, 5, dtype=torch.bool)).item() == 0


def test_gradients():
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    x_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    y_mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda a, b: cauchy_schwarz_divergence(a, b, 0.8, x_mask, y_mask), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: cauchy_schwarz_divergence(a[0], b[0]), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a[0, :3], b[0], 0.5), (x, y))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_equal_sets_are_exactly_0_apart(scale):
    x = torch.randn(3, 8, 16) * scale
    mask = torch.arange(8) < torch.tensor([8, 5, 1])[:, None]
    assert torch.equal(cauchy_schwarz_divergence(x, x), torch.zeros(3))
    assert torch.equal(cauchy_schwarz_divergence(x, x.clone(), 1.0, mask, mask), torch.zeros(3))
    assert cauchy_schwarz_divergence(x[0], x[0]).item() == 0


def test_far_sets_have_a_finite_loss_that_still_pulls():
    x = torch.randn(2, 8, 16).requires_grad_()
    y = torch.randn(2, 6, 16) + 1e3
    loss = cauchy_schwarz_divergence(x, y)
    loss.sum().backward()
    assert loss.isfinite().all() and (loss > 1e5).all()
    assert x.grad.isfinite().all() and (x.grad.sum((1, 2)) < 0).all()  # downhill is towards y


def test_a_set_without_vectors_gives_0_and_no_nan():
    x, y = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 3, 8)
    y_mask = torch.tensor([[0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    loss = cauchy_schwarz_divergence(x, y, 1.0, y_mask=y_mask)
    loss.sum().backward()
    assert loss[0] == 0 and loss[1] > 0
    assert torch.equal(x.grad[0], torch.zeros(4, 8)) and x.grad[1].isfinite().all() and x.grad[1].any()


def test_order_and_sides_do_not_matter():
    x, y = unit(5, 16), unit(7, 16)
    expected = cauchy_schwarz_divergence(x, y)
    torch.testing.assert_close(cauchy_schwarz_divergence(x[torch.randperm(5)], y[torch.randperm(7)]), expected)
    torch.testing.assert_close(cauchy_schwarz_divergence(y, x), expected)
    order = torch.randperm(5)
    torch.testing.assert_close(info_nce(x[order], y[:5][order]), info_nce(x, y[:5]))


def test_the_median_kernel_width_is_a_constant_of_the_batch():
    x, y = torch.randn(5, 16, requires_grad=True), torch.randn(6, 16)
    y_mask = torch.arange(6) < 4
    sigma = torch.cdist(x, y[:4]).median().item()
    median = cauchy_schwarz_divergence(x, y, "median", y_mask=y_mask)
    fixed = cauchy_schwarz_divergence(x, y, sigma, y_mask=y_mask)
    assert median.item() == pytest.approx(cs_oracle(x.detach(), y[:4], sigma), abs=1e-5)
    by_median, by_number = (torch.autograd.grad(loss, x)[0] for loss in (median, fixed))
    torch.testing.assert_close(by_median, by_number)
    assert cauchy_schwarz_divergence(x, x, "median").item() == 0
    assert cauchy_schwarz_divergence(x[:1], x[:1], "median").item() == 0  # all distances are 0


def test_half_precision_is_lifted_to_float32():
    x, y = unit(4, 8, 32).bfloat16(), unit(4, 8, 32).bfloat16()
    result = cauchy_schwarz_divergence(x, y)
    torch.testing.assert_close(result, cauchy_schwarz_divergence(x.float(), y.float()))
    assert info_nce(x[0], y[0]).dtype == torch.float32


# -- the module --------------------------------------------------------------------------------------------------------


def batch(width=48):
    z_a, z_t = torch.randn(5, 4, width), torch.randn(5, 7, width)
    text_mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 6])[:, None]
    return z_a, z_t, text_mask


def losses(aligner, *args, **kwargs):
    return {name: value.item() for name, value in aligner(*args, **kwargs).items()}


def test_the_aligner_pools_masks_and_normalizes():
    z_a, z_t, text_mask = batch()
    result = losses(CrossModalAligner(tiny_config(), 48), z_a, z_t, text_mask)
    bar_a = z_a.double().mean(1)
    bar_t = torch.stack([z_t[i, text_mask[i]].double().mean(0) for i in range(5)])
    assert result["cs_global_loss"] == pytest.approx(cs_oracle(normalize(bar_a), normalize(bar_t)), abs=1e-5)
    tokens = [cs_oracle(normalize(z_a[i].double()), normalize(z_t[i, text_mask[i]].double())) for i in range(5)]
    assert result["cs_token_loss"] == pytest.approx(sum(tokens) / 5, abs=1e-5)
    assert result["info_nce_loss"] == pytest.approx(info_nce_oracle(bar_a, bar_t, 0.07), rel=1e-5)
    assert result["modality_gap"] == pytest.approx((bar_a - bar_t).norm(dim=1).mean().item(), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(bar_a, bar_t).mean().item()
    assert result["modality_cosine"] == pytest.approx(cosine, abs=1e-5)


def test_padding_does_not_reach_the_aligner():
    z_a, z_t, text_mask = batch()
    aligner = CrossModalAligner(tiny_config(), 48)
    expected = losses(aligner, z_a, z_t, text_mask)
    audio_mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool).expand(5, -1)
    padded_a = torch.cat([z_a, torch.full((5, 2, 48), 9.0)], dim=1)
    padded_t = torch.where(text_mask[..., None], z_t, torch.full_like(z_t, -9.0))
    assert losses(aligner, padded_a, padded_t, text_mask, audio_mask) == pytest.approx(expected, rel=1e-5)


def test_rows_without_audio_take_no_part():
    z_a, z_t, text_mask = batch()
    aligner = CrossModalAligner(tiny_config(), 48)
    audio_mask = torch.ones(5, 4, dtype=torch.bool)
    audio_mask[2] = False
    heard = [0, 1, 3, 4]
    ids = torch.tensor([0, 1, 0, 1, 2])
    expected = losses(aligner, z_a[heard], z_t[heard], text_mask[heard], clip_ids=ids[heard])
    assert losses(aligner, z_a, z_t, text_mask, audio_mask, ids) == pytest.approx(expected, rel=1e-6)


def test_equal_captions_and_clips_are_no_negatives():
    z_a, z_t, text_mask = batch()
    z_t[1], text_mask[1] = z_t[0], text_mask[0]
    bar_a, bar_t = masked_mean(z_a, torch.ones(5, 4)), masked_mean(z_t, text_mask)
    ids = torch.tensor([0, 1, 2, 3, 2])
    same = torch.eye(5, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    aligner = CrossModalAligner(tiny_config(), 48)
    result = losses(aligner, z_a, z_t, text_mask)["info_nce_loss"]
    assert result == pytest.approx(info_nce_oracle(bar_a, bar_t, 0.07, same), rel=1e-5)
    same[2, 4] = same[4, 2] = True
    result = losses(aligner, z_a, z_t, text_mask, clip_ids=ids)["info_nce_loss"]
    assert result == pytest.approx(info_nce_oracle(bar_a, bar_t, 0.07, same), rel=1e-5)


def test_raw_space_measures_the_vectors_as_they_are():
    z_a, z_t, text_mask = batch(8)
    aligner = CrossModalAligner(tiny_config(kernel_space="raw", kernel_width=2.0), 8)
    tokens = [cs_oracle(z_a[i], z_t[i, text_mask[i]], 2.0) for i in range(5)]
    assert losses(aligner, z_a, z_t, text_mask)["cs_token_loss"] == pytest.approx(sum(tokens) / 5, abs=1e-5)


def test_centred_space_takes_off_the_running_text_mean():
    z_a, z_t, text_mask = batch(8)
    aligner = CrossModalAligner(tiny_config(kernel_space="centred"), 8)
    means = []
    for shift in (0.0, 1.0, 5.0):
        aligner(z_a, z_t + shift, text_mask)
        means.append(masked_mean(z_t + shift, text_mask).mean(0))
    torch.testing.assert_close(aligner.text_mean, torch.stack(means).mean(0))  # the plain average to begin with
    before = aligner.eval().text_mean.clone()
    result = losses(aligner, z_a, z_t, text_mask)
    assert torch.equal(aligner.text_mean, before)  # evaluation does not move it
    tokens = [
        cs_oracle(normalize(z_a[i] - before, dim=-1), normalize(z_t[i, text_mask[i]] - before, dim=-1))
        for i in range(5)
    ]
    assert result["cs_token_loss"] == pytest.approx(sum(tokens) / 5, abs=1e-5)


@pytest.mark.parametrize("space", ["normalized", "centred", "raw"])
@pytest.mark.parametrize("width", [1.0, "median"])
def test_every_space_has_finite_losses_and_gradients(space, width):
    z_a, z_t, text_mask = batch()
    z_a = (1e3 * z_a + 1e3).requires_grad_()
    result = CrossModalAligner(tiny_config(kernel_space=space, kernel_width=width), 48)(z_a, z_t, text_mask)
    sum(result[name] for name in ("cs_global_loss", "cs_token_loss", "info_nce_loss")).backward()
    assert all(value.isfinite() for value in result.values())
    assert z_a.grad.isfinite().all() and z_a.grad.any()
