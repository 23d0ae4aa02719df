"""The table of docs/rented_gpu.md: hours and dollars of every config on every card, as Markdown.

python benchmarks/cards.py
"""

from __future__ import annotations

import os
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
SHOWN = (
    "flux2-klein", "flux2-klein-base", "flux-kontext-24gb", "flux3-klein-base", "qwen-image-2.1",
    "qwen-image-edit-plus", "flux-kontext", "uno-paper",
)  # fmt: skip


def main() -> None:
    """Prints the table."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

    from customized_grpo.config import load_config
    from customized_grpo.tools.estimate.cards import price_list
    from customized_grpo.tools.estimate.workload import count_run

    works = {f"`{name}`": count_run(load_config(CONFIGS / f"{name}.yaml")) for name in SHOWN}
    print("\n".join(price_list(works)))


if __name__ == "__main__":
    main()
