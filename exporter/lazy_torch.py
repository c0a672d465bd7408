"""`torch`, imported when one of its attributes is first used.

`mmq plan` reads recipes, methods and formats but computes no tensor. The import of torch takes longer than the plan, so
the modules that a plan loads write `from exporter.lazy_torch import torch`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _OnFirstUse:
        """Has the attributes of torch."""

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _OnFirstUse()

__all__ = ["torch"]
