"""What checkpoints cost: seconds of writing them, of the seconds of the updates between them.

    python benchmarks/checkpoints.py --json

Each is waited for, as if nothing were written beside the training: an upper bound.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _iterations import STAGES, parse


def main() -> None:
    """Prints the share and what it is made of."""
    options = parse(
        "What checkpoints cost.",
        ("--every", {"type": int, "default": 10, "help": "updates between them (default: 10)"}),
        ("--updates", {"type": int, "default": 40, "help": "of the run (default: 40)"}),
    )
    from customized_grpo.config import load_config
    from customized_grpo.runs.checkpoint import CheckpointStore
    from customized_grpo.training import session
    from customized_grpo.training.train import train as run_training

    spent: list[float] = []

    class Waiting(CheckpointStore):
        def save(self, *args: Any) -> None:
            started = time.monotonic()
            super().save(*args)
            self.wait()
            spent.append(time.monotonic() - started)

    session.CheckpointStore = Waiting
    config = load_config(options.config)
    train = replace(
        config.train, num_updates=options.updates, sample_every=0, save_every=options.every
    )
    with tempfile.TemporaryDirectory() as folder:
        run = run_training(replace(config, name="benchmark", output_dir=folder, train=train))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        size = sum(f.stat().st_size for f in _newest(run).rglob("*"))
    seconds = sum(row.get(f"seconds/{stage}", 0.0) for row in rows for stage in STAGES)
    result = {
        "share": sum(spent) / seconds,
        "seconds_per_checkpoint": sum(spent) / len(spent),
        "seconds_per_update": seconds / options.updates,
        "checkpoint_mb": size / 1e6,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:24s} {value:8.4f}" for name, value in result.items()))


def _newest(run: Path) -> Path:
    from customized_grpo.runs.checkpoint import checkpoint_folders

    return checkpoint_folders(run)[-1]


if __name__ == "__main__":
    main()
