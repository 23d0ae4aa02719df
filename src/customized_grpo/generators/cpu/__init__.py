"""Kernels for a CPU: the laptop's way through a transformer."""
