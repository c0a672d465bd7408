"""A real vLLM answers as the reference for every family that it serves; each start takes a minute.

`make test-vllm` runs the families with tiles, windows and features between blocks, `make test-vllm SELECT=` all of the
registry. `bench/check_families.py` checks other parts and schemes in the same way.
"""

from collections import Counter
from pathlib import Path

import pytest

from bench.check_families import checked, export_model
from exporter.artifact.artifact import Artifact
from exporter.model.families import FAMILIES
from exporter.serving.launch import Program
from tests.slow import some
from tests.vllm.served import ONE_PROCESS_LESS

SERVED = [name for name, family in FAMILIES.items() if not family.unserved]
CLASSES = {4: "CompressedTensorsWNA16", 8: "CompressedTensorsW8A8Int8"}  # bits of a weight -> vLLM's class


def vllm_linears(artifact: Path) -> dict[str, int]:
    """vLLM's class -> number of its linears, which hold one or several of the artifact's."""
    opened = Artifact.open(artifact)
    fused = {opened.family.engine_name(module): opened.scheme_of(module) for module in opened.manifest.linears}
    return Counter(CLASSES[scheme.bits] for scheme in fused.values())


@pytest.mark.parametrize("name", some(SERVED, ("llava-onevision", "qwen3-vl", "smolvlm")))
def test_a_tiny_model_of_every_family_answers_as_the_reference(
    name: str, serving_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention in 4 bits, feed-forwards with int8 weights and inputs, all components that vLLM loads packed."""
    for variable, value in ONE_PROCESS_LESS.items():
        monkeypatch.setenv(variable, value)
    artifact = export_model(name, "mixed", tmp_path)
    options = ["--questions", "4", "--no-control"]
    result = checked(artifact, serving_program.path, options, tmp_path / "logs")
    assert result["passed"], result
    assert result["schemes"] == vllm_linears(artifact)
