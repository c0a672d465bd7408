"""The embedded demo models, and a picture with a question that they answer.

Enters: a name (`demo-llava`).
Leaves: the folder of a checkpoint.
May import: no other room.
"""

from pathlib import Path

MODELS: dict[str, Path] = {
    name: Path(__file__).parent / name for name in ("demo-llava", "demo-blip2", "demo-blip2-itm")
}
