"""HPSv3: the published file loads strictly, and scores as its authors' pipeline does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import tiny_models
import torch
from helpers import assert_near
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from customized_grpo.errors import ConfigError, DataError
from customized_grpo.pictures import to_pil
from customized_grpo.rewards import hpsv3
from customized_grpo.rewards.hpsv3 import Hpsv3Config, Hpsv3Reward, load_hpsv3
from customized_grpo.types import Example

CPU = torch.device("cpu")
PROMPTS = ("a cat on {the} beach", "one red dog")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_models.save_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(paths: dict[str, str]) -> Hpsv3Reward:
    return Hpsv3Config(objective="prompt", dtype="float32", **paths).build(CPU)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """448 px, the size that the model sees: the processor changes and rounds nothing."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 8, 8), generator=generator)
    return coarse.repeat_interleave(56, 2).repeat_interleave(56, 3) / 255


def examples(*prompts: str) -> list[Example]:
    return [Example(id=str(i), prompt=p, references=(), subject="x") for i, p in enumerate(prompts)]


class Published(nn.Module):
    """The authors' model: one module whose names are those of their file."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.vlm = Qwen2VLForConditionalGeneration(config)
        self.rm_head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def forward(self, ids: Tensor, pixels: Tensor, grid: Tensor, token: int) -> Tensor:
        """One example at a time, embeddings merged by hand: no mask, no positions of ours."""
        inner = self.vlm.model
        embeds = inner.language_model.embed_tokens(ids)
        seen = inner.visual(pixels, grid_thw=grid).pooler_output
        mask = (ids == self.vlm.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(mask, seen)
        positions = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)
        hidden = inner.language_model(inputs_embeds=embeds, position_ids=positions)
        return self.rm_head(hidden.last_hidden_state[ids == token])[0, 0]


def conversation(prompt: str, places: int) -> str:
    """What Qwen2-VL's chat template makes of the authors' message."""
    text = tiny_models.INSTRUCTION.replace("{text_prompt}", prompt)
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{'<|image_pad|>' * places}<|vision_end|>{text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@torch.no_grad()
def test_scores_are_those_of_the_published_pipeline(
    paths: dict[str, str], reward: Hpsv3Reward, images: Tensor
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(paths["base"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = Qwen2VLConfig.from_pretrained(paths["base"])
    config.text_config.vocab_size = len(tokenizer)
    model = Published(config).float().eval()
    state = load_file(Path(paths["path"]) / "HPSv3.safetensors")
    names = {
        n: n.replace("vlm.model.language_model.", "model.")
        .replace("vlm.model.visual.", "visual.")
        .replace("vlm.", "")
        for n in model.state_dict()
    }
    assert set(names.values()) == set(state)
    model.load_state_dict({new: state[old] for new, old in names.items()}, strict=True)
    processor = Qwen2VLImageProcessorPil(min_pixels=256 * 28 * 28, max_pixels=256 * 28 * 28)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        seen = processor([to_pil(image)], return_tensors="pt")
        ids = tokenizer(conversation(prompt, 256), return_tensors="pt")["input_ids"]
        token = tokenizer.convert_tokens_to_ids("<|Reward|>")
        expected.append(model(ids, seen.pixel_values, seen.image_grid_thw, token))
    ours = reward.score(images, examples(*PROMPTS))
    assert ours[0] != ours[1]
    assert_near(ours, torch.stack(expected))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("no prompt <|Reward|>", "must hold '{text_prompt}' once"),
     ("{text_prompt}", r"must hold '<\|Reward\|>' once")],
)  # fmt: skip
def test_an_instruction_without_its_places_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "instruction.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=f"^instruction: .*{message}") as caught:
        hpsv3.read_instruction(str(file))
    # The token is not in the authors' INSTRUCTION: two constants make the text.
    assert "INSTRUCTION + prompt_with_special_token of hpsv3/dataset/" in str(caught.value)


_MODULE = '''
import torch  # no line of it is run: this one is not here either
import a_package_of_theirs

INSTRUCTION = """
Rate it.
Textual prompt - {text_prompt}


"""

INSTRUCTION_debug = """{text_prompt}"""

prompt_with_special_token = """
Overall: <|Reward|>

END
"""
'''


def test_the_instruction_is_found_in_a_checkout(tmp_path: Path) -> None:
    module = tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py"
    module.parent.mkdir(parents=True)
    module.write_text(_MODULE)
    expected = "\nRate it.\nTextual prompt - {text_prompt}\n\n\n\nOverall: <|Reward|>\n\nEND\n"
    assert hpsv3.read_instruction(str(tmp_path)) == expected
    (own,) = (
        checkpoint.path
        for checkpoint in Hpsv3Config(objective="prompt", instruction=str(tmp_path)).checkpoints()
        if checkpoint.field == "instruction"
    )
    assert own == str(module)  # a checkout's history changes no key of a cache
    for text, reason in (
        ("INSTRUCTION = 'x'", "has no text prompt_with_special_token"),
        ("INSTRUCTION = f(1)", "malformed node"),
        ("INSTRUCTION = ", "invalid syntax"),
    ):
        module.write_text(text)
        with pytest.raises(ConfigError, match=rf"^instruction: .*{reason}.*; name a checkout"):
            hpsv3.read_instruction(str(tmp_path))
    module.unlink()
    with pytest.raises(ConfigError, match=r"^instruction: .*No such file"):
        hpsv3.read_instruction(str(tmp_path))


def test_another_instruction_is_warned_of(
    paths: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = hpsv3.read_instruction(paths["instruction"])
    assert "its scores will differ" in caplog.text
    caplog.clear()
    monkeypatch.setattr(hpsv3, "_PUBLISHED", hashlib.sha256(text.encode()).hexdigest())
    hpsv3.read_instruction(paths["instruction"])
    assert not caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("rm_head.5.bias"), "5.bias"),
        (lambda s: s.pop("visual.merger.mlp.0.weight"), "visual.merger.mlp.0.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra"),
        (lambda s: s.update({"rm_head.0.weight": torch.zeros(4, 4)}), "size mismatch"),
        (lambda s: s.pop("model.embed_tokens.weight"), "must hold 'model.embed_tokens.weight'"),
    ],
    ids=["head missing", "vision missing", "unknown", "shape", "no vocabulary"],
)
def test_the_load_is_strict(paths: dict[str, str], tmp_path: Path, change, reason: str) -> None:
    state = load_file(Path(paths["path"]) / "HPSv3.safetensors")
    change(state)
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(
        ConfigError, match=r"^path: HPSv3\.safetensors of .* does not fit"
    ) as caught:
        Hpsv3Config(
            objective="prompt",
            path=str(tmp_path),
            base=paths["base"],
            instruction=paths["instruction"],
        ).build(CPU)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_weights_are_those_of_the_file(paths: dict[str, str]) -> None:
    state = load_file(Path(paths["path"]) / "HPSv3.safetensors")
    model, head = load_hpsv3(Qwen2VLConfig.from_pretrained(paths["base"]), state, "path: x")
    loaded = {**dict(model.named_parameters()), **dict(head.named_parameters())}
    assert len(loaded) == len(state) - 1  # all but lm_head, which nothing reads
    assert not any(parameter.is_meta for parameter in loaded.values())
    assert torch.equal(model.language_model.norm.weight, state["model.norm.weight"])
    assert torch.equal(head[3].weight, state["rm_head.3.weight"])


def test_bfloat16_keeps_head_and_positions_in_float32(
    paths: dict[str, str], reward: Hpsv3Reward, images: Tensor
) -> None:
    half = Hpsv3Config(objective="prompt", **paths).build(CPU)
    assert {p.dtype for p in half._model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half._head.parameters()} == {torch.float32}
    assert {b.dtype for b in half._model.buffers() if b.is_floating_point()} == {torch.float32}
    close = half.score(images, examples(*PROMPTS))
    torch.testing.assert_close(close, reward.score(images, examples(*PROMPTS)), atol=0.1, rtol=0)


def test_special_tokens_in_a_prompt_are_refused(reward: Hpsv3Reward, images: Tensor) -> None:
    for token in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(DataError, match="must not hold a special token") as caught:
            reward.score(images[:1], examples(f"a cat {token}"))
        assert token in str(caught.value)
