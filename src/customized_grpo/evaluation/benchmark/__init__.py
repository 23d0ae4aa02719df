"""Benchmarks: fixed subjects, photos and prompts, and what is measured of anyone's pictures."""
