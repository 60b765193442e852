"""Multi-Token Attention (arXiv 2504.00927): the attention map is convolved over queries and keys, and heads are mixed.

For head h, with scores S = scale * q kᵀ, queries i and keys j counted by position:

    S0       = S where j <= i, else 0                                        (0, not -inf: neutral in the convolution)
    L_h[i,j] = sum over a, o of κ_h[a, o] S0_h[i - a, j + o]                 kq_pre    (Eq. 5)
    L'_g     = sum over h of P[g, h] L_h                                     head_pre
    A_g      = softmax over j <= i of L'_g
    Ã_h[i,j] = sum over a, o of κ²_h[a, o] A_h[i - a, j + o] where j <= i    kq_post
    B_m      = sum over h of W[h, m] Ã_h, in groups of heads                 head_post
    O_m      = dropout(B_m) v_m

The lag a counts 0..c_q-1 past queries, the offset o counts keys on both sides of j. Each step is optional.
"""

from __future__ import annotations

import torch

from shared.kernels.mta_chunked import mta_chunked
from shared.kernels.mta_reference import mta_reference

BACKENDS = ("auto", "reference", "chunked", "triton")
# Fewer queries than this, as in decoding, are not worth the Triton path's preparations.
MIN_TRITON_QUERIES = 64
# Bytes that one program of the largest tiles takes.
MIN_SHARED_MEMORY = 227 * 1024


def mta_attention(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    *,
    kq_pre: torch.Tensor | None = None,
    kq_post: torch.Tensor | None = None,
    head_pre: torch.Tensor | None = None,
    head_post: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal Multi-Token Attention; differentiable in q, k, v and the four learned kernels.

    Args:
        q_BHTD: queries, the last T of the S positions. Decoding passes as many past queries as the convolutions look
            back, c_q - 1 each, and keeps the new rows: a query that is not given counts as zero in the convolution.
        k_BGSD: keys; head h attends to key-value head h // (H / G).
        v_BGSD: values; their last axis may differ from D.
        kq_pre, kq_post: (H, c_q, c_k), c_k odd. Row u weighs the query c_q - 1 - u steps back (the last row is the
            current query), column w the key at offset w - (c_k - 1) / 2, as in the paper's conv2d weights.
        head_pre: (H, H), indexed [to, from].
        head_post: (groups, c_h, c_h), indexed [group, from, to]; groups * c_h = H.
        segment_ids: (B, S), int32 or int64: a row attends within its own segment, and the convolution reaches only
            queries and keys of it. The positions of a segment must follow each other. Negative: padding, whose
            outputs are zero. None: one segment.
        scale: on the scores; None: D ** -0.5.
        dropout_p: on the final weights; pass 0 in evaluation.
        backend: what computes it, all of them exact:
            "reference": the equations above with every map in memory, the official algorithm.
            "chunked": blocks of query rows, memory linear in S.
            "triton": memory linear in S; with key-query kernels alone as flash attention on expanded keys and values,
                with head mixing alone, or else in blocks of query rows with fused operations. fp32, fp16, bf16.
            "auto": "triton" where `triton_fits`, else "chunked".

    Returns:
        (B, H, T, channels of v) in q's dtype.

    Raises:
        ValueError: shapes, dtypes or options do not fit; the message says which and what would.
    """
    kernels = {"kq_pre": kq_pre, "kq_post": kq_post, "head_pre": head_pre, "head_post": head_post}
    _check(q_BHTD, k_BGSD, v_BGSD, kernels, segment_ids, dropout_p, backend)
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    segment_ids = None if segment_ids is None else segment_ids.contiguous()
    options = {**kernels, "segment_ids": segment_ids, "scale": scale, "dropout_p": dropout_p}
    if backend == "auto":
        backend = "triton" if triton_fits(q_BHTD, kernels) else "chunked"
    # The maps have the precision of q whatever autocast would choose for their products.
    with torch.autocast(q_BHTD.device.type, enabled=False):
        if backend == "triton":
            return _triton(q_BHTD, k_BGSD, v_BGSD, **options)
        compute = mta_reference if backend == "reference" else mta_chunked
        return compute(q_BHTD, k_BGSD, v_BGSD, **options)


def triton_fits(q_BHTD: torch.Tensor, kernels: dict[str, torch.Tensor | None]) -> bool:
    """Whether "auto" takes Triton: an NVIDIA GPU with an H100's on-chip memory, a long enough T, sizes that fit."""
    _, H, T, D = q_BHTD.shape
    if not q_BHTD.is_cuda or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_properties(q_BHTD.device).shared_memory_per_block_optin < MIN_SHARED_MEMORY:
        return False
    widest = max(
        [kernel.shape[-1] for name, kernel in kernels.items() if name[:2] == "kq" and kernel is not None], default=1
    )
    return q_BHTD.dtype != torch.float64 and T >= MIN_TRITON_QUERIES and D <= 128 and H <= 64 and widest <= 33


def _triton(q_BHTD, k_BGSD, v_BGSD, *, kq_pre, kq_post, head_pre, head_post, dropout_p, **options) -> torch.Tensor:
    # Imported here: CPU builds of torch come without Triton.
    no_kernels, no_mixing = kq_pre is None and kq_post is None, head_pre is None and head_post is None
    if no_mixing and dropout_p == 0 and v_BGSD.shape[-1] == q_BHTD.shape[-1]:
        from shared.kernels.mta_triton_kq import mta_triton_kq

        return mta_triton_kq(q_BHTD, k_BGSD, v_BGSD, kq_pre=kq_pre, kq_post=kq_post, **options)
    if no_kernels and dropout_p == 0:
        from shared.kernels.mta_triton_heads import mta_triton_heads

        return mta_triton_heads(q_BHTD, k_BGSD, v_BGSD, head_pre=head_pre, head_post=head_post, **options)
    from shared.kernels.mta_triton_maps import TritonMaps

    kernels = {"kq_pre": kq_pre, "kq_post": kq_post, "head_pre": head_pre, "head_post": head_post}
    maps = TritonMaps(q_BHTD.dtype)
    return mta_chunked(q_BHTD, k_BGSD, v_BGSD, **kernels, dropout_p=dropout_p, maps=maps, **options)


def _check(q_BHTD, k_BGSD, v_BGSD, kernels, segment_ids, dropout_p, backend) -> None:
    tensors = {"q_BHTD": q_BHTD, "k_BGSD": k_BGSD, "v_BGSD": v_BGSD}
    for name, x in tensors.items():
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} axes {tuple(x.shape)}; it needs batch, heads, positions, channels")
        if x.dtype != q_BHTD.dtype or not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; q, k and v need one floating point dtype, and q is {q_BHTD.dtype}")
    B, H, T, D = q_BHTD.shape
    _, G, S, _ = k_BGSD.shape
    if k_BGSD.shape != (B, G, S, D) or v_BGSD.shape[:3] != (B, G, S):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{shapes}: k must share q's batch and channels, v k's batch, heads and positions")
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key-value heads")
    if not 0 < T <= S:
        raise ValueError(f"{T} queries for {S} keys: the queries are the last of the key positions, at least one")
    for name in ("kq_pre", "kq_post"):
        kernel = kernels[name]
        if kernel is None:
            continue
        if kernel.ndim != 3 or kernel.shape[0] != H or kernel.shape[1] < 1 or kernel.shape[2] % 2 != 1:
            raise ValueError(f"{name} has shape {tuple(kernel.shape)}; it needs ({H} heads, c_q, c_k) with c_k odd")
    if kernels["head_pre"] is not None and kernels["head_pre"].shape != (H, H):
        raise ValueError(f"head_pre has shape {tuple(kernels['head_pre'].shape)}; it needs ({H}, {H}) for {H} heads")
    post = kernels["head_post"]
    if post is not None and (post.ndim != 3 or post.shape[1] != post.shape[2] or post.shape[0] * post.shape[1] != H):
        raise ValueError(f"head_post has shape {tuple(post.shape)}; it needs (groups, c_h, c_h), groups * c_h = {H}")
    integers = (torch.int32, torch.int64)
    if segment_ids is not None and (segment_ids.shape != (B, S) or segment_ids.dtype not in integers):
        found = f"{tuple(segment_ids.shape)} {segment_ids.dtype}"
        raise ValueError(f"segment_ids is {found}; it needs ({B}, {S}) of int32 or int64, one for each key")
    for name, x in {**tensors, **kernels, "segment_ids": segment_ids}.items():
        if x is not None and x.device != q_BHTD.device:
            raise ValueError(f"{name} is on {x.device}, q on {q_BHTD.device}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} is outside [0, 1)")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")
    if backend == "triton" and (q_BHTD.dtype == torch.float64 or D > 128):
        raise ValueError(f"backend='triton' has no {q_BHTD.dtype} with {D} channels: not float64, at most 128 channels")
