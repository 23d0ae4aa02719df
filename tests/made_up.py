"""Results of two methods over three seeds with known numbers, as a study would leave them."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import ROOT

from customized_grpo.config import dump_config, load_config
from customized_grpo.evaluation.items import Item
from customized_grpo.evaluation.outcome import Judgement, Yardstick
from customized_grpo.evaluation.results import Cell, Results
from customized_grpo.pictures import save_strip

CONFIG = dump_config(load_config(ROOT / "configs" / "emoji.yaml"))
OBJECTIVES = {"clip-text": "prompt", "dinov2": "identity"}


def judgement(prompt: float, identity: float, shift: float = 0.0) -> Judgement:
    """Ten examples around the means, with every kind of measure."""
    spread = torch.linspace(-0.05, 0.05, 10) + shift
    return Judgement(
        columns={
            "clip-text": (prompt + spread).tolist(),
            "dinov2": (identity - spread).tolist(),
            "reward/clip-text": (prompt + 0.01 + spread).tolist(),
            "reward/dinov2": (identity + spread).tolist(),
            "copy": [identity - 0.5] * 10,
            "prompt_right": [1.0] * 6 + [0.0] * 4,
            "subject_right": [0.0, 1.0] * 5,
            "both_right": [0.0, 1.0] * 3 + [0.0] * 4,
            "copies": [0.0] * 9 + [1.0],
            "subject": [identity + 0.1] * 10,
            "attribute/scene": [1.0, 0.0] * 5,
            "attribute/color": [None, 1.0] * 5,
        },
        numbers={"frechet": 0.1, "high_frequency": 1.5, "diversity": 0.07},
    )


def cell(method: str, seed: int, gain: float) -> Cell:
    return Cell(
        method=method,
        seed=seed,
        judgement=judgement(0.8 + gain, 0.5 + gain + 0.001 * seed),
        config=CONFIG.replace("name: emoji", f"name: seed{seed}").replace(
            "output_dir: runs", f"output_dir: runs/<{method}>"
        ),
        curve={
            "update": [0, 10, 20],
            "validation/clip-text": [0.8, 0.8 + gain / 2, 0.8 + gain],
            "validation/dinov2": [0.5, 0.5 + seed / 100, 0.5 + gain],
            "validation/reward/dinov2": [0.4, 0.41, 0.43],
            "validation/share/both_right": [0.1, 0.2, 0.3],
        },
        shares={
            "update": [1, 3],
            "share/conflicted": [0.5, 0.4],
            "share/both_positive": [0.3, 0.4],
            "share/both_negative": [0.2, 0.2],
        },
        advantages={
            "identity": [1.0, -1.0, 0.5, None] * 3 + [1.0, 2.0, 0.5] * 4,
            "prompt": [1.0, -0.5, -2.0, 1.0] * 3 + [1.0, 2.0, 0.5] * 4,
        },
        schedule={
            "objectives": ["identity", "prompt"],
            "sigmas": [1.0, 0.5, 0.0],
            "weights": [[0.3, 0.7], [0.5, 0.5]] if method == "both" else [[0.5, 0.5]] * 2,
        },
        seconds=120.0,
        environment={"device": "a machine", "threads": "1", "torch": "2.13.0"},
    )


def made_up(**changes: object) -> Results:
    prompts = ["a dog <b>", *["a cat"] * 9]
    yardstick = Yardstick(
        set="held_out",
        items=tuple(Item(subject=f"s{i}", prompt_index=i, prompt=p) for i, p in enumerate(prompts)),
        objectives=OBJECTIVES,
        rewards=OBJECTIVES,
        anchors={
            "copy": judgement(0.0, 1.0),
            "ground truth": judgement(0.9, 0.6),
            "unrelated": judgement(0.0, 0.1),
        },
        base=judgement(0.8, 0.5),
    )
    fields: dict = {
        "name": "made up",
        "config": CONFIG,
        "yardstick": yardstick,
        "labels": {"naive": "naive GRPO 1:1", "both": "Customized-GRPO"},
        "main": "both",
        "cells": [cell(m, s, g) for s in range(3) for m, g in (("naive", -0.01), ("both", 0.02))],
    }
    return Results(**(fields | changes))


def save_pictures(folder: Path) -> None:
    for number, name in enumerate(("reference", "ground-truth", "base", "naive", "both")):
        save_strip(folder / "pictures" / f"{name}.png", torch.full((10, 3, 8, 8), number / 5))
