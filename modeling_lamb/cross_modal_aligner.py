"""Cross-Modal Aligner (section 2.2): Cauchy-Schwarz divergence at two levels, and InfoNCE."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .configuration_lamb import LambConfig


def at_least_float32(x: Tensor) -> Tensor:
    """Kernels and distances of half-precision vectors are noise; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Gram(torch.autograd.Function):
    """`x @ x.mT`, whose gradient takes one product where torch's own rule takes two."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return (gradient + gradient.mT) @ x


def squared_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Squared Euclidean distances between and within two sets, in float32 at least.

    Everything that is as long as the vectors is a matrix product, which is fast on every device. Each set is measured
    from its own mean, or the difference of two large numbers would leave nothing of a small distance.

    Args:
        x, y: `(..., N, D)` and `(..., M, D)`.

    Returns:
        `(..., N, M)`, `(..., N, N)` and `(..., M, M)`.
    """
    x, y = at_least_float32(x), at_least_float32(y)
    x_mean, y_mean = (t.mean(dim=-2, keepdim=True).detach() for t in (x, y))
    x, y, shift = x - x_mean, y - y_mean, x_mean - y_mean
    gram_xy, gram_xx, gram_yy = x @ torch.cat([y, shift], dim=-2).mT, _Gram.apply(x), _Gram.apply(y)
    x_norms, y_norms = (gram.diagonal(dim1=-2, dim2=-1) for gram in (gram_xx, gram_yy))
    x_far = x_norms + 2 * gram_xy[..., -1] + (shift @ shift.mT)[..., 0]  # squared distance of x to the mean of y
    y_far = y_norms - 2 * (y @ shift.mT)[..., 0]
    return (
        (x_far[..., :, None] + y_far[..., None, :] - 2 * gram_xy[..., :-1]).clamp(min=0),
        (x_norms[..., :, None] + x_norms[..., None, :] - 2 * gram_xx).clamp(min=0),
        (y_norms[..., :, None] + y_norms[..., None, :] - 2 * gram_yy).clamp(min=0),
    )


def _log_kernel_sum(distances: Tensor, sigma: Tensor | float, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
    """log of the sum of Gaussian kernels over all unmasked pairs: `(..., N, M) -> (...)`."""
    exponents = -distances / (2 * sigma**2)
    if x_mask is not None or y_mask is not None:
        x_mask = torch.ones_like(distances[..., :, 0], dtype=torch.bool) if x_mask is None else x_mask.bool()
        y_mask = torch.ones_like(distances[..., 0, :], dtype=torch.bool) if y_mask is None else y_mask.bool()
        exponents = exponents.masked_fill(~(x_mask[..., :, None] & y_mask[..., None, :]), -torch.inf)
    return exponents.flatten(-2).logsumexp(-1)


def cauchy_schwarz_divergence(
    x: Tensor,
    y: Tensor,
    kernel_width: float | str = 1.0,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
) -> Tensor:
    """
    Cauchy-Schwarz divergence of two sets of vectors by kernel density estimation (Eq. 6, and Eq. 7 per sample).

    It is computed in float32 and in the log domain, because the kernel of two far sets underflows: finite for any
    inputs, 0 up to rounding for equal sets. Unequal counts need no factor, 1/N and 1/M cancel.

    Args:
        x, y: `(..., N, D)` and `(..., M, D)`.
        kernel_width: sigma of the Gaussian kernel, or `"median"` for the median distance between the two sets'
            unmasked vectors (a constant for the gradient).
        x_mask, y_mask: `(..., N)` and `(..., M)`, true at vectors that count. A set without any gives 0.

    Returns:
        `(...)`, float32 (float64 for float64 inputs), at least 0 up to rounding.
    """
    d_xy, d_xx, d_yy = squared_distances(x, y)
    sigma: Tensor | float
    if kernel_width == "median":
        sigma = _median_distance(d_xy.detach(), x_mask, y_mask)[..., None, None]
    else:
        sigma = float(kernel_width)
    empty = torch.zeros(d_xy.shape[:-2], dtype=torch.bool, device=x.device)
    for mask in (x_mask, y_mask):
        if mask is not None:
            empty = empty | ~mask.bool().any(-1)
    if x_mask is not None:  # one vector stands in for an empty set, so that neither the value nor its gradient is NaN
        x_mask = x_mask.bool() | empty[..., None]
    if y_mask is not None:
        y_mask = y_mask.bool() | empty[..., None]
    cross = _log_kernel_sum(d_xy, sigma, x_mask, y_mask)
    own = _log_kernel_sum(d_xx, sigma, x_mask, x_mask) + _log_kernel_sum(d_yy, sigma, y_mask, y_mask)
    return (own / 2 - cross).masked_fill(empty, 0.0)


def _median_distance(squared: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
    valid = torch.ones_like(squared, dtype=torch.bool)
    if x_mask is not None:
        valid = valid & x_mask.bool()[..., :, None]
    if y_mask is not None:
        valid = valid & y_mask.bool()[..., None, :]
    distances = squared.sqrt().masked_fill(~valid, torch.nan).flatten(-2)
    return distances.nanmedian(-1).values.nan_to_num(1.0).clamp(min=1e-6)


def info_nce(x: Tensor, y: Tensor, temperature: float = 0.07, same: Tensor | None = None) -> Tensor:
    """
    Symmetric InfoNCE of paired vectors with cosine similarity (Eq. 8 and 9).

    Args:
        x, y: `(batch, D)`, row i of each a pair. (Eq. 9 has no bar over z; the pooled vectors are meant here.)
        temperature: tau.
        same: `(batch, batch)`, true where row j says the same as row i (another caption of the clip, an equal
            caption): such pairs are no negatives and are left out.

    Returns:
        A scalar, float32 (float64 for float64 inputs).
    """
    x, y = at_least_float32(x), at_least_float32(y)
    similarity = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(y, dim=-1).T / temperature
    if same is not None:
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        similarity = similarity.masked_fill(same & ~itself, -torch.inf)
    target = torch.arange(len(x), device=x.device)
    return (nn.functional.cross_entropy(similarity, target) + nn.functional.cross_entropy(similarity.T, target)) / 2


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the unmasked positions, 0 where there is none: `(..., L, D), (..., L) -> (..., D)`, in float32."""
    states = at_least_float32(states)
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(-2) / weights.sum(-2).clamp(min=1)


class _AllGather(torch.autograd.Function):
    """Rows of all ranks; what every rank's loss says of a row comes back to the rank that it is from."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """Rows of all ranks, with exact gradients under DDP; in one process the tensor itself."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return _AllGather.apply(x)


class CrossModalAligner(nn.Module):
    """
    The alignment losses of a batch (Eq. 5-10), and Table 2's two measures of the modality gap.

    The losses that compare clips with each other (global CS, InfoNCE) see the clips of all ranks; token-level CS stays
    local. All ranks must hold the same number of clips.
    """

    text_mean: Tensor
    batches_seen: Tensor

    def __init__(self, config: LambConfig, text_hidden_size: int) -> None:
        super().__init__()
        self.kernel_space, self.kernel_width = config.kernel_space, config.kernel_width
        self.temperature = config.info_nce_temperature
        # Captions share most of their words, so their mean embeddings all point one way until that mean is taken off.
        self.register_buffer("text_mean", torch.zeros(text_hidden_size))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))

    def project(self, x: Tensor) -> Tensor:
        """Vectors `(..., D)` in the space where distances are measured."""
        x = at_least_float32(x)
        if self.kernel_space == "raw":
            return x
        if self.kernel_space == "centred":
            x = x - self.text_mean.to(x.dtype)
        return nn.functional.normalize(x, dim=-1)

    def forward(
        self,
        audio_embeds: Tensor,
        text_embeds: Tensor,
        text_mask: Tensor,
        audio_mask: Tensor | None = None,
        clip_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            audio_embeds: z_a `(batch, audio_tokens, D)`.
            text_embeds: z_t `(batch, length, D)`, the LLM's embeddings of the caption's tokens.
            text_mask: `(batch, length)`, true at caption tokens.
            audio_mask: `(batch, audio_tokens)`, where rows have more or fewer audio embeddings; a row without any takes
                no part.
            clip_ids: `(batch,)` integers, equal for captions of the same clip.

        Returns:
            `cs_global_loss`, `cs_token_loss`, `info_nce_loss`, and without gradient `modality_gap` (mean of
            `||z_a_bar - z_t_bar||`) and `modality_cosine`.
        """
        if audio_mask is None:
            audio_mask = torch.ones_like(audio_embeds[..., 0], dtype=torch.bool)
        heard = audio_mask.any(1)
        if not heard.all():
            audio_embeds, audio_mask = audio_embeds[heard], audio_mask[heard]
            text_embeds, text_mask = text_embeds[heard], text_mask[heard]
            clip_ids = None if clip_ids is None else clip_ids[heard]
        z_a, z_t = masked_mean(audio_embeds, audio_mask), masked_mean(text_embeds, text_mask)
        if self.training and self.kernel_space == "centred":
            self._update_text_mean(z_t)
        all_a, all_t = gather_with_gradient(z_a), gather_with_gradient(z_t)
        texts = all_t.unique(dim=0, return_inverse=True)[1]
        same = texts[:, None] == texts[None]
        if clip_ids is not None:
            all_ids = gather_with_gradient(clip_ids)
            same = same | (all_ids[:, None] == all_ids[None])
        projected_a, projected_t = self.project(all_a), self.project(all_t)
        with torch.no_grad():
            gap = (z_a - z_t).norm(dim=-1).mean()
            cosine = nn.functional.cosine_similarity(z_a, z_t).mean()
        return {
            "cs_global_loss": cauchy_schwarz_divergence(projected_a, projected_t, self.kernel_width),  # Eq. 6
            "cs_token_loss": cauchy_schwarz_divergence(  # Eq. 7
                self.project(audio_embeds), self.project(text_embeds), self.kernel_width, audio_mask, text_mask
            ).mean(),
            "info_nce_loss": info_nce(projected_a, projected_t, self.temperature, same),  # Eq. 8
            "modality_gap": gap,
            "modality_cosine": cosine,
        }

    @torch.no_grad()
    def _update_text_mean(self, z_t: Tensor) -> None:
        """A running mean: the plain average of the first hundred batches, then a slow exponential one."""
        self.batches_seen += 1
        weight = torch.clamp(1.0 / self.batches_seen, min=0.01)
        self.text_mean.lerp_(
            gather_with_gradient(z_t).mean(0).to(self.text_mean.dtype), weight.to(self.text_mean.dtype)
        )
