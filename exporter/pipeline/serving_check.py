"""The check of an artifact's answers in vLLM, with the samples and the program that it needs."""

from collections.abc import Sequence
from pathlib import Path

from exporter import data
from exporter.artifact.artifact import Artifact
from exporter.artifact.output_folder import reading
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError
from exporter.evaluation.backends import weights_digest
from exporter.model.processors.processor import load_processor
from exporter.pipeline.samples import test_sources
from exporter.planning.recipe_file import load_recipe
from exporter.serving.check import CheckResult, check, store_result
from exporter.serving.comparison import CheckSettings
from exporter.serving.launch import Program, find_program
from exporter.serving.preflight import refuse_unserved


def program_for(artifact: Path, vllm: str | None) -> Program:
    """The installed vLLM; ServeError when there is none, or when vLLM does not serve models of this family."""
    refuse_unserved(Artifact.open(artifact).family)
    return find_program(vllm)


def questions(artifact: Path, sources: Sequence[data.SourceSpec], count: int) -> list[Sample]:
    """Test samples of every task of the artifact's gates, in turn; no `sources` means those of its recipe."""
    if count < 1:
        raise DataError(f"a check of {count} questions compares nothing", "ask at least one")
    recipe = load_recipe(str(artifact / "recipe.yaml"))
    tasks = list(dict.fromkeys(gate.task for gate in recipe.gates)) or ["vqa"]
    specs, seed = sources or test_sources(recipe), recipe.evaluation.seed
    lists = [data.samples_from(specs, task, "test", -(-count // len(tasks)), seed) for task in tasks]
    return [sample for group in zip(*lists, strict=False) for sample in group][:count]


def check_artifact(
    artifact: Path, samples: Sequence[Sample], settings: CheckSettings, control: bool = True
) -> CheckResult:
    """Check the answers to `samples`, and store the result in the artifact's report and manifest."""
    with reading(artifact, settings.on_event):
        checked = check(artifact, samples, load_processor(artifact), settings, control=control)
        store_result(artifact, checked, weights_digest(Artifact.open(artifact)))
    return checked
