"""Where a model comes from: an embedded one, a local folder, the hub cache or the hub."""

from pathlib import Path

from exporter.checkpoint import Checkpoint, read_json
from exporter.demo import MODELS
from exporter.errors import CheckpointError, PlanError
from exporter.families import FAMILIES, Family

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


def open_source(repo: str, revision: str | None = None) -> tuple[Checkpoint, Family]:
    """Open a model's headers and find its family (PlanError when mmq does not know its architecture)."""
    folder, origin = locate(repo, revision)
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if set(architectures) & set(family.architectures):
            return Checkpoint.open(folder, family.canonical_name, origin), family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    found = ", ".join(architectures) or "no architectures at all"
    raise PlanError(f"{folder / 'config.json'}: mmq does not know {found}", f"it knows {known}")
