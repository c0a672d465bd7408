"""mmq quantizes vision-language checkpoints into artifacts that vLLM serves, and measures their quality.

The names in `__all__` are the Python API; docs/reference/python-api.md documents them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.api import (
        CheckResult,
        Device,
        Event,
        Export,
        Listener,
        Manifest,
        MmqError,
        OpenedArtifact,
        Plan,
        Publication,
        Recipe,
        Report,
        Verification,
        check,
        evaluate,
        export,
        load_recipe,
        open_artifact,
        plan,
        publish,
        verify,
    )

__all__ = [
    "CheckResult",
    "Device",
    "Event",
    "Export",
    "Listener",
    "Manifest",
    "MmqError",
    "OpenedArtifact",
    "Plan",
    "Publication",
    "Recipe",
    "Report",
    "Verification",
    "check",
    "evaluate",
    "export",
    "load_recipe",
    "open_artifact",
    "plan",
    "publish",
    "verify",
]


if not TYPE_CHECKING:  # with a `__getattr__`, type checkers accept every name

    def __getattr__(name: str) -> Any:
        """Load the API on first use, so that `import exporter` does not import torch."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module("exporter.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
