"""Kinds of fields that sections and plugs share, and how large their values may be."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, Field

# Counts end where no machine could serve them: a slip of the keyboard is named here and is not an
# overflow, a full memory or a run without end later.
MOST_AT_ONCE = 65_536
Count = Annotated[int, Field(gt=0, le=MOST_AT_ONCE)]
"""Things that are in memory at a time."""
GroupSize = Annotated[int, Field(ge=2, le=MOST_AT_ONCE)]
Side = Annotated[int, Field(gt=0, le=16_384)]
"""Pixels."""
Area = Annotated[int, Field(gt=0, le=16_384**2)]
"""Pixels of a picture."""
NumSteps = Annotated[int, Field(gt=0, le=1000)]
"""Denoising steps: as many as the models have noise levels."""
NumUpdates = Annotated[int, Field(gt=0, le=10**9)]
EveryUpdates = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Rank = Annotated[int, Field(gt=0, le=16_384)]
"""Rank of an adapter; at most the width of the largest models."""
Concurrency = Annotated[int, Field(gt=0, le=1024)]
"""Threads."""
Retries = Annotated[int, Field(ge=0, le=100)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
"""At most a day."""
Minutes = Annotated[float, Field(ge=0, le=10_080)]
"""At most a week."""


def _check_variable(name: str) -> str:
    # Its value is not shown: who mistakes the field has put the secret itself there.
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError(
            "must be the name of an environment variable, in capitals such as API_KEY; a secret "
            "itself does not belong into a config"
        )
    return name


VariableName = Annotated[str, AfterValidator(_check_variable)]

FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""File or folder, `~` being the home folder, as in a shell: in a file no shell has read it."""
