"""Embedded demo models, and the drawings and questions that evaluate them.

Enters: a name (`demo-llava`).
Leaves: the folder of a checkpoint; samples.
May import: tasks.
"""

from pathlib import Path

MODELS: dict[str, Path] = {
    name: Path(__file__).parent / name for name in ("demo-llava", "demo-blip2", "demo-blip2-itm")
}
