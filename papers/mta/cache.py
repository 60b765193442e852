"""What Multi-Token Attention remembers while it decodes; axes as in `papers.mta.model`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from papers.mta.model import MTAConfig


class MTACacheLayer(DynamicLayer):
    """Keys and values of all positions; queries, RoPE applied, of the last `n_queries` only."""

    def __init__(self, n_queries: int):
        super().__init__()
        self.n_queries = n_queries
        self.queries: torch.Tensor | None = None
        self.record_past = False

    def extend_queries(self, queries_BHTD: torch.Tensor) -> torch.Tensor:
        """Puts the remembered queries before the new ones and remembers the last of them."""
        if self.n_queries == 0:
            return queries_BHTD
        if self.queries is not None:
            queries_BHTD = torch.cat([self.queries, queries_BHTD], dim=-2)
        # a copy: a view would keep the whole prompt's queries alive
        self.queries = queries_BHTD if self.record_past else queries_BHTD[:, :, -self.n_queries :].clone()
        return queries_BHTD

    def activate_past_recording(self) -> None:
        """From now on all new queries are kept until `crop`, which assisted decoding calls to take back guesses."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` positions."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass minus the number of tokens to take back")
        removed = -tokens_to_remove
        if self.queries is not None:
            kept = self.queries.shape[-2] - removed
            if kept < min(self.n_queries, self.get_seq_length() - removed):
                raise RuntimeError(
                    f"cannot take back {removed} tokens: their queries are gone; call activate_past_recording first"
                )
            self.queries = self.queries[:, :, max(kept - self.n_queries, 0) : kept]
        if removed:
            super().crop(-removed)

    def _map_queries(self, change) -> None:
        if self.queries is not None:
            self.queries = change(self.queries)

    def reset(self) -> None:
        super().reset()
        self._map_queries(torch.zeros_like)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_queries(lambda q: q.index_select(0, beam_idx.to(q.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_queries(lambda q: q.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_queries(lambda q: q[indices])


class MTACache(Cache):
    """What decoding remembers: K, V, at most 2(c_q - 1) queries a layer, and which document each position belongs to.

    `segment_ids_BS` is None as long as every position of every row belongs to one document; padding is negative.
    """

    def __init__(self, config: MTAConfig):
        layers = range(config.num_hidden_layers)
        super().__init__(layers=[MTACacheLayer(config.n_cached_queries(layer)) for layer in layers])
        self.segment_ids_BS: torch.Tensor | None = None

    def extend_segments(self, new_BT: torch.Tensor | None) -> torch.Tensor | None:
        """Appends the segment ids of new positions; call before the layers see them. Returns those of all positions."""
        if new_BT is not None and self.segment_ids_BS is None:
            self.segment_ids_BS = new_BT.new_zeros(new_BT.shape[0], self.get_seq_length())
        if new_BT is not None:
            self.segment_ids_BS = torch.cat([self.segment_ids_BS, new_BT], dim=1)
        return self.segment_ids_BS

    def _map_segments(self, change) -> None:
        if self.segment_ids_BS is not None:
            self.segment_ids_BS = change(self.segment_ids_BS)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._map_segments(lambda s: s[:, : self.get_seq_length()])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_segments(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_segments(lambda s: s.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_segments(lambda s: s[indices])
