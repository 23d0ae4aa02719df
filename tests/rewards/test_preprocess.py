"""The torch preprocessing against the processors of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from customized_grpo.errors import ConfigError
from customized_grpo.pictures import to_pil
from customized_grpo.rewards.preprocess import Preprocessing, naflex_patches, qwen2vl_patches

PROCESSORS = {
    "clip": CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ),
    "dinov2": BitImageProcessorPil(
        size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}
    ),
    "siglip": SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2),
    "clipseg": ViTImageProcessorPil(size={"height": 44, "width": 36}),
    "other scale": ViTImageProcessorPil(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5),
    "no scale": ViTImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False),
    "no normalise": CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 33, "width": 28}, do_normalize=False
    ),
    "crop only": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 24, "width": 16}),
}
SIZES = [(48, 48), (90, 61), (33, 70), (24, 31)]


def picture(height: int, width: int) -> Tensor:
    """Mid-tones: PIL also clips the overshoot between the two passes of a resize."""
    generator = torch.Generator().manual_seed(height * width)
    image = 0.25 + 0.5 * torch.rand(3, height, width, generator=generator)
    return (image * 255).round() / 255


def two_levels(preprocess: Preprocessing) -> float:
    """PIL rounds to 8 bits after each of two passes; in units of the result."""
    return 2 / 255 * preprocess.scale / min(preprocess.std) + 1e-3


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_equals_the_processor(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    PROCESSORS[name].save_pretrained(tmp_path)
    ours, image = Preprocessing.from_pretrained(str(tmp_path)), picture(*size)
    expected = PROCESSORS[name]([to_pil(image)], return_tensors="pt").pixel_values
    torch.testing.assert_close(ours(image[None]), expected, atol=two_levels(ours), rtol=0)


def test_a_batch_is_its_images() -> None:
    ours = Preprocessing(fit="exact", size=(20, 30), mean=(0.5,) * 3, std=(0.5,) * 3)
    images = torch.stack([picture(48, 40), picture(48, 40).flip(2)])
    assert torch.equal(ours(images), torch.cat([ours(image[None]) for image in images]))
    mixed = [picture(48, 40), picture(31, 60)]
    assert ours.stack(mixed).shape == (2, 3, 20, 30)


def write(folder: Path, **changes: object) -> str:
    config = PROCESSORS["clip"].to_dict() | changes
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return str(folder)


def test_sizes_of_old_files_are_numbers(tmp_path: Path) -> None:
    new = Preprocessing.from_pretrained(write(tmp_path))
    assert Preprocessing.from_pretrained(write(tmp_path, size=32, crop_size=32)) == new
    squashed = Preprocessing.from_pretrained(write(tmp_path, size=32, crop_size=None))
    assert (squashed.fit, squashed.size, squashed.crop) == ("exact", (32, 32), None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resample": 1}, "KeyError: 1"),
        ({"size": {"longest_edge": 4}}, "KeyError: 'height'"),
        ({"crop_size": {"height": 99, "width": 32}}, "above size"),
        ({"do_pad": True}, "do_pad"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, changes: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match="must describe a resize") as caught:
        Preprocessing.from_pretrained(write(tmp_path, **changes))
    assert reason in str(caught.value)


def test_longest_fits_the_whole_picture_on_black() -> None:
    ours = Preprocessing(
        fit="longest", size=(32, 32), crop=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3
    )
    image = picture(30, 60)
    fitted = ours(image[None])[0]
    small = to_pil(image).resize((32, 16), Image.Resampling.BICUBIC)
    inside = torch.tensor(list(small.get_flattened_data()), dtype=torch.float32)
    inside = inside.view(16, 32, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(fitted[:, 8:24], inside, atol=2 / 255 + 1e-3, rtol=0)
    assert not fitted[:, :8].any()
    assert not fitted[:, 24:].any()


@pytest.mark.parametrize("size", [(64, 64), (90, 150), (600, 400)], ids=str)
def test_qwen_patches_equal_the_processor(size: tuple[int, int]) -> None:
    pixels = 8 * 28 * 28
    processor = Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels)
    image = picture(*size)
    expected = processor([to_pil(image), to_pil(image.flip(2))], return_tensors="pt")
    images = torch.stack([image, image.flip(2)])
    patches, grid = qwen2vl_patches(images, num_pixels=pixels, patch=14, merge=2, temporal=2)
    assert torch.equal(grid, expected.image_grid_thw)
    torch.testing.assert_close(patches, expected.pixel_values, atol=2 / 255 / 0.26 + 1e-3, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (128, 60)], ids=str)
def test_naflex_patches_equal_the_processor(size: tuple[int, int]) -> None:
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20)
    image = picture(*size)
    expected = processor([to_pil(image)] * 2, return_tensors="pt")
    ours = naflex_patches(torch.stack([image] * 2), processor.to_dict())
    assert ours.keys() == expected.keys()
    assert torch.equal(ours["spatial_shapes"], expected["spatial_shapes"])
    assert torch.equal(ours["pixel_attention_mask"], expected["pixel_attention_mask"])
    torch.testing.assert_close(
        ours["pixel_values"], expected["pixel_values"], atol=2 * 2 / 255 + 1e-3, rtol=0
    )
