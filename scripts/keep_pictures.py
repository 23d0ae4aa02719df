"""Keeps the pictures of a study's method in the package, for the demo to show beside its own.

python scripts/keep_pictures.py docs/results/proof naive-1to1

Writes assets/naive.png and naive.json: seed 0's pictures of the first held-out examples, unselected
ones, and which of them are wrong. To be called again when the study's results change.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from customized_grpo.evaluation.hero import NAIVE, keep
from customized_grpo.evaluation.results import Results
from customized_grpo.evaluation.study import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="results of a study, with its pictures")
    parser.add_argument("method", help="as results.json calls it")
    parser.add_argument("--target", type=Path, default=NAIVE, help="without suffix")
    options = parser.parse_args()
    results = Results.read(options.folder / RESULTS)
    keep(results, options.folder, options.method, options.target)


if __name__ == "__main__":
    main()
