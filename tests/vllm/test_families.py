"""A real vLLM answers as the reference for families with tiles, windows and features between blocks.

`bench/check_families.py` checks all families and parts in the same way; each start of vLLM takes a minute.
"""

from pathlib import Path

import pytest

from bench.check_families import checked, export_model
from exporter.serving.launch import Program
from tests.vllm.served import ONE_PROCESS_LESS


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("llava-onevision", {"CompressedTensorsWNA16": 10, "CompressedTensorsW8A8Int8": 10}),  # vLLM's linears
        ("qwen3-vl", {"CompressedTensorsWNA16": 14, "CompressedTensorsW8A8Int8": 20}),
        ("smolvlm", {"CompressedTensorsWNA16": 10, "CompressedTensorsW8A8Int8": 11}),
    ],
)
def test_tiny_models_of_new_families_answer_as_the_reference(
    name: str, packed: dict[str, int], serving_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention in 4 bits, feed-forwards with int8 weights and inputs, all components that vLLM loads packed."""
    for variable, value in ONE_PROCESS_LESS.items():
        monkeypatch.setenv(variable, value)
    artifact = export_model(name, "mixed", tmp_path)
    options = ["--questions", "4", "--no-control"]
    result = checked(artifact, serving_program.path, options, tmp_path / "logs")
    assert result["passed"], result
    assert result["schemes"] == packed
