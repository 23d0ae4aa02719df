"""Where the log of a run goes besides its folder: TensorBoard, Weights & Biases, trackio, yours.

``metrics.jsonl`` is the source of truth. A sink gets the same numbers under the same names, and the
sample pictures, on a thread of its own (`feed`): it can neither stop nor slow the training.
"""
