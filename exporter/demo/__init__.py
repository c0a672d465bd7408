"""The embedded models, and the drawings and questions on which they are measured.

Enters: a name (`demo-llava`).
Leaves: the folder of a checkpoint; samples.
May import: tasks.
"""

from pathlib import Path

MODELS: dict[str, Path] = {
    name: Path(__file__).parent / name for name in ("demo-llava", "demo-blip2", "demo-blip2-itm")
}
