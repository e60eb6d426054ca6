"""Token Guide (section 2.3): logits steered by the distance between a clip's mean embedding and each token's."""

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from .configuration_lamb import LambConfig

_ROWS = 1024  # token embeddings that are worked on at a time: few enough to stay in the cache of a CPU


def guide_scores(audio_embeds: Tensor, token_embeddings: Tensor, metric: str = "l2") -> Tensor:
    """
    Distances of the Token Guide (Eq. 12), the one function behind training and generation.

    Computed in float32: in half precision the Gram form of the distance cancels to noise. For the same reason the mean
    token embedding is subtracted from both sides first, which changes no distance.

    Args:
        audio_embeds: z_a `(batch, num_audio_tokens, D)`; its mean over the tokens is compared.
        token_embeddings: v `(vocab_size, D)`, the LLM's input embeddings.
        metric: `l2` (squared Euclidean, Eq. 12), `l1`, or `cosine` (1 - cosine similarity).

    Returns:
        `(batch, vocab_size)`, float32 (float64 for float64 inputs); smaller is closer.

    Raises:
        ValueError: on another metric, or embeddings of different width.
    """
    if metric not in _DISTANCES:
        raise ValueError(f"metric={metric!r} is none of {', '.join(_DISTANCES)}.")
    if audio_embeds.shape[-1] != token_embeddings.shape[-1]:
        raise ValueError(
            f"audio_embeds have width {audio_embeds.shape[-1]}, token_embeddings {token_embeddings.shape[-1]}: both must "
            "lie in the LLM's embedding space."
        )
    dtype = torch.float64 if audio_embeds.dtype == torch.float64 else torch.float32
    z = audio_embeds.to(dtype).mean(-2)  # z_a_bar
    centre = token_embeddings.mean(0, dtype=dtype).detach()
    distance = _DISTANCES[metric]
    scores = [distance(z, rows.to(dtype), centre) for rows in token_embeddings.split(_ROWS)]
    return torch.cat(scores, dim=-1)


def _squared_l2(z: Tensor, v: Tensor, centre: Tensor) -> Tensor:
    z, v = z - centre, v - centre
    lengths = torch.linalg.vector_norm(v, dim=-1)  # in one pass over v, without its square in memory
    return (z.square().sum(-1, keepdim=True) + lengths.square() - 2 * z @ v.T).clamp(min=0)


def _l1(z: Tensor, v: Tensor, centre: Tensor) -> Tensor:
    return torch.cdist(z, v, p=1)


def _cosine(z: Tensor, v: Tensor, centre: Tensor) -> Tensor:
    return 1 - nn.functional.normalize(z, dim=-1) @ nn.functional.normalize(v, dim=-1).T


_DISTANCES = {"l2": _squared_l2, "l1": _l1, "cosine": _cosine}


class TokenGuide(nn.Module):
    """The learnable coefficient beta of Eq. 12 and the choice of distance."""

    def __init__(self, config: LambConfig) -> None:
        super().__init__()
        self.metric = config.guide_metric
        # one element and not a scalar: DeepSpeed and FSDP cannot send or shard a parameter without dimensions
        self.beta = nn.Parameter(torch.tensor([float(config.guide_weight_init)]))

    def forward(self, audio_embeds: Tensor, token_embeddings: Tensor) -> Tensor | None:
        """Guide scores `(batch, vocab_size)` of z_a `(batch, num_audio_tokens, D)`; None where the guide is off."""
        return None if self.metric == "none" else guide_scores(audio_embeds, token_embeddings, self.metric)


class TokenGuideLogitsProcessor(LogitsProcessor):
    """
    Subtracts `weight * scores` from the logits of every step (Eq. 12). Works in any causal LM's `generate`.

    Args:
        scores: `(batch, vocab_size)` from [`guide_scores`]; rows are repeated for beams and returned sequences.
        weight: beta.
        renormalize: return log-probabilities. Beam search needs it: it adds up log-probabilities that it computed
            before any processor ran, and a bias on those is no longer the log of a distribution.
    """

    def __init__(self, scores: Tensor, weight: float | Tensor, renormalize: bool = False) -> None:
        if scores.dim() != 2:
            raise ValueError(f"scores must have the shape (batch, vocab_size), got {tuple(scores.shape)}.")
        self.bias = -weight * scores
        self.renormalize = renormalize

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids `(rows, length)`, scores `(rows, vocab_size)` -> `(rows, vocab_size)`, out of place."""
        if scores.shape[0] % self.bias.shape[0] or scores.shape[1] < self.bias.shape[1]:
            raise ValueError(
                f"Logits of shape {tuple(scores.shape)} do not fit guide scores of shape {tuple(self.bias.shape)}: the rows "
                "must be a multiple of the clips and the vocabulary that of the token embeddings."
            )
        bias = self.bias.to(scores.device).repeat_interleave(scores.shape[0] // self.bias.shape[0], dim=0)
        if scores.shape[1] > bias.shape[1]:  # an output layer padded beyond the embeddings
            bias = nn.functional.pad(bias, (0, scores.shape[1] - bias.shape[1]))
        guided = scores + bias
        return guided.log_softmax(-1) if self.renormalize else guided
