import pytest
import torch
from diffusers import FluxKontextPipeline
from helpers import assert_near

from customized_grpo.config import RunConfig
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.pictures import to_pil
from customized_grpo.training.policy import make_policy
from customized_grpo.training.sampling import sample_images
from customized_grpo.types import Example, crop_and_resize


def stock_images(pipeline: FluxKontextPipeline, example: Example, noise: torch.Tensor, steps: int):
    """What the stock pipeline itself makes of one example."""
    return pipeline(
        image=to_pil(example.references[0]),
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


def test_sampling_equals_the_stock_pipeline(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    example = rounded(examples[0])
    noise = generator.noise(1, torch.Generator().manual_seed(5))
    policy = make_policy(generator, tiny_config)
    ours = sample_images(policy, generator.encode([example]), noise, 1)
    stock = stock_images(generator.pipeline, example, noise, tiny_config.rollout.num_steps)
    assert_near(ours, stock)


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
        (
            {"path": "embedded:generator", "height": 60},
            "height: must be 64 for .*, got 60",
        ),
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
