"""Where a model comes from: an embedded one, a local folder, the hub cache or the hub."""

import json
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint, read_json
from exporter.demo import MODELS
from exporter.errors import CheckpointError, HubError, PlanError
from exporter.families import FAMILIES, Family
from exporter.hub import open_remote

# Weights come as safetensors only; everything else a processor or an engine reads is small text.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*", "NOTICE*"]


def locate(repo: str, revision: str | None = None) -> tuple[Path, str]:
    """The local folder of `repo` and where it came from (`demo-llava`, a path, or `org/name@commit`).

    Hub models are looked up in the hub library's cache and downloaded when absent. CheckpointError when neither
    can be reached.
    """
    if repo in MODELS:
        return MODELS[repo], repo
    folder = Path(repo).expanduser()
    if folder.is_dir():
        return folder, folder.name
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no model '{repo}': neither a folder, nor a hub id like org/name, nor embedded ({', '.join(MODELS)})",
            "give a local folder, a hub id, or --model demo-llava",
        )
    return _from_hub(repo, revision)


def _from_hub(repo: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    hint = f"download it elsewhere and pass its folder (--model ./{repo.split('/')[1]}), or try --model demo-llava"
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no model '{repo}', or your token may not see it", hint) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"the hub refused '{repo}' ({error.__class__.__name__})", hint) from None
    except (LocalEntryNotFoundError, OSError):
        raise CheckpointError(f"'{repo}' is not in the hub cache and the hub cannot be reached", hint) from None
    return path, f"{repo}@{path.name}"


def open_source(repo: str, revision: str | None = None, headers_only: bool = False) -> tuple[Checkpoint, Family]:
    """Open a model's headers and find its family (PlanError when mmq does not know its architecture).

    headers_only: nothing but headers and configuration of a hub model is fetched; its tensors cannot be read then.
    """
    if headers_only and repo not in MODELS and not Path(repo).expanduser().is_dir() and repo.count("/") == 1:
        found = _headers_of(repo, revision)
        if found:
            return found
    folder, origin = locate(repo, revision)
    family = _family(read_json(folder / "config.json"), str(folder / "config.json"))
    return Checkpoint.open(folder, family.canonical_name, origin), family


def _headers_of(repo: str, revision: str | None) -> tuple[Checkpoint, Family] | None:
    """A hub model by range requests; None when its files are here already, or the hub is out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        remote = open_remote(repo, revision)
        snapshot_download(repo, revision=remote.commit, allow_patterns=PATTERNS, local_files_only=True)
    except HubError:
        return None  # the cache may have it; if not, `locate` says what is wrong
    except LocalEntryNotFoundError:
        pass
    else:
        return None
    config = json.loads(remote.read("config.json") or b"{}")
    family = _family(config, f"{repo}: config.json")
    index = json.loads(remote.read("model.safetensors.index.json") or b"{}").get("weight_map", {})
    headers = remote.headers()
    promised: dict[str, set[str]] = {file: set() for file in headers}
    for name, file in index.items():
        promised.setdefault(file, set()).add(name)
    absent = sorted(promised.keys() - headers.keys())
    if absent or not headers:
        raise CheckpointError(f"{remote.name}: no {absent[0] if absent else 'safetensors file'} in the repository")
    rename = family.canonical_name
    return Checkpoint.from_headers(Path(repo), config, headers, promised, rename, remote.name), family


def _family(config: dict[str, Any], where: str) -> Family:
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if set(architectures) & set(family.architectures):
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    found = ", ".join(architectures) or "no architectures at all"
    raise PlanError(f"{where}: mmq does not know {found}", f"it knows {known}")
