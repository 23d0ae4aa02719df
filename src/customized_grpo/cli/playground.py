"""`cgrpo playground`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from customized_grpo.cli.shared import hide_loading_bars, positive
from customized_grpo.errors import needs_extra
from customized_grpo.runs.interrupts import Interrupts


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "playground",
        help="a page on this machine: upload a picture, type a prompt, see base beside tuned",
        description="Serve a page on this machine: upload a reference picture, type a prompt, and "
        "see base and tuned from the same noise, their rewards, and whether the change is towards "
        "both or towards one; browse the checkpoints of a run. Needs the extra `playground`.",
        epilog="examples:\n  cgrpo playground runs/emoji\n"
        "  cgrpo playground configs/emoji.yaml --port 8000   the base, before any training\n"
        "  cgrpo playground configs/emoji.yaml --lora my-lora\n"
        "what is on the page: docs/playground.md",
    )
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder of a run, or a config")
    lora = "folder of trained weights or anyone's LoRA file, where TARGET is a config"
    parser.add_argument("--lora", type=Path, metavar="PATH", help=lora)
    port = "of 127.0.0.1 (default: the first free one from 7860)"
    parser.add_argument("--port", type=positive, metavar="N", help=port)
    share = "open the page to the internet, through a tunnel of gradio's makers: anyone who has "
    parser.add_argument("--share", action="store_true", help=share + "the link can use it")
    parser.set_defaults(run=_playground)


def _playground(options: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="cgrpo-playground-") as folder:  # of uploads and pictures
        # Both are read when gradio is imported. By default it makes /tmp/gradio, leaves it behind,
        # and fails where another user of the machine has done so.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        with needs_extra("playground", "playground"):
            from customized_grpo.tools.playground.page import serving
        from customized_grpo.tools.playground.session import Session

        hide_loading_bars()
        session = Session(options.target, options.lora)
        with Interrupts() as interrupts, serving(session, options.port, options.share) as address:
            print(f"playground: {address}\nCtrl-C ends it", flush=True)
            while interrupts.received is None:
                interrupts.sleep(60)
