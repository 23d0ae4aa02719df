"""The model card: what the weights are, how they came about, what they do, how to load them."""

from __future__ import annotations

import logging
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from customized_grpo.errors import CheckpointError
from customized_grpo.evaluation.evaluate import Place, current_outcome
from customized_grpo.evaluation.outcome import Outcome
from customized_grpo.evaluation.tables import Table, run_table, verdict
from customized_grpo.generators.lora import DEFAULT_RANK
from customized_grpo.runs.run import Run
from customized_grpo.tools.export.snippet import example_prompt, is_stock, snippet

logger = logging.getLogger("customized_grpo")

PICTURE = "samples.png"
_PAPER = "[From Competition to Synergy](https://arxiv.org/abs/2510.18263)"
_QWEN = (
    "\nWith transformers 5, diffusers up to 0.42.1 at least loses the positions of the reference's "
    "tokens in the text encoder (diffusers #14194) and shows the transformer other prompts than in "
    "training; `cgrpo generate` does not.\n"
)


def model_card(run: Run, folder: str, license: str, outcome: Outcome | None, picture: bool) -> str:
    """Markdown with the hub's YAML on top; ``folder`` is where the weights will lie."""
    kind = "A LoRA" if run.is_lora else "The transformer"
    parts = [
        f"---\n{_front_matter(run, license)}---\n",
        f"# {run.config.name}\n",
        f"{kind} for `{_base(run)}`, trained by online reinforcement learning to keep the "
        "subject of a reference picture and to do what the prompt says, with "
        f"customized-grpo {version('customized-grpo')} (method: {_PAPER}).\n",
        f"![reference, prompt, base and tuned]({PICTURE})\n" if picture else "",
        f"## Use\n\n{_use(run, folder)}",
        f"## Results\n\n{_results(outcome)}",
        f"## Training\n\n{_training(run)}",
        f"## Licence\n\n`{license}`. The licence of the base model holds for what was trained of "
        "it: see its page.\n",
    ]
    return "\n".join(part for part in parts if part)


def _base(run: Run) -> str:
    generator: Any = run.config.generator
    return getattr(generator, "path", generator.type)


def _front_matter(run: Run, license: str) -> str:
    fields: dict[str, Any] = {"license": license, "library_name": "diffusers"}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", _base(run)):  # a hub id, which the hub makes a link
        fields["base_model"] = _base(run)
        fields["base_model_relation"] = "adapter" if run.is_lora else "finetune"
    fields["pipeline_tag"] = "image-to-image"
    fields["tags"] = [*(["lora"] if run.is_lora else []), "customized-grpo", "subject-driven"]
    return yaml.safe_dump(fields, sort_keys=False)


def _use(run: Run, folder: str) -> str:
    generator: Any = run.config.generator
    note = _QWEN if generator.type == "qwen-image-edit-plus" else ""
    generate = (
        f"cgrpo generate config.yaml --lora . --prompt '{example_prompt(_base(run))}' "
        f"--reference reference.png{'' if run.is_lora else ' --no-base'}"
    )
    command = "in this folder, a picture of the subject being `reference.png`:\n\n"
    command += f"```bash\n{generate}\n```\n"
    if not is_stock(run):
        return f"No stock pipeline takes references for this model. With customized-grpo, {command}"
    return f"```python\n{snippet(run, folder)}\n```\n{note}\nOr with customized-grpo, {command}"


def _results(outcome: Outcome | None) -> str:
    if outcome is None:
        return "The weights were not evaluated on held-out examples.\n"
    table = f"```text\n{run_table(outcome)}\n```"
    return f"{verdict(outcome)}\n\nOn held-out subjects or prompts:\n\n{table}\n"


def evaluation_of(run: Run) -> Outcome | None:
    """Of the weights that are exported; None, and a warning if there is one of others."""
    if not Place(run.folder, "held_out").json.exists():
        return None
    try:
        return current_outcome(run)
    except CheckpointError as error:
        logger.warning("left out of the model card: %s", error)
        return None


def picture_of(run: Run, outcome: Outcome | None) -> Path | None:
    """References, prompts and pictures by base and tuned: the evaluation's, or the training's."""
    grid = Place(run.folder, "held_out").grid
    return grid if outcome is not None and grid.exists() else run.sample


def _training(run: Run) -> str:
    config = run.config
    rollout, train, lora = config.rollout, config.train, config.lora
    advantage = config.advantage
    rewards = ", ".join(
        f"{reward.objective}: {reward.type} {getattr(reward, 'path', '')}".strip()
        for reward in config.rewards
    )
    if lora is None:
        weights = "all weights"
    elif lora.path is not None:
        weights = "a LoRA that was there before"
    else:
        rank = lora.rank or DEFAULT_RANK
        weights = f"LoRA of rank {rank}, alpha {rank if lora.alpha is None else lora.alpha:g}"
    rows = {
        "updates": f"{run.updates} of {train.num_updates}, learning rate {train.learning_rate:g}",
        "trained": weights,
        "rollout": f"{rollout.prompts_per_rollout} prompts x {rollout.group_size} pictures, "
        f"{rollout.num_steps} steps, {rollout.num_trained_steps} of them trained",
        "rewards": rewards,
        "advantage": f"{advantage.shaping_target or advantage.shaping}, schedule "
        f"{advantage.schedule.type}",
        "data": str(config.data.type),
        "seed": str(config.seed),
    }
    table = Table(heads=["", ""], rows=[[*row] for row in rows.items()]).markdown()
    return f"{table}\n\nEvery field is in [config.yaml](config.yaml).\n"
