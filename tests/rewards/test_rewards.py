import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, targets
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, Dinov2Model

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.data.emoji.world import EmojiBatch, EmojiWorld, attribute_values
from customized_grpo.errors import ConfigError, DataError, RewardError
from customized_grpo.pictures import to_pil
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.rewards.pickscore import PickScoreConfig
from customized_grpo.rewards.regions import cut_out
from customized_grpo.types import Example

CPU = torch.device("cpu")
CLIP = ClipTextConfig(path="embedded:reward-clip", objective="prompt")
PREFERENCE = PickScoreConfig(
    path="embedded:reward-preference", processor="embedded:reward-preference", objective="prompt"
)
DINO = Dinov2Config(path="embedded:reward-dino", objective="identity")


@pytest.fixture(scope="module")
def many() -> list[Example]:
    return EmojiSource(seed=0).held_out(48)


def references(examples: list[Example]) -> torch.Tensor:
    return torch.stack([e.references[0] for e in examples])


@torch.no_grad()
def test_clip_text_equals_transformers(many: list[Example]) -> None:
    folder = resolve_checkpoint(CLIP.path)
    images = [to_pil(image) for image in targets(many[:4])]
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(
        [e.prompt for e in many[:4]], padding=True, return_tensors="pt"
    )
    output = model(**pixels, **tokens)
    plain = (output.image_embeds * output.text_embeds).sum(1)
    rounded = (targets(many[:4]) * 255).round() / 255
    ours = CLIP.build(CPU).score(rounded, many[:4])
    assert_near(ours, plain, scale=1)


@torch.no_grad()
def test_dinov2_equals_transformers(many: list[Example]) -> None:
    model = Dinov2Model.from_pretrained(resolve_checkpoint(DINO.path), dtype=torch.float32).eval()

    def embed(images: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=(images - 0.5) / 0.5).pooler_output

    plain = torch.cosine_similarity(embed(targets(many[:4])), embed(references(many[:4])))
    ours = DINO.build(CPU).score(targets(many[:4]), many[:4])
    assert_near(ours, plain, scale=1)


def wrongly(world: EmojiWorld, batch: EmojiBatch, name: str) -> torch.Tensor:
    """The pictures that were asked for, but for one attribute."""
    values = getattr(batch.attributes, name)
    wrong = (values + 1) % len(attribute_values(name))
    attributes = dataclasses.replace(batch.attributes, **{name: wrong})
    return world.render(batch.subject, attributes, torch.Generator().manual_seed(1))[0]


def blurred(images: torch.Tensor) -> torch.Tensor:
    small = F.interpolate(images, scale_factor=0.25, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear")


def test_one_file_is_no_checkpoint_folder(tmp_path: Path) -> None:
    file = tmp_path / "flux1-kontext-dev.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="is one file, as ComfyUI has it; a folder in the format"):
        resolve_checkpoint(str(file))


def test_the_preference_is_for_what_was_asked_for_and_for_a_sharp_picture() -> None:
    """On held-out subjects: a copy is better than a blurred picture of neither."""
    world = EmojiWorld("held_out")
    batch = world.sample(64, torch.Generator().manual_seed(0))
    reward = PREFERENCE.build(CPU)
    examples = [
        Example(id=str(row), prompt=prompt, references=(batch.references[row],), subject="it")
        for row, prompt in enumerate(batch.prompts)
    ]

    def score(images: torch.Tensor) -> torch.Tensor:
        return reward.score(images, examples)

    truth, copy = score(batch.targets), score(batch.references)
    unrelated = score(blurred(batch.targets.roll(1, 0)))
    for worse in (score(blurred(batch.targets)), copy):
        assert truth.mean() > worse.mean() > unrelated.mean()
        assert (truth > worse).float().mean() > 0.9
    assert (copy > unrelated).float().mean() > 0.8
    for name in ("scene", "placement", "prop", "color", "accessory"):
        asked = getattr(batch.attributes, name) > (-1 if name in ("scene", "placement") else 0)
        better = truth[asked] > score(wrongly(world, batch, name))[asked]
        assert better.float().mean() > 0.8, name


def test_copying_the_reference_pleases_identity_and_not_the_prompt(many: list[Example]) -> None:
    rewards = RewardSet([CLIP, DINO], CPU)
    truth = rewards.score(targets(many), many).scores.mean(0)
    copy = rewards.score(references(many), many).scores.mean(0)
    shuffled = rewards.score(targets(many).roll(1, 0), many).scores.mean(0)
    assert_near(copy[1], 1.0)
    assert truth[1] < 0.9
    assert truth[0] > copy[0] + 0.3
    assert truth[1] > shuffled[1] + 0.1
    assert truth[0] > shuffled[0] + 0.3


def test_subject_region_ignores_the_background_of_the_reference(many: list[Example]) -> None:
    example = many[0]
    assert example.reference_masks is not None
    mask = example.reference_masks[0]
    painted = torch.where(mask > 0, example.references[0], torch.tensor(0.9))
    other = dataclasses.replace(example, id="painted", references=(painted,))
    images = targets(many[:1])
    region = Dinov2Config(path=DINO.path, objective="identity", region="subject").build(CPU)
    whole = DINO.build(CPU)
    hard = (mask == 0) | (mask == 1)
    assert hard.float().mean() > 0.8
    torch.testing.assert_close(
        region.score(images, [other]), region.score(images, [example]), atol=0.03, rtol=0
    )
    assert (whole.score(images, [other]) - whole.score(images, [example])).abs() > 0.03


def test_cut_out_is_the_masked_square() -> None:
    image, mask = torch.rand(3, 20, 30), torch.zeros(1, 20, 30)
    mask[:, 4:10, 5:17] = 1
    square = cut_out(image, mask)
    assert square.shape == (3, 12, 12)
    assert torch.equal(square[:, 3:9], image[:, 4:10, 5:17])
    assert (square[:, :3] == 0.5).all()
    with pytest.raises(DataError, match="empty"):
        cut_out(image, torch.zeros(1, 20, 30))


class _Faulty:
    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour

    def score(self, images: torch.Tensor, examples: list[Example]) -> torch.Tensor:
        if self.behaviour == "raises":
            raise RewardError("endpoint is down")
        if self.behaviour == "bug":
            return images[0, 0] @ torch.zeros(3)  # shapes do not fit
        if self.behaviour == "memory":
            raise MemoryError
        if self.behaviour == "wrong shape":
            return torch.zeros(len(images), 1)
        return torch.tensor([torch.inf, *[0.5] * (len(images) - 1)])


def reward_set_with(behaviour: str) -> RewardSet:
    rewards = RewardSet([CLIP, DINO], CPU)
    rewards._rewards[1] = _Faulty(behaviour)
    return rewards


def test_infinite_scores_are_nan(many: list[Example]) -> None:
    column = reward_set_with("infinite").score(targets(many[:3]), many[:3]).scores[:, 1]
    assert column.isnan().tolist() == [True, False, False]


def test_scores_come_to_the_device_of_the_images(many: list[Example]) -> None:
    """As those of a reward that returns CPU tensors in a run on a GPU."""
    rewards = RewardSet([CLIP], CPU)
    rewards._rewards[0] = _Faulty("infinite")
    scores = rewards.score(targets(many[:3]).to("meta"), many[:3])
    assert (scores.scores.device.type, scores.scores.dtype) == ("meta", torch.float32)
    assert scores.errors == ()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("raises", "dinov2: endpoint is down"),
        ("wrong shape", "dinov2: must return one score per image, shape (3,), got (3, 1)"),
        ("bug", "dinov2: RuntimeError: "),
    ],
)
def test_a_failed_reward_is_nan_and_never_zero(
    many: list[Example], behaviour: str, message: str
) -> None:
    result = reward_set_with(behaviour).score(targets(many[:3]), many[:3])
    assert result.scores[:, 1].isnan().all()
    assert result.scores[:, 0].isfinite().all()
    (error,) = result.errors
    assert error.startswith(message)


def test_memory_that_has_run_out_is_no_error_of_a_reward(many: list[Example]) -> None:
    with pytest.raises(MemoryError):
        reward_set_with("memory").score(targets(many[:3]), many[:3])
