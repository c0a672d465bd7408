"""Bits for every part of a model under a size budget: an integer program over measured sensitivities.

Each place (a role of a block, a block, or a component) takes one of its options. The cost of an option is how far it
alone moves the model's predictions; the cost of a whole choice is taken to be the sum of these. That assumption is what
makes the best choice computable; `mmq allocate` measures the winner and says how far off the sum was.
HiGHS (scipy.optimize.milp) solves the program exactly: least cost, one option a place, bytes within the budget.
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

COST_SCALE = 1e4  # costs are scaled up to this, since the solver takes differences of 1e-6 for none
POINTS = 25  # budgets between the smallest and the full size that make up the front


@dataclass(frozen=True)
class Option:
    """One way to store one place. rule: None keeps it. saved: bytes it takes less than in 16 bits. cost: measured."""

    rule: Rule | None
    saved: int
    cost: float


@dataclass(frozen=True)
class Slot:
    """What gets one scheme. blocks, role: None for all of them."""

    component: str
    blocks: int | None
    role: str | None
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """An option for each place. bytes: of the whole artifact. cost: the sum of costs that was minimized."""

    options: tuple[Option, ...]
    bytes: int
    cost: float


def solve(places: Sequence[Slot], full_bytes: int, max_bytes: int) -> Allocation:
    """The cheapest choice of at most `max_bytes`. PlanError when nothing is that small, DataError without scipy.

    full_bytes: size of the model with everything kept.
    """
    least = full_bytes - sum(max(option.saved for option in place.options) for place in places)
    if least > max_bytes:
        raise PlanError(
            f"no choice of these schemes is at most {max_bytes:,} bytes: the smallest is {least:,}",
            "raise --max-size, or allow fewer bits by --bits",
        )
    budget = max_bytes
    while True:  # the solver works in floating point: a choice that is over by rounding is asked for again, lower
        numbers = _program(places, full_bytes, budget)
        options = tuple(place.options[i] for place, i in zip(places, numbers, strict=True))
        size = full_bytes - sum(option.saved for option in options)
        if size <= max_bytes:
            return Allocation(options, size, sum(option.cost for option in options))
        budget -= size - max_bytes


def need_solver() -> None:
    """DataError when the solver's library is missing."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise DataError("allocation needs scipy", install_extra("study")) from None


def _program(places: Sequence[Slot], full_bytes: int, budget: int) -> list[int]:
    """The number of the option of each place."""
    need_solver()
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    owners = [i for i, place in enumerate(places) for _ in place.options]
    options = [option for place in places for option in place.options]
    one_each = lil_matrix((len(places), len(options)))
    for column, owner in enumerate(owners):
        one_each[owner, column] = 1
    saved = np.array([[option.saved for option in options]], dtype=np.float64)
    unit = max(1.0, float(saved.max()))
    costs = np.array([option.cost for option in options])
    with _silent():
        found = milp(
            COST_SCALE / max(max(costs), 1e-30) * costs,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each.tocsr(), 1, 1),
                LinearConstraint(saved / unit, (full_bytes - budget) / unit, np.inf),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        raise PlanError(f"the solver found no choice: {found.message}", "raise --max-size")
    taken = np.flatnonzero(np.round(found.x))
    starts = np.cumsum([0, *(len(place.options) for place in places)])
    return [int(column - starts[owner]) for owner, column in enumerate(taken)]


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what the solver's library writes to standard output by itself gets there: results go there."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def front(places: Sequence[Slot], full_bytes: int, points: int = POINTS) -> list[Allocation]:
    """The cheapest choices for budgets from the smallest size up, smallest first, none twice."""
    least = full_bytes - sum(max(option.saved for option in place.options) for place in places)
    budgets = np.geomspace(least, full_bytes, points)
    found: dict[tuple[int, float], Allocation] = {}
    for budget in budgets:
        chosen = solve(places, full_bytes, max(least, int(budget)))
        found.setdefault((chosen.bytes, chosen.cost), chosen)
    return [found[key] for key in sorted(found)]


def rules_of(places: Sequence[Slot], options: Sequence[Option]) -> tuple[Rule, ...]:
    """The rules of a choice, blocks in a row and roles that got the same joined; what is kept is left out."""
    rules: list[Rule] = []
    for component in dict.fromkeys(place.component for place in places):
        mine = [(p, o) for p, o in zip(places, options, strict=True) if p.component == component]
        blocks: dict[int | None, dict[str | None, Rule | None]] = {}
        for place, option in mine:
            blocks.setdefault(place.blocks, {})[place.role] = _bare(option.rule)
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


def _bare(rule: Rule | None) -> Rule | None:
    return rule.model_copy(update={"blocks": None, "role": None}) if rule else None


def _role_rules(roles: dict[str | None, Rule | None], span: str | None) -> list[Rule]:
    """Rules for one run of blocks."""
    alike = all(rule == next(iter(roles.values())) for rule in roles.values())
    chosen = {None: next(iter(roles.values()))} if alike else roles
    return [rule.model_copy(update={"blocks": span, "role": role}) for role, rule in chosen.items() if rule is not None]
