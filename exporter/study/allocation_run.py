"""`mmq allocate` from start to end: measure sensitivities, compute the front, choose an allocation, and confirm it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter import data
from exporter.errors import PlanError, RecipeError
from exporter.events import Listener, notice
from exporter.numerics.quantized import GroupSize
from exporter.planning.recipe import Recipe
from exporter.study import propose
from exporter.study.allocate import POINTS, Allocation, Slot, front, need_solver, rules_of, solve
from exporter.study.grid import Setting
from exporter.study.propose import MeasuredRecipe
from exporter.study.records import ScoredSetting
from exporter.study.run import run
from exporter.study.sensitivity import TABLE, Granularity, measure, on_training, rules, table, without_extras
from exporter.study.worker_pool import WorkerPool
from exporter.study.worker_tasks import Setup, StudyModel, exam_samples, open_model

FRONT_SAMPLES = 4  # the front is scored on this multiple of the samples for sensitivities
TRIES = 4  # largest number of allocations to confirm until one is within --max-drop


@dataclass(frozen=True)
class Request:
    """Constraint of an allocation, a size in bytes or a drop as a share of the full score, and its search space.

    names: components, empty for all that can be packed. plain: only kernels of a plain vLLM. unserved: also schemes
    that no engine runs. against: recipes to compare with. samples: test samples per task. points: number of budgets
    of the front.
    """

    max_size: int | None
    max_drop: float | None
    bits: tuple[int, ...]
    groups: tuple[GroupSize, ...]
    method: str
    symmetric: bool
    per: Granularity
    names: tuple[str, ...] = ()
    plain: bool = False
    unserved: bool = False
    against: tuple[str, ...] = ()
    samples: int = 500
    points: int = POINTS
    name: str = "allocated"


@dataclass(frozen=True)
class Candidate:
    """An allocation or recipe, scored without generation on the validation split.

    predicted: sum of the slots' divergences, None for hand-written recipes. change: relative change of the score.
    """

    name: str
    measured: ScoredSetting
    predicted: float | None
    change: float

    def row(self) -> dict[str, Any]:
        """JSON-compatible data."""
        setting = self.measured
        fields = {
            "name": self.name,
            "bytes": setting.bytes,
            "bits_per_weight": setting.bits_per_weight,
            "change": self.change,
        }
        return {**fields, "score": setting.scores["score"], "kl": setting.scores["kl"], "predicted_kl": self.predicted}


@dataclass(frozen=True)
class AllocationResult:
    """The recipe with its evidence, and the measurements behind it.

    sensitivity: slot -> scheme -> KL per token. front: allocations by size. winner: the chosen one. together: its KL
    per token on the samples of the sensitivities, to compare with their sum. hand_written: recipes of --against on the
    validation split. confirmed, against: results on real tasks of the winner and of these recipes.
    warnings: the loss exceeds --max-drop, or CLOSE without --max-drop.
    """

    recipe: Recipe
    sensitivity: dict[str, dict[str, float]]
    front: tuple[Candidate, ...]
    winner: Candidate
    together: float
    hand_written: tuple[Candidate, ...]
    confirmed: MeasuredRecipe | None
    against: tuple[MeasuredRecipe, ...]
    seconds: dict[str, float]
    cpu_seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def decided(self) -> bool:
        """Whether the loss is known: false where the full-precision model scores 0 on every task."""
        return not math.isnan(_change(self.winner, self.confirmed))

    def as_json(self) -> dict[str, Any]:
        """JSON-compatible data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "warnings": list(self.warnings),
            "winner": self.winner.row() | {"together_kl": self.together},
            "confirmed": self.confirmed.row() if self.confirmed else None,
            "against": [item.row() for item in self.against],
            "front": [item.row() for item in self.front],
            "written": [item.row() for item in self.hand_written],
            "sensitivity": self.sensitivity,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }


def allocate(
    setup: Setup, request: Request, pool: WorkerPool, on_event: Listener, prove: bool = True
) -> AllocationResult:
    """Choose bits, measure the choice and build the recipe.

    Raises PlanError if no allocation is within the size, or none is within the drop. Before anything is measured, it
    raises DataError if the data lacks a split.
    """
    need_solver()
    for split in ("train", "validation", "test") if prove else ("train", "validation"):
        exam_samples(replace(setup, split=split, samples=1))
    model = open_model(setup)
    _require_smaller_size(model, request)
    format_name = model.recipe.format
    schemes = rules(request.bits, request.groups, request.method, request.symmetric, request.unserved, format_name)
    schemes = without_extras(schemes, format_name) if request.plain else schemes
    hand_written = [(name, propose.comparable(name, model.recipe, model.family)) for name in request.against]
    slots, full_bytes, measured = measure(setup, request.per, request.names, schemes, pool, on_event)
    allocations = [
        allocation for allocation in front(slots, full_bytes, request.points) if allocation.bytes < full_bytes
    ]
    if request.max_size is not None:
        allocations.append(solve(slots, full_bytes, request.max_size))
    candidates, hand_written_candidates = score_choices(setup, slots, allocations, hand_written, pool, on_event)
    recipes = [_recipe(setup, request, slots, allocation) for allocation in allocations]
    winner, confirmed = _choose(setup, request, candidates, recipes, on_event, prove)
    recipe = recipes[candidates.index(winner)]
    together = _divergence_together(setup, recipe, pool, on_event)
    recipe = propose.with_evidence(recipe, confirmed, winner.predicted or 0.0, together, request.max_drop)
    compared = [_confirm(setup, other, request.samples, on_event) for _, other in hand_written if prove]
    return AllocationResult(
        recipe=recipe,
        sensitivity=table(measured.settings[1:]),
        front=tuple(sorted(candidates, key=lambda candidate: candidate.measured.bytes)),
        winner=winner,
        together=together,
        hand_written=hand_written_candidates,
        confirmed=confirmed,
        against=tuple(compared),
        seconds=dict(measured.seconds),
        cpu_seconds=measured.cpu_seconds,
        warnings=_warnings(_change(winner, confirmed), confirmed is not None, request.max_drop),
    )


def _require_smaller_size(model: StudyModel, request: Request) -> None:
    """Raise RecipeError if the model in 16 bits is already within the size."""
    full = model.plan(()).bytes_after
    if request.max_size is not None and request.max_size >= full:
        raise RecipeError(
            f"the model in 16 bits has {full:,} bytes, which --max-size {request.max_size:,} already allows",
            f"pass --max-size below {full:,}, or --max-drop",
        )


def _change(winner: Candidate, confirmed: MeasuredRecipe | None) -> float:
    """The relative change by which the allocation is judged; NaN if the full-precision model scores 0."""
    return confirmed.worst if confirmed else winner.change


def _warnings(change: float, confirmed: bool, max_drop: float | None) -> tuple[str, ...]:
    """A warning if the loss exceeds `max_drop`, or CLOSE without `max_drop`, or is unknown."""
    data_name = "real tasks" if confirmed else "the validation split"
    if math.isnan(change):
        return (f"the loss on {data_name} is unknown: the full-precision model scores 0 there; check prompt and data",)
    allowed = propose.CLOSE if max_drop is None else max_drop
    if change >= -allowed:
        return ()
    loss = f"the allocation loses {-change:.1%} on {data_name}, more than {allowed:.1%}"
    return (f"{loss}: allow a larger size, or more --bits",)


def _divergence_together(setup: Setup, recipe: Recipe, pool: WorkerPool, on_event: Listener) -> float:
    """KL per token of the whole allocation on the samples of the sensitivities."""
    setting = Setting(recipe.quantize, (("place", "together"), ("scheme", "chosen")))
    return run(on_training(setup), [setting], pool, on_event).settings[0].scores["kl"]


def _recipe(setup: Setup, request: Request, slots: Sequence[Slot], allocation: Allocation) -> Recipe:
    """An allocation as a recipe, with gates on the tasks of the data."""
    max_drop, model = propose.CLOSE if request.max_drop is None else request.max_drop, open_model(setup)
    recipe = propose.recipe_of(model.recipe, request.name, slots, allocation, exam_samples(setup), max_drop)
    return recipe.model_copy(update={"quantize": model.fitted(recipe.quantize)})


def _choose(
    setup: Setup,
    request: Request,
    candidates: Sequence[Candidate],
    recipes: Sequence[Recipe],
    on_event: Listener,
    prove: bool,
) -> tuple[Candidate, MeasuredRecipe | None]:
    """The candidate to use; with `prove`, the first one whose loss on real tasks is within the limit.

    Raises PlanError if no candidate is.
    """
    for candidate in _candidates(request, candidates):
        if not prove:
            return candidate, None
        confirmed = _confirm(setup, recipes[candidates.index(candidate)], request.samples, on_event)
        if request.max_drop is None or confirmed.worst >= -request.max_drop:
            return candidate, confirmed
        loss = f"{candidate.name}: {-confirmed.worst:.1%} lost on real tasks"
        on_event(notice(f"{loss}; the next candidate is a larger one"))
    raise PlanError(
        f"every measured allocation loses more than {request.max_drop or 0:.1%} on real tasks",
        "raise --max-drop, or raise --eval-samples: small drops need many samples",
    )


def score_choices(
    setup: Setup,
    slots: Sequence[Slot],
    allocations: Sequence[Allocation],
    hand_written: Sequence[tuple[str, Recipe]],
    pool: WorkerPool,
    on_event: Listener,
) -> tuple[list[Candidate], tuple[Candidate, ...]]:
    """Score all allocations and hand-written recipes on the validation split, relative to the full-precision model.

    This omits the rounding of activations to 8 bits, which only the export measures.
    """
    rules = [
        (),
        *(rules_of(slots, allocation.options) for allocation in allocations),
        *(recipe.quantize for _, recipe in hand_written),
    ]
    names = ["full", *(f"choice {i + 1}" for i in range(len(allocations))), *(name for name, _ in hand_written)]
    settings = [
        Setting(tuple(rule.model_copy(update={"activations": None}) for rule in setting_rules), (("name", name),))
        for name, setting_rules in zip(names, rules, strict=True)
    ]
    setup_of_front = replace(setup, split="validation", table=f"{TABLE}-front", samples=FRONT_SAMPLES * setup.samples)
    outcome = run(setup_of_front, settings, pool, on_event)
    full = outcome.settings[0].scores["score"]
    predicted = [None, *(allocation.cost for allocation in allocations), *(None for _ in hand_written)]
    candidates = [
        Candidate(name, setting, cost, setting.scores["score"] / max(full, 1e-12) - 1)
        for name, setting, cost in zip(names, outcome.settings, predicted, strict=True)
    ]
    return candidates[1 : 1 + len(allocations)], tuple(candidates[1 + len(allocations) :])


def _candidates(request: Request, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates to confirm: the one for --max-size, or the smallest ones within --max-drop on the validation split.

    Raises PlanError if none is within --max-drop.
    """
    if request.max_drop is None:
        return [candidates[-1]]
    by_size = sorted(
        (candidate for candidate in candidates if candidate.predicted is not None),
        key=lambda candidate: candidate.measured.bytes,
    )
    allowed_indices = [i for i, candidate in enumerate(by_size) if candidate.change >= -request.max_drop]
    if not allowed_indices:
        raise PlanError(
            f"every allocation of these schemes loses more than {request.max_drop:.1%}",
            "raise --max-drop, or allow more bits",
        )
    return by_size[allowed_indices[0] : allowed_indices[0] + TRIES]


def _confirm(setup: Setup, recipe: Recipe, samples: int, on_event: Listener) -> MeasuredRecipe:
    sources: tuple[data.SourceSpec, ...] = setup.places
    device = open_model(setup).device
    return propose.confirm(recipe, setup.folder / "confirmed", device, sources, samples, on_event)
