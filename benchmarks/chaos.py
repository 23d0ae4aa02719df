"""Kills a run over and over, resumes it, and compares what it computed with a run left in peace.

    python benchmarks/chaos.py --kills 50
    python benchmarks/chaos.py --kills 10 --processes 2

Every life of the run ends by a real SIGKILL: after a random time, or at a random one of the calls
that write (a rename, an fsync, a tensor file, a deletion). Then the run is resumed. In the end
weights, metrics (but for seconds), advantages and pictures must be the same, bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from customized_grpo.config import RunConfig, load_config
from customized_grpo.runs import checkpoint
from customized_grpo.training.train import train

ROOT = Path(__file__).parents[1]
RUN = {
    "mixed_precision": "no",
    "lora.rank": 4,
    "rollout.num_steps": 3,
    "rollout.num_trained_steps": 2,
    "rollout.group_size": 2,
    "rollout.prompts_per_rollout": 2,
    "rollout.batch_size": 2,
    "train.inner_updates": 2,
    "train.sample_every": 4,
    "train.save_every": 2,
    "evaluation.validate_every": 4,
    "evaluation.num_validation": 2,
    "evaluation.num_examples": 4,
}
WRITES: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (Path, "rename"),
    (checkpoint, "save_file"),
    (shutil, "rmtree"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--updates", type=int, default=24, help="of the run (default: 24)")
    parser.add_argument("--processes", type=int, default=1, help="of the run (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        moments = random.Random(options.seed)
        result = chaos(Path(folder), options.kills, options.updates, options.processes, moments)
    if options.json:
        print(json.dumps(result))
    return 0 if result["identical"] else 1


def chaos(
    folder: Path, kills: int, updates: int, processes: int, moments: random.Random
) -> dict[str, Any]:
    """Runs both and compares."""
    rank = ("--lora.rank", "128")  # the config's: writing takes long enough to be killed in it
    peaceful, troubled = (small_run(folder, n, updates, *rank) for n in ("peaceful", "troubled"))
    started = time.monotonic()
    if life(peaceful, processes, lambda: None) != 0:
        raise SystemExit("the run that is left in peace has failed")
    seconds = time.monotonic() - started
    died: dict[str, int] = {}
    done = 0
    while done < kills:
        kind, plan = choose(moments, seconds)
        code = life(troubled, processes, plan)
        if code == 0:  # it has finished: take its end away, so that it has to go on
            rewind(folder / "troubled", moments)
            continue
        if code != -signal.SIGKILL:
            raise SystemExit(f"a life ended with exit code {code}, not by the kill")
        done += 1
        died[kind] = died.get(kind, 0) + 1
        print(f"kill {done}/{kills}: {kind}, {where(folder / 'troubled')}", flush=True)
    if life(troubled, processes, lambda: None) != 0:
        raise SystemExit("the last resume has failed")
    different = differences(folder / "peaceful", folder / "troubled")
    print("bit-identical" if not different else f"DIFFERENT: {', '.join(different)}")
    return {"kills": done, "by": died, "identical": not different, "different": different}


def small_run(folder: Path, name: str, updates: int, *flags: str) -> RunConfig:
    """The embedded default, cut down to about a second per rollout."""
    fields = RUN | {"train.num_updates": updates, "output_dir": folder, "name": name}
    words = [word for field, value in fields.items() for word in (f"--{field}", str(value))]
    return load_config(ROOT / "configs" / "emoji.yaml", [*words, *flags])


def choose(moments: random.Random, seconds: float) -> tuple[str, Callable[[], None]]:
    """Where the next life ends."""
    if moments.random() < 0.5:
        delay = moments.uniform(0.2, seconds)
        return "after a random time", lambda: die_after(delay)
    owner, name = moments.choice(WRITES)
    number = moments.randint(1, 12)
    return f"at {getattr(owner, '__name__', owner)}.{name}", lambda: die_at(owner, name, number)


def die_after(delay: float) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, delay)


def die_at(owner: Any, name: str, number: int) -> None:
    """SIGKILL in place of the ``number``-th call, or in the middle of it where it writes a file."""
    before, calls = getattr(owner, name), iter(range(1, 10**9))

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            if name == "save_file":  # half a file
                args[1].write_bytes(b"\0" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **kwargs)

    setattr(owner, name, deadly)


def life(config: RunConfig, processes: int, plan: Callable[[], None]) -> int:
    """Begins or resumes the run in processes of its own; returns how the first to end has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def live(rank: int) -> None:
        logging.disable(logging.CRITICAL)
        if processes > 1:  # as torchrun would
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in place.items()}
        with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
            plan()
            train(config, resume=True)

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=live, args=(rank,)) for rank in range(processes)]
    for process in ranks:
        process.start()
    ended = multiprocessing.connection.wait([process.sentinel for process in ranks])
    first = next(process for process in ranks if process.sentinel in ended)
    first.join()
    code = first.exitcode
    for process in ranks:
        if code:
            process.kill()
        process.join()
        code = code or process.exitcode
    assert code is not None
    return code


def rewind(run: Path, moments: random.Random) -> None:
    """Leaves a random one of a finished run's checkpoints, as if it had been killed after that."""
    folders = checkpoint.checkpoint_folders(run)
    keep = moments.randrange(len(folders) + 1)
    for folder in folders[keep:]:
        shutil.rmtree(folder)
    (run / "finished.json").unlink()


def where(run: Path) -> str:
    """What the killed run has left."""
    folders = [folder.name for folder in checkpoint.checkpoint_folders(run)]
    leftovers = len(list(run.rglob("*.tmp")) + list(run.rglob("*.old"))) if run.exists() else 0
    return f"checkpoints {' '.join(folders) or 'none'}, {leftovers} half-written"


def differences(one: Path, other: Path) -> list[str]:
    """Files that are not the same, but for times, places and checkpoints."""
    contents = [content(one), content(other)]
    return [n for n in sorted(set().union(*contents)) if contents[0].get(n) != contents[1].get(n)]


def content(run: Path) -> dict[str, object]:
    """Every file that the run computed, as bytes; what is there besides is times and places."""
    found: dict[str, object] = {}
    for file in run.rglob("*"):
        name = str(file.relative_to(run))
        if file.is_dir() or name.startswith("checkpoints") or name in (".lock", "config.yaml"):
            continue
        found[name] = file.read_bytes()
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found[name] = [
                {k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows
            ]
        elif file.suffix == ".safetensors":  # which writes its metadata in any order
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            found[name] = metadata, {k: t.numpy().tobytes() for k, t in load_file(file).items()}
    return found


if __name__ == "__main__":
    sys.exit(main())
