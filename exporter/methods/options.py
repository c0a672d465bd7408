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
    def correction_damping(self) -> float | None:
        """Damping of the correction of weights for everything that was quantized before them; None without one."""
        return None

    @property
    def learned_steps(self) -> int:
        """Steps of learned rounding after the method, for all linears of a block together; 0 is none."""
        return 0

    @property
    def learning_rate(self) -> float:
        """Size of the first step of learned rounding."""
        return 0.0

    @property
    def signed_scales(self) -> bool:
        """Whether a group may get a negative scale."""
        return False

    @property
    def scales_in_loop(self) -> bool:
        """Whether a group's scale is known only after the earlier columns are quantized."""
        return False
