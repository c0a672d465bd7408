"""mmq: LLaVA and BLIP-2 checkpoints as quantized artifacts that vLLM serves, with measured proof."""

from typing import Any

__all__ = ["choose", "export", "load_recipe", "make_plan", "open_source", "verify"]

_HOMES = {
    "choose": "exporter.device",
    "export": "exporter.pipeline.export",
    "load_recipe": "exporter.planning.recipe_file",
    "make_plan": "exporter.planning.plan",
    "open_source": "exporter.model.source",
    "verify": "exporter.artifact.verify",
}


def __getattr__(name: str) -> Any:
    """Load the public API on first use, so that `mmq --help` does not wait for torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
