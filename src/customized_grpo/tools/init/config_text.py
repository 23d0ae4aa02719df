"""The config of a project: one that ships, for these photos, with every number explained."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from customized_grpo.config import list_fields, read_config
from customized_grpo.config.yaml_text import Dumper

_WIDTH = 100

_SECTIONS = {
    "data": "What is trained on, and what is judged by: look into both files, change them freely.",
    "generator": "The model that learns your subject.",
    "rewards": "What a picture is judged by in training: is it the subject (a copy of the whole "
    "photo pays the penalty), is it what was asked?",
    "evaluators": "Other models for `cgrpo evaluate`, so that gains are not only in the rewards' "
    "eyes.",
    "lora": "What is trained: a small addition to the model's weights, which stay as they are.",
    "rollout": "How pictures are made to learn from.",
    "advantage": "How both judgements become one: what makes a picture better than its siblings.",
    "loss": "How far the updates of one rollout may move the model.",
    "train": "How the weights are changed.",
    "evaluation": "How `cgrpo evaluate` compares the model before and after.",
}

_ADVICE = {
    "rollout.batch_size": "Lower it where memory runs out: it changes nothing else.",
    "train.num_updates": "The first number to change.",
    "train.learning_rate": "The second: halve it where pictures get worse.",
}


def write_config(raw: Mapping[str, Any], header: Sequence[str]) -> str:
    """YAML of a run with a comment at everything that is not obvious, after the header's lines.

    Raises:
        ConfigError: if the config is not valid.
    """
    config = read_config(yaml.dump(dict(raw), Dumper=Dumper), "the project's config")
    docs = {info.path: f"{info.doc} {_ADVICE.get(info.path, '')}" for info in list_fields(config)}
    lines = [*(f"# {line}".rstrip() for line in header), ""]
    for name, value in raw.items():
        lines += ["", *_comment(_SECTIONS[name])] if name in _SECTIONS else []
        lines += _section(name, value, docs)
    return "\n".join(lines) + "\n"


def _section(name: str, value: Any, docs: Mapping[str, str]) -> list[str]:
    if isinstance(value, dict):
        inside = [_field(f"{name}.{key}", item, docs, "  ") for key, item in value.items()]
        return [f"{name}:", *(line for lines in inside for line in lines)]
    if isinstance(value, list):
        return [f"{name}:", *(f"  - {_flow(item, '  ')}" for item in value)]
    return _field(name, value, docs, "")


def _field(path: str, value: Any, docs: Mapping[str, str], indent: str) -> list[str]:
    """The comment beside the value where there is room, else above it."""
    text = f"{indent}{path.rpartition('.')[2]}: {_flow(value, indent)}"
    comment = "" if isinstance(value, str) else docs.get(path, "").strip()
    if not comment:
        return [text]
    beside = f"{text}  # {comment}"
    return [beside] if len(beside) <= _WIDTH else [*_comment(comment, indent), text]


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )


def _flow(value: Any, indent: str = "") -> str:
    text = yaml.dump(
        value,
        Dumper=Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=_WIDTH - 40 if isinstance(value, list | dict) else 10_000,  # it breaks a word later
    )
    return text.removesuffix("\n").removesuffix("\n...").replace("\n", f"\n{indent}  ")
