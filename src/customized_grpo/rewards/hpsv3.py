"""HPSv3: how much would people like the picture for the prompt, by a VLM (arXiv:2508.03789).

A direct loader: the authors' package pins libraries of 2024. Their model is a Qwen2-VL with a
small head that reads the hidden state of one added token at the end of a fixed instruction.
"""

from __future__ import annotations

import ast
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from customized_grpo.assets import one_line, resolve_checkpoint
from customized_grpo.config import Checkpoint, RewardConfig, find_checkpoints
from customized_grpo.config.limits import Count
from customized_grpo.config.plugs import CheckpointKind
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.files import load_text
from customized_grpo.rewards.loading import (
    freeze,
    load_layout,
    load_tokenizer,
    read_tensors,
)
from customized_grpo.rewards.preprocess import qwen2vl_patches
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

_NUM_PIXELS = 256 * 28 * 28  # both least and most of the authors' inference
_REWARD, _IMAGE = "<|Reward|>", "<|image_pad|>"
_PUBLISHED = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
_SOURCE = "hpsv3/dataset/data_collator_qwen.py"
_PARTS = ("INSTRUCTION", "prompt_with_special_token")
_FIX = (
    "name a checkout (git clone https://github.com/MizzenAI/HPSv3), or a file with "
    f"{' + '.join(_PARTS)} of {_SOURCE} in it, to the byte"
)
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hpsv3Config(RewardConfig):
    """HPSv3's mean score, unbounded; good pictures are around 10."""

    type: Literal["hpsv3"] = "hpsv3"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str = "MizzenAI/HPSv3"
    """Folder or hub id with the weights."""
    file: str = "HPSv3.safetensors"
    """Weights under the names of the published file."""
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    """Folder or hub id of the model that was tuned; gives shapes and tokenizer."""
    instruction: str
    """The question that the model was trained with: a checkout of github.com/MizzenAI/HPSv3 (MIT),
    of which no code is run, or a text file of its own, '{text_prompt}' where the prompt goes."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the language model (the authors': bfloat16); the head is always float32."""
    batch_size: Count = 8
    """Images per forward; changes no score."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug."""
        kinds: dict[str, CheckpointKind | None]
        kinds = {"path": "model", "base": "texts", "instruction": None}
        file = _instruction_file(self.instruction)  # of a checkout, nothing else counts
        own = [Checkpoint(field="instruction", path=str(file))] if file.is_file() else []
        return (*find_checkpoints(self, kinds, {"path": self.file}), *own)

    def check(self) -> None:
        """See Plug: whether the instruction can be read."""
        read_instruction(self.instruction)

    def build(self, device: torch.device) -> Hpsv3Reward:
        """Loads weights and tokenizer."""
        from transformers import Qwen2VLConfig

        with one_line(f"base: {self.base!r} is not a Qwen2-VL checkpoint"):
            config = Qwen2VLConfig.from_pretrained(resolve_checkpoint(self.base, "base"))
        tokenizer = load_tokenizer(self.base, "base")
        tokenizer.add_special_tokens({"extra_special_tokens": [_REWARD]})
        tokenizer.padding_side = "right"
        state = read_tensors(self.path, self.file)
        what = f"path: {self.file} of {self.path!r} does not fit {self.base!r}"
        model, head = load_hpsv3(config, state, what)
        return Hpsv3Reward(
            freeze(model, device, getattr(torch, self.dtype)),
            freeze(head, device),
            tokenizer,
            read_instruction(self.instruction),
            self.batch_size,
        )


def read_instruction(path: str) -> str:
    """The text around the prompt, of a file or a checkout; warns if it is not the published one.

    Raises:
        ConfigError: if it cannot be read, or prompt or reward token have no one place in it.
    """
    file = _instruction_file(path)
    try:
        text = load_text(file)
        text = _joined(text) if file.name == Path(_SOURCE).name else text
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"instruction: {path!r} cannot be read: {error}; {_FIX}") from error
    for place in ("{text_prompt}", _REWARD):
        if text.count(place) != 1:
            raise ConfigError(
                f"instruction: {path!r} must hold {place!r} once, got it {text.count(place)} "
                f"times; {_FIX}"
            )
    if hashlib.sha256(text.encode()).hexdigest() != _PUBLISHED:
        what = "instruction: %r is not HPSv3's own; its scores will differ; %s"
        logger.warning(what, path, _FIX)
    return text


def _instruction_file(path: str) -> Path:
    place = Path(path).expanduser()
    return place / _SOURCE if place.is_dir() else place


def _joined(module: str) -> str:
    """The texts that the authors' module gives two names, which is read and not run."""
    found = {
        line.targets[0].id: ast.literal_eval(line.value)
        for line in ast.parse(module).body
        if isinstance(line, ast.Assign)
        and isinstance(line.targets[0], ast.Name)
        and line.targets[0].id in _PARTS
    }
    if missing := [name for name in _PARTS if not isinstance(found.get(name), str)]:
        raise ValueError(f"{_SOURCE} has no text {missing[0]}")
    return "".join(found[name] for name in _PARTS)


def load_hpsv3(config: Any, state: dict[str, Tensor], what: str) -> tuple[Any, nn.Module]:
    """Language model and head from the tensors of the published file, all of them.

    The file has the names of transformers 4.45: ``visual.*``, ``model.*``, ``lm_head.*`` and
    ``rm_head.*``. Its vocabulary is Qwen's and the reward token, without Qwen's padding.

    Raises:
        ConfigError: opened by ``what``, if names or shapes differ.
    """
    from transformers import Qwen2VLForConditionalGeneration

    if "model.embed_tokens.weight" not in state:
        raise ConfigError(
            f"{what}: must hold 'model.embed_tokens.weight', got {min(state)!r} and others; "
            "give the published file"
        )
    with one_line(what):
        config.text_config.vocab_size = len(state["model.embed_tokens.weight"])
    head = {k.removeprefix("rm_head."): v for k, v in state.items() if k.startswith("rm_head.")}
    rest = {_new_name(k): v for k, v in state.items() if not k.startswith("rm_head.")}
    model: Any = load_layout(lambda: Qwen2VLForConditionalGeneration(config), rest, what)
    width = config.text_config.hidden_size
    return model.model, load_layout(lambda: _head(width), head, f"{what}, rm_head")


def _head(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),  # mean and spread of the score
    )


def _new_name(name: str) -> str:
    for old, new in (("visual.", "model.visual."), ("model.", "model.language_model.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


class Hpsv3Reward:
    """See Hpsv3Config."""

    def __init__(
        self, model: Any, head: nn.Module, tokenizer: Any, instruction: str, batch_size: int
    ) -> None:
        self._model, self._head, self._tokenizer = model, head, tokenizer
        self._instruction, self._batch_size = instruction, batch_size
        self._reward_id = tokenizer.convert_tokens_to_ids(_REWARD)

    @torch.no_grad()
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """See the Protocol.

        Raises:
            DataError: if a prompt holds a special token of the model.
        """
        scores = []
        for first in range(0, len(images), self._batch_size):
            some = slice(first, first + self._batch_size)
            scores.append(self._score(images[some], [e.prompt for e in examples[some]]))
        return torch.cat(scores)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        vision = self._model.config.vision_config
        merge = vision.spatial_merge_size
        pixels, grid = qwen2vl_patches(
            images,
            num_pixels=_NUM_PIXELS,
            patch=vision.patch_size,
            merge=merge,
            temporal=vision.temporal_patch_size,
        )
        places = int(grid[0].prod()) // merge**2
        tokens = self._tokenizer(
            [self._question(prompt, places) for prompt in prompts],
            padding=True,
            return_tensors="pt",
        ).to(images.device)
        ids = tokens["input_ids"]
        hidden = self._model(
            input_ids=ids,
            attention_mask=tokens["attention_mask"],
            # Plain positions, as the model was trained: its forward never made Qwen's 3-D ones.
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape),
            pixel_values=pixels,
            image_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state
        return self._head(hidden[ids == self._reward_id].float())[:, 0]

    def _question(self, prompt: str, places: int) -> str:
        if found := [token for token in self._tokenizer.get_added_vocab() if token in prompt]:
            raise DataError(
                f"prompt {prompt!r}: must not hold a special token of HPSv3, got {found[0]!r}; "
                "reword it"
            )
        text = self._instruction.replace("{text_prompt}", prompt)
        return _CHAT.format(image=_IMAGE * places, text=text)
