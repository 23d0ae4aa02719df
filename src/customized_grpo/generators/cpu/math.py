"""Pieces of a transformer in few passes over memory, for a CPU.

There the matmuls of a small transformer take a fifth of the time, and everything between them the
rest: every elementwise operation reads and writes all tokens. These functions compute what torch's
do, in float32 or better between bfloat16 ends, with hand-written gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHED = 1 << 16  # elements of a temporary that stays in a core's cache
_SCORES = 1 << 21  # the same for attention scores, which torch's softmax reads twice
MAX_TOKENS = 1024  # above it attention scores cost too much memory to keep for the backward pass
_FUSED_TOKENS = 300  # from here on torch's fused attention is faster forward, never backward


def gelu(x: Tensor) -> Tensor:
    """``F.gelu(x, approximate='tanh')``; torch's takes twice the time, forward and backward."""
    return _Gelu.apply(x) if torch.is_grad_enabled() and x.requires_grad else _gelu(x, None)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = torch.empty_like(x)
        ctx.save_for_backward(slope)
        return _gelu(x, slope)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope


_ROOT = 0.7978845608028654  # sqrt(2 / pi)
_CUBIC = 0.044715


def _gelu(x: Tensor, slope: Tensor | None) -> Tensor:
    """``x a`` with ``a = sigmoid(2 u)``, ``u = sqrt(2 / pi) (x + c x^3)``, and where ``slope`` is
    given its derivative ``a + x a (1 - a) 2 u'``."""
    out = torch.empty_like(x)
    for source, target, derivative in _pieces(x, out, slope):
        wide = _wide(source)
        square = wide * wide
        share = torch.addcmul(wide, square, wide, value=_CUBIC).mul_(2 * _ROOT).sigmoid_()
        result = wide.mul_(share) if wide is not source else wide * share
        target.copy_(result)
        if derivative is not None:
            steepness = square.mul_(6 * _CUBIC * _ROOT).add_(2 * _ROOT)
            falling = torch.addcmul(result, result, share, value=-1)
            derivative.copy_(share.addcmul_(falling, steepness))
    return out


def _pieces(x: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Flat pieces of equally laid out tensors, each small enough to stay in the cache."""
    flat = [None if t is None else t.view(-1) for t in (x, *others)]
    for start in range(0, x.numel(), _CACHED):
        yield tuple(None if t is None else t[start : start + _CACHED] for t in flat)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotated_heads(
    parts: list[Tensor], weights: list[Tensor], rotation: Tensor, eps: float, scale: float = 1.0
) -> Tensor:
    """Queries or keys as attention takes them: RMS norm of each head, then rotary positions.

    Args:
        parts: ``[B, s, heads d]`` of each stream, in the order of the tokens.
        weights: of each stream's norm, ``[d]``.
        rotation: ``[S, d / 2]`` complex, of all streams' tokens.
        eps: of the norm.
        scale: a factor on the result.

    Returns:
        ``[B, heads, S, d]``.
    """
    table = torch.cat([w.expand(part.shape[1], -1) for w, part in zip(weights, parts, strict=True)])
    return _RotatedHeads.apply(_wide(table) * scale, rotation, eps, *parts)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rotation: Tensor, eps: float, *parts: Tensor) -> Tensor:
        batch, width = len(parts[0]), table.shape[1]
        out = parts[0].new_empty(batch, parts[0].shape[-1] // width, *table.shape)
        inverse = table.new_empty(*out.shape[:-1], 1)
        for target, factor, *some in _batches(out, inverse, *parts):
            heads = _heads(some, table)
            torch.linalg.vector_norm(heads, dim=-1, keepdim=True, out=factor)
            factor.square_().div_(width).add_(eps).rsqrt_()
            heads.mul_(factor).mul_(table)
            torch.view_as_complex(_pairs(heads)).mul_(rotation)
            target.copy_(heads)
        ctx.save_for_backward(table, rotation, inverse, *parts)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        table, rotation, inverse, *parts = ctx.saved_tensors
        lengths, back_rotation = [part.shape[1] for part in parts], rotation.conj().resolve_conj()
        of_table = torch.zeros_like(table) if ctx.needs_input_grad[0] else None
        results = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        for gradient, factor, *some in _batches(gradients[0], inverse, *results, *parts):
            targets, sources = some[: len(parts)], some[len(parts) :]
            back = table.new_empty(gradient.shape).copy_(gradient)
            torch.view_as_complex(_pairs(back)).mul_(back_rotation)
            normed = _heads(sources, table).mul_(factor)
            if of_table is not None:
                of_table += (normed * back).sum((0, 1))
            along = (normed * back.mul_(table)).mean(-1, keepdim=True)
            back.addcmul_(normed, along, value=-1).mul_(factor)
            for target, piece in zip(targets, back.split(lengths, 2), strict=True):
                _as_heads(target, piece.shape[-1]).copy_(piece)
        return of_table, None, None, *results


def _batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of a few samples, whose heads stay in the cache."""
    per_sample = tensors[0][0].numel()
    return _rows(max(1, _CACHED // per_sample), *tensors)


def _heads(parts: Any, table: Tensor) -> Tensor:
    """``[B, s, heads d]`` of several streams as one ``[B, heads, S, d]``, in the table's dtype."""
    tokens, width = table.shape
    batch, heads = len(parts[0]), parts[0].shape[-1] // width
    out = table.new_empty(batch, heads, tokens, width)
    for target, part in zip(out.split([p.shape[1] for p in parts], 2), parts, strict=True):
        target.copy_(_as_heads(part, width))
    return out


def _as_heads(x: Tensor, width: int) -> Tensor:
    """View ``[B, heads, s, d]`` of ``[B, s, heads d]``."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2))


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(Q K^T) V`` of ``[B, heads, S, d]``; queries are scaled already, and may be fewer.

    torch's fused kernel computes the scores twice more in the backward pass, slowly: up to
    MAX_TOKENS they are kept.
    """
    trained = torch.is_grad_enabled() and query.requires_grad
    if key.shape[2] > (MAX_TOKENS if trained else _FUSED_TOKENS):
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)
    flat = (x.flatten(0, 1) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):  # its softmax would write float32
        return _Attention.apply(*flat).unflatten(0, query.shape[:2])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        rows = max(1, _SCORES // (query.shape[1] * key.shape[1]))
        kept = []
        for q, k, v, o in _rows(rows, query, key, value, out):
            shares = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
            torch.bmm(shares, v, out=o)
            kept.append(shares)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.rows = rows
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *kept = ctx.saved_tensors
        given = (query, key, value)
        results = tuple(torch.empty_like(x) for x in given)
        pieces = _rows(ctx.rows, gradients[0].contiguous(), *given, *results)
        for shares, (g, q, k, v, dq, dk, dv) in zip(kept, pieces, strict=True):
            torch.bmm(shares.transpose(1, 2), g, out=dv)
            inner = torch.bmm(g, v.transpose(1, 2))
            inner = torch._softmax_backward_data(inner, shares, -1, shares.dtype)
            torch.bmm(inner, k, out=dq)
            torch.bmm(inner.transpose(1, 2), q, out=dk)
        return results


def _rows(count: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(count) for x in tensors), strict=True)
