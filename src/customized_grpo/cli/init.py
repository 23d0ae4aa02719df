"""`cgrpo init`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customized_grpo.cli.shared import number, positive, refuse, seed
from customized_grpo.errors import ConfigError
from customized_grpo.tools.init.models import PRESETS

if TYPE_CHECKING:
    from customized_grpo.tools.init.llm import Writer
    from customized_grpo.tools.init.project import Project


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "init",
        help="from a folder of photos to a project: prompts and a config that trains as it is",
        description="Check the photos of one subject, write prompts to train on and others to "
        "judge by, and a config in which every number is explained; then print the commands from "
        "there to a LoRA. Everything goes into one new folder; your photos are copied, never "
        "changed.",
        epilog="examples:\n  cgrpo init my-dog --photos photos --class dog --live\n"
        '  cgrpo init my-mug --photos photos --class "red mug" --gpu-memory 24\n'
        "  cgrpo init my-bear --photos photos --class bear --prompts prompts.txt\n"
        "  cgrpo init my-cat --photos photos --class cat --live --model flux2-klein-base \\\n"
        "      --llm http://localhost:8000/v1 --llm-model Qwen/Qwen3-8B\n"
        "what the checks mean, and the way to a LoRA: docs/own_subject.md",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="new folder of the project")
    photos = "folder with 5 to 20 photos of your subject"
    parser.add_argument("--photos", metavar="DIR", type=Path, required=True, help=photos)
    words = 'what they show, without an article: "dog", "plush bear"'
    parser.add_argument("--class", dest="words", metavar="WORDS", required=True, help=words)
    parser.add_argument(
        "--model",
        choices=PRESETS,
        help="what to train (default: what fits --gpu-memory or this machine's GPU; without one, "
        "embedded: a small model to try everything with on a CPU)",
    )
    memory = "of the GPU that will train it, if it is not this machine's"
    gigabytes = number(0, 10_000, "a number of GB above 0")
    parser.add_argument("--gpu-memory", type=gigabytes, metavar="GB", help=memory)
    parser.add_argument(
        "--live",
        action="store_true",
        help="it is a person or an animal, which can sit and wear a hat",
    )
    own = "your own prompts, one a line, {class} stands for the class (default: from our grammar)"
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=own)
    parser.add_argument(
        "--llm",
        metavar="URL",
        help="let a language model write the prompts: an OpenAI-compatible endpoint up to its "
        "version, http://localhost:8000/v1",
    )
    parser.add_argument("--llm-model", metavar="NAME", help="name of the model at the endpoint")
    key = "environment variable with the endpoint's key (default: none is sent)"
    parser.add_argument("--llm-key-env", metavar="NAME", help=key)
    count = "prompts to write, 15 to 600, a fifth of them to judge by (default: 60)"
    parser.add_argument("--num-prompts", type=positive, metavar="N", help=count)
    random = "of the prompts, and of the run (default: 0)"
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help=random)
    parser.set_defaults(run=_init)


def _init(options: argparse.Namespace) -> None:
    from customized_grpo.tools.init.plan import Order, plan_project

    order = Order(
        folder=options.folder,
        photos=options.photos,
        words=options.words,
        model=options.model,
        gpu_memory=options.gpu_memory,
        live=options.live,
        prompts=options.prompts,
        writer=_writer(options),
        num_prompts=options.num_prompts,
        seed=options.seed,
    )
    project = plan_project(order)
    project.write()
    _print(project)


def _writer(options: argparse.Namespace) -> Writer | None:
    if options.llm is None:
        refuse(options, ("llm_model", "llm_key_env"), "without --llm; give the URL")
        return None
    if options.llm_model is None:
        raise ConfigError("--llm-model must be given with --llm, got none; name the model there")
    from customized_grpo.tools.init.llm import Writer

    return Writer(url=options.llm, model=options.llm_model, key_env=options.llm_key_env)


def _print(project: Project) -> None:
    from customized_grpo.tools.init.guide import steps, summary

    print(f"project: {project.folder}")
    print("\n".join(f"  {line}" for line in summary(project)))
    if project.album.remarks:
        print("worth a look:")
        print("\n".join(f"  {remark}" for remark in project.album.remarks))
    print(f"all photos, and what was found: {project.folder / 'photos.png'}")
    print(f"every number of the config, explained: {project.folder / 'config.yaml'}")
    print("next:")
    print(
        "\n".join(f"  {line}" for step in steps(project, project.folder) for line in step.lines())
    )
