"""Opens a model's checkpoint from its source: an embedded model, a local folder, the hub cache or the hub."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from exporter.dtypes import DTYPES
from exporter.errors import CheckpointError, HubError, HubMissing, HubUnreachable, did_you_mean, one_line
from exporter.files.hub import Remote, hub_errors, open_remote
from exporter.files.strict_json import parse_object, read_json
from exporter.model.adapter import open_adapter
from exporter.model.checkpoint import Checkpoint, indexed_files
from exporter.model.config_check import known_family, without_buffers
from exporter.model.embedded import MODELS
from exporter.model.families import Family
from exporter.model.tied_heads import refuse_trained_apart

# Weights only as safetensors; all other files that a processor or vLLM reads are small texts.
SMALL = ["*.json", "*.model", "*.jinja", "*.txt", "LICENSE*", "NOTICE*"]
PATTERNS = ["*.safetensors", *SMALL]
MOST_BYTES = 64 * 2**20  # of a file besides the weights that a plan downloads


def locate(repo: str, revision: str | None = None) -> tuple[Path, str]:
    """The local folder of `repo`, and its origin (`demo-llava`, a path, or `org/name@commit`).

    Hub models are taken from the hub library's cache, or downloaded. CheckpointError when neither is possible.
    """
    if repo in MODELS:
        return MODELS[repo], repo
    folder = Path(repo).expanduser()
    if folder.is_dir():
        return folder, one_line(folder.name or folder.resolve().name)
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no model '{repo}': not a folder, a hub id like org/name, or an embedded model ({', '.join(MODELS)})."
            + did_you_mean(repo, MODELS),
            "pass a local folder, a hub id, or --model demo-llava",
        )
    return _from_hub(repo, revision)


def _offline_hint(repo: str) -> str:
    embedded = " or ".join(MODELS)
    folder = f"./{repo.split('/')[1]}"
    return f"download it on another machine and pass its folder (--model {folder}), or try --model {embedded}"


def _from_hub(repo: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    hint = _offline_hint(repo)
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no model '{repo}', or your token has no access to it", hint) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"the hub refused to send '{repo}' ({error.__class__.__name__})", hint) from None
    except (LocalEntryNotFoundError, OSError):
        raise CheckpointError(f"'{repo}' is not in the hub cache and the hub cannot be reached", hint) from None
    return path, f"{repo}@{path.name}"


def open_source(
    repo: str,
    revision: str | None = None,
    headers_only: bool = False,
    dtype: str | None = None,
    adapter: str | None = None,
) -> tuple[Checkpoint, Family]:
    """Open a model's headers, and find its family (PlanError when mmq does not support it).

    headers_only: fetch only the headers and the small files of a hub model; its tensors cannot be read then.
    dtype: read float32 tensors as `float16` or `bfloat16`; None keeps float32.
    adapter: folder of a LoRA adapter that is merged into the tensors when they are read.
    """
    checkpoint, family = _open(repo, revision, headers_only)
    if adapter:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        lora = open_adapter(Path(adapter).expanduser(), shapes, family.canonical_name)
        checkpoint = checkpoint.changed(adapter=lora)
        refuse_trained_apart(checkpoint, family)
    return (narrowed(checkpoint, dtype) if dtype else checkpoint), family


def narrowed(checkpoint: Checkpoint, dtype: str, read: Sequence[str] = ("F32",)) -> Checkpoint:
    """The checkpoint with tensors of the dtypes `read` read in a 16-bit dtype, and that dtype in its config."""
    kind, tensors = DTYPES[{"float16": "F16", "bfloat16": "BF16"}[dtype]], checkpoint.tensors
    changed = {DTYPES[name] for name in read} - {kind}
    infos = {n: replace(info, dtype=kind) if info.dtype in changed else info for n, info in tensors.items()}
    if infos == tensors:
        return checkpoint
    key = "dtype" if "dtype" in checkpoint.config else "torch_dtype"
    return checkpoint.changed(config={**checkpoint.config, key: dtype}, tensors=infos)


def _open(repo: str, revision: str | None, headers_only: bool) -> tuple[Checkpoint, Family]:
    if headers_only and is_on_hub(repo):
        folder = _cached(repo, revision)
        if isinstance(folder, Remote):
            return _headers_of(folder)
        return _open_folder(folder, f"{repo}@{folder.name}")
    if is_on_hub(repo):
        if _is_unreachable(repo, revision):  # at once: the client library retries each download for half a minute
            folder = _from_cache(repo, revision, f"'{repo}' is not in the hub cache and the hub cannot be reached")
            return _open_folder(folder, f"{repo}@{folder.name}")
        _refuse_unsupported(repo, revision)
    return _open_folder(*locate(repo, revision))


def _is_unreachable(repo: str, revision: str | None) -> bool:
    """Whether one request to the hub gets no response."""
    try:
        open_remote(repo, revision)
    except HubUnreachable:
        return True
    except HubError:
        return False  # the download reports it
    return False


def _open_folder(folder: Path, origin: str) -> tuple[Checkpoint, Family]:
    family = known_family(read_json(folder / "config.json"), str(folder / "config.json"))
    return without_buffers(Checkpoint.open(folder, family.canonical_name, origin), family), family


def is_on_hub(repo: str) -> bool:
    """Whether a model's name is a hub repository: neither embedded nor a local folder."""
    return repo not in MODELS and not Path(repo).expanduser().is_dir() and repo.count("/") == 1


def _refuse_unsupported(repo: str, revision: str | None) -> None:
    """PlanError when config.json shows that mmq does not support the model, before its weights are downloaded.

    Errors while config.json is read are ignored, because `locate` reports them.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(repo, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return
    known_family(read_json(path), f"{repo}: config.json")


def _cached(repo: str, revision: str | None) -> Path | Remote:
    """A hub model's folder when the cache has all its files, otherwise its `Remote`; downloads nothing."""
    remote, problem = None, f"'{repo}' is not in the hub cache and the hub cannot be reached"
    try:
        remote = open_remote(repo, revision)
    except HubMissing as error:
        problem = error.message
    except HubError:
        pass  # the cache may have it
    try:
        return _from_cache(repo, remote.commit if remote else revision, problem)
    except CheckpointError:
        if remote is None:
            raise
        return remote


def _from_cache(repo: str, revision: str | None, problem: str) -> Path:
    """A hub model's folder in the cache; CheckpointError with `problem` if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS, local_files_only=True))
    except HFValidationError:
        raise CheckpointError(f"'{repo}' is neither a folder nor a valid hub id", _offline_hint(repo)) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(problem, _offline_hint(repo)) from None


def _headers_of(remote: Remote) -> tuple[Checkpoint, Family]:
    """A hub model whose headers are read by range requests; its folder in the cache has only the small files."""
    config = parse_object(remote.read("config.json") or b"{}", f"{remote.repo}: config.json")
    family = known_family(config, f"{remote.repo}: config.json")
    headers = remote.headers()
    indexed: dict[str, set[str]] = {file: set() for file in headers}
    if index := remote.read("model.safetensors.index.json"):  # other files are not part of the model
        where = f"{remote.repo}: model.safetensors.index.json"
        indexed = indexed_files(parse_object(index, where), where)
    absent = sorted(indexed.keys() - headers.keys())
    if absent or not headers:
        raise CheckpointError(f"{remote.name}: no {absent[0] if absent else 'safetensors file'} in the repository")
    headers = {file: headers[file] for file in indexed}
    rename = family.canonical_name
    checkpoint = Checkpoint.from_headers(_small_files(remote), config, headers, indexed, rename, remote.name)
    return without_buffers(checkpoint, family), family


def _small_files(remote: Remote) -> Path:
    """A commit's folder in the hub cache, with all its files but the weights; downloads what is missing."""
    from huggingface_hub import snapshot_download

    names = [
        name
        for name, file in remote.files.items()
        if file.size <= MOST_BYTES and any(fnmatch(name, pattern) for pattern in SMALL)
    ]
    with hub_errors(remote.repo, "reading its settings"):
        return Path(snapshot_download(remote.repo, revision=remote.commit, allow_patterns=names))
