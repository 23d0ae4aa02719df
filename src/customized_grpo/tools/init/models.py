"""Which of the configs that ship a project starts from, and what the user has to do first."""

from __future__ import annotations

from dataclasses import dataclass

from customized_grpo.errors import ConfigError

EMBEDDED = "embedded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Something for the user to do."""

    why: str
    command: str = ""
    """For a shell; '' = not in one."""

    def lines(self) -> list[str]:
        """As it is shown: the command stands alone, to be pasted."""
        return [f"{self.why}:", f"  {self.command}"] if self.command else [self.why]


_HUB = "https://huggingface.co/black-forest-labs"
_LOGIN = Step(why="log in to the hub, with a token of yours that may read", command="hf auth login")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model that can be taken."""

    name: str
    config: str
    """File among the configs that ship."""
    memory: int
    """GB of a GPU that its config is made for (computed, docs/generators.md)."""
    side: int = 512
    """Pixels of what it makes."""
    before: tuple[Step, ...] = ()
    """What has to be done once."""


def _licence(repository: str) -> Step:
    return Step(why=f"accept the licence of the weights at {_HUB}/{repository}")


def _extra(name: str) -> Step:
    return Step(
        why="install what reads the model in fewer bits",
        command=f"pip install 'customized-grpo[{name}]'",
    )


MODELS = {
    model.name: model
    for model in (
        Model(name=EMBEDDED, config="emoji.yaml", memory=0, side=64),
        Model(name="flux2-klein", config="flux2-klein.yaml", memory=24),
        Model(
            name="flux-kontext-24gb",
            config="flux-kontext-24gb.yaml",
            memory=24,
            before=(_extra("bitsandbytes"), _licence("FLUX.1-Kontext-dev"), _LOGIN),
        ),
        Model(
            name="flux-kontext",
            config="flux-kontext.yaml",
            memory=80,
            before=(_licence("FLUX.1-Kontext-dev"), _LOGIN),
        ),
        Model(
            name="qwen-image-edit-plus",
            config="qwen-image-edit-plus.yaml",
            memory=80,
            before=(_extra("torchao"),),
        ),
        Model(
            name="uno",
            config="uno-paper.yaml",
            memory=80,
            before=(_licence("FLUX.1-dev"), _LOGIN),
        ),
    )
}


def choose_model(name: str | None, memory: float | None) -> Model:
    """The model of that name, or a sensible one for the memory of a GPU in GB.

    Without either, for this machine's GPU; the embedded model where there is none.

    Raises:
        ConfigError: if it does not fit.
    """
    if name is not None:
        model = MODELS[name]
        if memory is not None and memory < model.memory:
            raise ConfigError(
                f"--model {name} is set up for a GPU of {model.memory} GB, got --gpu-memory "
                f"{memory:g}; take {_fitting(memory).name}, or leave --gpu-memory out to try it"
            )
        return model
    found = _gpu_memory() if memory is None else memory
    model = _fitting(found)
    if memory is not None and model.name == EMBEDDED:
        raise ConfigError(
            f"--gpu-memory must be at least 24 for the smallest of the large models, got {memory:g}"
            "; rent a larger GPU, or write --model embedded to try it all on the CPU"
        )
    return model


def _fitting(memory: float) -> Model:
    """FLUX.1 Kontext where there is room for it, else the fastest of those that fit."""
    fitting = ("flux-kontext", "flux2-klein", EMBEDDED)
    return next(MODELS[name] for name in fitting if MODELS[name].memory <= memory)


def _gpu_memory() -> int:
    """GB of this machine's GPU, as its maker counts them; 0 where there is none."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return round(torch.cuda.get_device_properties(0).total_memory / 1e9)
