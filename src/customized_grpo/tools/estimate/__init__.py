"""What a run will cost: FLOPs, bytes, seconds and memory from a config, without its weights."""
