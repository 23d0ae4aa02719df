"""How much of a prompt a model reads: known from its tokenizer, without its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from customized_grpo.assets import is_there, resolve_checkpoint

_NO_LIMIT = 10**6  # tokenizers without one say 10^30


@dataclass(frozen=True, slots=True)
class TextLimit:
    """What a text encoder does not read is cut off without a word."""

    most: int
    """Tokens of a prompt that it reads."""
    count: Callable[[Sequence[str]], list[int]]
    """Tokens of prompts."""


def tokenizer_limit(
    path: str, subfolder: str = "", most: int | None = None, around: int = 2
) -> TextLimit | None:
    """The limit of a checkpoint that lies on this machine; None: it does not, or has no limit.

    Args:
        path: folder, hub id or 'embedded:NAME'.
        subfolder: of the tokenizer.
        most: tokens; None: as the tokenizer says.
        around: tokens that are added to a prompt's own and count too.
    """
    from transformers import AutoTokenizer

    if not is_there(path):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_checkpoint(path), subfolder=subfolder, local_files_only=True
        )
    except Exception:  # of a checkpoint that is not one; the loader says what is wrong with it
        return None
    most = tokenizer.model_max_length if most is None else most

    def count(prompts: Sequence[str]) -> list[int]:
        texts = tokenizer(list(prompts), add_special_tokens=False, verbose=False)
        return [len(ids) + around for ids in texts["input_ids"]]

    return None if most > _NO_LIMIT else TextLimit(most, count)
