"""The models that travel with mmq: name -> checkpoint folder."""

from pathlib import Path

MODELS: dict[str, Path] = {
    name: Path(__file__).parent / name for name in ("demo-llava", "demo-blip2", "demo-blip2-itm")
}
