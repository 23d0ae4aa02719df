"""Is an evaluation bound by its encoder? Pictures per second of both.

    python benchmarks/evaluation.py --json

Outputs are 512 px PNGs in a folder with a manifest, made here; the encoder is a ViT-S/16 with
random weights in float32, as DINO's. The whole: everything that `cgrpo evaluate` does, from reading
the photos to writing the gallery. The encoder alone: its forward on pixels that are there, just
before and just after. MFU = its useful FLOPs / seconds / the fastest float32 matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

SUBJECTS, PHOTOS, SIDE = 30, 5, 512


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=750, help="outputs (default: 750)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.count, options.batch_size, options.device)
    result["threads"] = options.threads
    for name, value in result.items():
        print(f"{name:32s} {value}")
    if options.json:
        print(json.dumps(result))


def measure(folder: Path, count: int, batch_size: int, device_name: str) -> dict[str, Any]:
    """All numbers of one evaluation in a folder that is empty."""
    import torch

    from customized_grpo.config import BenchmarkConfig
    from customized_grpo.config.decoding import decode
    from customized_grpo.devices import pick_device
    from customized_grpo.evaluation.benchmark import evaluate_benchmark
    from customized_grpo.tools.estimate.counting import count as count_flops
    from customized_grpo.tools.estimate.devices import matmul_peak, synchronize

    device = pick_device(device_name)
    write_inputs(folder, count)
    model: Any = save_encoder(folder / "encoder")
    model.to(device)
    metric = {"type": "customized_grpo.rewards.dino:DinoConfig", "name": "dino"}
    raw = {
        "name": "evaluation",
        "output_dir": str(folder),
        "device": device.type,
        "benchmark": {"type": "jsonl", "path": str(folder / "prompts.jsonl")},
        "images": str(folder / "outputs"),
        "metrics": [metric | {"objective": "identity", "path": str(folder / "encoder")}],
        "batch_size": batch_size,
    }
    config = decode(raw, "benchmark", BenchmarkConfig)
    pixels = torch.rand(batch_size, 3, 224, 224, device=device)

    @torch.no_grad()
    def encode() -> None:
        model(pixels)
        synchronize(device)

    batches = max(1, min(10, count // batch_size))
    before = seconds_per_call(encode, batches)
    start = time.perf_counter()
    evaluate_benchmark(config)
    whole = time.perf_counter() - start
    alone = (before + seconds_per_call(encode, batches)) / 2 / batch_size
    with torch.no_grad():
        flops = count_flops(lambda: model(pixels[:1])).flops
    pictures = count + SUBJECTS * PHOTOS
    peak = matmul_peak(torch.float32, device)
    return {
        "outputs": count,
        "pictures": pictures,
        "seconds": whole,
        "pictures_per_second": pictures / whole,
        "encoder_pictures_per_second": 1 / alone,
        "share_of_encoder_rate": alone * pictures / whole,
        "mfu": flops * pictures / whole / peak,
        "encoder_mfu": flops / alone / peak,
        "flops_per_picture": flops,
        "peak_float32_flops_per_second": peak,
    }


def seconds_per_call(function, repeats: int) -> float:
    """Median, after one call to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[repeats // 2]


def write_inputs(folder: Path, count: int) -> None:
    """Photos, prompts, outputs and their manifest."""
    from concurrent.futures import ThreadPoolExecutor

    from customized_grpo.config import JsonlSet
    from customized_grpo.evaluation.manifest import MANIFEST, write_manifest
    from customized_grpo.evaluation.sets import build_set

    if count % SUBJECTS:
        raise SystemExit(f"--count must be a multiple of {SUBJECTS}, got {count}")
    photos = {
        f"subject-{n}": [f"photos/{n}-{i}.png" for i in range(PHOTOS)] for n in range(SUBJECTS)
    }
    rows = [
        {"subject": s, "prompt": f"{s} in place {p}", "references": files[:1], "photos": files}
        for s, files in photos.items()
        for p in range(count // SUBJECTS)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = [f"{number:05d}.png" for number in range(count)]
    names = [folder / file for files in photos.values() for file in files]
    names += [folder / "outputs" / file for file in outputs]
    with ThreadPoolExecutor() as pool:
        list(pool.map(paint, names, range(len(names))))
    wanted = build_set(JsonlSet(path=str(folder / "prompts.jsonl")), num_images=1)
    (folder / "outputs" / MANIFEST).write_text(write_manifest(wanted.items, outputs))


def paint(path: Path, seed: int) -> None:
    """Shapes with fine grain: about as large a file as a photo's."""
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = random.integers(-6, 7, smooth.shape, dtype=np.int16)
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path)


def save_encoder(folder: Path):
    """A ViT-S/16 of DINO's shape, with random weights."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)
    return model


if __name__ == "__main__":
    main()
