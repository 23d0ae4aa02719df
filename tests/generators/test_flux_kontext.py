from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from helpers import assert_near
from PIL import Image

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import LoraSettings, RunConfig
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.generators.lora import attach_lora
from customized_grpo.training.rollout import make_policy, sample_images
from customized_grpo.types import Example, crop_and_resize


def stock_images(pipeline: FluxKontextPipeline, example: Example, noise: torch.Tensor, steps: int):
    """What the stock pipeline itself makes of one example."""
    pixels = (example.references[0].permute(1, 2, 0) * 255).round().byte().numpy()
    return pipeline(
        image=Image.fromarray(pixels),
        prompt=example.prompt,
        height=64,
        width=64,
        max_area=64 * 64,
        _auto_resize=False,
        num_inference_steps=steps,
        max_sequence_length=30,
        latents=noise,
        output_type="pt",
    ).images


def rounded(example: Example) -> Example:
    """The example with its reference rounded to 8 bits, as a picture file would have it."""
    reference = (example.references[0] * 255).round() / 255
    return Example(
        id=example.id, prompt=example.prompt, references=(reference,), subject=example.subject
    )


def perturb_lora(generator: Flux1Generator) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in generator.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


def test_sampling_equals_the_stock_pipeline(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    example = rounded(examples[0])
    noise = generator.noise(1, torch.Generator().manual_seed(5))
    policy = make_policy(generator, tiny_config)
    ours = sample_images(policy, generator.encode([example]), noise, 1)
    stock = stock_images(generator.pipeline, example, noise, tiny_config.rollout.num_steps)
    assert_near(ours, stock)


def test_saved_lora_loads_in_plain_diffusers(
    generator: Flux1Generator,
    tiny_config: RunConfig,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    example = rounded(examples[1])
    noise = generator.noise(1, torch.Generator().manual_seed(6))
    base = sample_images(make_policy(generator, tiny_config), generator.encode([example]), noise, 1)
    attach_lora(generator.transformer, LoraSettings(rank=4, alpha=8), generator.lora_targets)
    perturb_lora(generator)
    tuned = sample_images(
        make_policy(generator, tiny_config), generator.encode([example]), noise, 1
    )
    generator.save_weights(tmp_path)
    pipeline = FluxKontextPipeline.from_pretrained(resolve_checkpoint("embedded:generator"))
    pipeline.to(torch.float32)
    pipeline.load_lora_weights(str(tmp_path))
    stock = stock_images(pipeline, example, noise, tiny_config.rollout.num_steps)
    assert_near(tuned, stock)
    assert (tuned - base).abs().max() > 0.01


def test_base_policy_is_bitwise_the_base(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    policy, conditioning = make_policy(generator, tiny_config), generator.encode(examples)
    noise, steps = generator.noise(4, torch.Generator().manual_seed(0)), torch.arange(4)
    with torch.no_grad():
        base = policy.velocity(noise, steps, conditioning)
        attach_lora(generator.transformer, LoraSettings(rank=4), generator.lora_targets)
        assert torch.equal(policy.velocity(noise, steps, conditioning), base)
        perturb_lora(generator)
        tuned = policy.velocity(noise, steps, conditioning)
        with generator.base_policy():
            assert torch.equal(policy.velocity(noise, steps, conditioning), base)
        assert torch.equal(policy.velocity(noise, steps, conditioning), tuned)
    assert not torch.equal(tuned, base)


def test_full_weights_round_trip(generator: Flux1Generator, tmp_path: Path) -> None:
    parameter = next(generator.transformer.parameters())
    with torch.no_grad():
        parameter.add_(0.25)
    generator.save_weights(tmp_path)
    other = FluxKontextConfig(path="embedded:generator").build(torch.device("cpu"))
    other.load_weights(tmp_path)
    assert torch.equal(next(other.transformer.parameters()), parameter)


def test_decode_inverts_encode_roughly(generator: Flux1Generator, examples: list[Example]) -> None:
    images = torch.stack([example.references[0] for example in examples])
    with torch.no_grad():
        again = generator.decode(generator._encode_images(images))
    assert again.shape == images.shape
    assert (again - images).square().mean() < 0.01


def test_own_shift_replaces_the_schedule(generator: Flux1Generator) -> None:
    assert_near(generator.sigmas(4, 3.0), [1, 0.9, 0.75, 0.5, 0], terms=16)
    torch.testing.assert_close(
        generator.sigmas(2, None), torch.tensor([1, 2 / 3, 0]), atol=1e-4, rtol=0
    )


def test_crop_keeps_the_aspect_ratio() -> None:
    image = torch.zeros(3, 60, 100)
    image[:, :, 20:80] = 1
    assert torch.allclose(crop_and_resize(image, 64, 64), torch.ones(3, 64, 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "nowhere"}, "checkpoint 'nowhere' not found"),
        ({"path": "embedded:nothing"}, "no embedded checkpoint"),
        ({"path": "embedded:reward-clip"}, "cannot be loaded as a checkpoint of flux-kontext"),
        ({"path": "embedded:generator", "height": 60}, "height: must be a multiple of 16, got 60"),
        ({"path": "embedded:generator", "guidance_scale": 2.5}, "has no guidance, got 2.5"),
    ],
)
def test_wrong_checkpoints_and_sizes_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        FluxKontextConfig(**fields).build(torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_two_references_are_refused(generator: Flux1Generator, examples: list[Example]) -> None:
    twice = Example(id="two", prompt="x", references=examples[0].references * 2, subject="x")
    with pytest.raises(DataError, match="exactly one reference, got 2"):
        generator.encode([twice])
