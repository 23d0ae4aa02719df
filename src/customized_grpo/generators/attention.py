"""Attention for short sequences on a CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

MAX_TOKENS = 500  # from about here on, torch's fused kernel is the faster one (FIELD_NOTES)


def use_plain_attention(transformer: Any) -> None:
    """Makes a diffusers transformer multiply out ``softmax(Q K^T / sqrt(d)) V``.

    On a CPU, forward + backward over some hundred tokens then take 3/4 of the time. diffusers has
    no public way to add an attention backend: this one takes the place of its ``_native_math``,
    which is the same formula by a slower route.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    _AttentionBackendRegistry.register(AttentionBackendName._NATIVE_MATH)(plain_attention)
    process_wide, _ = _AttentionBackendRegistry.get_active_backend()
    transformer.set_attention_backend(AttentionBackendName._NATIVE_MATH.value)
    _AttentionBackendRegistry.set_active_backend(process_wide)  # other models keep theirs


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention over ``[B, S, heads, d]``, in the arguments of diffusers' registry.

    Raises:
        NotImplementedError: if a mask or dropout is asked for; no generator here does.
    """
    if attn_mask is not None or dropout_p or is_causal:
        raise NotImplementedError("plain attention knows neither masks nor dropout")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-1, -2)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
