"""Checkpoints on the model hub: in the cache, or allowed and small enough to be downloaded.

Only names and sizes are asked for; nothing is downloaded, and a token is never shown.
"""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from customized_grpo.tools.doctor import folders
from customized_grpo.tools.doctor.findings import Finding, gigabytes, ok, problem
from customized_grpo.tools.doctor.machine import free_space

_SECONDS = 10.0


def on_hub(field: str, repo: str, kind: folders.Kind, file: str | None = None) -> Finding:
    """A finding for a hub id ``owner/name``."""
    from huggingface_hub import constants

    snapshot = _snapshot(repo)
    gaps = None if snapshot is None else _gaps(snapshot, kind, file)
    if gaps == [] and kind == "lora" and constants.is_offline_mode():  # diffusers asks for its name
        found = f"{repo} is in the cache, but with HF_HUB_OFFLINE a LoRA is taken from a path only"
        return problem(field, found, f"--{field} {shlex.quote(str(snapshot))}")
    if gaps == []:
        return ok(field, f"{repo} is in the cache")
    state = f"{repo} is not in the cache" if gaps is None else f"{repo} in the cache: {gaps[0]}"
    if constants.is_offline_mode():
        fix = f"unset HF_HUB_OFFLINE, or copy {constants.HF_HUB_CACHE} from where it is complete"
        return problem(field, f"{state}, and HF_HUB_OFFLINE is set", fix)
    return _remote(field, repo, kind, file, state)


def _snapshot(repo: str) -> Path | None:
    """Folder of what is in the cache; None: nothing."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    cache = constants.HF_HUB_CACHE
    try:  # no file is asked for, so one that is missing is no error
        folder = snapshot_download(repo, cache_dir=cache, local_files_only=True, allow_patterns=[])
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _gaps(snapshot: Path, kind: folders.Kind, file: str | None) -> list[str]:
    try:
        return folders.gaps(snapshot, kind, file)
    except (OSError, ValueError, KeyError, AttributeError) as error:  # of a damaged JSON file
        return [f"it cannot be read: {error!r}"]


def _remote(field: str, repo: str, kind: folders.Kind, file: str | None, state: str) -> Finding:
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    api = HfApi(endpoint=constants.ENDPOINT)
    shown = re.sub("//.*@", "//", constants.ENDPOINT)  # a mirror's may hold a password
    if error := _connection_error(constants.ENDPOINT):
        fix = f"check network and proxy, or on a machine with network: hf download {repo}"
        return problem(field, f"{state}, {shown} cannot be reached ({error})", fix)
    try:
        about = api.model_info(repo, files_metadata=True, timeout=_SECONDS)
        if about.gated:
            api.auth_check(repo)
    except GatedRepoError:
        found = f"{state}; it is gated, {_token_state()}"
        return problem(field, found, _licence(f"{shown}/{repo}"))
    except RepositoryNotFoundError:
        fix = "correct the id; for a private one, `hf auth login` or export HF_TOKEN"
        return problem(field, f"{state}; the hub has none, or it is private", fix)
    except HfHubHTTPError as error:
        code = error.response.status_code
        fix = "renew the token: `hf auth login`" if code in (401, 403) else "try again later"
        return problem(field, f"{state}; {shown} answers HTTP {code}", fix)
    except (httpx2.RequestError, OSError) as error:
        return problem(field, f"{state}; {shown}: {type(error).__name__}", "try again")
    return _download(field, about.siblings or [], kind, file, state)


@cache
def _connection_error(endpoint: str) -> str | None:
    """Asked once: where packets are dropped, every try takes its time."""
    import httpx2
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=_SECONDS)
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        return type(error).__name__
    return None


def _token_state() -> str:
    """Without the token itself."""
    from huggingface_hub import get_token

    return "the token has no access" if get_token() else "HF_TOKEN is not set and nobody logged in"


def _licence(page: str) -> str:
    return f"accept its licence at {page}, then `hf auth login` or export HF_TOKEN"


def _download(
    field: str, files: list[Any], kind: folders.Kind, file: str | None, state: str
) -> Finding:
    from huggingface_hub import constants

    sizes = [f.size or 0 for f in files if _is_wanted(f.rfilename, kind, file)]
    if not sizes:
        wanted = file or folders.WANTED[kind]
        fix = "name a repository in that format"
        return problem(field, f"{state}; on the hub it has no {wanted}", fix)
    cache = Path(constants.HF_HUB_CACHE)
    found = f"{state}; up to {gigabytes(sum(sizes))} will be downloaded"
    if (free := free_space(cache)) < sum(sizes):
        fix = "free some, or set HF_HOME to a folder on a larger disk"
        return problem(field, f"{found}, {gigabytes(free)} are free at {cache}", fix)
    return ok(field, found)


def _is_wanted(name: str, kind: folders.Kind, file: str | None) -> bool:
    """Whether a loader would fetch a file: of pipelines, not the single-file copies beside them."""
    if file is not None:
        return name == file
    patterns = {
        "pipeline": r"[^/]+/[^/]+\.safetensors",
        "model": r"model[^/]*\.safetensors",
        "lora": r"[^/]+\.safetensors",
        "texts": r"tokenizer_config\.json",
    }
    return re.fullmatch(patterns[kind], name) is not None
