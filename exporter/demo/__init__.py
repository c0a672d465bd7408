"""The models that travel with mmq: name -> checkpoint folder."""

from pathlib import Path

MODELS: dict[str, Path] = {"demo-llava": Path(__file__).parent / "demo-llava"}
