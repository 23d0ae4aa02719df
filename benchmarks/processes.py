"""What do several processes gain? The same global batch by one process and by several.

    python benchmarks/processes.py --processes 2 --json

Both are started by torchrun and train the config by `cgrpo train`, each process on --threads
threads; medians of the iterations after the first. The machine must have a core for each thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _iterations import STAGES, logged, parse, shortened


def main() -> None:
    """Measures and prints."""
    options = parse(
        __doc__ or "",
        ("--processes", {"type": int, "default": 2, "help": "of the second run (default: 2)"}),
        ("--repeats", {"type": int, "default": 5, "help": "iterations of each (default: 5)"}),
        ("--fsdp", {"action": "store_true", "help": "shard the weights in the second run"}),
    )
    from customized_grpo.config import load_config

    config = load_config(options.config)
    flags = ["--fsdp", "true"] if options.fsdp else []
    one = _measure(config, options.repeats, 1, [])
    several = _measure(config, options.repeats, options.processes, flags)
    for stage in (*STAGES, "iteration"):
        print(f"{stage:10}{one[stage]:10.3f} s{several[stage]:10.3f} s")
    ratio = one["iteration"] / several["iteration"]
    print(f"{options.processes} processes / one: {ratio:.2f} x")
    if options.json:
        result = {"throughput_ratio": ratio, "processes": options.processes, "fsdp": options.fsdp}
        print(json.dumps({**result, "one_seconds": one, "seconds": several}))


def _measure(config, repeats: int, processes: int, flags: list[str]) -> dict[str, float]:
    from customized_grpo.config import dump_config

    with tempfile.TemporaryDirectory() as folder:
        short = shortened(config, repeats, folder)
        file = Path(folder, "run.yaml")
        file.write_text(dump_config(short))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = ["-m", "customized_grpo", "train", str(file), *flags]
        subprocess.run(
            [sys.executable, *launcher, str(processes), *command],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return logged(Path(folder, short.name), short)


if __name__ == "__main__":
    main()
