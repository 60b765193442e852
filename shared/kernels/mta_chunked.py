"""Exact Multi-Token Attention in blocks of query rows: O(block * S) memory instead of O(T * S), on any device.

A block of rows [r0, r1) needs the score rows from c_q - 1 before it, for each of the two convolutions, and no key
after its last row, so that half of the map is never computed. Backward computes a block's maps again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from shared.kernels.mta_reference import mix_heads_post, mix_heads_pre

# Elements of one block's map, all its batch rows and heads: on a CPU about what the caches hold.
CPU_BLOCK, GPU_BLOCK = 2**20, 2**26
MIN_ROWS, MAX_ROWS = 64, 512
# Columns of the map that the convolution treats as channels.
PANEL = 16


@dataclass(frozen=True)
class Axes:
    """Those of the (T, C) map: T queries, the last of S positions; C columns, the S keys and gaps between documents.

    position_BC: (B or 1, C) the key's position, -1 in a gap.
    segment_BC, segment_BS: by column (-1 in a gap) and by position; None: one segment.
    end_S: for each position the number of columns up to and including it, the largest in the batch.
    """

    n_queries: int
    position_BC: torch.Tensor
    segment_BC: torch.Tensor | None
    segment_BS: torch.Tensor | None
    end_S: list[int] | range

    @classmethod
    def of(cls, n_queries: int, n_keys: int, segment_BS: torch.Tensor | None, gap: int, device: torch.device) -> Axes:
        """Puts `gap` empty columns wherever the segment changes: a convolution along the keys cannot bridge them."""
        position_S = torch.arange(n_keys, device=device)
        if segment_BS is None:
            return cls(n_queries, position_S[None], None, None, range(1, n_keys + 1))
        column_BS = position_S + gap * F.pad(segment_BS.diff(dim=1) != 0, (1, 0)).cumsum(1)
        end_S = (column_BS.amax(0) + 1).tolist()
        empty_BC = position_S.new_full((len(segment_BS), end_S[-1]), -1)
        position_BC = empty_BC.scatter(1, column_BS, position_S.expand_as(column_BS))
        segment_BC = empty_BC.scatter(1, column_BS, segment_BS.to(empty_BC.dtype))
        return cls(n_queries, position_BC, segment_BC, segment_BS, end_S)

    def columns(self, x_BGSD: torch.Tensor) -> torch.Tensor:
        """Keys or values of the columns; those in gaps are arbitrary."""
        if self.segment_BC is None:
            return x_BGSD
        index_BC = self.position_BC.clamp_min(0)
        return x_BGSD.gather(2, index_BC[:, None, :, None].expand(-1, x_BGSD.shape[1], -1, x_BGSD.shape[3]))

    def hidden(self, block: Block) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(b or 1, 1, R, C), True where a query may not see the key; and which queries are padding, (b, 1, R, 1)."""
        offset = len(self.end_S) - self.n_queries
        rows = slice(offset + block.scores_from, offset + block.rows.stop)
        row_R1 = torch.arange(rows.start, rows.stop, device=self.position_BC.device)[:, None]
        if self.segment_BC is None:
            return (self.position_BC[:, None, : block.cols] > row_R1)[:, None], None
        segment_bR1 = self.segment_BS[block.batch, rows, None]
        other_bRC = segment_bR1 != self.segment_BC[block.batch, None, : block.cols]
        padding_bR1 = segment_bR1 < 0
        hidden_bRC = other_bRC | padding_bR1 | (self.position_BC[block.batch, None, : block.cols] > row_R1)
        return hidden_bRC[:, None], padding_bR1[:, None]


@dataclass(frozen=True)
class Block:
    """Queries `rows` of `batch`: scores from query `scores_from` on, weights from `weights_from`, `cols` columns."""

    batch: slice
    rows: slice
    scores_from: int
    weights_from: int
    cols: int


def convolve_rows(x_BHRC: torch.Tensor, kernel_HAO: torch.Tensor, rows_above: int) -> torch.Tensor:
    """Key-query convolution (Eq. 5) of a block of rows; the map has `rows_above` zero rows on top of those given.

    Returns R + rows_above - (c_q - 1) rows. `PANEL` neighbouring columns are taken as channels: the convolution along
    the keys becomes a dense one, PANEL to PANEL channels over 1 + (c_k - 1) / PANEL panels rounded up, and is worth
    its superfluous zeros, because libraries are fast at it and slow at depthwise convolution: with a 6x11 kernel on
    one CPU core 2 to 3 times as fast forward and 4 to 9 times with backward.
    """
    B, H, R, C = x_BHRC.shape
    _, n_lags, width = kernel_HAO.shape
    n_panels, n_taps = -(-C // PANEL), 1 + -(-(width - 1) // PANEL)
    left = width // 2
    right = (n_panels + n_taps - 1) * PANEL - C - left
    x_BHRPn = F.pad(x_BHRC, (left, right, rows_above, 0)).unflatten(-1, (-1, PANEL))
    x_BcRP = x_BHRPn.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)  # channels (H, PANEL), innermost in memory

    # Column n of a panel sees column m of the same and the next panels, counted from `left` before it, with tap m - n.
    tap_mn = torch.arange(n_taps * PANEL, device=x_BHRC.device)[:, None] - torch.arange(PANEL, device=x_BHRC.device)
    dense_HAmn = kernel_HAO[:, :, tap_mn.clamp(0, width - 1)] * ((tap_mn >= 0) & (tap_mn < width))
    dense_HnmAP = dense_HAmn.unflatten(2, (n_taps, PANEL)).permute(0, 4, 3, 1, 2)
    y_BcRP = F.conv2d(x_BcRP, dense_HnmAP.flatten(0, 1).contiguous(memory_format=torch.channels_last), groups=H)
    y_BHRPn = y_BcRP.permute(0, 2, 3, 1).unflatten(-1, (H, PANEL)).permute(0, 3, 1, 2, 4)
    return y_BHRPn.reshape(B, H, R + rows_above - n_lags + 1, n_panels * PANEL)[..., :C]


def multiply_grouped(x_BHRK: torch.Tensor, y_BGKN: torch.Tensor) -> torch.Tensor:
    """x @ y where head h takes y's head h // (H / G), without repeating y."""
    B, H, R, K = x_BHRK.shape
    G = y_BGKN.shape[1]
    return (x_BHRK.reshape(B, G, H // G * R, K) @ y_BGKN).view(B, H, R, -1)


def filled(x: torch.Tensor, where: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    """`x.masked_fill(where, value)`, whatever x holds there; where: True or False, broadcast over x's heads.

    By bit masks, which on a CPU take a tenth of `masked_fill`'s time. Multiplying by a mask would be as fast, but makes
    NaN of what is infinite (in fp16 a score of 65,520).
    """
    return _Filled.apply(x, where, value)


class _Filled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, where: torch.Tensor, value: float) -> torch.Tensor:
        ctx.save_for_backward(where)
        bits = {4: torch.int32, 8: torch.int64}[x.element_size()]
        keep = where.to(bits) - 1  # every bit, or none
        y = x.view(bits) & keep
        if value != 0:
            y |= torch.full((), value, dtype=x.dtype, device=x.device).view(bits) & ~keep
        return y.view(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return filled(grad, *ctx.saved_tensors), None, None


class TorchMaps:
    """The operations on a block's maps, in >= fp32. `shared.kernels.mta_triton_maps.TritonMaps` has the same ones."""

    @staticmethod
    def scores(q_bHRD, k_bGCD, scale: float, hidden_b1RC) -> torch.Tensor:
        """scale * q kᵀ, zero where hidden; rounded to q's dtype first."""
        x_bHRC = multiply_grouped(q_bHRD, k_bGCD.transpose(-1, -2))
        x_bHRC = x_bHRC.to(torch.promote_types(x_bHRC.dtype, torch.float32))
        return filled(x_bHRC, hidden_b1RC).mul_(scale)

    @staticmethod
    def convolve(x_bHRC, kernel_HAO, rows_above: int, hidden_b1RC=None) -> torch.Tensor:
        """`convolve_rows`, zero where hidden."""
        y_bHRC = convolve_rows(x_bHRC, kernel_HAO, rows_above)
        return y_bHRC if hidden_b1RC is None else filled(y_bHRC, hidden_b1RC)

    @staticmethod
    def weights(x_bHRC, head_pre, head_post, hidden_b1RC, padding_b1R1, dtype: torch.dtype) -> torch.Tensor:
        """Mixed softmax of the mixed logits, over the keys that are not hidden; zero in rows of padding."""
        if head_pre is not None:
            x_bHRC = mix_heads_pre(x_bHRC, head_pre)
        if padding_b1R1 is None:
            x_bHRC = torch.softmax(filled(x_bHRC, hidden_b1RC, -torch.inf), dim=-1)
        else:  # A row without any key would be NaN: uniform first, then zero.
            x_bHRC = filled(x_bHRC, hidden_b1RC & ~padding_b1R1, -torch.inf)
            x_bHRC = filled(torch.softmax(x_bHRC, dim=-1), hidden_b1RC)
        return (x_bHRC if head_post is None else mix_heads_post(x_bHRC, head_post)).to(dtype)

    @staticmethod
    def mix(x_bHRC, head_post) -> torch.Tensor:
        return mix_heads_post(x_bHRC, head_post)


@dataclass(frozen=True)
class Attention:
    """Multi-Token Attention block by block. lags: c_q - 1 of kq_pre, of kq_post."""

    maps: TorchMaps
    axes: Axes
    lags: tuple[int, int]
    scale: float
    dropout_p: float
    seed: int

    def blocks(self, B: int, H: int, device: torch.device) -> list[Block]:
        T, n_columns = self.axes.n_queries, self.axes.position_BC.shape[1]
        budget = CPU_BLOCK if device.type == "cpu" else GPU_BLOCK
        n_rows = min(T, MAX_ROWS, max(MIN_ROWS, budget // (H * n_columns)))
        n_batch = max(1, budget // (H * n_columns * n_rows))
        return [
            self.block(b, min(B, b + n_batch), r, min(T, r + n_rows))
            for b in range(0, B, n_batch)
            for r in range(0, T, n_rows)
        ]

    def block(self, b0: int, b1: int, r0: int, r1: int) -> Block:
        weights_from = max(0, r0 - self.lags[1])
        last = len(self.axes.end_S) - self.axes.n_queries + r1 - 1
        return Block(
            slice(b0, b1), slice(r0, r1), max(0, weights_from - self.lags[0]), weights_from, self.axes.end_S[last]
        )

    def cut(self, block: Block, q_BHTD, k_BGCD, v_BGCD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            q_BHTD[block.batch, :, block.scores_from : block.rows.stop],
            k_BGCD[block.batch, :, : block.cols],
            v_BGCD[block.batch, :, : block.cols],
        )

    def attend(self, block: Block, q_bHRD, k_bGCD, v_bGCD, kq_pre, kq_post, head_pre, head_post) -> torch.Tensor:
        """(b, H, R, Dv) for the rows of the block, from tensors that are `cut` to it."""
        hidden, padding = self.axes.hidden(block)
        x_bHRC = self.maps.scores(q_bHRD, k_bGCD, self.scale, hidden)
        skip = block.weights_from - block.scores_from
        hidden, padding = hidden[:, :, skip:], None if padding is None else padding[:, :, skip:]
        if kq_pre is not None:
            x_bHRC = self.maps.convolve(x_bHRC, kq_pre, self.lags[0] - skip)
        # Without a convolution between them, softmax and second mixing are one step.
        early, late = (head_post, None) if kq_post is None else (None, head_post)
        last = kq_post is None and self.dropout_p == 0
        x_bHRC = self.maps.weights(x_bHRC, head_pre, early, hidden, padding, v_bGCD.dtype if last else x_bHRC.dtype)
        if kq_post is not None:
            skip = block.rows.start - block.weights_from
            x_bHRC = self.maps.convolve(x_bHRC, kq_post, self.lags[1] - skip, hidden[:, :, skip:])
        if late is not None:
            x_bHRC = self.maps.mix(x_bHRC, late)
        if self.dropout_p > 0:
            x_bHRC = self.drop(block, x_bHRC)
        return multiply_grouped(x_bHRC.to(v_bGCD.dtype), v_bGCD)

    def drop(self, block: Block, x_bHRC: torch.Tensor) -> torch.Tensor:
        """Dropout that is the same again when the block is computed again for backward."""
        generator = torch.Generator(x_bHRC.device)
        generator.manual_seed((self.seed + 1_000_003 * block.batch.start + block.rows.start) % 2**63)
        keep = torch.empty_like(x_bHRC).bernoulli_(1 - self.dropout_p, generator=generator)
        return x_bHRC * keep / (1 - self.dropout_p)


class _Recomputed(torch.autograd.Function):
    """All blocks in turn; keeps only the inputs and computes each block again in backward."""

    @staticmethod
    def forward(ctx, attention: Attention, blocks: list[Block], q_BHTD, k_BGCD, v_BGCD, *kernels):
        ctx.attention, ctx.blocks = attention, blocks
        ctx.save_for_backward(q_BHTD, k_BGCD, v_BGCD, *kernels)
        o_BHTD = q_BHTD.new_empty(*q_BHTD.shape[:3], v_BGCD.shape[3])
        for block in blocks:
            qkv = attention.cut(block, q_BHTD, k_BGCD, v_BGCD)
            o_BHTD[block.batch, :, block.rows] = attention.attend(block, *qkv, *kernels)
        return o_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BHTD: torch.Tensor):
        attention, saved = ctx.attention, ctx.saved_tensors
        wanted = [i for i in range(len(saved)) if ctx.needs_input_grad[2 + i]]
        # Sums over blocks in >= fp32.
        grads = {
            i: torch.zeros_like(saved[i], dtype=torch.promote_types(saved[i].dtype, torch.float32)) for i in wanted
        }
        for block in ctx.blocks:
            inputs = [x if x is None else x.detach() for x in (*attention.cut(block, *saved[:3]), *saved[3:])]
            for i in wanted:
                inputs[i].requires_grad_()
            with torch.enable_grad():
                o_bHRD = attention.attend(block, *inputs)
            parts = torch.autograd.grad(o_bHRD, [inputs[i] for i in wanted], do_BHTD[block.batch, :, block.rows])
            targets = (
                *attention.cut(block, *(grads.get(i, saved[i]) for i in range(3))),
                *(grads.get(i) for i in range(3, 7)),
            )
            for i, part in zip(wanted, parts, strict=True):
                targets[i].add_(part)
        return None, None, *(grads[i].to(saved[i].dtype) if i in grads else None for i in range(len(saved)))


def mta_chunked(
    q_BHTD, k_BGSD, v_BGSD, *, kq_pre, kq_post, head_pre, head_post, segment_ids, scale, dropout_p, maps=None
) -> torch.Tensor:
    """See `shared.kernels.mta.mta_attention`. maps: the operations on maps, PyTorch's by default."""
    B, H, T, _ = q_BHTD.shape
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    kernels = tuple(None if x is None else x.to(dtype) for x in (kq_pre, kq_post, head_pre, head_post))
    lags = tuple(0 if kernel is None else kernel.shape[1] - 1 for kernel in (kq_pre, kq_post))
    gap = max(0 if kernel is None else kernel.shape[2] // 2 for kernel in (kq_pre, kq_post))
    axes = Axes.of(T, k_BGSD.shape[2], segment_ids, gap, q_BHTD.device)
    seed = int(torch.randint(2**62, ())) if dropout_p > 0 else 0
    attention = Attention(maps or TorchMaps(), axes, lags, scale, dropout_p, seed)
    blocks = attention.blocks(B, H, q_BHTD.device)
    tensors = (q_BHTD, axes.columns(k_BGSD), axes.columns(v_BGSD), *kernels)
    if len(blocks) == 1:
        return attention.attend(blocks[0], *tensors)
    return _Recomputed.apply(attention, blocks, *tensors)
