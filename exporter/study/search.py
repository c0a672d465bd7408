"""The whole allocation on one page: sensitivities, the front, the choice, and its proof by real tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter import data
from exporter.errors import PlanError, RecipeError
from exporter.events import Event, Listener
from exporter.numerics.quantized import GroupSize
from exporter.planning.recipe import Recipe
from exporter.study import propose
from exporter.study.allocate import POINTS, Allocation, Slot, front, need_solver, rules_of, solve
from exporter.study.grid import Point
from exporter.study.pool import WorkerPool
from exporter.study.propose import Confirmed
from exporter.study.records import Measured
from exporter.study.run import run
from exporter.study.sensitivity import TABLE, Per, measure, on_training, rules, table, without_extras
from exporter.study.work import Opened, Setup, exam_samples, opened

FRONT_SAMPLES = 4  # choices are scored on so many times the samples that sensitivities are measured on
TRIES = 4  # choices that are confirmed one after the other until one loses no more than is allowed


@dataclass(frozen=True)
class Request:
    """What is asked for: a size or a drop (a share of the full score), and what may be chosen from.

    names: components, all that can be packed when empty. plain: only kernels of a plain engine; unserved: also schemes
    that no engine runs. against: recipes to compare with. samples: of each task, for the proof. points: sizes of
    the front.
    """

    max_size: int | None
    max_drop: float | None
    bits: tuple[int, ...]
    groups: tuple[GroupSize, ...]
    method: str
    symmetric: bool
    per: Per
    names: tuple[str, ...] = ()
    plain: bool = False
    unserved: bool = False
    against: tuple[str, ...] = ()
    samples: int = 500
    points: int = POINTS
    name: str = "allocated"


@dataclass(frozen=True)
class Tried:
    """One choice or recipe scored without generating, on samples that neither calibration nor the proof uses.

    predicted: the sum of divergences, None for hand-written recipes. change: share of the full model's score.
    """

    name: str
    measured: Measured
    predicted: float | None
    change: float

    def row(self) -> dict[str, Any]:
        """For tables, pictures and `--json`."""
        one = self.measured
        plain = {"name": self.name, "bytes": one.bytes, "bits_per_weight": one.bits_per_weight, "change": self.change}
        return {**plain, "score": one.scores["score"], "kl": one.scores["kl"], "predicted_kl": self.predicted}


@dataclass(frozen=True)
class AllocationResult:
    """The recipe with its evidence, and everything it rests on.

    sensitivity: place -> scheme -> divergence. front: choices by size. winner: the one that was taken; together: its
    divergence where the single ones were measured, so that their sum can be judged.
    confirmed: its real tasks; against: those of the recipes it was compared with. warnings: why the choice is no
    success: it loses more than it may, or than CLOSE where nothing was asked.
    """

    recipe: Recipe
    sensitivity: dict[str, dict[str, float]]
    front: tuple[Tried, ...]
    winner: Tried
    together: float
    written: tuple[Tried, ...]
    confirmed: Confirmed | None
    against: tuple[Confirmed, ...]
    seconds: dict[str, float]
    cpu_seconds: float
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "warnings": list(self.warnings),
            "winner": self.winner.row() | {"together_kl": self.together},
            "confirmed": self.confirmed.row() if self.confirmed else None,
            "against": [one.row() for one in self.against],
            "front": [one.row() for one in self.front],
            "written": [one.row() for one in self.written],
            "sensitivity": self.sensitivity,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }


def allocate(
    setup: Setup, request: Request, pool: WorkerPool, on_event: Listener, prove: bool = True
) -> AllocationResult:
    """Choose bits, and measure the choice. PlanError when nothing is small enough, or nothing loses little enough."""
    need_solver()  # before anything is measured
    model = opened(setup)
    _require_less(model, request)
    form = model.recipe.format
    schemes = rules(request.bits, request.groups, request.method, request.symmetric, request.unserved, form)
    schemes = without_extras(schemes, form) if request.plain else schemes
    written = [(name, propose.comparable(name, model.recipe)) for name in request.against]
    places, full, measured = measure(setup, request.per, request.names, schemes, pool, on_event)
    choices = [choice for choice in front(places, full, request.points) if choice.bytes < full]
    if request.max_size is not None:
        choices.append(solve(places, full, request.max_size))
    tried, hand = score_choices(setup, places, choices, written, pool, on_event)
    recipes = [_recipe(setup, request, places, choice) for choice in choices]
    winner, confirmed = _choose(setup, request, tried, recipes, on_event, prove)
    recipe = recipes[tried.index(winner)]
    together = _together(setup, recipe, pool, on_event)
    recipe = propose.with_evidence(recipe, confirmed, winner.predicted or 0.0, together, request.max_drop)
    rivals = [_confirm(setup, other, request.samples, on_event) for _, other in written if prove]
    return AllocationResult(
        recipe=recipe,
        sensitivity=table(measured.found[1:]),
        front=tuple(sorted(tried, key=lambda one: one.measured.bytes)),
        winner=winner,
        together=together,
        written=hand,
        confirmed=confirmed,
        against=tuple(rivals),
        seconds=dict(measured.seconds),
        cpu_seconds=measured.cpu_seconds,
        warnings=_warnings(winner, confirmed, request.max_drop),
    )


def _require_less(model: Opened, request: Request) -> None:
    """RecipeError when the size leaves nothing to choose: the whole model is that small already."""
    full = model.plan(()).bytes_after
    if request.max_size is not None and request.max_size >= full:
        raise RecipeError(
            f"the choice keeps everything at 16 bits: that takes {full:,} bytes, and {request.max_size:,} are allowed",
            f"give a --max-size below {full:,}, or --max-drop",
        )


def _warnings(winner: Tried, confirmed: Confirmed | None, max_drop: float | None) -> tuple[str, ...]:
    """What must not look like success: a loss beyond what is allowed, or beyond CLOSE where no limit was given."""
    change, on = (confirmed.worst, "real tasks") if confirmed else (winner.change, "the validation split")
    allowed = propose.CLOSE if max_drop is None else max_drop
    if change >= -allowed:  # false of NaN
        return ()
    return (f"this choice loses {-change:.1%} on {on}, more than {allowed:.1%}: allow a larger size, or more --bits",)


def _together(setup: Setup, recipe: Recipe, pool: WorkerPool, on_event: Listener) -> float:
    """The divergence of a whole choice on the samples that single ones were measured on."""
    point = Point(recipe.quantize, (("place", "together"), ("scheme", "chosen")))
    return run(on_training(setup), [point], pool, on_event).found[0].scores["kl"]


def _recipe(setup: Setup, request: Request, places: Sequence[Slot], choice: Allocation) -> Recipe:
    """A choice as a recipe, with gates on the tasks that the data has."""
    allowed = propose.CLOSE if request.max_drop is None else request.max_drop
    return propose.recipe_of(opened(setup).recipe, request.name, places, choice, list(exam_samples(setup)), allowed)


def _choose(
    setup: Setup,
    request: Request,
    tried: Sequence[Tried],
    recipes: Sequence[Recipe],
    on_event: Listener,
    prove: bool,
) -> tuple[Tried, Confirmed | None]:
    """The choice that is taken; with `prove`, the first one whose real tasks keep to the limit."""
    for one in _candidates(request, tried):
        if not prove:
            return one, None
        found = _confirm(setup, recipes[tried.index(one)], request.samples, on_event)
        if request.max_drop is None or found.worst >= -request.max_drop:
            return one, found
        on_event(Event("note", 0, 0, f"{one.name}: {-found.worst:.1%} lost on real tasks; a larger one is tried"))
    raise PlanError(
        f"none of the choices that were tried loses at most {request.max_drop or 0:.1%} on real tasks",
        "allow more by --max-drop, or measure on more --eval-samples: small drops need many",
    )


def score_choices(
    setup: Setup,
    places: Sequence[Slot],
    choices: Sequence[Allocation],
    written: Sequence[tuple[str, Recipe]],
    pool: WorkerPool,
    on_event: Listener,
) -> tuple[list[Tried], tuple[Tried, ...]]:
    """All choices and recipes on the validation split; the full model's score is what changes are shares of.

    Inputs rounded to 8 bits are left out here; the proof has them.
    """
    rules = [(), *(rules_of(places, choice.options) for choice in choices), *(recipe.quantize for _, recipe in written)]
    names = ["full", *(f"choice {i + 1}" for i in range(len(choices))), *(name for name, _ in written)]
    points = [
        Point(tuple(rule.model_copy(update={"activations": None}) for rule in found), (("name", name),))
        for name, found in zip(names, rules, strict=True)
    ]
    wide = replace(setup, split="validation", table=f"{TABLE}-front", samples=FRONT_SAMPLES * setup.samples)
    outcome = run(wide, points, pool, on_event)
    full = outcome.found[0].scores["score"]
    predicted = [None, *(choice.cost for choice in choices), *(None for _ in written)]
    tried = [
        Tried(name, one, cost, one.scores["score"] / max(full, 1e-12) - 1)
        for name, one, cost in zip(names, outcome.found, predicted, strict=True)
    ]
    return tried[1 : 1 + len(choices)], tuple(tried[1 + len(choices) :])


def _candidates(request: Request, tried: Sequence[Tried]) -> list[Tried]:
    """The choice for the size; for a drop, the smallest ones that seem to keep to it (PlanError when none does)."""
    if request.max_drop is None:
        return [tried[-1]]
    by_size = sorted((one for one in tried if one.predicted is not None), key=lambda one: one.measured.bytes)
    good = [i for i, one in enumerate(by_size) if one.change >= -request.max_drop]
    if not good:
        raise PlanError(
            f"no choice of these schemes loses at most {request.max_drop:.1%}", "allow more by --max-drop, or more bits"
        )
    return by_size[good[0] : good[0] + TRIES]


def _confirm(setup: Setup, recipe: Recipe, samples: int, on_event: Listener) -> Confirmed:
    sources: tuple[data.SourceSpec, ...] = setup.places
    device = opened(setup).device
    return propose.confirm(recipe, setup.folder / "confirmed", device, sources, samples, on_event)
