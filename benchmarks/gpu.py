"""One GPU, a few minutes: what does RL on FLUX.1 Kontext cost here, and what does each choice gain?

    python benchmarks/gpu.py --minutes 8 --out gpu.json
    python benchmarks/gpu.py --show gpu.json        the tables of docs/performance.md
    python benchmarks/gpu.py --device cpu --tiny    the same code on small shapes

FLUX.1-Kontext's shape (512 x 512, one reference, 512 text tokens, T5-XXL and all) with random
weights, `configs/flux-kontext.yaml` with one prompt per rollout and fewer trained steps, rewarded
by a DINOv2-base and a CLIP-L: rollout and update by the trainer's own loop. Then parts of it in
other ways, and the embedded world's training. Nothing is downloaded. Parts come in order of value,
each under a time limit; what is known is written after every number. A part that fails leaves its
traceback, and the others go on.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _gpu_tables import show
from _gpu_world import World, batch_of, watched
from _iterations import DEFAULT_CONFIG, measure, parse

KONTEXT = Path(__file__).parents[1] / "configs" / "flux-kontext.yaml"
ONE_GROUP = ("--rollout.prompts_per_rollout=1", "--train.inner_updates=1")
TINY = (
    *ONE_GROUP, "--rollout.group_size=4", "--rollout.num_steps=3", "--rollout.batch_size=4",
    "--train.micro_batch_size=2", "--generator.height=64", "--generator.width=64",
    "--generator.max_sequence_length=32", "--generator.dtype=bfloat16",
    "--generator.offload=true", "--generator.gradient_checkpointing=true",
)  # fmt: skip
BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3")
LAYOUTS = (  # gradient checkpointing, pairs per backward; the last are meant not to fit 80 GB
    (True, 1), (True, 4), (True, 12), (False, 1), (False, 2), (False, 3), (False, 6),
)  # fmt: skip
_KINDS = {
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "addmm", "aten::mm", "bmm"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
}


class OutOfTime(BaseException):
    """Of a part; no `except Exception` on the way keeps it."""


def main() -> None:
    """Measures what there is time for, and prints the tables."""
    number, text, flag = {"type": float}, {"type": str}, {"action": "store_true"}
    options = parse(
        __doc__ or "",
        (
            "--device",
            {"default": "auto", "choices": ("auto", "cuda", "cpu"), "help": "default: auto"},
        ),
        ("--tiny", {**flag, "help": "the embedded generator's shapes"}),
        ("--minutes", {**number, "default": 8.0, "help": "no part begins later (default: 8)"}),
        ("--parts", {**text, "default": "", "help": f"of {', '.join(PARTS)}; default: all"}),
        ("--trained-steps", {"type": int, "default": 5, "help": "K of the iteration (default: 5)"}),
        ("--out", {"type": Path, "default": Path("gpu.json"), "help": "default: gpu.json"}),
        ("--show", {"type": Path, "help": "only print the tables of such a file"}),
    )
    if options.show:
        print(show(json.loads(options.show.read_text())))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    bench = Bench(options, time.monotonic() + 60 * options.minutes)
    for name in options.parts.split(",") if options.parts else PARTS:
        bench.run(name)
    wait([bench.counts], timeout=60)  # it has had the time of the parts
    bench.save()
    print(show(bench.result))
    if options.json:
        print(json.dumps(bench.result))


class Bench:
    """The result, the clock, and the model while it is the same from part to part."""

    def __init__(self, options: Any, deadline: float) -> None:
        import torch

        from customized_grpo.config import dump_config
        from customized_grpo.devices import pick_device
        from customized_grpo.runs.log import describe_environment

        torch.set_num_threads(options.threads)
        self.options, self.deadline = options, deadline
        self.device = pick_device(options.device)
        self.config = flux_config(options.tiny, options.device, options.trained_steps)
        self.result: dict[str, Any] = {
            "environment": {
                **describe_environment(self.device),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            },
            "tiny": options.tiny,
            "config": dump_config(self.config),
            "rollout": asdict(self.config.rollout),
            "parts": {},
        }
        self._world: World | None = None
        # Beside the measurements, in a process of its own: it takes a while on a CPU.
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        self.counts: Future[dict[str, Any]] = pool.submit(count, dump_config(self.config))

    def run(self, name: str) -> None:
        """A part, unless there is no time left; whatever it raises stands in the result."""
        part, limit = PARTS[name]
        left = self.deadline - time.monotonic()
        entry = self.result["parts"][name] = {}
        if left < 5:
            entry["error"] = "no time was left"
            return self.save()
        started = time.monotonic()
        try:
            with time_limit(min(limit, left)):
                part(self, entry)
        except OutOfTime:
            entry["error"] = f"stopped after {time.monotonic() - started:.0f} s"
        except Exception:
            entry["error"] = traceback.format_exc()
        if "error" in entry:  # what it has left behind need not be in order
            self._world = None
        self.free()
        entry["part_seconds"] = time.monotonic() - started
        print(f"{name}: {entry['part_seconds']:.1f} s {entry.get('error', '')}", flush=True)
        self.save()

    def save(self) -> None:
        """Writes what is known so far."""
        from customized_grpo.files import write_atomic

        if self.counts.done() and "predicted" not in self.result:
            error = self.counts.exception()
            self.result["predicted"] = {} if error else self.counts.result()
            if error:
                self.result["prediction_error"] = "".join(traceback.format_exception(error))
        write_atomic(self.options.out.absolute(), json.dumps(self.result, indent=1) + "\n")

    def world(self) -> World:
        """The generator and all around it, with something to measure on; built if need be."""
        if self._world is None:
            self._world = World(self.config, self.device)
        return self._world

    def drop(self) -> None:
        """Frees the model's memory."""
        self._world = None
        self.free()

    def free(self) -> None:
        """Gives back what is not in use, so that no part begins in another one's fragments."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measured(self, function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """What it returns; its seconds and the most memory meanwhile, in bytes."""
        with watched(self.device) as numbers:
            value = function()
        return value, numbers


def flux_config(tiny: bool, device: str, trained_steps: int) -> Any:
    """The shipped recipe on one group, with random weights."""
    from _random_weights import with_random_weights

    from customized_grpo.config import load_config

    if tiny:
        config = load_config(DEFAULT_CONFIG, [*TINY, "--rollout.num_trained_steps=2"])
    else:
        config = load_config(KONTEXT, [*ONE_GROUP, f"--rollout.num_trained_steps={trained_steps}"])
    return replace(with_random_weights(config), device=device, name="gpu")


def count(config: str) -> dict[str, Any]:
    """FLOPs and memory that `cgrpo estimate` predicts for a config."""
    from customized_grpo.config import read_config
    from customized_grpo.tools.estimate.cost import predict_memory
    from customized_grpo.tools.estimate.workload import count_run

    work = count_run(read_config(config, "gpu"))
    return {
        "useful": {stage.name: stage.flops for stage in work.stages()},
        "again": {stage.name: stage.again for stage in work.stages()},
        "forward_flops": work.transformer.forward_flops,
        "pair_flops": work.transformer.pair_flops,
        "memory": {
            str(on): {**asdict(memory), "total": memory.total}
            for on in (True, False)
            for memory in [predict_memory(work, 1, fsdp=False, checkpointing=on)]
        },
    }


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside when they are over, as soon as Python is at work again."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak(bench: Bench, entry: dict[str, Any]) -> None:
    """What the device can do."""
    import torch

    from customized_grpo.tools.estimate.devices import matmul_peak

    entry["bf16_flops_per_second"] = matmul_peak(torch.bfloat16, bench.device)
    if bench.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(bench.device)
        entry.update(device_bytes=total, free_bytes=free)


def iteration(bench: Bench, entry: dict[str, Any]) -> None:
    """A rollout and its update, by the loop; encoding, decoding and rewards also by themselves."""
    world, entry["build"] = bench.measured(bench.world)
    entry["resident"] = bench.measured(lambda: None)[1]
    loop = world.loop(bench.config)
    entry["stages"] = loop.log.stages
    bench.save()
    experience = loop.collect(1)
    bench.save()
    images, batch = experience.rollout.images, batch_of(experience)
    entry["trained_pairs"] = int(batch.advantage.count_nonzero())
    with loop.log.timed("update"):
        entry["numbers"] = loop.update(batch, experience.conditioning, is_first=True)
    bench.save()
    examples = world.data.training(1, 1)
    _, entry["encode"] = bench.measured(lambda: world.generator.encode(examples))
    latents = experience.rollout.latents[:, -1]
    _, entry["decode"] = bench.measured(lambda: loop.policy.decode(latents))
    scored = examples * len(images)
    scores, entry["reward"] = bench.measured(lambda: world.rewards.score(images, scored))
    entry["reward_errors"] = scores.errors


def naive(bench: Bench, entry: dict[str, Any]) -> None:
    """Batch 1 everywhere, a backward per pair, with gradient checkpointing: as peers do it."""
    world = bench.world()
    world.checkpointing(on=True)
    entry.update(passes(bench, samples=1, pairs=8, micro_batch_size=1))
    rollout = world.experience.rollout
    latents, image = rollout.latents[:1, -1], rollout.images[:1]
    example = world.data.training(1, 1)
    for name, work in {
        "decode": lambda: world.policy.decode(latents),
        "reward": lambda: world.rewards.score(image, example),
    }.items():
        work()
        _, entry[name] = bench.measured(work)


def passes(bench: Bench, *, samples: int, pairs: int, micro_batch_size: int) -> dict[str, Any]:
    """Seconds per sample and step, and per trained pair, after a warm-up of each."""
    world, repeats = bench.world(), max(2, 4 // samples)
    world.velocity(samples)
    _, forward = bench.measured(lambda: [world.velocity(samples) for _ in range(repeats)])
    world.gradient(micro_batch_size, micro_batch_size)
    stats, pair = bench.measured(lambda: world.gradient(pairs, micro_batch_size))
    return {
        "forward_seconds": forward["seconds"] / repeats / samples,
        "pair_seconds": pair["seconds"] / pairs,
        "bytes": max(forward.get("bytes", 0), pair.get("bytes", 0)),
        "micro_batch_size": int(stats.get("micro_batch_size", micro_batch_size)),
    }


def as_configured(bench: Bench) -> dict[str, Any]:
    """The passes of the config's own batches."""
    config = bench.config
    micro = config.train.micro_batch_size
    return passes(bench, samples=config.rollout.batch_size, pairs=2 * micro, micro_batch_size=micro)


def embedded(bench: Bench, entry: dict[str, Any]) -> None:
    """The embedded generator's training, `configs/emoji.yaml`, by `cgrpo train`."""
    from customized_grpo.config import load_config

    small = ("--rollout.group_size=2", "--rollout.prompts_per_rollout=2") * bench.options.tiny
    config = load_config(bench.options.config, [*small, f"--device={bench.options.device}"])
    entry["iteration"] = measure(config, 1 if bench.options.tiny else 5)
    entry["seconds_per_update"] = entry["iteration"]["iteration"] / config.train.inner_updates
    entry["images"] = config.rollout.prompts_per_rollout * config.rollout.group_size


def attention(bench: Bench, entry: dict[str, Any]) -> None:
    """diffusers' attention backends; those that are not installed say so."""
    transformer: Any = bench.world().generator.transformer
    try:
        for backend in BACKENDS:
            try:
                transformer.set_attention_backend(backend)
                entry[backend] = as_configured(bench)
            except Exception as error:
                entry[backend] = {"error": f"{type(error).__name__}: {error}"[:300]}
            bench.save()
    finally:
        transformer.set_attention_backend("native")


def layouts(bench: Bench, entry: dict[str, Any]) -> None:
    """How many pairs per backward, with and without gradient checkpointing."""
    world = bench.world()
    try:
        for on, micro in LAYOUTS:
            world.checkpointing(on)
            name = f"{'with' if on else 'without'} checkpointing, {micro} per backward"
            pairs = micro if bench.options.tiny else 12
            entry[name] = passes(bench, samples=micro, pairs=pairs, micro_batch_size=micro)
            bench.save()
    finally:
        world.checkpointing(bench.config.generator.gradient_checkpointing)


def profile(bench: Bench, entry: dict[str, Any]) -> None:
    """Where the device's time goes in a pass of each kind."""
    world, micro = bench.world(), bench.config.train.micro_batch_size
    samples = bench.config.rollout.batch_size
    entry["rollout"] = _kernels(bench, lambda: world.velocity(samples))
    bench.save()
    entry["update"] = _kernels(bench, lambda: world.gradient(micro, micro))


def _kernels(bench: Bench, work: Callable[[], object]) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    work()
    cuda = bench.device.type == "cuda"
    kinds = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with recording(activities=kinds) as recorded:
        _, numbers = bench.measured(work)
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [(row.key, getattr(row, attribute) / 1e6, row.count) for row in recorded.key_averages()]
    found = sorted((row for row in found if row[1]), key=lambda row: -row[1])
    shares = dict.fromkeys((*_KINDS, "other"), 0.0)
    for name, seconds, _ in found:
        low = name.lower()
        # Attention first: its kernels may be built of cutlass.
        kind = next((k for k in reversed(_KINDS) if any(w in low for w in _KINDS[k])), "other")
        shares[kind] += seconds
    top = [{"name": name[:120], "seconds": s, "calls": calls} for name, s, calls in found[:25]]
    return {**numbers, "seconds_by_kind": shares, "top": top}


def fsdp(bench: Bench, entry: dict[str, Any]) -> None:
    """The weights sharded over one process: what FSDP costs where it gains nothing."""
    import torch.distributed as dist

    from customized_grpo.runs.sharding import shard

    world = bench.world()
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
        try:
            shard(world.generator.transformer, bench.device, 1)
            entry.update(as_configured(bench))
        finally:
            bench.drop()
            dist.destroy_process_group()


def compiled(bench: Bench, entry: dict[str, Any]) -> None:
    """The transformer's blocks by torch.compile, as `compile: true` has them."""
    bench.drop()
    bench.config = replace(bench.config, compile=True)
    try:
        _, entry["build"] = bench.measured(bench.world)  # its warm-up compiles
        bench.save()
        entry.update(as_configured(bench))
    finally:
        bench.config = replace(bench.config, compile=False)
        bench.drop()


PARTS: dict[str, tuple[Callable[[Bench, dict[str, Any]], None], float]] = {
    "peak": (peak, 30),
    "iteration": (iteration, 240),
    "naive": (naive, 40),
    "embedded": (embedded, 60),
    "attention": (attention, 60),
    "layouts": (layouts, 60),
    "profile": (profile, 40),
    "fsdp": (fsdp, 60),
    "compile": (compiled, 200),
}
"""In order of value, with seconds at most."""


if __name__ == "__main__":
    main()
