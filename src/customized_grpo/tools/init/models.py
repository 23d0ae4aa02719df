"""Which of the configs that ship a project starts from, and what the user has to do first."""

from __future__ import annotations

from dataclasses import dataclass

from customized_grpo.errors import ConfigError

EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class Step:
    """Something for the user to do."""

    why: str
    command: str = ""
    """For a shell; '' = not in one."""

    def lines(self) -> list[str]:
        """As it is shown: the command stands alone, to be pasted."""
        return [f"{self.why}:", f"  {self.command}"] if self.command else [self.why]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model that can be taken, and its config."""

    name: str
    config: str
    """File among the configs that ship."""
    memory: int
    """GB of a GPU that its config is made for (computed, docs/generators.md)."""
    side: int = 512
    """Pixels of what it makes."""
    extra: str = ""
    """The extra of this package that reads the model in fewer bits."""
    licence: str = ""
    """The repository of black-forest-labs whose licence has to be accepted."""

    @property
    def before(self) -> list[Step]:
        """What has to be done once."""
        install = Step(
            "install what reads the model in fewer bits",
            f"pip install 'customized-grpo[{self.extra}]'",
        )
        page = f"https://huggingface.co/black-forest-labs/{self.licence}"
        accept = Step(f"accept the weights' licence at {page}")
        login = Step("log in to the hub, with a token of yours that may read", "hf auth login")
        return [install] * bool(self.extra) + [accept, login] * bool(self.licence)


_KONTEXT = "FLUX.1-Kontext-dev"
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(name=EMBEDDED, config="emoji.yaml", memory=0, side=64),
        Preset(name="flux2-klein-base", config="flux2-klein-base.yaml", memory=24),
        Preset(name="flux2-klein", config="flux2-klein.yaml", memory=24),
        Preset(
            name="flux3-klein-base",
            config="flux3-klein-base.yaml",
            memory=48,
            licence="flux-3-image-klein-base",
        ),
        Preset(
            name="flux-kontext-24gb",
            config="flux-kontext-24gb.yaml",
            memory=24,
            extra="bitsandbytes",
            licence=_KONTEXT,
        ),
        Preset(name="flux-kontext", config="flux-kontext.yaml", memory=80, licence=_KONTEXT),
        Preset(name="qwen-image-2.1", config="qwen-image-2.1.yaml", memory=48),
        Preset(
            name="qwen-image-edit-plus",
            config="qwen-image-edit-plus.yaml",
            memory=80,
            extra="torchao",
        ),
        Preset(name="uno", config="uno-paper.yaml", memory=80, licence="FLUX.1-dev"),
    )
}


def choose_preset(name: str | None, memory: float | None) -> Preset:
    """The model of that name, or a sensible one for the memory of a GPU in GB.

    Without either, for this machine's GPU; the embedded model where there is none.

    Raises:
        ConfigError: if it does not fit.
    """
    if name is not None:
        preset = PRESETS[name]
        if memory is not None and memory < preset.memory:
            raise ConfigError(
                f"--model {name} is set up for a GPU of {preset.memory} GB, got --gpu-memory "
                f"{memory:g}; take {_fitting(memory).name}, or leave --gpu-memory out to try it"
            )
        return preset
    found = _gpu_memory() if memory is None else memory
    preset = _fitting(found)
    if memory is not None and preset.name == EMBEDDED:
        raise ConfigError(
            f"--gpu-memory must be at least 24 for the smallest of the large models, got {memory:g}"
            "; rent a larger GPU, or write --model embedded to try it all on the CPU"
        )
    return preset


def _fitting(memory: float) -> Preset:
    """FLUX.1 Kontext where there is room for it, else the smallest that is not distilled."""
    fitting = ("flux-kontext", "flux2-klein-base", EMBEDDED)
    return next(PRESETS[name] for name in fitting if PRESETS[name].memory <= memory)


def _gpu_memory() -> int:
    """GB of this machine's GPU, as its maker counts them; 0 where there is none."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return round(torch.cuda.get_device_properties(0).total_memory / 1e9)
