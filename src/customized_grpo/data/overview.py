"""What a run will be trained on: counts, shapes, prompts, and the first batch as a picture."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from customized_grpo.buckets import NAMES, RATIOS, nearest_ratio
from customized_grpo.config import Plug, RunConfig
from customized_grpo.data.base import DataSource
from customized_grpo.data.images import Picture
from customized_grpo.data.listed import Entry, ListedSource, Loadable
from customized_grpo.data.streamed import StreamedSource
from customized_grpo.data.texts import short
from customized_grpo.errors import within
from customized_grpo.pictures import save_grid

logger = logging.getLogger("customized_grpo")

_MOST_REMARKS = 40
_MUCH = 0.25


def show_data(config: RunConfig, picture: Path) -> str:
    """Draws the first training batch into ``picture`` (PNG) and returns a description in text.

    Raises:
        DataError, ConfigError: at the first mistake in the data, as before a run.
    """
    logger.info("reading data: %s", config.data.type)
    with within("data"):
        source: DataSource = config.data.build(config.seed)
    batch = source.training(0, config.rollout.prompts_per_rollout)
    further = {
        f"reference {number + 1}": [example.references[number] for example in batch]
        for number in range(1, len(batch[0].references))
    }
    picture.parent.mkdir(parents=True, exist_ok=True)
    save_grid(picture, batch, further)
    lines = [*count_lines(source), *remark_lines(config, source)]
    return "\n".join([*lines, "first batch:", *(f"  {e.prompt}" for e in batch)])


def count_lines(source: DataSource) -> list[str]:
    """How many examples of what shapes a source has."""
    if isinstance(source, StreamedSource):
        return ["examples: streamed, and not counted"]
    if not isinstance(source, ListedSource):
        examples = source.listed()
        return [f"examples: {len(examples)}" if examples else "examples: without end"]
    splits = source.splits
    different = len({entry.id for entry in splits.training})
    repeats = "" if different == len(splits.training) else f" with repeats, {different} different"
    lines = [
        f"training: {len(splits.training)} examples{repeats}",
        f"held out: {len(splits.held_out)}, validation: {len(splits.validation)}",
        "references, width:height:",
    ]
    counts = {key: len(entries) for key, entries in source.layouts.items()}
    for key, count in Counter(counts).most_common():
        lines.append(f"  {' + '.join(NAMES[index] for index in key)}: {count} examples")
    return lines


def remark_lines(config: RunConfig, source: DataSource) -> list[str]:
    """What of the data is not used, or in part: files, ends of pictures, ends of prompts."""
    if isinstance(source, StreamedSource):
        return [*source.remarks, *long_prompt_lines(config, source)]
    if not isinstance(source, ListedSource):
        return long_prompt_lines(config, source)
    rest = len(source.remarks) - _MOST_REMARKS
    more = [f"and {rest} more"] if rest > 0 else []
    parts = [*_cropped_lines(source.splits.training), *long_prompt_lines(config, source)]
    return [*source.remarks[:_MOST_REMARKS], *more, *parts]


def long_prompt_lines(config: RunConfig, source: DataSource) -> list[str]:
    """See read_in_part: of a run's models and the prompts of its data, in a stream of a block."""
    if isinstance(source, StreamedSource):
        prompts = source.prompts
    else:
        prompts = [example.prompt for example in source.listed()]
    plugs: dict[str, Plug] = {"generator": config.generator}
    for field in ("rewards", "evaluators"):
        plugs |= {f"{field}.{reward.label}": reward for reward in getattr(config, field)}
    return read_in_part(plugs, prompts)


def read_in_part(plugs: Mapping[str, Plug], prompts: Iterable[str]) -> list[str]:
    """A line for each model that reads some prompts in part, which says so nowhere else."""
    prompts, lines = list(dict.fromkeys(prompts)), []
    for where, plug in plugs.items():
        if (limit := plug.text_limit()) is None:
            continue
        # A token is a byte at least, and few are added: most prompts need not be counted.
        asked = [p for p in prompts if len(p.encode()) > limit.most // 2]
        counts = dict(zip(asked, limit.count(asked) if asked else [], strict=True))
        if long := [prompt for prompt, count in counts.items() if count > limit.most]:
            lines.append(
                f"{where}: reads {limit.most} tokens of a prompt; {len(long)} of {len(prompts)} "
                f"prompts are longer and their ends have no effect, the first ({counts[long[0]]} "
                f"tokens): {short(long[0])}"
            )
    return lines


def _cropped_lines(entries: Sequence[Entry]) -> list[str]:
    """A line if references lose much where they are cropped to the nearest ratio."""
    lost: dict[Loadable, float] = {}
    for picture in (picture for entry in entries for picture in entry.references):
        ratio, kept = (
            picture.height / picture.width,
            RATIOS[nearest_ratio(picture.height, picture.width)],
        )
        if (share := 1 - min(ratio / kept, kept / ratio)) > _MUCH:
            lost[picture] = share
    if not lost:
        return []
    worst = max(lost, key=lambda picture: lost[picture])
    name = worst.path.name if isinstance(worst, Picture) else "one"
    return [
        f"cropped: {len(lost)} pictures lose more than {_MUCH:.0%} of a side, {name} the most, "
        f"{lost[worst]:.0%}; crop them around the subject yourself"
    ]
