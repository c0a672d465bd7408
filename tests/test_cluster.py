"""Studies and evaluations on a Ray cluster: workers share nothing with the process that starts the job.

Two nodes of one machine stand for a cluster where Ray is installed (`make test-ray`). The driver runs in a mount
namespace of its own, in which model, data and results lie on a file system that the workers do not see. A stand-in for
Ray runs the same commands everywhere.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from exporter.commands.main import cli
from exporter.data import image_key, places, samples_from
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError, MmqError
from exporter.evaluation.cluster.packed_samples import pack_samples, packed_groups
from exporter.evaluation.cluster.ray_cluster import ray_cluster
from exporter.evaluation.cluster.shipment import Shipment, folder_files, shipped, write_missing
from exporter.model.embedded import MODELS
from tests.fake_ray import install_ray

STUDY = [
    *("study", "--model", "MODEL", "--bits", "3,16", "--methods", "gptq", "--combine", "alone"),
    *("--samples", "8", "--calibration", "4", "--device", "cpu"),
]
EVALUATION = ["evaluate", "ARTIFACT", "--device", "cpu", "--eval-samples", "10", "--eval-batch", "4", "--fresh"]
HIDDEN = 'mount -t tmpfs tmpfs "$1" && cp -r "$2"/. "$1" && shift 2 && exec "$@"'


class Objects:
    """An object store in this process."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.read = 0

    def put(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def get(self, reference: int) -> Any:
        self.read += 1
        return self.values[reference]


def test_files_arrive_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.evaluation.cluster.shipment.PIECE", 1000)
    objects, there = Objects(), tmp_path / "there"
    there.mkdir()
    files = folder_files(MODELS["demo-llava"], "model")
    (tmp_path / "empty.json").touch()
    content = shipped({**files, "empty.json": tmp_path / "empty.json"}, objects.put)
    shipment = Shipment("job", content)
    write_missing(shipment, there, objects.get)
    assert {path.relative_to(there).as_posix() for path in there.rglob("*.*") if path.name != ".lock"} == content.keys()
    assert all((there / name).read_bytes() == path.read_bytes() for name, path in files.items())
    count = objects.read
    assert count == len(objects.values)
    write_missing(shipment, there, objects.get)
    assert objects.read == count


@pytest.mark.parametrize("task", ["vqa", "captioning", "retrieval"])
def test_packed_samples_are_the_same(task: str, tmp_path: Path) -> None:
    samples = samples_from(places("demo"), task, "test", 12, 0)
    pack_samples({"a": samples, "b": samples[:1]}, tmp_path / "samples.zip")
    groups = packed_groups(tmp_path / "samples.zip")
    assert [_content(sample) for sample in groups["a"]] == [_content(sample) for sample in samples]
    assert [sample.identity for sample in groups["b"]] == [samples[0].identity]
    assert len({id(sample.among) for sample in groups["a"]}) == 1


def _content(sample: Sample) -> list[Any]:
    plain = {name: value for name, value in vars(sample).items() if name not in ("image", "among")}
    return [plain, image_key(sample.image()), sample.among and sample.among.digest]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster of two nodes with one core each."""
    pytest.importorskip("ray", reason="make test-ray")
    from ray.cluster_utils import Cluster

    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        yield str(nodes.address)
        nodes.shutdown()


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    """A folder whose content only the driver sees; it starts with a model and pictures."""
    content = tmp_path / "content"
    shutil.copytree(MODELS["demo-llava"], content / "model")
    for number in range(24):
        place = content / "data"
        place.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (number * 10, 80, 255 - number)).save(place / f"{number}.png")
    lines = [
        {"file_name": f"{number}.png", "question": "what shape is it?", "answer": "box", "caption": "a red box"}
        for number in range(24)
    ]
    (content / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "hidden").mkdir()
    return tmp_path


def test_a_study_on_a_stand_in_for_ray_scores_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install_ray(monkeypatch, pickled=True)
    words = [word if word != "MODEL" else "demo-llava" for word in STUDY]

    def study(name: str, *more: str) -> dict[str, Any]:
        done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / name), "--json", *more])
        assert done.exit_code == 0, done.output
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    alone, spread = study("alone", "--workers", "1"), study("spread", "--ray", "local")
    assert [_figures(point) for point in spread["points"]] == [_figures(point) for point in alone["points"]]
    assert spread["units_made"] == alone["units_made"] > 0
    assert len(ray.calls) > len(spread["points"])
    assert not ray.is_initialized()
    assert study("spread", "--ray", "local")["units_made"] == 0
    assert not list(Path("/tmp").glob(f"mmq-ray-{os.getuid()}-*"))


def test_an_evaluation_on_a_stand_in_for_ray_answers_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, made = install_ray(monkeypatch, pickled=True), str(tmp_path / "artifact")
    export = ["export", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--samples", "8", "--out", made]
    assert CliRunner().invoke(cli, [*export, "--skip-evaluation"]).exit_code == 0
    words = [made if word == "ARTIFACT" else word for word in EVALUATION]

    def evaluation(*more: str) -> dict[str, Any]:
        done = CliRunner().invoke(cli, [*words, "--json", *more])
        assert done.exit_code in (0, 3, 5), done.output
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    assert evaluation("--ray", "local") == evaluation()
    assert len(ray.calls) >= 12, "two models, two tasks, three batches"


def test_errors_of_a_stand_in_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install_ray(monkeypatch)
    ray.unreachable = ConnectionError("no route")
    with pytest.raises(DataError, match="no Ray cluster at nowhere:1: no route"), ray_cluster("nowhere:1"):
        pass
    ray.unreachable = None
    with ray_cluster(None) as cluster:
        assert cluster.slots == 2
        assert sorted(cluster.results(divmod, [(7, 2), (9, 4)])) == [(0, (3, 1)), (1, (2, 1))]
        with pytest.raises(MmqError, match="a task failed on the Ray cluster: integer division"):
            list(cluster.results(divmod, [(1, 0)]))
        with pytest.raises(DataError, match="unknown data source"):
            list(cluster.results(places, [("cocoa:/x",)]))


def run_hidden(folder: Path, arguments: list[str], *more: str) -> dict[str, Any]:
    """The JSON result of a command of mmq, all of whose files are in `folder/hidden` of its mount namespace."""
    names = {"MODEL": folder / "hidden" / "model", "ARTIFACT": folder / "hidden" / "artifact"}
    words = [str(names.get(word, word)) for word in arguments]
    command = [sys.executable, "-m", "exporter", *words, "--data", str(folder / "hidden" / "data"), "--json", *more]
    places_of_files = [str(folder / "hidden"), str(folder / "content")]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", HIDDEN, "hidden", *places_of_files, *command],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, 3, 5), done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_study_on_ray_scores_as_on_one_machine(cluster: str, hidden: Path) -> None:
    arguments = [*STUDY, "--out", str(hidden / "hidden" / "study")]
    alone = run_hidden(hidden, arguments, "--workers", "1")
    spread = run_hidden(hidden, arguments, "--ray", cluster)
    assert [_figures(point) for point in spread["points"]] == [_figures(point) for point in alone["points"]]
    assert spread["units_made"] == alone["units_made"] > 0


def _figures(point: dict[str, Any]) -> dict[str, Any]:
    """A measured setting without its times."""
    return {name: value for name, value in point.items() if "seconds" not in name}


def test_an_evaluation_on_ray_answers_as_on_one_machine(cluster: str, hidden: Path) -> None:
    export = ["export", "--recipe", "llava-w4-vit8", "--model", "MODEL", "--samples", "8", "--skip-evaluation"]
    words = [str(hidden / "content" / "model") if word == "MODEL" else word for word in export]
    made = hidden / "content" / "artifact"
    subprocess.run([sys.executable, "-m", "exporter", *words, "--out", str(made)], check=True, capture_output=True)
    arguments = [*EVALUATION, "--baseline", str(hidden / "hidden" / "model")]
    alone, spread = run_hidden(hidden, arguments), run_hidden(hidden, arguments, "--ray", cluster)
    assert spread == alone
    assert not list(Path("/tmp").glob(f"mmq-ray-{os.getuid()}-*"))
