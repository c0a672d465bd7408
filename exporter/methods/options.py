"""`MethodOptions`, the base class of every method's options."""

from pydantic import BaseModel, ConfigDict


class MethodOptions(BaseModel):
    """Base of every method's `Options`: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def runs_block(self) -> bool:
        """Whether the search for column scales runs the whole block for every candidate."""
        return False

    @property
    def scales_in_loop(self) -> bool:
        """Whether a group's scale is known only after the earlier columns are quantized."""
        return False
