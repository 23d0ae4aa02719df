"""Which kernel computes a transformer's attention, through diffusers' dispatch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from customized_grpo.errors import ConfigError

Attention = Literal[
    "auto", "sdpa", "math", "efficient", "cudnn", "flash", "flash_varlen", "xformers"
]
_BACKENDS = {
    "sdpa": "native",  # torch chooses among its kernels
    "math": "_native_math",
    "efficient": "_native_efficient",
    "cudnn": "_native_cudnn",
    "flash": "flash",
    "flash_varlen": "flash_varlen",
    "xformers": "xformers",
}
"""Those of diffusers that can be trained through."""
_PACKAGES = {"flash": "flash-attn", "flash_varlen": "flash-attn", "xformers": "xformers"}
_ON_A_CPU_TOO = ("auto", "sdpa", "math")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def check_attention(name: Attention) -> None:
    """Whether this machine has what a kernel needs.

    Raises:
        ConfigError: if it has no GPU, or not the package.
    """
    from diffusers import attention_backend

    if name not in _ON_A_CPU_TOO and not torch.cuda.is_available():
        raise ConfigError(f"attention: {name!r} needs a GPU, and none is visible; use 'sdpa'")
    if name in _PACKAGES:
        try:
            with attention_backend(_BACKENDS[name]):
                pass
        except RuntimeError as error:
            raise ConfigError(
                f"attention: {name!r} needs another package ({error}); pip install "
                f"{_PACKAGES[name]}, or use 'sdpa'"
            ) from error


def use_attention(transformer: Any, name: Attention) -> None:
    """Makes all of a diffusers transformer's attention that of a kernel; ``auto``: as it is.

    Raises:
        ConfigError: see ``check_attention``.
    """
    from diffusers import attention_backend

    check_attention(name)
    if name == "auto":
        return
    with attention_backend(_BACKENDS[name]):  # diffusers makes it every other model's default too
        transformer.set_attention_backend(_BACKENDS[name])
    if name in _PACKAGES:
        for module_name, module in transformer.named_modules():
            if module_name.rpartition(".")[2] in _NORMS:
                module.register_forward_hook(_in_the_dtype_of_its_input)


def _in_the_dtype_of_its_input(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """CUDA's autocast leaves norms in float32, and casts for torch's own kernels only."""
    return output.to(inputs[0].dtype)
