"""`cgrpo export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from customized_grpo.cli.shared import hide_loading_bars, hint, refuse

_NEXT = {
    "hub-folder": "{}/README.md shows how to load it; `hf upload` publishes the folder",
    "comfyui": "put the file in {} where ComfyUI's Load LoRA looks, models/loras",
    "merged": "DiffusionPipeline.from_pretrained({!r}) loads it",
}


def add(commands: Any) -> None:
    """Adds the parser."""
    parser = commands.add_parser(
        "export",
        help="what a run has trained, in the formats that others load",
        description="Write what a run has trained into a new folder: hub-folder, the weights in "
        "diffusers format with a model card, ready to be uploaded; comfyui, one LoRA file for "
        "ComfyUI (FLUX family); merged, the whole pipeline with the LoRA fused, for "
        "from_pretrained.",
        epilog="examples:\n  cgrpo export runs/emoji --to hub-folder --out my-lora\n"
        "  cgrpo export runs/emoji --to comfyui --out ComfyUI/models/loras/mine\n"
        "  cgrpo export runs/emoji --to merged --out my-model\n"
        "what is in the folders, and what was tested: docs/using.md",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--to", choices=("hub-folder", "comfyui", "merged"), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    license = "of the weights, in the model card of hub-folder (default: other)"
    parser.add_argument("--license", metavar="ID", help=license)
    picture = "leave pictures, which show references, out of the model card"
    parser.add_argument("--no-picture", action="store_true", help=picture)
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from customized_grpo.tools.export.folders import export_run

    if options.to != "hub-folder":
        refuse(options, ("license", "no_picture"), f"with --to {options.to}; leave it out")
    hide_loading_bars()
    license = options.license or "other"
    export_run(options.run_folder, options.to, options.out, license, not options.no_picture)
    print(f"exported: {options.out}")
    for path in sorted(options.out.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")
    hint(_NEXT[options.to].format(str(options.out)))
