"""The emoji world: rendered references, prompts and targets, as many as a run asks for."""

from customized_grpo.data.emoji.world import EmojiBatch, EmojiWorld

__all__ = ["EmojiBatch", "EmojiWorld"]
