import dataclasses

import torch
from peft.tuners.lora import LoraLayer

from customized_grpo.config import LoraSettings, RunConfig
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.lora import attach_lora, trust_autocast
from customized_grpo.rollout import make_policy
from customized_grpo.types import Example


def test_gradients_under_autocast_are_those_of_peft(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    torch.manual_seed(0)
    attach_lora(generator.transformer, LoraSettings(rank=4), generator.lora_targets)
    policy = make_policy(generator, dataclasses.replace(tiny_config, mixed_precision="bf16"))
    conditioning = generator.encode(examples)
    noise, steps = generator.noise(4, torch.Generator().manual_seed(0)), torch.arange(4)
    parameters = [p for p in generator.transformer.parameters() if p.requires_grad]

    def gradient() -> torch.Tensor:
        generator.transformer.zero_grad()
        policy.velocity(noise, steps, conditioning).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    cast = gradient()
    trust_autocast(generator.transformer)
    layers = [m for m in generator.transformer.modules() if isinstance(m, LoraLayer)]
    assert layers
    assert not any(layer.cast_input_dtype_enabled for layer in layers)
    assert torch.cosine_similarity(gradient(), cast, 0) > 0.999
