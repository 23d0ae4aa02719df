"""Checkpoints on the model hub: in the cache, or allowed and small enough to be downloaded.

Only names and sizes are asked for; nothing is downloaded, and a token is never shown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from customized_grpo.config import Checkpoint
from customized_grpo.config.plugs import CheckpointKind
from customized_grpo.tools.doctor import folders
from customized_grpo.tools.doctor.findings import Finding, gigabytes, ok, problem
from customized_grpo.tools.doctor.machine import free_space

_SECONDS = 10.0

# What a kind is made of, in words and as names of files that its loader would fetch: not the
# single-file copies beside a pipeline.
_WANTED: dict[CheckpointKind, tuple[str, str]] = {
    "pipeline": ("model_index.json with folders of safetensors", r"[^/]+/[^/]+\.safetensors"),
    "model": ("model.safetensors", r"model[^/]*\.safetensors"),
    "lora": ("*.safetensors", r"[^/]+\.safetensors"),
    "texts": ("tokenizer_config.json", r"tokenizer_config\.json"),
    "any": ("files", r".+"),
}


def on_hub(checkpoint: Checkpoint, repo: str) -> Finding:
    """A finding for a checkpoint with the hub id ``owner/name``."""
    from huggingface_hub import constants

    field, kind = checkpoint.field, checkpoint.kind
    snapshot = _snapshot(repo)
    gaps = None if snapshot is None else folders.gaps(snapshot, kind, checkpoint.file)
    if gaps == []:
        return ok(field, f"{repo} is in the cache")
    state = f"{repo} is not in the cache" if gaps is None else f"{repo} in the cache: {gaps[0]}"
    if constants.is_offline_mode():
        fix = f"unset HF_HUB_OFFLINE, or copy {constants.HF_HUB_CACHE} from where it is complete"
        return problem(field, f"{state}, and HF_HUB_OFFLINE is set", fix)
    about = _ask(repo)
    if isinstance(about, tuple):
        return problem(field, f"{state}; {about[0]}", about[1])
    return _download(checkpoint, about, state)


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


def _ask(repo: str) -> list[Any] | tuple[str, str]:
    """The files of a repository, or why they are not to be had and the fix."""
    import httpx2
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    api = HfApi(endpoint=constants.ENDPOINT)
    login = "`hf auth login` or export HF_TOKEN"
    shown = re.sub("//.*@", "//", constants.ENDPOINT)  # a mirror's may hold a password
    try:
        about = api.model_info(repo, files_metadata=True, timeout=_SECONDS)
        if about.gated:
            api.auth_check(repo)
        return about.siblings or []
    except GatedRepoError:
        token = "the token has no access"
        who = token if get_token() else "HF_TOKEN is not set and nobody logged in"
        return f"it is gated, {who}", f"accept its licence at {shown}/{repo}, then {login}"
    except RepositoryNotFoundError:
        return "the hub has none, or it is private", f"correct the id; for a private one, {login}"
    except HfHubHTTPError as error:
        code = error.response.status_code
        fix = "renew the token: `hf auth login`" if code in (401, 403) else "try again later"
        return f"{shown} answers HTTP {code}", fix
    except (httpx2.RequestError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
        fix = f"check network and proxy, or on a machine with network: hf download {repo}"
        return f"{shown} cannot be reached ({type(error).__name__})", fix


def _download(checkpoint: Checkpoint, files: list[Any], state: str) -> Finding:
    from huggingface_hub import constants

    field = checkpoint.field
    wanted, pattern = _WANTED[checkpoint.kind]
    if checkpoint.file is not None:
        wanted, pattern = checkpoint.file, re.escape(checkpoint.file)
    sizes = [f.size or 0 for f in files if re.fullmatch(pattern, f.rfilename)]
    if not sizes:
        fix = "name a repository in that format"
        return problem(field, f"{state}; on the hub it has no {wanted}", fix)
    cache = Path(constants.HF_HUB_CACHE)
    found = f"{state}; up to {gigabytes(sum(sizes))} will be downloaded"
    if (free := free_space(cache)) < sum(sizes):
        fix = "free some, or set HF_HOME to a folder on a larger disk"
        return problem(field, f"{found}, {gigabytes(free)} are free at {cache}", fix)
    return ok(field, found)
