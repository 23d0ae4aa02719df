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
    "rewards": "What a picture is judged by in training: is it the subject, is it what was asked?",
    "evaluators": "Other models for `cgrpo evaluate`, so that gains are not only in the rewards' "
    "eyes.",
    "lora": "What is trained: a small addition to the model's weights, which stay as they are.",
    "rollout": "How pictures are made to learn from.",
    "advantage": "How both judgements become one: what makes a picture better than its siblings.",
    "train": "How the weights are changed.",
    "evaluation": "How `cgrpo evaluate` compares the model before and after.",
}

# In plain words; for fields that are not here, the words of `cgrpo train --help`.
_WORDS = {
    "name": "folder of the run in output_dir; for another try: --name second",
    "seed": "of everything random: the same seed gives the same run on the same machine",
    "output_dir": "where runs are written",
    "mixed_precision": "bf16: faster and in less memory; sums and losses stay exact",
    "generator.height": "pixels of the pictures that are made; more take longer",
    "generator.width": "and their width",
    "generator.guidance_scale": "how strongly the prompt is followed, as its makers advise",
    "generator.dtype": "the model's weights in 2 bytes each",
    "generator.offload": "true: what does not work at the moment leaves the GPU, to save memory",
    "generator.gradient_checkpointing": "true: less memory, a third slower",
    "generator.reference_area": "pixels at which your photo is shown to the model, 512 x 512",
    "generator.quantization": "weights in less than 2 bytes each, to fit the GPU",
    "lora.rank": "size of the addition: more can learn more, and takes more memory",
    "lora.target_modules": "the layers that get one",
    "rollout.num_steps": "steps from noise to a picture: fewer are faster, too few are blurred",
    "rollout.num_trained_steps": "so many of them are learned from; at most num_steps - 1",
    "rollout.dynamics": "the formula of the noise that makes siblings differ",
    "rollout.noise_level": "how different the siblings of a prompt are: too little teaches nothing",
    "rollout.shift": "how long the steps stay at high noise; the paper's value",
    "rollout.group_size": "pictures of one prompt, compared with each other; more are steadier, "
    "and slower",
    "rollout.prompts_per_rollout": "prompts at a time; more are steadier, and slower",
    "rollout.batch_size": "pictures made at once: lower it where memory runs out, it changes "
    "nothing else",
    "advantage.shaping": "sars: a bonus for pictures that are good at both",
    "advantage.gamma": "strength of that bonus; the paper's value",
    "advantage.center": "true: the bonus is above 0 as often as below",
    "advantage.schedule": "tdw: the prompt counts more in the early steps, the subject in the late "
    "ones",
    "train.num_updates": "how long it trains: the first number to change",
    "train.inner_updates": "times that the weights change per set of pictures",
    "train.micro_batch_size": "(picture, step) pairs at once: lower it where memory runs out, it "
    "changes nothing else",
    "train.learning_rate": "how far one update goes: halve it where pictures get worse, the second "
    "number to change",
    "train.ema_decay": "what is saved is an average over the last updates: 0.95 = about 20 of them",
    "evaluation.num_examples": "lines of held_out.jsonl that are judged: all, or 64",
    "evaluation.batch_size": "pictures made at once",
}


def write_config(raw: Mapping[str, Any], header: Sequence[str]) -> str:
    """YAML of a run with a comment at everything that is not obvious, after the header's lines.

    Raises:
        ConfigError: if the config is not valid.
    """
    config = read_config(yaml.dump(dict(raw), Dumper=Dumper), "the project's config")
    docs = {info.path: info.doc for info in list_fields(config)}
    words = docs | _WORDS
    lines = [*(f"# {line}".rstrip() for line in header), ""]
    for name, value in raw.items():
        lines += ["", *_comment(_SECTIONS[name])] if name in _SECTIONS else []
        lines += _section(name, value, words)
    return "\n".join(lines) + "\n"


def _section(name: str, value: Any, words: Mapping[str, str]) -> list[str]:
    if isinstance(value, dict):
        inside = [_field(f"{name}.{key}", item, words, "  ") for key, item in value.items()]
        return [f"{name}:", *(line for lines in inside for line in lines)]
    if isinstance(value, list):
        return [f"{name}:", *(f"  - {_flow(item)}" for item in value)]
    return _field(name, value, words, "")


def _field(path: str, value: Any, words: Mapping[str, str], indent: str) -> list[str]:
    """The comment beside the value where there is room, else above it."""
    text = f"{indent}{path.rpartition('.')[2]}: {_flow(value, indent)}"
    needed = not isinstance(value, str) or path in _WORDS
    comment = words.get(path, "") if needed else ""
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
        width=_WIDTH - 40 if isinstance(value, list) else 10_000,  # it breaks a word later
    )
    return text.removesuffix("\n").removesuffix("\n...").replace("\n", f"\n{indent}  ")
