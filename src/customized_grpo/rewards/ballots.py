"""The folder in which a run asks people about its pictures, and they answer.

    pictures/DIGEST.png   what is shown, under the digest of its pixels; kept
    asked-DIGEST.json     what one reward in one process of a run waits for; replaced as a whole
    votes.jsonl           a vote a line, appended to by any number of writers

A group is known by its content, so that votes for the same pictures count after a break too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor

from customized_grpo.config import decode
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.files import append_line, read_text, write_atomic
from customized_grpo.pictures import png, to_pil

VOTES = "votes.jsonl"
_PICTURES, _ASKED = "pictures", "asked-{}.json"
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Pictures of one prompt that a person is to compare."""

    id: _Digest
    """Digest of question, prompt, references and pictures: whatever a vote has to name."""
    question: str
    prompt: str
    references: tuple[_Digest, ...]
    pictures: Annotated[tuple[_Digest, ...], Field(min_length=1)]
    """In the order of the group; pictures that are the same to the bit share a digest."""
    needs_worst: bool
    """Whether a vote names the worst picture too."""
    min_votes: int
    """People who have to vote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """What one person said of a group; of several by one person the last counts."""

    group: _Digest
    prompt: str
    pictures: tuple[_Digest, ...]
    best: _Digest | None
    """None: there is no difference."""
    worst: _Digest | None
    voter: Annotated[str, Field(min_length=1)]
    time: str
    """When, in UTC."""


class Ballots:
    """See the module; the folder is made when something is first written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: tuple[int, int] | None = None  # size and time of the votes that were read
        self._votes: dict[str, list[Vote]] = {}
        self._lock = Lock()

    def group(
        self,
        question: str,
        prompt: str,
        references: Sequence[Tensor],
        pictures: Sequence[Tensor],
        needs_worst: bool,
        min_votes: int,
    ) -> Group:
        """A group of pictures ``[3, H, W]`` in [0, 1], which are written where they can be seen."""
        shown = tuple(self._keep(picture) for picture in references)
        compared = tuple(self._keep(picture) for picture in pictures)
        content = json.dumps([question, prompt, shown, compared])
        return Group(
            id=_digest(content.encode("utf-8", errors="surrogatepass")),
            question=question,
            prompt=prompt,
            references=shown,
            pictures=compared,
            needs_worst=needs_worst,
            min_votes=min_votes,
        )

    def _keep(self, picture: Tensor) -> str:
        pixels = np.asarray(to_pil(picture))
        digest = _digest(repr(pixels.shape).encode() + pixels.tobytes())
        file = self.picture(digest)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, png(picture))
        return digest

    def picture(self, digest: str) -> Path:
        """Where a picture lies."""
        return self.folder / _PICTURES / f"{digest}.png"

    def ask(self, name: str, groups: Iterable[Group]) -> None:
        """Replaces what the process ``name`` waits for; of nothing nothing is left."""
        file, waiting = self._asked(name), [asdict(group) for group in groups]
        if waiting:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps({"groups": waiting}, indent=1) + "\n")
        else:
            file.unlink(missing_ok=True)

    def forget(self) -> None:
        """No process waits for anything."""
        for file in self.folder.glob(_ASKED.format("*")):
            file.unlink(missing_ok=True)

    def asked(self) -> list[Group]:
        """Groups that a run waits for, those of all its processes."""
        files = sorted(self.folder.glob(_ASKED.format("*")))
        groups = [group for file in files for group in read_asked(file)]
        return list({group.id: group for group in groups}.values())

    def _asked(self, name: str) -> Path:
        # A reward's name may be no name of a file.
        return self.folder / _ASKED.format(_digest(name.encode())[:12])

    def cast(self, vote: Vote) -> None:
        """Appends a vote."""
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self.folder / VOTES, json.dumps(asdict(vote), ensure_ascii=False))

    def votes(self) -> dict[str, list[Vote]]:
        """Group -> the votes that count: one of every person, the last.

        Raises:
            DataError: naming the line that is no vote.
        """
        file = self.folder / VOTES
        try:
            status = file.stat()
        except FileNotFoundError:
            return {}
        with self._lock:  # pages are served on threads
            if (now := (status.st_size, status.st_mtime_ns)) != self._read:
                last = {(vote.group, vote.voter): vote for vote in read_votes(file)}
                votes: dict[str, list[Vote]] = {}
                for vote in last.values():
                    votes.setdefault(vote.group, []).append(vote)
                self._votes, self._read = votes, now
            return self._votes


def read_asked(file: Path) -> tuple[Group, ...]:
    """What one process waits for; nothing, if it has got it meanwhile.

    Raises:
        DataError: if the file holds something else.
    """
    try:
        text = read_text(file)
    except DataError:
        if file.exists():
            raise
        return ()
    return _decoded(text, str(file), _Asked).groups


def read_votes(file: Path) -> list[Vote]:
    """All votes in the order in which they were cast; a last line that is being written waits.

    Raises:
        DataError: naming the line that is no vote.
    """
    *lines, last = read_text(file).split("\n")
    found = [
        _decoded(line, f"{file}:{number}", Vote)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    return found + ([_decoded(last, f"{file}:{len(lines) + 1}", Vote)] if _is_json(last) else [])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    groups: tuple[Group, ...]


def _decoded(text: str, where: str, cls: type) -> Any:
    try:
        return decode(json.loads(text), where, cls)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}; remove it") from error
    except ConfigError as error:
        raise DataError(str(error)) from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def is_answered(group: Group, votes: Mapping[str, Sequence[Vote]]) -> bool:
    """Whether as many people have voted as have to; ``votes`` are those of all groups."""
    return len(votes.get(group.id, ())) >= group.min_votes


def best_worst_scores(group: Group, votes: Mapping[str, Sequence[Vote]]) -> list[float]:
    """How often each picture was the best less how often the worst, per vote, in [-1, 1]; NaN for
    a group without enough votes; ``votes`` are those of all groups.

    Counts of best-worst scaling (Kiritchenko and Mohammad, arXiv:1712.01765).
    """
    if not is_answered(group, votes):
        return [math.nan] * len(group.pictures)
    best, worst = zip(*((vote.best, vote.worst) for vote in votes[group.id]), strict=True)
    return [(best.count(p) - worst.count(p)) / len(best) for p in group.pictures]
