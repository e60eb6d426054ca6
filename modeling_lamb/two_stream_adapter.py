"""From encoder tokens to a fixed number of audio embeddings: the Two-Stream Adapter and Table 2's two baselines."""

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from .configuration_lamb import LambConfig


class QueryAttention(nn.Module):
    """Learnable queries that attend to a sequence, with residual and LayerNorm: `LN(MHA(Q, h) + Q)` (Eq. 1-4)."""

    def __init__(self, num_queries: int, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)  # not in Eq. 1, which leaves H x d_H unequal to D possible
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """states `(batch, length, hidden)`, mask `(batch, length)` true where attended -> `(batch, queries, hidden)`."""
        query = self.query.expand(states.shape[0], -1, -1)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, states), (self.v_proj, states))
        )
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else mask[:, None, None]
        )
        return self.norm(self.o_proj(attended.transpose(1, 2).flatten(2)) + query)


class MaskedBiGRU(nn.Module):
    """
    A bidirectional GRU whose backward direction starts at each sequence's own end.

    `pack_padded_sequence` does the same, but copies the lengths to the CPU on every call and cannot be exported.
    """

    def __init__(self, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.forward_layers, self.backward_layers = (
            nn.ModuleList(nn.GRU(hidden_size, hidden_size // 2, batch_first=True) for _ in range(num_layers))
            for _ in range(2)
        )

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """states `(batch, length, hidden)` with padding last, mask `(batch, length)` -> `(batch, length, hidden)`."""
        steps = torch.arange(states.shape[1], device=states.device)
        # position of the mirrored frame; padding stays where it is
        mirrored = torch.where(mask, mask.sum(1, keepdim=True) - 1 - steps, steps)[..., None]
        for forward_gru, backward_gru in zip(self.forward_layers, self.backward_layers, strict=True):
            ahead, _ = forward_gru(states)
            behind, _ = backward_gru(states.gather(1, mirrored.expand_as(states)))
            states = torch.cat([ahead, behind.gather(1, mirrored.expand_as(behind))], dim=-1)
        return states


class TemporalEncoder(nn.Module):
    """Multi-scale Conv1d, projected with LayerNorm and GELU, and a bidirectional GRU: `GRU(Conv1D(h_a))` (Eq. 3)."""

    def __init__(self, hidden_size: int, kernel_sizes: list[int], num_layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(hidden_size, hidden_size, k, padding=k // 2) for k in kernel_sizes)
        self.proj = nn.Linear(len(kernel_sizes) * hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.gru = MaskedBiGRU(hidden_size, num_layers)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """states `(batch, steps, hidden)`, mask `(batch, steps)` -> `(batch, steps, hidden)`."""
        channels = (states * mask[..., None]).transpose(1, 2)  # beyond a clip's end lies the convolution's zero padding
        scales = torch.cat([conv(channels) for conv in self.convs], dim=1).transpose(1, 2)
        return self.gru(nn.functional.gelu(self.norm(self.proj(scales))), mask)


class TwoStreamAdapter(nn.Module):
    """
    The Two-Stream Adapter (section 2.1): semantic queries over all encoder tokens, temporal queries over the time
    sequence, global queries over both, and a projection into the LLM's embedding space.

    The temporal stream runs over real time: the frequency bands of a step are averaged first (the paper does not say).
    """

    def __init__(self, config: LambConfig, encoder_hidden_size: int, text_hidden_size: int) -> None:
        super().__init__()
        width, heads = config.adapter_hidden_size or encoder_hidden_size, config.adapter_heads
        self.input_proj: nn.Module = nn.Identity()
        if width != encoder_hidden_size:  # the paper keeps the encoder's width
            self.input_proj = nn.Sequential(nn.Linear(encoder_hidden_size, width), nn.GELU(), nn.LayerNorm(width))
        self.temporal: QueryAttention | None = None
        self.semantic = (
            QueryAttention(config.num_semantic_queries, width, heads) if config.num_semantic_queries else None
        )
        if config.num_temporal_queries:
            self.temporal_encoder = TemporalEncoder(width, list(config.conv_kernel_sizes), config.gru_num_layers)
            self.temporal = QueryAttention(config.num_temporal_queries, width, heads)
        self.fusion = QueryAttention(config.num_audio_tokens, width, heads)
        self.output_proj = nn.Linear(width, text_hidden_size)  # W_p

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """
        Args:
            hidden_states: encoder tokens `(batch, steps, bands, encoder_hidden)`.
            mask: `(batch, steps)`, true at real time steps, which come first.

        Returns:
            z_a: `(batch, num_audio_tokens, text_hidden)`.
        """
        h_a = self.input_proj(hidden_states)
        streams = []
        if self.semantic is not None:  # Eq. 2
            streams.append(self.semantic(h_a.flatten(1, 2), mask.repeat_interleave(h_a.shape[2], dim=1)))
        if self.temporal is not None:  # Eq. 3
            streams.append(self.temporal(self.temporal_encoder(h_a.mean(2), mask), mask))
        return self.output_proj(self.fusion(torch.cat(streams, dim=1)))  # Eq. 4


class LinearAdapter(nn.Module):
    """Table 2's linear baseline: time averaged into `num_audio_tokens` equal spans of each clip, then one Linear."""

    def __init__(self, config: LambConfig, encoder_hidden_size: int, text_hidden_size: int) -> None:
        super().__init__()
        self.num_audio_tokens = config.num_audio_tokens
        self.output_proj = nn.Linear(encoder_hidden_size, text_hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """As [`TwoStreamAdapter.forward`]."""
        steps = torch.arange(mask.shape[1], device=mask.device)
        span = mask.sum(1)[:, None, None] / self.num_audio_tokens  # in steps, a fraction where the clip is short
        start = torch.arange(self.num_audio_tokens, device=mask.device)[:, None] * span
        overlap = (torch.minimum(start + span, steps + 1) - torch.maximum(start, steps)).clamp(min=0)
        weights = (overlap / span).to(hidden_states.dtype)  # (batch, num_audio_tokens, steps), rows sum to 1
        return self.output_proj(weights @ hidden_states.mean(2))


class QFormerAdapter(nn.Module):
    """Table 2's Q-Former baseline: BLIP-2's, with `num_audio_tokens` queries over all encoder tokens."""

    def __init__(self, config: LambConfig, encoder_hidden_size: int, text_hidden_size: int) -> None:
        super().__init__()
        width = config.adapter_hidden_size or encoder_hidden_size
        self.query = nn.Parameter(torch.empty(config.num_audio_tokens, width))
        self.qformer = Blip2QFormerModel._from_config(
            Blip2QFormerConfig(
                hidden_size=width,
                encoder_hidden_size=encoder_hidden_size,
                num_hidden_layers=config.qformer_num_layers,
                num_attention_heads=config.adapter_heads,
                intermediate_size=4 * width,
                cross_attention_frequency=1,
            )
        )
        self.output_proj = nn.Linear(width, text_hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """As [`TwoStreamAdapter.forward`]."""
        output = self.qformer(
            query_embeds=self.query.expand(hidden_states.shape[0], -1, -1),
            encoder_hidden_states=hidden_states.flatten(1, 2),
            encoder_attention_mask=mask.repeat_interleave(hidden_states.shape[2], dim=1).long(),
        )
        return self.output_proj(output.last_hidden_state)


ADAPTERS = {"two_stream": TwoStreamAdapter, "linear": LinearAdapter, "qformer": QFormerAdapter}
