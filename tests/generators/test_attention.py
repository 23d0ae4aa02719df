import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from customized_grpo.generators.attention import plain_attention
from customized_grpo.generators.flux1 import Flux1Generator


def test_plain_attention_is_attention() -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 8).unbind(0)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(plain_attention(q, k, v), wanted.transpose(1, 2))
    scaled = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.1)
    torch.testing.assert_close(plain_attention(q, k, v, scale=0.1), scaled.transpose(1, 2))


def test_the_embedded_generator_uses_it_and_masks_are_not_lost(
    generator: Flux1Generator,
) -> None:
    attention = generator.transformer.single_transformer_blocks[0].attn
    backend = attention.processor._attention_backend
    q = torch.randn(1, 4, 2, 8)
    out = dispatch_attention_fn(q, q, q, backend=backend)
    torch.testing.assert_close(out, plain_attention(q, q, q))
    with pytest.raises(NotImplementedError, match="masks"):
        dispatch_attention_fn(q, q, q, torch.ones(4, 4, dtype=torch.bool), backend=backend)


def test_other_models_keep_their_attention(generator: Flux1Generator) -> None:
    assert _AttentionBackendRegistry.get_active_backend()[0] != AttentionBackendName._NATIVE_MATH
