"""What every method's options have in common; the rest is each method's own."""

from pydantic import BaseModel, ConfigDict


class MethodOptions(BaseModel):
    """Base of every method's `Options`: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def runs_block(self) -> bool:
        """Whether a search for column scales runs the whole block for every candidate."""
        return False

    @property
    def scales_in_loop(self) -> bool:
        """Whether a group's scale is known only once the columns before it are rounded."""
        return False
