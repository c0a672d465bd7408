"""Access to the model hub through its client library: lists and reads files of a repository, and translates errors.

The library finds the token (`hf auth login`, HF_TOKEN). mmq reads it only to validate it and to remove it from
messages.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError, HubError, HubMissing, HubUnreachable
from exporter.files.safetensors_header import Entry, check_header

PREFIX = "hub:"  # `hub:ORG/NAME` or `hub:ORG/NAME@REVISION`, accepted in place of a local folder
AGAIN = "run the same command again"
PATIENCE = 10.0  # seconds to wait for the hub to look up a repository
RESUME = f"{AGAIN}; it does not repeat large files that are already uploaded"
WRITING = ("uploading", "creating the repository", "making the branch")  # actions that need a token with write access
INVALID_TOKEN = "the hub token contains a space, a control character or a non-ASCII character, so it is not valid"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. sha256: only for large files. git: the git hash of a small file's blob."""

    size: int
    sha256: str | None
    git: str


@dataclass(frozen=True)
class Remote:
    """One commit of a repository. files: by path."""

    repo: str
    commit: str
    private: bool
    files: Mapping[str, RemoteFile]

    @property
    def name(self) -> str:
        """`ORG/NAME@COMMIT`."""
        return f"{self.repo}@{self.commit}"

    def read(self, path: str) -> bytes | None:
        """The content of a small file (cached by the hub library); None when the commit does not have it."""
        from huggingface_hub import hf_hub_download

        if path not in self.files:
            return None
        with hub_errors(self.repo, f"reading {path}"):
            return Path(hf_hub_download(self.repo, path, revision=self.commit)).read_bytes()

    def headers(self) -> dict[str, dict[str, Entry]]:
        """The header of every safetensors file, fetched by range requests without downloading weights.

        Returns file -> tensor name -> entry. CheckpointError when a file is not in this format.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        headers = {}
        for file in sorted(path for path in self.files if path.endswith(".safetensors") and "/" not in path):
            with hub_errors(self.repo, f"reading the header of {file}"):
                try:
                    parsed = HfApi().parse_safetensors_file_metadata(self.repo, file, revision=self.commit)
                except (SafetensorsParsingError, LookupError, TypeError, AttributeError, ValueError, RecursionError):
                    raise CheckpointError(f"{self.name}: {file} has no valid safetensors header") from None
            header = {
                name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
                for name, info in parsed.tensors.items()
            }
            headers[file] = check_header(header, f"{self.name}: {file}", None)
        return headers


def open_remote(repo: str, revision: str | None = None) -> Remote:
    """Resolve a branch, tag or commit and list its files; HubError when the hub does not return them."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(repo, "looking it up"):
        info = HfApi().model_info(repo, revision=revision, timeout=PATIENCE)
        tree = HfApi().list_repo_tree(repo, recursive=True, revision=info.sha)
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
        files = {f.path: RemoteFile(f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in entries}
    return Remote(repo, str(info.sha), bool(info.private), files)


def parse_place(place: str) -> tuple[str, str | None]:
    """Repository and revision of `hub:ORG/NAME@REVISION`; HubError when it does not have this form."""
    repo, _, revision = place.removeprefix(PREFIX).partition("@")
    check_name(repo)
    return repo, revision or None


def check_name(repo: str) -> None:
    """HubError unless `repo` is ORG/NAME with characters that the hub allows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        valid = False
    else:
        valid = repo.count("/") == 1
    if not valid:
        raise HubError(
            f"'{repo}' is not a repository name", "use ORG/NAME with letters, digits, '-', '_' and '.' in both"
        )


def require_token() -> None:
    """HubError when there is no valid token; called before anything is hashed or uploaded."""
    from huggingface_hub import get_token

    if not get_token():
        raise HubError("no hub token: an upload needs one", "run `hf auth login`, or set HF_TOKEN")
    if _token_is_invalid():
        raise HubError(INVALID_TOKEN, "copy it again: run `hf auth login`, or set HF_TOKEN")


def _token_is_invalid() -> bool:
    """Whether the token has characters that an HTTP header cannot contain."""
    from huggingface_hub import get_token

    return re.fullmatch("[!-~]*", get_token() or "") is None


@contextmanager
def without_xet() -> Iterator[None]:
    """Upload by plain HTTP inside the context, unless the environment sets HF_HUB_DISABLE_XET.

    Xet is a second transfer protocol, in a compiled library with its own servers and errors. mmq cannot interpret these
    errors, so a refusal would look like a lost connection. The client library reads this value before every transfer.
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
def hub_errors(repo: str, action: str) -> Iterator[None]:
    """Convert errors of the client library inside the context into HubError: what failed, why, and what to do."""
    try:
        yield
    except Exception as error:
        hub_error = explain(error, repo, action)
        if hub_error is None:
            raise
        raise hub_error from None


def explain(error: Exception, repo: str, action: str) -> HubError | None:
    """The HubError for an error of the client library; None when the error has another origin."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where, error = f"{repo}: {action}", root_cause(error)
    refusal = _refusal(error, repo, action) if isinstance(error, HfHubHTTPError) else None
    unauthorized = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
    if _token_is_invalid() and (unauthorized or is_network(error) or isinstance(error, ValueError)):
        return HubError(f"{where}: {INVALID_TOKEN}", "copy it again: run `hf auth login`, or set HF_TOKEN")
    if refusal:
        return refusal
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachable(f"{where}: HF_HUB_OFFLINE is set", "unset it to reach the hub")
    if is_network(error):
        return HubUnreachable(f"{where}: the connection failed ({type(error).__name__})", _retry_hint(action))
    if isinstance(error, ValueError | OSError) and "huggingface_hub" in _raised_in(error):
        return HubError(f"{where}: {redact_token(str(error))}")
    return None


def root_cause(error: Exception) -> Exception:
    """The original error: the library wraps a failed upload of one file into a RuntimeError."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def is_network(error: Exception) -> bool:
    """Whether the HTTP library (httpx or its successor) or the operating system lost the connection."""
    return type(error).__module__.partition(".")[0].startswith("httpx") or isinstance(error, ConnectionError)


def _raised_in(error: Exception) -> str:
    """File names of the traceback, to recognize errors that the hub library raised."""
    names, frame = [], error.__traceback__
    while frame:
        names.append(frame.tb_frame.f_code.co_filename)
        frame = frame.tb_next
    return "\n".join(names)


def _retry_hint(action: str) -> str:
    from huggingface_hub import constants

    if action == "uploading" and not constants.HF_HUB_DISABLE_XET:
        return f"{RESUME}. Xet hides the messages of its servers: remove HF_HUB_DISABLE_XET=0 to see them"
    return RESUME if action == "uploading" else AGAIN


def _refusal(error: Any, repo: str, action: str) -> HubError:
    """The HubError for an HTTP status, with a hint."""
    from huggingface_hub import errors

    where, retry = f"{repo}: {action}", _retry_hint(action)
    status = error.response.status_code
    message = f" ({redact_token(error.server_message)})" if getattr(error, "server_message", None) else ""
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{where}: access must be requested on its page{message}", f"open the page of {repo} and request access"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubMissing(f"{where}: the revision does not exist{message}", "pass an existing branch, tag or commit")
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{where}: the file does not exist{message}")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check the name; `hf auth whoami` shows the owner of the token"
        return HubMissing(f"{where}: the repository does not exist, or your token has no access to it", hint)
    if status == 401:
        return HubError(
            f"{where}: the hub does not accept your token{message}", "run `hf auth login`, or renew HF_TOKEN"
        )
    if status == 403:
        access = "write" if action in WRITING else "read"
        hint = f"the token needs {access} access to '{repo.partition('/')[0]}': `hf auth whoami` shows its owner"
        return HubError(f"{where}: your token does not have the permission{message}", hint)
    if status in (409, 412):
        return HubError(f"{where}: another upload changed it at the same time{message}", retry)
    if status == 429:
        wait = retry_after(error.response.headers.get("Retry-After"))
        duration = "some time" if wait is None else f"{wait:.0f} seconds"
        return HubError(f"{where}: too many requests{message}", f"wait {duration}, then {retry}")
    if status >= 500:
        return HubError(f"{where}: hub error (HTTP {status}){message}", f"wait some minutes, then {retry}")
    return HubError(f"{where}: the hub refused the request (HTTP {status}){message}")


def redact_token(text: str) -> str:
    """`text` with the token replaced."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "[token]") if token else text


def retry_after(header: str | None) -> float | None:
    """Seconds in a Retry-After header; None when it is absent or a date."""
    value = (header or "").strip()
    return float(value) if value.isascii() and value.isdigit() else None
