"""How many calls lie between the command line and a tensor that is quantized."""

import sys
from pathlib import Path
from types import FrameType

import pytest
from click.testing import CliRunner

from exporter.commands.main import cli
from exporter.errors import CalibrationError
from exporter.methods import METHODS

PACKAGE = Path(__file__).parent.parent / "exporter"
MOST = 6


def own_frames(frame: FrameType | None) -> list[str]:
    """Functions of this package on the stack of `frame`, innermost first."""
    frames = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            frames.append(f"{path.stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return frames


@pytest.mark.parametrize(
    ("method", "recipe", "model"), [("gptq", "llava-w3-vit4", "demo-llava"), ("awq", "blip2-caption-w4", "demo-blip2")]
)
def test_a_tensor_is_quantized_six_calls_below_the_command(
    method: str, recipe: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[str] = []

    def reached(*_arguments: object) -> None:
        frames.extend(["quantize_linear", *own_frames(sys._getframe(1))])
        raise CalibrationError("far enough")

    monkeypatch.setattr(METHODS[method], "quantize_linear", reached)
    out = tmp_path / "out"
    command = ["export", "--recipe", recipe, "--model", model, "--samples", "8", "--skip-evaluation", "--out", str(out)]
    result = CliRunner().invoke(cli, command)
    assert "far enough" in result.stderr
    path = frames[: frames.index("main.export") + 1]
    assert len(path) <= MOST, " <- ".join(path)
