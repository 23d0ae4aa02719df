"""How much of a prompt a model reads: known from its tokenizer, without its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from customized_grpo.assets import embedded_file, is_there, resolve_checkpoint

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


def unknown_words(path: str, prompts: Sequence[str]) -> str:
    """A line on the words of prompts that the embedded model has never seen, which it reads letter
    by letter; "" if there are none, and for any other checkpoint."""
    if path != "embedded:generator":
        return ""
    tokenizer = embedded_file("generator/tokenizer_2/tokenizer.json").read_text(encoding="utf-8")
    known = {token.removeprefix("\u2581") for token, _ in json.loads(tokenizer)["model"]["vocab"]}
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", " ".join(prompts).lower()))
    unknown = [repr(word) for word in words if word not in known]
    if not unknown:
        return ""
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return (
        f"the embedded model does not know {', '.join(unknown[:5])}{more}; it knows animal, "
        "person, plant, food, vehicle, toy and the like (docs/embedded_models.md)"
    )
