"""A laptop's way through a transformer: the same numbers in fewer passes over memory."""

from customized_grpo.generators.cpu.flux1 import cut_to_targets, use_cpu_blocks, use_stock_blocks
from customized_grpo.generators.cpu.merge import lora_merged, unmerged

__all__ = ["cut_to_targets", "lora_merged", "unmerged", "use_cpu_blocks", "use_stock_blocks"]
