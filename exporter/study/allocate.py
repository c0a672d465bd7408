"""Choose bits for every part of a model under a size budget: an integer program over measured sensitivities.

Each slot (a role of a block, a block, or a component) takes one of its options. The cost of an option is the divergence
of the model's predictions when only this slot is quantized. The cost of an allocation is the sum of the costs of its
options; this assumption makes the problem linear, and `mmq allocate` reports the measured divergence beside the sum.
HiGHS (scipy.optimize.milp) solves the program exactly: minimal cost, one option per slot, bytes within the budget.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from exporter.distribution import install_extra
from exporter.errors import DataError, PlanError
from exporter.planning.recipe import Rule

COST_SCALE = 1e4  # the largest cost after scaling, because the solver ignores differences below 1e-6
POINTS = 25  # number of budgets of the front, between the smallest and the full size


@dataclass(frozen=True)
class Option:
    """One way to store a slot. rule: None keeps 16 bits. saved: bytes saved against 16 bits. cost: KL per token."""

    rule: Rule | None
    saved: int
    cost: float


@dataclass(frozen=True)
class Slot:
    """A part of the model that gets one scheme (`place` in tables). blocks: number of a block. None: all of them."""

    component: str
    blocks: int | None
    role: str | None
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """One option per slot. bytes: size of the whole artifact. cost: sum of the options' costs."""

    options: tuple[Option, ...]
    bytes: int
    cost: float


def solve(slots: Sequence[Slot], full_bytes: int, max_bytes: int) -> Allocation:
    """The allocation of minimal cost with at most `max_bytes`.

    full_bytes: size of the model in 16 bits. Raises PlanError if no allocation is that small, DataError without scipy.
    """
    smallest = full_bytes - sum(max(option.saved for option in slot.options) for slot in slots)
    if smallest > max_bytes:
        raise PlanError(
            f"no allocation of these schemes has at most {max_bytes:,} bytes: the smallest has {smallest:,}",
            "raise --max-size, or allow fewer bits by --bits",
        )
    budget = max_bytes
    while True:  # the solver's rounding can exceed the budget; then solve again with a smaller one
        numbers = _program(slots, full_bytes, budget)
        options = tuple(slot.options[i] for slot, i in zip(slots, numbers, strict=True))
        size = full_bytes - sum(option.saved for option in options)
        if size <= max_bytes:
            return Allocation(options, size, sum(option.cost for option in options))
        budget -= size - max_bytes


def need_solver() -> None:
    """Raise DataError if scipy is missing."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise DataError("allocation needs scipy", install_extra("study")) from None


def _program(slots: Sequence[Slot], full_bytes: int, budget: int) -> list[int]:
    """Solve the integer program. Returns the index of the selected option of each slot."""
    need_solver()
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    slot_of_column = [i for i, slot in enumerate(slots) for _ in slot.options]
    options = [option for slot in slots for option in slot.options]
    one_each = lil_matrix((len(slots), len(options)))
    for column, slot_index in enumerate(slot_of_column):
        one_each[slot_index, column] = 1
    saved = np.array([[option.saved for option in options]], dtype=np.float64)
    unit = max(1.0, float(saved.max()))
    costs = np.array([option.cost for option in options])
    with _silenced_stdout():
        solution = milp(
            COST_SCALE / max(max(costs), 1e-30) * costs,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each.tocsr(), 1, 1),
                LinearConstraint(saved / unit, (full_bytes - budget) / unit, np.inf),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if solution.x is None:
        raise PlanError(f"the solver returned no allocation: {solution.message}", "raise --max-size")
    selected_columns = np.flatnonzero(np.round(solution.x))
    starts = np.cumsum([0, *(len(slot.options) for slot in slots)])
    return [int(column - starts[slot_index]) for slot_index, column in enumerate(selected_columns)]


@contextmanager
def _silenced_stdout() -> Iterator[None]:
    """Discard what the solver's C library writes to standard output, which carries the command's result."""
    sys.stdout.flush()
    saved_stdout = os.dup(1)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 1)
        yield
    finally:
        os.dup2(saved_stdout, 1)
        os.close(saved_stdout)


def front(slots: Sequence[Slot], full_bytes: int, points: int = POINTS) -> list[Allocation]:
    """Allocations of minimal cost for `points` budgets from the smallest to the full size, sorted by size, distinct."""
    smallest = full_bytes - sum(max(option.saved for option in slot.options) for slot in slots)
    budgets = np.geomspace(smallest, full_bytes, points)
    allocations: dict[tuple[int, float], Allocation] = {}
    for budget in budgets:
        allocation = solve(slots, full_bytes, max(smallest, int(budget)))
        allocations.setdefault((allocation.bytes, allocation.cost), allocation)
    return [allocations[key] for key in sorted(allocations)]


def rules_of(slots: Sequence[Slot], options: Sequence[Option]) -> tuple[Rule, ...]:
    """Recipe rules of an allocation; consecutive blocks and roles with equal rules share one, 16 bits needs none."""
    rules: list[Rule] = []
    for component in dict.fromkeys(slot.component for slot in slots):
        component_choices = [
            (candidate_slot, candidate_option)
            for candidate_slot, candidate_option in zip(slots, options, strict=True)
            if candidate_slot.component == component
        ]
        blocks: dict[int | None, dict[str | None, Rule | None]] = {}
        for slot, option in component_choices:
            blocks.setdefault(slot.blocks, {})[slot.role] = _without_block_and_role(option.rule)
        runs: list[tuple[list[int | None], dict[str | None, Rule | None]]] = []
        for number, roles in sorted(blocks.items(), key=lambda item: item[0] or 0):
            if runs and runs[-1][1] == roles:
                runs[-1][0].append(number)
            else:
                runs.append(([number], roles))
        for numbers, roles in runs:
            span = None if len(runs) == 1 or numbers[0] is None else f"{numbers[0]}:{(numbers[-1] or 0) + 1}"
            rules += _role_rules(roles, span)
    return tuple(rules)


def _without_block_and_role(rule: Rule | None) -> Rule | None:
    return rule.model_copy(update={"blocks": None, "role": None}) if rule else None


def _role_rules(roles: dict[str | None, Rule | None], span: str | None) -> list[Rule]:
    """Rules of one range of blocks; one rule without a role if all roles have the same rule."""
    all_equal = all(rule == next(iter(roles.values())) for rule in roles.values())
    rules_by_role = {None: next(iter(roles.values()))} if all_equal else roles
    return [
        rule.model_copy(update={"blocks": span, "role": role})
        for role, rule in rules_by_role.items()
        if rule is not None
    ]
