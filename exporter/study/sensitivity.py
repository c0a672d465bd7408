"""What every scheme costs at every place, all the rest being kept: the divergence of the model's predictions."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import ValidationError

from exporter.errors import PlanError
from exporter.events import Listener
from exporter.formats import FORMATS
from exporter.methods import METHODS
from exporter.model.families import Component
from exporter.numerics.quantized import GroupSize, Scheme
from exporter.planning.recipe import Rule
from exporter.planning.vllm_kernels import serving_kernels
from exporter.study.allocate import Option, Slot
from exporter.study.grid import Point
from exporter.study.pool import WorkerPool
from exporter.study.records import Measured
from exporter.study.run import Outcome, run
from exporter.study.work import Opened, Setup, opened

Per = Literal["role", "block", "component"]
TABLE = "allocate"


def rules(
    bits: Sequence[int], groups: Sequence[GroupSize], method: str, symmetric: bool, unserved: bool, format_name: str
) -> list[dict[str, Any]]:
    """What places may choose from, besides being kept: rules without a place. unserved: also what no engine runs."""
    found: list[dict[str, Any]] = []
    for width in sorted(set(bits) - {16}):
        for group in groups:
            rule: dict[str, Any] = {"bits": width, "group_size": group, "method": method, "symmetric": symmetric}
            try:
                Rule(component="any", **rule)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise PlanError(f"{where}: {first['msg']}", "see --bits, --groups and --method of --help") from None
            kernels = serving_kernels(Scheme(width, group, symmetric), format_name)
            if unserved or kernels.cuda or kernels.cpu:
                found.append(rule)
    if not found:
        raise PlanError("no scheme is left to choose from", "name other --bits or --groups, or allow --unserved")
    return found


def without_extras(found: Sequence[dict[str, Any]], format_name: str) -> list[dict[str, Any]]:
    """Those schemes whose kernels a plain installation of the engine has."""

    def plain(rule: dict[str, Any]) -> bool:
        kernels = serving_kernels(Scheme(rule["bits"], rule["group_size"], rule["symmetric"]), format_name)
        return not kernels.requirement()

    return [rule for rule in found if plain(rule)]


def spots(model: Opened, per: Per, names: Sequence[str]) -> Iterator[tuple[Component, int | None, str | None]]:
    """Component, block and role of every place; components that the engine cannot load packed are left alone.

    Linears that the engine fuses have one role, so they share their place.
    """
    known = [component.name for component in model.family.components]
    for name in names:
        if name not in known:
            raise PlanError(f"no component '{name}'", f"family {model.family.name} has {', '.join(known)}")
    for component in model.family.components:
        usable = component.formats is None or model.recipe.format in component.formats
        if component.unpackable or not usable or (names and component.name not in names):
            continue
        if per == "component":
            yield component, None, None
            continue
        for i in range(component.used(model.checkpoint.config)):
            linears = component.linears_of(model.checkpoint.config, i)
            roles = list(dict.fromkeys(component.roles[linear] for linear in linears))
            for role in roles if per == "role" and len(roles) > 1 else [None]:
                yield component, i, role


def on_training(setup: Setup) -> Setup:
    """The setup that sensitivities are measured by: on the training split, in a table of its own."""
    return replace(setup, split="train", table=TABLE)


def measure(
    setup: Setup,
    per: Per,
    names: Sequence[str],
    schemes: Sequence[dict[str, Any]],
    pool: WorkerPool,
    on_event: Listener,
) -> tuple[list[Slot], int, Outcome]:
    """Every place with its options, the full size, and what measuring took. It scores on the training split."""
    model = opened(setup)
    found = list(spots(model, per, names))
    points, owners = [Point((), (("place", "full"), ("scheme", "16")))], [-1]
    for number, (component, block, role) in enumerate(found):
        for scheme in schemes:
            span = None if block is None else f"{block}:{block + 1}"
            method = scheme["method"]
            if component.without_data and METHODS[method].Statistics is not None:
                method = "rtn"
            rule = Rule(component=component.name, blocks=span, role=role, **{**scheme, "method": method})
            if _fits(model, component, block, role, rule):
                points.append(Point((rule,), _about(component, block, role, rule)))
                owners.append(number)
    outcome = run(on_training(setup), points, pool, on_event)
    full = outcome.found[0].bytes
    options: list[list[Option]] = [[Option(None, 0, 0.0)] for _ in found]
    for owner, point, measured in list(zip(owners, points, outcome.found, strict=True))[1:]:
        options[owner].append(Option(point.rules[0], full - measured.bytes, measured.scores["kl"]))
    places = [
        Slot(component.name, block, role, _undominated(options[i])) for i, (component, block, role) in enumerate(found)
    ]
    return places, full, outcome


def _about(component: Component, block: int | None, role: str | None, rule: Rule) -> tuple[tuple[str, str | int], ...]:
    scheme = rule.scheme()
    assert scheme is not None
    where = component.name + (f" {block}" if block is not None and "{i}" in component.blocks else "")
    where += f" {role}" if role else ""
    return (("place", where), ("scheme", scheme.label()), ("method", rule.method), ("bits", rule.bits))


def _fits(model: Opened, component: Component, block: int | None, role: str | None, rule: Rule) -> bool:
    """Whether the format can store this scheme in every linear of the place."""
    scheme = rule.scheme()
    assert scheme is not None
    blocks = range(component.used(model.checkpoint.config)) if block is None else [block]
    for i in blocks:
        for linear in component.linears_of(model.checkpoint.config, i):
            if role is None or component.roles[linear] == role:
                rows, columns = model.checkpoint.tensors[f"{component.module(i, linear)}.weight"].shape
                if FORMATS[model.recipe.format].supports(scheme, columns, rows):
                    return False
    return True


def _undominated(options: Sequence[Option]) -> tuple[Option, ...]:
    """Options that save most for what they cost: one that saves no more than a cheaper one is never chosen."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, -o.saved)):
        if not kept or option.saved > kept[-1].saved:
            kept.append(option)
    return tuple(kept)


def table(found: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Place -> scheme -> divergence, as measured."""
    places: dict[str, dict[str, float]] = {}
    for one in found:
        places.setdefault(str(one.about["place"]), {})[str(one.about["scheme"])] = one.scores["kl"]
    return places
