"""Errors of the hub's client library as errors of mmq: what failed, why, and what to do."""

from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from exporter.errors import HubError, HubMissing, HubUnreachable
from exporter.files.hub import (
    INVALID_TOKEN,
    Remote,
    RemoteFile,
    check_name,
    explain,
    hub_errors,
    parse_place,
    redact_token,
    require_token,
    retry_after,
    root_cause,
    without_xet,
)
from exporter.publishing import upload
from exporter.publishing.upload import Target


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The user's token, which a test may change."""
    tokens = ["hf_secret"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: tokens[0])
    return tokens


def refusal(kind: type[Exception], status: int, header: dict[str, str] | None = None, message: str = "") -> Any:
    """The library's error for an HTTP status."""
    error: Any = kind.__new__(kind)
    Exception.__init__(error, "text")
    error.response = SimpleNamespace(status_code=status, headers=header or {})
    error.server_message = message
    return error


HTTP = errors.HfHubHTTPError
AGAIN = "run the same command again"
UPLOAD = f"{AGAIN}; it does not repeat large files that are already uploaded"
REFUSALS: list[tuple[type[Exception], int, str, type[HubError], str, str | None]] = [
    (
        errors.GatedRepoError,
        403,
        "reading x",
        HubError,
        "access must be requested on its page (no hf)",
        "open the page of",
    ),
    (
        errors.RevisionNotFoundError,
        404,
        "reading x",
        HubMissing,
        "the revision does not exist (no hf)",
        "existing branch",
    ),
    (errors.RemoteEntryNotFoundError, 404, "reading x", HubError, "the file does not exist (no hf)", None),
    (
        errors.RepositoryNotFoundError,
        404,
        "reading x",
        HubMissing,
        "the repository does not exist, or",
        "check the name",
    ),
    (HTTP, 401, "reading x", HubError, "the hub does not accept your token (no hf)", "renew HF_TOKEN"),
    (
        HTTP,
        403,
        "reading x",
        HubError,
        "your token does not have the permission",
        "the token needs read access to 'org'",
    ),
    (
        HTTP,
        403,
        "uploading",
        HubError,
        "your token does not have the permission",
        "the token needs write access to 'org'",
    ),
    (HTTP, 409, "uploading", HubError, "another upload changed it at the same time", UPLOAD),
    (HTTP, 412, "reading x", HubError, "another upload changed it at the same time", AGAIN),
    (HTTP, 429, "reading x", HubError, "too many requests", f"wait some time, then {AGAIN}"),
    (HTTP, 500, "reading x", HubError, "hub error (HTTP 500)", f"wait some minutes, then {AGAIN}"),
    (HTTP, 499, "reading x", HubError, "the hub refused the request (HTTP 499)", None),
]


@pytest.mark.parametrize(("kind", "status", "action", "expected", "text", "hint"), REFUSALS)
def test_a_refusal_of_the_hub_has_a_reason_and_a_hint(
    kind: type[Exception], status: int, action: str, expected: type[HubError], text: str, hint: str | None
) -> None:
    error = explain(refusal(kind, status, message="no hf"), "org/name", action)
    assert type(error) is expected
    assert error.message.startswith(f"org/name: {action}: {text}")
    assert error.hint is None if hint is None else hint in str(error.hint)


def test_the_hub_says_how_long_to_wait() -> None:
    error = explain(refusal(HTTP, 429, {"Retry-After": "17"}, "slow hf_secret"), "org/name", "reading")
    assert error is not None
    assert error.message == "org/name: reading: too many requests (slow [token])"
    assert error.hint == f"wait 17 seconds, then {AGAIN}"


def test_lost_connections_and_the_offline_mode_are_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = explain(httpx2.ConnectError("x"), "org/name", "uploading")
    assert type(lost) is HubUnreachable
    assert lost.message == "org/name: uploading: the connection failed (ConnectError)"
    assert lost.hint == UPLOAD if constants.HF_HUB_DISABLE_XET else UPLOAD in str(lost.hint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert "Xet hides" in str(explain(ConnectionResetError(), "org/name", "uploading").hint)  # type: ignore[union-attr]
    assert explain(ConnectionResetError(), "o/n", "reading").hint == AGAIN  # type: ignore[union-attr]
    offline = explain(errors.OfflineModeIsEnabled("x"), "org/name", "reading")
    assert type(offline) is HubUnreachable
    assert "HF_HUB_OFFLINE is set" in offline.message


def test_errors_of_other_programs_pass() -> None:
    assert explain(ValueError("mine"), "o/n", "reading") is None
    with pytest.raises(ValueError, match="mine"), hub_errors("o/n", "reading"):
        raise ValueError("mine")
    with pytest.raises(HubUnreachable), hub_errors("o/n", "reading"):
        raise ConnectionError
    with pytest.raises(HubError, match="o/n: reading: ") as caught, hub_errors("o/n", "reading"):
        validate_repo_id("a//b hf_secret")
    assert "hf_secret" not in caught.value.message


def test_the_cause_of_a_wrapped_error_counts() -> None:
    inner, outer = ConnectionError("inner"), RuntimeError("outer")
    outer.__cause__ = inner
    assert root_cause(outer) is inner
    assert root_cause(RuntimeError("alone")).args == ("alone",)
    assert type(explain(outer, "o/n", "reading")) is HubUnreachable


def test_a_token_that_no_header_can_contain_is_the_reason(token: list[str]) -> None:
    token[0] = "hf secret"
    for error in (refusal(HTTP, 401), ConnectionError(), ValueError()):
        assert INVALID_TOKEN in str(explain(error, "o/n", "reading"))
    assert "HTTP 500" in str(explain(refusal(HTTP, 500), "o/n", "reading"))
    with pytest.raises(HubError, match="so it is not valid"):
        require_token()
    token[0] = ""
    with pytest.raises(HubError, match="no hub token"):
        require_token()
    assert redact_token("a b") == "a b"
    token[0] = "hf_x"
    require_token()
    assert redact_token("a hf_x b hf_x") == "a [token] b [token]"


@pytest.mark.parametrize("repo", ["name", "a/b/c", "a/b c", "", "a/"])
def test_a_name_that_is_no_repository_is_refused(repo: str) -> None:
    with pytest.raises(HubError, match="is not a repository name"):
        check_name(repo)
    check_name("org/name-1.5_x")


def test_places_on_the_hub() -> None:
    assert parse_place("hub:org/name") == ("org/name", None)
    assert parse_place("hub:org/name@main") == ("org/name", "main")
    assert parse_place("org/name@") == ("org/name", None)
    remote = Remote("org/name", "c" * 40, False, {})
    assert remote.name == f"org/name@{'c' * 40}"
    assert remote.read("absent") is None


def test_xet_is_off_unless_the_environment_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    with without_xet():
        assert constants.HF_HUB_DISABLE_XET is True
    assert constants.HF_HUB_DISABLE_XET is False
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
    with without_xet():
        assert constants.HF_HUB_DISABLE_XET is False


def test_seconds_of_a_retry() -> None:
    assert [retry_after(value) for value in ("5", " 7 ", None, "", "soon", "-1", "٣")] == [
        5,
        7,
        None,
        None,
        None,
        None,
        None,
    ]


# The target of an upload


def remote(private: bool = True, *names: str) -> Remote:
    return Remote("org/name", "c" * 40, private, dict.fromkeys(names, RemoteFile(1, None, "g")))


@pytest.mark.parametrize(
    ("target", "found", "problem"),
    [
        (Target("org/name"), remote(False), "exists and is public"),
        (Target("org/name", private=False), remote(True), "exists and is private; --public applies only to new"),
        (
            Target("org/name"),
            remote(True, "a", "b", ".gitattributes"),
            "org/name has 2 files that mmq did not publish, such as a",
        ),
        (Target("org/name", "dev"), remote(True, "a"), "org/name@dev has 1 files"),
        (Target("org/name", replace=True), remote(True, "a"), ""),
        (Target("org/name"), remote(True, "a", "mmq_manifest.json"), ""),
        (Target("org/name"), remote(True, ".gitattributes", "README.md"), ""),
        (Target("org/name", private=False), remote(False), ""),
    ],
)
def test_what_a_repository_may_hold(
    target: Target, found: Remote, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "open_remote", lambda repo, revision=None: found)
    if not problem:
        assert upload.existing_repository(target) is found
        return
    with pytest.raises(upload.PublishError, match=problem):
        upload.existing_repository(target)


def test_a_new_branch_begins_with_the_files_of_main(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(repo: str, revision: str | None = None) -> Remote:
        if revision or repo == "org/new":
            raise HubMissing("x")
        return remote()

    monkeypatch.setattr(upload, "open_remote", opened)
    assert upload.existing_repository(Target("org/name", "dev")) == remote()
    assert upload.existing_repository(Target("org/new")) is None


@pytest.mark.parametrize(
    ("error", "attempt", "seconds"),
    [
        (ConnectionError(), 0, 1.0),
        (ConnectionError(), 3, 8.0),
        (refusal(HTTP, 500), 1, 2.0),
        (refusal(HTTP, 429, {"Retry-After": "0"}), 1, 0.0),
        (refusal(HTTP, 429, {"Retry-After": "120"}), 1, 120.0),
        (refusal(HTTP, 429, {"Retry-After": "121"}), 1, None),
        (refusal(HTTP, 499), 0, None),
        (refusal(HTTP, 404), 0, None),
        (ValueError(), 0, None),
    ],
)
def test_the_wait_before_another_attempt(error: Exception, attempt: int, seconds: float | None) -> None:
    assert upload._wait(error, attempt) == seconds
