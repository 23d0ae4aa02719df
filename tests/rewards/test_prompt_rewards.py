"""Prompt rewards against independent forwards of the same weights."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from helpers import assert_near
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipImageProcessorPil,
    SiglipModel,
)

from customized_grpo.errors import ConfigError
from customized_grpo.rewards.hpsv2 import Hpsv2Config
from customized_grpo.rewards.pickscore import PickScoreConfig
from customized_grpo.rewards.siglip2 import Siglip2Config
from customized_grpo.types import Example

CPU = torch.device("cpu")
PROMPTS = ("a cat on the beach", "one red dog", "a toy in the snow " * 9)


def examples(*prompts: str) -> list[Example]:
    return [Example(id=str(i), prompt=p, references=(), subject="x") for i, p in enumerate(prompts)]


@pytest.fixture
def images() -> Tensor:
    """They have the models' own size and 8-bit levels: the processors change and round nothing."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 32, 32), generator=generator) / 255


def to_bytes(images: Tensor) -> list[Tensor]:
    return list((images * 255).round().byte())


@torch.no_grad()
def test_pickscore_is_its_authors_score(tmp_path: Path, images: Tensor) -> None:
    path = tiny_models.save_clip(tmp_path)
    model = CLIPModel.from_pretrained(path, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(path)(to_bytes(images), return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(path)(
        PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    expected = model(**pixels, **tokens).logits_per_image.diagonal()
    config = PickScoreConfig(objective="prompt", path=path, processor=path)
    ours = config.build(CPU).score(images, examples(*PROMPTS))
    assert_near(ours, expected)


@torch.no_grad()
@pytest.mark.parametrize("naflex", [False, True])
def test_siglip_scores_are_transformers(tmp_path: Path, images: Tensor, naflex: bool) -> None:
    path = tiny_models.save_siglip(tmp_path, naflex)
    cls, processor = (
        (Siglip2Model, Siglip2ImageProcessorPil)
        if naflex
        else (SiglipModel, SiglipImageProcessorPil)
    )
    model = cls.from_pretrained(path, dtype=torch.float32).eval()
    pixels = processor.from_pretrained(path)(to_bytes(images), return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(path)(
        PROMPTS, padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )
    output = model(**pixels, input_ids=tokens["input_ids"])
    cosine = (output.image_embeds * output.text_embeds).sum(1)
    expected = {"cosine": cosine, "logit": output.logits_per_image.diagonal()}
    for score in ("cosine", "logit"):
        reward = Siglip2Config(objective="prompt", path=path, score=score).build(CPU)
        ours = reward.score(images, examples(*PROMPTS))
        assert_near(ours, expected[score])


def open_clip_tower(state: dict[str, Tensor], prefix: str, x: Tensor, heads: int) -> Tensor:
    """The residual blocks of open_clip's transformer, with its fused torch attention."""
    causal = None if prefix else torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
    layer = 0
    while (block := f"{prefix}transformer.resblocks.{layer}.") + "ln_1.weight" in state:

        def part(name: str, block: str = block) -> tuple[Tensor, Tensor]:
            return state[f"{block}{name}.weight"], state[f"{block}{name}.bias"]

        attention = torch.nn.MultiheadAttention(x.shape[2], heads, batch_first=True).eval()
        attention.load_state_dict(
            {
                k.removeprefix(f"{block}attn."): v
                for k, v in state.items()
                if k.startswith(f"{block}attn.")
            }
        )
        y = F.layer_norm(x, x.shape[2:], *part("ln_1"))
        x = x + attention(y, y, y, need_weights=False, attn_mask=causal)[0]
        y = F.layer_norm(x, x.shape[2:], *part("ln_2"))
        x = x + F.linear(F.gelu(F.linear(y, *part("mlp.c_fc"))), *part("mlp.c_proj"))
        layer += 1
    assert layer == 2
    return x


def open_clip_cosine(state: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """open_clip's CLIP.forward, from its source: classes first, text read at the largest id."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + state["visual.positional_embedding"]
    x = open_clip_tower(state, "visual.", norm("visual.ln_pre", x), heads=2)
    image = norm("visual.ln_post", x[:, 0]) @ state["visual.proj"]

    y = state["token_embedding.weight"][ids] + state["positional_embedding"]
    y = norm("ln_final", open_clip_tower(state, "", y, heads=2))
    text = y[torch.arange(len(ids)), ids.argmax(1)] @ state["text_projection"]
    return F.cosine_similarity(image, text)


@torch.no_grad()
def test_hpsv2_is_open_clip(tmp_path: Path, images: Tensor) -> None:
    paths = tiny_models.save_hpsv2(tmp_path)
    state = torch.load(tmp_path / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    processor = CLIPImageProcessorPil.from_pretrained(paths["clip"])
    tokenizer = tiny_models.clip_tokenizer()
    ids = torch.zeros(3, 77, dtype=torch.int64)  # open_clip pads with 0
    for row, prompt in zip(ids, PROMPTS, strict=True):
        tokens = tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
        row[: len(tokens)] = torch.tensor(tokens)
    pixels = processor(to_bytes(images), return_tensors="pt").pixel_values
    expected = open_clip_cosine(state, pixels, ids)
    ours = Hpsv2Config(objective="prompt", **paths).build(CPU).score(images, examples(*PROMPTS))
    assert expected.std() > 1e-2
    assert_near(ours, expected, scale=1)


def test_hpsv2_sees_the_whole_picture(tmp_path: Path) -> None:
    reward = Hpsv2Config(objective="prompt", **tiny_models.save_hpsv2(tmp_path)).build(CPU)
    wide = torch.rand(1, 3, 32, 64)
    changed = wide.clone()
    changed[..., :8] = 0  # outside of the central square
    one = examples(PROMPTS[0])
    assert (reward.score(wide, one) - reward.score(changed, one)).abs() > 1e-4


def test_hpsv2_reads_safetensors_too(tmp_path: Path, images: Tensor) -> None:
    from safetensors.torch import save_file

    paths = tiny_models.save_hpsv2(tmp_path)
    state = torch.load(tmp_path / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "hps.safetensors")
    files = ("HPS_v2.1_compressed.pt", "hps.safetensors")
    scores = [
        Hpsv2Config(objective="prompt", file=file, **paths)
        .build(CPU)
        .score(images, examples(*PROMPTS))
        for file in files
    ]
    assert torch.equal(*scores)


class _Code:
    """What an attacker would put into a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_hpsv2_runs_no_code_of_a_pickle(tmp_path: Path) -> None:
    paths, mark = tiny_models.save_hpsv2(tmp_path), tmp_path / "ran"
    file = tmp_path / "HPS_v2.1_compressed.pt"
    for write in (
        lambda: torch.save({"state_dict": {}, "x": _Code(mark)}, file),
        lambda: file.write_bytes(pickle.dumps(_Code(mark), protocol=2)),
    ):
        write()
        with pytest.raises(ConfigError, match=r"^path: .* has no readable HPS_v2") as caught:
            Hpsv2Config(objective="prompt", **paths).build(CPU)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("visual.proj"), "visual_projection.weight"),
        (lambda s: s.update({"visual.extra": torch.zeros(1)}), "visual.extra"),
        (lambda s: s.update({"ln_final.weight": torch.zeros(5)}), "final_layer_norm.weight"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_hpsv2_weights_must_fit(tmp_path: Path, change, reason: str) -> None:
    paths, file = tiny_models.save_hpsv2(tmp_path), tmp_path / "HPS_v2.1_compressed.pt"
    state = torch.load(file, weights_only=True)["state_dict"]
    change(state)
    torch.save({"state_dict": state}, file)
    with pytest.raises(ConfigError, match="does not fit") as caught:
        Hpsv2Config(objective="prompt", **paths).build(CPU)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tiny_models.save_dinov2(tmp_path / "dino")
    tiny_models.clip_tokenizer().save_pretrained(path)
    with pytest.raises(ConfigError, match=r"^path: .*CLIPModel"):
        PickScoreConfig(objective="prompt", path=path, processor=path).build(CPU)
    clip = tiny_models.save_clip(tmp_path / "clip")
    with pytest.raises(ConfigError, match=r"^processor: 'no/such' has no tokenizer"):
        PickScoreConfig(objective="prompt", path=clip, processor="no/such").build(CPU)
