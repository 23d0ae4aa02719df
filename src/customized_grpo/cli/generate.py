"""`cgrpo generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import (
    after_pictures,
    alone,
    free_path,
    hide_loading_bars,
    next_step,
    pixels,
    positive,
    seed,
)
from customized_grpo.errors import ConfigError


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "generate",
        help="pictures of your own prompts and references, base and tuned side by side",
        description="Make pictures of prompts and reference pictures, by the base and by what a "
        "run has trained, from the same noise. Writes PNGs that say how they were made, and a "
        "contact sheet. A picture depends on its seed, prompt and references alone.",
        epilog="examples:\n"
        '  cgrpo generate runs/emoji --prompt "a fox on the beach" --reference fox.png --count 4\n'
        "  cgrpo generate runs/emoji --file prompts.jsonl --seeds 3 7 --strength 0.7 --out mine\n"
        "  cgrpo generate configs/emoji.yaml --lora my-lora --no-base --file prompts.jsonl\n"
        "what a picture depends on, and says of itself: docs/using.md",
    )
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder of a run, or a config")
    text = "what to show; may be repeated: every prompt is drawn with all references"
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=text)
    picture = "picture of the subject; may be repeated, where the generator takes several"
    parser.add_argument(
        "--reference", action="append", default=[], type=Path, metavar="FILE", help=picture
    )
    rows = 'instead of these: JSONL, rows {"prompt": ..., "references": ["a.png"]}'
    parser.add_argument("--file", type=Path, metavar="JSONL", help=rows)
    seeds = "one picture of every prompt for each (default: 0)"
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0], metavar="N", help=seeds)
    count = "so many seeds, counted up from the one given"
    parser.add_argument("--count", type=positive, metavar="N", help=count)
    text = "pixels of the pictures, such as 1024x768 (default: evaluation.width and height of the "
    parser.add_argument(
        "--size", type=pixels, metavar="WxH", help=f"{text}config, or as they are trained)"
    )
    lora = "folder of trained weights or anyone's LoRA file, where TARGET is a config"
    parser.add_argument("--lora", type=Path, metavar="PATH", help=lora)
    strength = "of the LoRA: 0 = the base, 1 = as it was trained (default)"
    parser.add_argument("--strength", type=float, metavar="X", help=strength)
    size = "pictures made together (default: evaluation.batch_size of the config)"
    parser.add_argument("--batch-size", type=positive, metavar="N", help=size)
    out = "new folder (default: generated, generated-2, ...)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    parser.add_argument(
        "--metadata",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompt, seed, run and versions as text in the PNGs (default: yes)",
    )
    parser.add_argument(
        "--base",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="by the base too, for comparison (default: yes)",
    )
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    alone("`cgrpo generate`")
    from customized_grpo.tools.generate import Shot, generate, open_target, read_prompts

    target = open_target(options.target, options.lora)
    entries = read_prompts(options.prompt, options.reference, options.file)
    seeds = _seeds(options.seeds, options.count)
    shots = [Shot(entry=entry, seed=seed) for entry in entries for seed in seeds]
    out = options.out or free_path(Path("generated"))
    hide_loading_bars()
    sheets = generate(
        target,
        shots,
        out,
        base=options.base,
        strength=options.strength,
        batch_size=options.batch_size,
        size=options.size,
        metadata=options.metadata,
    )
    print(f"pictures: {out}")
    for sheet in sheets:
        print(f"contact sheet: {sheet}")
    if options.target.is_dir():
        next_step(*after_pictures(target.config, options.target))


def _seeds(seeds: list[int], count: int | None) -> list[int]:
    if count is None:
        return list(dict.fromkeys(seeds))
    if len(seeds) > 1:
        raise ConfigError(f"--count must be left out with several --seeds, got {count}")
    return [seeds[0] + i for i in range(count)]
