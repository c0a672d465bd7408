"""Base class of the options of all quantization methods."""

from pydantic import BaseModel, ConfigDict


class MethodOptions(BaseModel):
    """Base class of every method's `Options`: frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def runs_block(self) -> bool:
        """Whether a search for column scales runs the whole block for every candidate."""
        return False

    @property
    def scales_in_loop(self) -> bool:
        """Whether a group's scale is computed only after the previous columns are rounded."""
        return False
