"""Publishing with the real hub client to a hub on loopback: refusals, faults, resume, and verification."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import httpcore2
import pytest
from click.testing import CliRunner, Result

import exporter.publishing.upload
from exporter.artifact.manifest import MANIFEST
from exporter.artifact.verify import verify
from exporter.commands.main import cli
from exporter.commands.next_steps import program
from exporter.errors import ArtifactError, CheckpointError, HubMissing, PlanError, PublishError
from exporter.evaluation.report_file import REPORT
from exporter.events import ignore
from exporter.files.hub import open_remote
from exporter.model.source import locate, open_source
from exporter.publishing.remote_check import verify_remote
from tests.hub_server import READER, WRITER, Entry, Fault, Hub, running
from tests.published_artifact import bootstrap_once, write_scores
from tests.test_data_sources import following

REPO = "me/tiny-w4"


@pytest.fixture(scope="module")
def exported(random_artifacts: Path) -> Path:
    """model, w4, w3: a source and two artifacts of it."""
    return random_artifacts


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(exported / "w4", tmp_path / "w4")


_default_ssl_context = cache(httpcore2.default_ssl_context)


@pytest.fixture
def waits() -> list[float]:
    """Records the requested pauses without waiting."""
    return []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float]) -> Iterator[Hub]:
    """A hub, and the client library pointed at it with a writer's token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, close_session

    with running() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (
            ("ENDPOINT", hub.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", template),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", False),  # as it is by default
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("DOWNLOAD_CHUNK_SIZE", 10_000),  # a cut loses what is short of a chunk
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(_http.time, "sleep", waits.append)
        # Every client reads all certificates, which takes longer than most uploads.
        monkeypatch.setattr(httpcore2, "default_ssl_context", _default_ssl_context)
        monkeypatch.setattr(
            "exporter.publishing.proof.prove.verify", partial(verify, load="nothing")
        )  # its own tests load models
        monkeypatch.setattr("exporter.evaluation.judge.paired_bootstrap", bootstrap_once)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
        yield hub
        close_session()


def mmq(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def published(artifact: Path, *arguments: str) -> Result:
    result = mmq("publish", artifact, "--repo", REPO, "--device", "cpu", *arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(artifact: Path, *arguments: str) -> str:
    """Output of a failing `mmq publish`, which must have no traceback."""
    result = mmq("publish", artifact, "--repo", REPO, "--device", "cpu", *arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


def commits(hub: Hub, repo: str = REPO) -> int:
    """Number of commits after the empty first commit of a repository."""
    return len(hub.repos[repo].commits) - 1 if repo in hub.repos else 0


def test_one_commit_has_all_files_and_is_private(hub: Hub, artifact: Path) -> None:
    done = published(artifact, "--license", "mit", "--base-model", "org/llava")
    files = hub.files(REPO)
    local = {path.name: path.read_bytes() for path in artifact.iterdir()}
    assert {name: files[name] for name in local} == local
    assert files.keys() - local.keys() == {"README.md", ".gitattributes"}
    assert hub.repos[REPO].private
    assert commits(hub) == 1
    assert f"{hub.url}/{REPO}/commit/" in done.output
    assert "base_model: org/llava\n" in files["README.md"].decode()
    weights = local["model.safetensors"]
    assert len(hub.sent(f"PUT /upload/{hashlib.sha256(weights).hexdigest()}")) == -(-len(weights) // (64 * 1024)) > 1


def test_dry_run_lists_files_and_card_and_sends_nothing(hub: Hub, artifact: Path) -> None:
    text = published(artifact, "--dry-run").output
    for path in artifact.iterdir():
        assert f"{path.stat().st_size:,}  {path.name}" in text
    assert "## What was quantized" in text
    assert "note: recipe.yaml is published unchanged and contains the local path" in text  # a local path
    assert not hub.sent("^(POST|PUT)")
    printed = json.loads(published(artifact, "--dry-run", "--json").stdout)
    (step,) = following(text)
    assert step == ["publish", str(artifact), "--repo", REPO, "--device", "cpu"]
    assert printed["files"].keys() == {path.name for path in artifact.iterdir()} | {"README.md"}


def spoil(path: Path) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_unproven_artifacts_are_refused_unless_forced_and_the_card_lists_the_reasons(hub: Hub, artifact: Path) -> None:
    write_scores(artifact, after=0.5)
    assert "gate vqa accuracy: failed: changed by -44.4% of the full-precision score" in refused(artifact)
    foreign = json.loads((artifact / REPORT).read_text())
    foreign["evaluation"]["models"]["artifact"]["weights"] = "0" * 64
    (artifact / REPORT).write_text(json.dumps(foreign))
    assert "measured on other weights" in refused(artifact)
    (artifact / REPORT).unlink()
    assert "the artifact was never evaluated" in refused(artifact)
    spoil(artifact / "model.safetensors")
    text = refused(artifact)
    assert "model.safetensors: its content changed after the export" in text
    assert "never evaluated" in text
    assert not hub.log
    published(artifact, "--force")
    card = hub.files(REPO)["README.md"].decode()
    assert "Published by force" in card
    assert "> - the artifact was never evaluated" in card
    assert "- unproven\n" in card


@pytest.mark.parametrize(
    ("token", "repo", "fragment"),
    [
        (None, REPO, "no hub token"),
        ("hf_nobodynobodynobodynobody", REPO, "does not accept your token"),
        (READER, REPO, "your token does not have the permission"),
        (WRITER, "them/tiny", "needs write access to 'them'"),
        (WRITER, "tiny", "not a repository name"),
    ],
)
def test_invalid_tokens_and_names_are_refused(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, repo: str, fragment: str
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    text = refused(artifact, "--repo", repo)
    assert fragment in text
    assert not token or token not in text
    assert not hub.repos


slow = partial(pytest.param, marks=pytest.mark.slow)  # the same answer, or the same place, as another
FAULTS = [
    # what breaks, how often, what comes of it: None when publishing goes on by itself, else what is said
    (Fault(r"PUT /upload/.*part=3", cut=20_000), None),
    slow(Fault(r"PUT /upload/.*part=3", 503, times=2), None),
    (Fault(r"PUT /upload/.*part=3", 429, headers={"Retry-After": "7"}), None),
    (Fault(r"PUT /upload/.*part=3", cut=20_000, times=99), "the connection failed"),
    (Fault(r"PUT /upload/.*part=3", 500, times=99), "hub error (HTTP 500)"),
    (Fault(r"PUT /upload/.*part=3", corrupt=True), "does not have the announced sha256"),
    slow(Fault(r"POST .*/commit/", 0), None),
    (Fault(r"POST .*/commit/", 0, after=True), None),
    slow(Fault(r"POST .*/commit/", 502, after=True), None),
    slow(Fault(r"POST .*/commit/", 503), None),
    slow(Fault(r"POST .*/commit/", 429, headers={"Retry-After": "7"}), None),
    (Fault(r"POST .*/commit/", 429, times=99, headers={"Retry-After": "3600"}), "wait 3600 seconds"),
    slow(Fault(r"POST .*/commit/", 500, times=99), "hub error (HTTP 500)"),
    (Fault(r"POST .*/commit/", 412, times=99), "another upload changed it"),
    (Fault(r"POST .*/preupload/", 403, times=99), "your token does not have the permission"),
    (Fault(r"POST /api/repos/create", 500, times=99), "hub error (HTTP 500)"),
]


@pytest.mark.parametrize(("fault", "fragment"), FAULTS, ids=lambda part: getattr(part, "pattern", "")[:24] or None)
def test_every_fault_ends_in_a_message_or_a_complete_revision(
    hub: Hub, artifact: Path, waits: list[float], fault: Fault, fragment: str | None
) -> None:
    fault = Fault(**vars(fault))  # faults count down
    hub.faults.append(fault)
    if fragment is None:
        published(artifact)
        assert commits(hub) == 1
    else:
        assert fragment in refused(artifact)
        assert commits(hub) == 0, "half a revision is visible"
        hub.faults.clear()
        published(artifact)
        assert commits(hub) == 1
    assert (fault.headers.get("Retry-After") != "7") or waits[0] >= 7
    assert max(waits, default=0) <= 120
    open_artifact()


def test_a_repository_that_another_process_created_in_the_meantime_is_used(hub: Hub, artifact: Path) -> None:
    hub.add(REPO, {}, private=True)
    hub.faults.append(Fault(rf"GET /api/models/{REPO}$", 404, headers={"X-Error-Code": "RepoNotFound"}))
    published(artifact)
    assert hub.sent("POST /api/repos/create")
    open_artifact()


def open_artifact() -> None:
    """The visible revision is complete."""
    verify_remote(open_remote(REPO), ignore)


def test_uploaded_files_are_not_sent_again(hub: Hub, exported: Path) -> None:
    hub.faults.append(Fault(r"POST .*/commit/", 403))
    refused(exported / "w4")
    sent = len(hub.sent("PUT /upload/"))
    assert sent > 1
    published(exported / "w4")
    assert len(hub.sent("PUT /upload/")) == sent
    hub.log.clear()
    published(exported / "w4")  # nothing has changed but the card's changelog
    assert not hub.sent("PUT /upload/")


def test_updating_removes_stale_files_and_keeps_a_changelog(hub: Hub, exported: Path, tmp_path: Path) -> None:
    old = shutil.copytree(exported / "w4", tmp_path / "old")
    (old / "notes.txt").write_text("gone later")
    manifest = json.loads((old / MANIFEST).read_text())
    from exporter.files.file_hashes import sha256

    manifest["files"]["notes.txt"] = sha256(old / "notes.txt")
    (old / MANIFEST).write_text(json.dumps(manifest))
    write_scores(old, after=0.88)
    published(old)
    first = hub.repos[REPO].branches["main"]
    assert "## Changelog" not in hub.files(REPO)["README.md"].decode()
    published(exported / "w3")
    card = hub.files(REPO)["README.md"].decode()
    assert "notes.txt" not in hub.files(REPO)
    assert f"since `{first[:12]}`" in card
    assert "- language: W4 g16 rtn → W3 g16 rtn" in card
    published(exported / "w4")
    card = hub.files(REPO)["README.md"].decode()
    assert card.index("W3 g16 rtn → W4 g16 rtn") < card.index("W4 g16 rtn → W3 g16 rtn")
    open_artifact()


def test_repositories_with_foreign_files_are_refused(hub: Hub, artifact: Path) -> None:
    hub.add(REPO, {"model.safetensors": b"precious"}, private=True)
    assert "has 1 files that mmq did not publish, such as model.safetensors" in refused(artifact)
    assert hub.files(REPO) == {"model.safetensors": b"precious"}
    published(artifact, "--replace")
    hub.repos[REPO].private = False
    assert "exists and is public" in refused(artifact)
    published(artifact, "--public")


def test_xet_is_used_only_when_the_environment_enables_it(hub: Hub, artifact: Path) -> None:
    published(artifact)
    assert not hub.sent("xet")
    weights = (artifact / "model.safetensors").read_bytes()
    (artifact / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_DISABLE_XET", "0")
        assert "Xet hides the messages of its servers" in refused(artifact, "--force")
    assert hub.sent("xet-write-token")


def test_names_in_a_manifest_cannot_leave_the_folder(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hf_secret")
    manifest = json.loads((artifact / MANIFEST).read_text())
    for name in (str(secret), "../secret", "x/../../secret", "..", "a\\b"):
        (artifact / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"] | {name: "0" * 64}}))
        assert f"files.{name}: {name!r} is not a plain file name" in refused(artifact, "--force")
    (artifact / "link.txt").symlink_to(secret)
    (artifact / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"] | {"link.txt": "0" * 64}}))
    assert "link.txt" in refused(artifact, "--force", "--dry-run")
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    (artifact / REPORT).rename(tmp_path / "report")
    (artifact / REPORT).symlink_to(tmp_path / "report")
    assert REPORT in refused(artifact, "--force")
    assert not hub.sent("^(POST|PUT)")


def test_an_update_keeps_foreign_files(hub: Hub, exported: Path) -> None:
    published(exported / "w4")
    foreign = {"LICENSE": b"mine", "assets/figure.png": b"png", ".eval_results/community.yaml": b"- x"}
    hub.add(REPO, hub.files(REPO) | foreign)
    published(exported / "w3")
    files = hub.files(REPO)
    assert {name: files[name] for name in foreign} == foreign
    hub.add(REPO, files | {"adapter.safetensors": b"x" * 20_000})
    assert "weights that mmq did not publish: adapter.safetensors" in refused(exported / "w4")
    published(exported / "w4", "--replace")
    assert "adapter.safetensors" not in hub.files(REPO)
    assert hub.files(REPO)["LICENSE"] == b"mine"


def test_a_commit_with_a_lost_response_is_recognized_beside_foreign_files(hub: Hub, exported: Path) -> None:
    published(exported / "w4")
    hub.add(REPO, hub.files(REPO) | {"LICENSE": b"mine"})
    before = commits(hub)
    hub.faults.append(Fault(r"POST .*/commit/", 0, after=True))
    published(exported / "w3")
    assert commits(hub) == before + 1


def test_a_branch_with_foreign_files_is_refused(hub: Hub, artifact: Path) -> None:
    published(artifact)
    repo = hub.repos[REPO]
    repo.commit("gguf", {"model.gguf": Entry(b"precious", False)})
    assert f"{REPO}@gguf has 1 files that mmq did not publish" in refused(artifact, "--revision", "gguf")
    assert hub.files(REPO, "gguf") == {"model.gguf": b"precious"}
    hub.add("me/other", {"model.gguf": b"precious"}, private=True)
    hub.repos["me/other"].commit("mmq", hub.repos[REPO].commits[repo.branches["main"]])
    published(artifact, "--repo", "me/other", "--revision", "mmq", "--license", "mit")  # main does not matter then
    assert hub.files("me/other") == {"model.gguf": b"precious"}


def test_a_damaged_artifact_on_the_hub_can_be_repaired(hub: Hub, artifact: Path) -> None:
    published(artifact)
    hub.add(REPO, hub.files(REPO) | {MANIFEST: b"{"})
    assert mmq("verify", f"hub:{REPO}").exit_code == 1
    published(artifact)
    assert "- mmq could not read the previous artifact" in hub.files(REPO)["README.md"].decode()
    open_artifact()
    files = hub.files(REPO)
    del files["recipe.yaml"]
    hub.add(REPO, files)
    published(artifact)
    open_artifact()


def test_invalid_targets_are_refused_before_any_request(hub: Hub, artifact: Path) -> None:
    assert "a pull request is always against main" in refused(artifact, "--create-pr", "--revision", "dev")
    assert "is a commit, which cannot change" in refused(artifact, "--revision", "0" * 40)
    assert not hub.log


def test_public_does_not_change_an_existing_private_repository(hub: Hub, artifact: Path) -> None:
    published(artifact)
    assert "exists and is private; --public applies only to new" in refused(artifact, "--public")
    published(artifact, "--repo", "me/open", "--public")
    assert not hub.repos["me/open"].private


def test_a_repository_that_appears_in_the_meantime_is_checked(hub: Hub, artifact: Path) -> None:
    def unseen(name: str) -> None:
        hub.faults.append(Fault(rf"GET /api/models/{name}$", 404, headers={"X-Error-Code": "RepoNotFound"}))

    hub.add("me/race", {"weights.bin": b"foreign"})
    unseen("me/race")
    assert "exists and is public" in refused(artifact, "--repo", "me/race")
    unseen("me/race")
    assert "mmq did not publish, such as weights.bin" in refused(artifact, "--repo", "me/race", "--public")
    assert hub.files("me/race") == {"weights.bin": b"foreign"}
    published(artifact)
    unseen(REPO)
    assert "another process created" in refused(artifact)


def test_the_parent_of_the_commit_is_the_checked_revision(
    hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change between check and upload is detected as a concurrent commit."""
    published(exported / "w4")
    existing = exporter.publishing.upload.existing_repository

    def looked_then(*arguments: Any) -> Any:
        remote = existing(*arguments)
        hub.add(REPO, hub.files(REPO) | {"new.txt": b"x"})
        return remote

    monkeypatch.setattr("exporter.publishing.upload.existing_repository", looked_then)
    assert "another upload changed it at the same time" in refused(exported / "w3")


def test_a_commit_that_cannot_be_read_back_is_named(hub: Hub, artifact: Path) -> None:
    published(artifact)
    fault = Fault(rf"GET /api/models/{REPO}/revision/", 0, times=99)
    hub.faults.append(fault)
    text = refused(artifact, "--license", "mit")
    head = hub.repos[REPO].branches["main"]
    assert f"the commit exists ({hub.url}/{REPO}/commit/{head}), but mmq could not read it back" in text
    assert f"{program()} verify hub:{REPO}@{head}" in text


def test_publishing_the_same_artifact_again_makes_no_commit(hub: Hub, artifact: Path) -> None:
    published(artifact)
    published(artifact, "--license", "mit")
    head = hub.repos[REPO].branches["main"]
    assert "the same artifact with a new card" in hub.files(REPO)["README.md"].decode()
    assert "nothing to do: the repository already holds" in published(artifact, "--license", "mit", "--dry-run").output
    second = published(artifact, "--license", "mit")
    assert f"nothing to do: {hub.url}/{REPO}/commit/{head} already holds these files" in second.output
    assert hub.repos[REPO].branches == {"main": head}
    published(artifact, "--license", "mit", "--revision", "copy")  # a new branch of it is something to do
    assert hub.repos[REPO].branches == {"main": head, "copy": head}


def test_the_license_defaults_to_the_sources(hub: Hub, artifact: Path) -> None:
    source = b"---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE\ntags: [x]\n---\n# LLaVA"
    hub.add("org/llava", {"README.md": source})
    published(artifact, "--base-model", "org/llava")
    card = hub.files(REPO)["README.md"].decode()
    assert "license: other\n" in card
    assert "license_name: llama2\n" in card
    published(artifact, "--base-model", "org/llava", "--license", "mit")
    assert "license: mit\n" in hub.files(REPO)["README.md"].decode()
    published(artifact, "--base-model", "org/gone")
    assert "\nlicense:" not in hub.files(REPO)["README.md"].decode()


def test_an_invalid_card_is_refused_before_the_repository_is_created(hub: Hub, artifact: Path) -> None:
    wrong = ["--license", "No Such License", "--language", "English", "--base-model", "a b", "--dataset", "x/y/z"]
    text = refused(artifact, *wrong, "--dry-run")
    assert "--license No Such License is not a license identifier" in text
    assert "--language English is not a language code" in text
    assert "--base-model a b is not a hub id" in text
    assert "--dataset x/y/z is not a hub id" in text
    assert "must be one of the known identifiers" in refused(artifact, "--license", "wrong")
    assert REPO not in hub.repos


def test_hints_name_the_action(hub: Hub, artifact: Path) -> None:
    published(artifact)
    resumed = "it does not repeat large files that are already uploaded"
    for status, fragment in (
        (403, "needs read access to 'me'"),
        (429, "wait some time, then run"),
        (500, "wait some minutes, then run"),
    ):
        hub.faults = [Fault(r"GET /api/models/", status, times=99)]
        text = mmq("verify", f"hub:{REPO}").output
        assert fragment in text
        assert resumed not in text
    hub.faults = [Fault(r"POST .*/commit/", 500, times=99)]
    assert resumed in refused(artifact, "--license", "mit")


@pytest.mark.parametrize("token", ["hf_\u00e9_secret", "hf_a\x01secret", "hf_a secret"])
def test_a_token_that_is_invalid_in_a_header_has_a_clear_error(
    hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    for text in (refused(artifact), mmq("verify", f"hub:{REPO}").output):
        assert "the hub token contains a space, a control character" in text
        assert "secret" not in text


def test_branch_and_pull_request(hub: Hub, exported: Path) -> None:
    published(exported / "w4")
    main = hub.repos[REPO].branches["main"]
    published(exported / "w3", "--revision", "three-bits")
    assert hub.repos[REPO].branches["main"] == main
    assert json.loads(hub.files(REPO, "three-bits")[MANIFEST])["recipe"]["name"] == "rtn-3"
    done = published(exported / "w3", "--create-pr")
    assert "/discussions/1" in done.output
    assert hub.repos[REPO].branches["main"] == main


def test_a_concurrent_commit_is_not_overwritten(hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(exported / "w4")
    from huggingface_hub import HfApi

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        repo = hub.repos[REPO]
        if len(repo.commits) == 2:
            repo.commit("main", dict(repo.commits[repo.branches["main"]]))
        return original(*arguments, **options)

    original = HfApi.create_commit
    monkeypatch.setattr(HfApi, "create_commit", meanwhile)
    assert "another upload changed it at the same time" in refused(exported / "w3")


def test_verify_of_a_published_artifact_downloads_no_weights(hub: Hub, artifact: Path) -> None:
    published(artifact)
    hub.log.clear()
    result = mmq("verify", f"hub:{REPO}")
    assert result.exit_code == 0, result.output
    assert "14 packed linears present by name" in result.output
    weights = hub.sent("(GET|HEAD) /(large|.*model.safetensors)")
    assert weights
    assert all(request.range == "bytes=0-100000" for request in weights)


@pytest.mark.parametrize(
    ("name", "change", "fragment"),
    [
        ("model.safetensors", lambda data: data[:-1] + b"\x01", "its content differs from the export"),
        ("config.json", lambda data: data + b" ", "its content differs from the export"),
        ("generation_config.json", None, "missing"),
        ("extra.safetensors", lambda data: b"x" * 20_000, "not in the manifest"),
    ],
)
def test_verify_lists_the_problems_of_a_published_artifact(
    hub: Hub, artifact: Path, name: str, change: Any, fragment: str
) -> None:
    published(artifact)
    files = hub.files(REPO)
    if change is None:
        del files[name]
    else:
        files[name] = change(files.get(name, b""))
    hub.add(REPO, files)
    result = mmq("verify", f"hub:{REPO}")
    assert result.exit_code == 1
    assert f"{name}: " in result.output
    assert fragment in result.output


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": ' * 100_000, b"\xff", b'{"text_config": 3}'])
def test_verify_of_a_damaged_config_on_the_hub_is_one_error(hub: Hub, artifact: Path, content: bytes) -> None:
    published(artifact)
    hub.add(REPO, hub.files(REPO) | {"config.json": content})
    result = mmq("verify", f"hub:{REPO}")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "config" in result.output


EMPTIED = [
    ({"linears": {}}, "packed, but not among the manifest's linears"),
    ({"linears": {}, "errors": {}, "units": []}, "the manifest names no quantized linear, so it verifies nothing"),
    ({"files": {}}, "config.json: not in the manifest"),
    ({"errors": {}}, "the manifest has no quantization error for it"),
]


@pytest.mark.parametrize(("emptied", "fragment"), EMPTIED)
def test_a_manifest_that_verifies_nothing_is_an_error(
    hub: Hub, artifact: Path, emptied: dict[str, Any], fragment: str
) -> None:
    """A folder and a repository on the hub are both checked for completeness."""
    plain = json.loads((artifact / MANIFEST).read_text())
    (artifact / MANIFEST).write_text(json.dumps(plain | emptied))
    local = mmq("verify", artifact, "--device", "cpu")
    hub.add(REPO, {path.name: path.read_bytes() for path in artifact.iterdir()})
    for result in (local, mmq("verify", f"hub:{REPO}")):
        assert result.exit_code == 1
        assert "does not match its manifest" in result.output
        assert fragment in result.output


def test_scores_on_the_built_in_drawings_are_published_only_when_accepted(hub: Hub, artifact: Path) -> None:
    """The drawings do not measure the gate on captions; only this exception is accepted without --force."""
    plain = json.loads((artifact / REPORT).read_text())
    plain["evaluation"]["data"] = "drawings"
    (artifact / REPORT).write_text(json.dumps(plain))
    note = "Measured on mmq's built-in drawings of colored shapes: the scores show that the model works"
    assert note in refused(artifact)
    assert not hub.log
    published(artifact, "--accept-built-in-data")
    card = hub.files(REPO)["README.md"].decode()
    assert note in card
    assert "Published by force" not in card
    write_scores(artifact, after=0.5)
    plain = json.loads((artifact / REPORT).read_text())
    plain["evaluation"]["data"] = "drawings"
    (artifact / REPORT).write_text(json.dumps(plain))
    assert "gate vqa accuracy: failed" in refused(artifact, "--accept-built-in-data")


def test_a_file_that_is_not_safetensors_gives_one_clear_error(hub: Hub, exported: Path) -> None:
    files = {path.name: path.read_bytes() for path in (exported / "w4").iterdir()}
    manifest = json.loads(files[MANIFEST])
    header = b'{"a": {"dtype": "F16"}}'
    for weights in (b"\xff" * 20_000, b"x", len(header).to_bytes(8, "little") + header + b" " * 20_000):
        named = manifest["files"] | {"model.safetensors": hashlib.sha256(weights).hexdigest()}
        changed = {MANIFEST: json.dumps(manifest | {"files": named}).encode(), "model.safetensors": weights}
        hub.add(REPO, files | changed)
        result = mmq("verify", f"hub:{REPO}", "--json")
        assert json.loads(result.stdout)["kind"] == ArtifactError.__name__
        assert "model.safetensors has no valid safetensors header" in result.stdout


def test_an_unknown_architecture_is_refused_before_the_download_of_weights(hub: Hub, exported: Path) -> None:
    source = {path.name: path.read_bytes() for path in (exported / "model").iterdir()}
    config = json.loads(source["config.json"]) | {"architectures": ["FooForX"]}
    hub.add("org/foo", source | {"config.json": json.dumps(config).encode()})
    with pytest.raises(PlanError, match="mmq does not support FooForX"):
        open_source("org/foo")
    assert not hub.sent("GET .*(large|safetensors)")


def test_the_artifact_may_be_the_current_folder(hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artifact)
    spoil(artifact / "model.safetensors")
    text = refused(Path())
    assert f"Error: mmq does not publish {artifact}:" in text
    assert "\n  w4 does not match its manifest" in text


def test_reading_back_a_pinned_revision(hub: Hub, exported: Path, tmp_path: Path) -> None:
    source = {path.name: path.read_bytes() for path in (exported / "model").iterdir()}
    old = hub.add("org/llava", source)
    hub.add("org/llava", source | {"config.json": b"{}"})
    folder, origin = locate("org/llava", old)
    assert origin == f"org/llava@{old}"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == source
    with pytest.raises(CheckpointError, match="RevisionNotFound"):
        locate("org/llava", "no-such-branch")
    artifact = tmp_path / "out"
    arguments = [
        "--recipe",
        exported / "w4" / "recipe.yaml",
        "--model",
        "org/llava",
        "--revision",
        old,
        "--out",
        artifact,
    ]
    result = mmq("export", *arguments, "--skip-evaluation", "--device", "cpu")
    assert result.exit_code == 0, result.output
    manifest = json.loads((artifact / MANIFEST).read_text())
    assert manifest["source"]["model"] == f"org/llava@{old}"
    assert json.loads((exported / "w4" / MANIFEST).read_text())["linears"] == manifest["linears"]


def test_an_interrupted_download_resumes(hub: Hub, exported: Path) -> None:
    source = {path.name: path.read_bytes() for path in (exported / "model").iterdir()}
    commit = hub.add("org/llava", source)
    hub.faults.append(Fault(r"GET /large/", cut=100_000))
    folder, _ = locate("org/llava", commit)
    assert (folder / "model.safetensors").read_bytes() == source["model.safetensors"]
    assert [request.range for request in hub.sent("GET /large/")] == [None, "bytes=100000-"]
    assert {request.token for request in hub.sent("GET /large/")} == {None}


def test_plan_of_a_hub_model_reads_headers_only(hub: Hub, exported: Path, tmp_path: Path) -> None:
    source = {path.name: path.read_bytes() for path in (exported / "model").iterdir()}
    hub.add("org/llava", source)
    arguments = ["plan", "--recipe", str(exported / "w4" / "recipe.yaml"), "--device", "cpu", "--json"]
    arguments += ["--skip-evaluation", "--model"]  # the model has no processor
    by_headers = json.loads(mmq(*arguments, "org/llava").stdout)
    weights = hub.sent("(GET|HEAD) /(large|.*model.safetensors)")
    assert weights
    assert all(request.range == "bytes=0-100000" for request in weights)
    local = json.loads(mmq(*arguments, str(exported / "model")).stdout)
    assert by_headers.pop("model").startswith("org/llava@")
    local.pop("model")
    assert any(text.startswith("the model folder has no processor") for text in local["warnings"])
    assert by_headers == local


def test_plan_uses_the_cache_and_never_downloads_weights(hub: Hub, exported: Path) -> None:
    source = {path.name: path.read_bytes() for path in (exported / "model").iterdir()}
    commit = hub.add("org/llava", source)
    hub.faults.append(Fault(r"GET /api/models/org/llava", 500, times=99))
    with pytest.raises(CheckpointError, match="not in the hub cache"):
        open_source("org/llava", headers_only=True)
    hub.faults.clear()
    with pytest.raises(CheckpointError, match="the repository does not exist"):
        open_source("org/nothing", headers_only=True)
    assert not hub.sent("GET /large/")
    locate("org/llava")
    hub.log.clear()
    assert open_source("org/llava", headers_only=True)[0].origin == f"org/llava@{commit}"
    assert not hub.sent("(GET|HEAD) /(large|org)")
    hub.faults.append(Fault(r".*", 0, times=99))
    assert open_source("org/llava", headers_only=True)[0].origin == f"org/llava@{commit}"


def test_plan_of_a_sharded_hub_model_checks_its_index(hub: Hub, exported: Path) -> None:
    source = {path.name: path.read_bytes() for path in (exported / "model").iterdir()}
    source["a.safetensors"] = source.pop("model.safetensors")
    for file, fragment in (
        ("b.safetensors", r"no b\.safetensors in"),
        ("a.safetensors", r"index lists gone\.weight"),
    ):
        index = {"weight_map": {"language_model.lm_head.weight": "a.safetensors", "gone.weight": file}}
        hub.add("org/llava", source | {"model.safetensors.index.json": json.dumps(index).encode()})
        with pytest.raises(CheckpointError, match=fragment):
            open_source("org/llava", headers_only=True)


@contextmanager
def logged() -> Iterator[StringIO]:
    """What any library logs in the context, at every level."""
    text, root = StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(text), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield text
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def test_the_token_is_in_no_output_or_file(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    with logged() as log:
        hub.faults.append(Fault(r"PUT /upload/", 503))
        text = published(artifact).output + mmq("verify", f"hub:{REPO}").output
    assert "/upload/" in log.getvalue()
    assert WRITER not in log.getvalue()
    hub.faults.append(Fault(r"POST .*/preupload/", 400, headers={"X-Error-Message": f"bad token {WRITER}"}))
    text += refused(artifact, "--license", "mit")
    assert "[token]" in text
    assert WRITER not in text
    for path in [*artifact.rglob("*"), *(tmp_path / "cache").rglob("*")]:
        assert not path.is_file() or WRITER.encode() not in path.read_bytes(), path
    assert not any(WRITER.encode() in data for data in hub.files(REPO).values())
    assert {request.token for request in hub.sent("POST .*/commit/")} == {WRITER}
    assert {request.token for request in hub.sent("PUT /upload/")} == {None}  # the storage is somebody else's


def test_export_can_push(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ["export", "--recipe", "llava-w8", "--model", "demo-llava", "--eval-samples", "4", "--out", out]
    assert "publishes only measured artifacts" in mmq(*arguments, "--skip-evaluation", "--push", REPO).output
    assert "not a repository name" in mmq(*arguments, "--push", "tiny").output
    assert not out.exists()
    from exporter.planning.recipe_file import built_in

    few = mmq(*arguments, "--push", REPO, "--device", "cpu")
    assert few.exit_code == 5, few.output
    assert REPO not in hub.repos
    accepting = tmp_path / "accepting.yaml"
    text = built_in()["llava-w8"].read_text()
    accepting.write_text(
        text.replace("max_drop: 0.01}", "max_drop: 0.01, decide: point}").replace(
            "max_drop: 0.02}", "max_drop: 0.02, decide: point}"
        )
    )
    arguments[2] = str(accepting)
    result = mmq(*arguments, "--overwrite", "--push", REPO, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "| vqa | accuracy | **not resolved** |" in hub.files(REPO)["README.md"].decode()
    assert f"{hub.url}/{REPO}/commit/" in result.output
    assert (out / MANIFEST).read_bytes() == hub.files(REPO)[MANIFEST]
    assert hub.files(REPO)["chat_template.jinja"].decode().startswith("{{ '<s>' }}")  # LLaVA's template lacks `<s>`
    monkeypatch.setattr("exporter.commands.publish.check_push", lambda repo, skip: None)
    failing = tmp_path / "failing.yaml"
    failing.write_text(text.replace("method: rtn, bits: 8", "method: rtn, bits: 2"))
    lost = [*arguments, "--recipe", str(failing)]
    result = mmq(*lost, "--overwrite", "--push", "me/failed", "--device", "cpu")
    assert result.exit_code == 3, result.output
    assert "me/failed" not in hub.repos


def test_publish_runs_as_a_separate_process(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    """This test patches nothing: environment variables point the library at the hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home"), "HF_DEBUG": "1"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "exporter", "publish", str(artifact), "--repo", REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert commits(hub) == 1
    assert WRITER not in done.stdout + done.stderr
    assert find_spec("hf_xet")
    assert not hub.sent("xet-write-token")


def test_errors_have_the_kind_that_scripts_expect(hub: Hub, artifact: Path) -> None:
    write_scores(artifact, after=0.5)
    result = mmq("publish", artifact, "--repo", REPO, "--json")
    assert json.loads(result.stdout)["kind"] == PublishError.__name__
    assert json.loads(mmq("verify", "hub:me/nothing", "--json").stdout)["kind"] == HubMissing.__name__
    hub.add("me/foreign", {"config.json": b"{}"})
    assert json.loads(mmq("verify", "hub:me/foreign", "--json").stdout)["kind"] == ArtifactError.__name__
