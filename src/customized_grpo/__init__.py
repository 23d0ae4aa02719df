"""Customized-GRPO: online RL for subject-driven image generation (arXiv:2510.18263)."""
