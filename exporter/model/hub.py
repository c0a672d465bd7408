"""The model hub through its own client library: what a repository holds, parts of its files, errors in our words.

The token is found by the library (`hf auth login`, HF_TOKEN) and never touched here, except to keep it out of messages.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError, HubError, HubMissing
from exporter.files.safetensors_header import Entry, check_header

PREFIX = "hub:"  # `hub:ORG/NAME` or `hub:ORG/NAME@REVISION` where a local folder is as good
AGAIN = "give the same command again"
RESUME = f"{AGAIN}; large files that have arrived are not sent a second time"
WRITING = ("uploading", "creating the repository", "making the branch")  # what needs a token that may write
ODD_TOKEN = "the hub token holds a blank, a control character or a letter with an accent, which no token does"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. sha256: of large files only. git: the hash git gives a small file's blob."""

    size: int
    sha256: str | None
    git: str


@dataclass(frozen=True)
class Remote:
    """One commit of a repository: `files` by path."""

    repo: str
    commit: str
    private: bool
    files: Mapping[str, RemoteFile]

    @property
    def name(self) -> str:
        """`ORG/NAME@COMMIT`."""
        return f"{self.repo}@{self.commit}"

    def read(self, path: str) -> bytes | None:
        """One small file (kept in the hub library's cache), None when the commit has no such file."""
        from huggingface_hub import hf_hub_download

        if path not in self.files:
            return None
        with speaking(self.repo, f"reading {path}"):
            return Path(hf_hub_download(self.repo, path, revision=self.commit)).read_bytes()

    def headers(self) -> dict[str, dict[str, Entry]]:
        """The header of every safetensors file, fetched by range requests: no weights are downloaded.

        file -> tensor name -> entry. CheckpointError when a file is not of this format.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        found = {}
        for file in sorted(path for path in self.files if path.endswith(".safetensors") and "/" not in path):
            with speaking(self.repo, f"reading the header of {file}"):
                try:
                    parsed = HfApi().parse_safetensors_file_metadata(self.repo, file, revision=self.commit)
                except (SafetensorsParsingError, LookupError, TypeError, AttributeError, ValueError, RecursionError):
                    raise CheckpointError(f"{self.name}: {file} has no header of a safetensors file") from None
            header = {
                name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
                for name, info in parsed.tensors.items()
            }
            found[file] = check_header(header, f"{self.name}: {file}", None)
        return found


def open_remote(repo: str, revision: str | None = None) -> Remote:
    """Resolve a branch, tag or commit and list its files; HubError when the hub does not show them."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with speaking(repo, "looking it up"):
        info = HfApi().model_info(repo, revision=revision)
        tree = HfApi().list_repo_tree(repo, recursive=True, revision=info.sha)
        found = [entry for entry in tree if isinstance(entry, RepoFile)]
        files = {f.path: RemoteFile(f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in found}
    return Remote(repo, str(info.sha), bool(info.private), files)


def split(place: str) -> tuple[str, str | None]:
    """`hub:ORG/NAME@REVISION` -> repository and revision; HubError when it is not of this form."""
    repo, _, revision = place.removeprefix(PREFIX).partition("@")
    check_name(repo)
    return repo, revision or None


def check_name(repo: str) -> None:
    """HubError unless `repo` is ORG/NAME as the hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo_is_fine = False
    else:
        repo_is_fine = repo.count("/") == 1
    if not repo_is_fine:
        raise HubError(f"'{repo}' is not a repository name", "ORG/NAME: letters, digits, '-', '_' and '.'")


def need_token() -> None:
    """HubError when the library finds no token: said before anything is hashed or sent."""
    from huggingface_hub import get_token

    if not get_token():
        raise HubError("no hub token: nothing can be uploaded without one", "run `hf auth login`, or set HF_TOKEN")
    if _odd_token():
        raise HubError(ODD_TOKEN, "copy it again: `hf auth login`, or set HF_TOKEN")


def _odd_token() -> bool:
    """Whether there is a token that no HTTP header can carry."""
    from huggingface_hub import get_token

    return re.fullmatch("[!-~]*", get_token() or "") is None


@contextmanager
def without_xet() -> Iterator[None]:
    """Uploads by plain HTTP inside, unless the environment says something of HF_HUB_DISABLE_XET.

    Xet is a second protocol, in a compiled library with servers and errors of its own: what those mean we cannot tell,
    so a refusal there would read like a lost connection. The client library looks at this value before every transfer.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    if "HF_HUB_DISABLE_XET" not in os.environ:
        constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def speaking(repo: str, doing: str) -> Iterator[None]:
    """Turn what the client library raises inside into a HubError: what failed, why, and what to do next."""
    try:
        yield
    except Exception as error:
        explained = explain(error, repo, doing)
        if explained is None:
            raise
        raise explained from None


def explain(error: Exception, repo: str, doing: str) -> HubError | None:
    """The error in our words, None when it is not the hub's."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where, error = f"{repo}: {doing}", root(error)
    refusal = _refusal(error, repo, doing) if isinstance(error, HfHubHTTPError) else None
    unaccepted = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
    if _odd_token() and (unaccepted or is_network(error) or isinstance(error, ValueError)):
        return HubError(f"{where}: {ODD_TOKEN}", "copy it again: `hf auth login`, or set HF_TOKEN")
    if refusal:
        return refusal
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{where}: HF_HUB_OFFLINE is set", "unset it to reach the hub")
    if is_network(error):
        return HubError(f"{where}: the connection failed ({type(error).__name__})", _again(doing))
    if isinstance(error, ValueError | OSError) and "huggingface_hub" in _raised_in(error):
        return HubError(f"{where}: {clean(str(error))}")
    return None


def root(error: Exception) -> Exception:
    """What really happened: the library wraps a failed upload of one file into a RuntimeError."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def is_network(error: Exception) -> bool:
    """Whether the HTTP library (its name changes between versions) or the operating system lost the connection."""
    return type(error).__module__.partition(".")[0].startswith("httpx") or isinstance(error, ConnectionError)


def _raised_in(error: Exception) -> str:
    """File names of the traceback, to tell the hub library's own errors from ours."""
    names, frame = [], error.__traceback__
    while frame:
        names.append(frame.tb_frame.f_code.co_filename)
        frame = frame.tb_next
    return "\n".join(names)


def _again(doing: str) -> str:
    from huggingface_hub import constants

    if doing == "uploading" and not constants.HF_HUB_DISABLE_XET:
        return f"{RESUME}. Xet hides what its servers say: without HF_HUB_DISABLE_XET=0 you will see it"
    return RESUME if doing == "uploading" else AGAIN


def _refusal(error: Any, repo: str, doing: str) -> HubError:
    """An HTTP status as a sentence and a way on."""
    from huggingface_hub import errors

    where, again = f"{repo}: {doing}", _again(doing)
    status = error.response.status_code
    said = f" ({clean(error.server_message)})" if getattr(error, "server_message", None) else ""
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{where}: access must be asked for on its page{said}", f"open the page of {repo} and ask")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubMissing(f"{where}: there is no such revision{said}", "give a branch, tag or commit that exists")
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{where}: there is no such file{said}")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check the name; `hf auth whoami` shows whose token it is"
        return HubMissing(f"{where}: no such repository, or your token may not see it", hint)
    if status == 401:
        return HubError(f"{where}: the hub does not accept your token{said}", "run `hf auth login`, or renew HF_TOKEN")
    if status == 403:
        access = "write" if doing in WRITING else "read"
        hint = f"the token needs {access} access to '{repo.partition('/')[0]}': `hf auth whoami` shows whose it is"
        return HubError(f"{where}: your token may not do this{said}", hint)
    if status in (409, 412):
        return HubError(f"{where}: somebody else changed it at the same time{said}", again)
    if status == 429:
        wait = retry_after(error.response.headers.get("Retry-After"))
        said_wait = "some time" if wait is None else f"{wait:.0f} seconds"
        return HubError(f"{where}: too many requests{said}", f"wait {said_wait}, then {again}")
    if status >= 500:
        return HubError(f"{where}: the hub has a problem of its own (HTTP {status}){said}", f"later {again}")
    return HubError(f"{where}: the hub refused (HTTP {status}){said}")


def clean(text: str) -> str:
    """`text` without the token, should somebody have put it there."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "[token]") if token else text


def retry_after(header: str | None) -> float | None:
    """Seconds that a busy server asks to wait, None without a number (the header's other form, a date, is ignored)."""
    value = (header or "").strip()
    return float(value) if value.isascii() and value.isdigit() else None
