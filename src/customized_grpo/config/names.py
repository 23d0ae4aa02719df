"""What tables and figures call the models that others are held against.

Their names are here, below the evaluation, so that no method, run or evaluation is called alike.
"""

from __future__ import annotations

BASE = "base"
REFERENCE = "reference"
# Anchors: models whose numbers are known beforehand, and which say what numbers mean.
COPY = "copy"  # the reference itself
TRUTH, UNRELATED = "ground truth", "unrelated"  # of synthetic worlds, which know perfect answers
ORACLE, RANDOM = "real photos (oracle)", "random other subject"  # of sets with photos

ANCHORS = (COPY, TRUTH, UNRELATED, ORACLE, RANDOM)
TAKEN = (BASE, REFERENCE, *ANCHORS)
"""What a report shows beside methods and runs."""
