"""Sensitivities: divergence of the model's predictions with one slot quantized by one scheme, all else in 16 bits."""

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
from exporter.study.grid import Setting
from exporter.study.records import ScoredSetting
from exporter.study.run import Outcome, run
from exporter.study.worker_pool import WorkerPool
from exporter.study.worker_tasks import Setup, StudyModel, open_model

Granularity = Literal["role", "block", "component"]
TABLE = "allocate"


def rules(
    bits: Sequence[int], groups: Sequence[GroupSize], method: str, symmetric: bool, unserved: bool, format_name: str
) -> list[dict[str, Any]]:
    """Schemes to choose from, as rule fields without component, blocks and role. unserved: also unservable schemes.

    Raises PlanError for invalid values, or if no scheme remains.
    """
    schemes: list[dict[str, Any]] = []
    for width in sorted(set(bits) - {16}):
        for group in groups:
            rule: dict[str, Any] = {"bits": width, "group_size": group, "method": method, "symmetric": symmetric}
            try:
                Rule(component="any", **rule)
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(str(part) for part in first["loc"])
                raise PlanError(
                    f"{key}: {first['msg']}", "see --bits, --groups and --method in `mmq allocate --help`"
                ) from None
            kernels = serving_kernels(Scheme(width, group, symmetric), format_name)
            if unserved or kernels.cuda or kernels.cpu:
                schemes.append(rule)
    if not schemes:
        raise PlanError(
            "no scheme of these options can be served", "choose other --bits or --groups, or pass --unserved"
        )
    return schemes


def without_extras(schemes: Sequence[dict[str, Any]], format_name: str) -> list[dict[str, Any]]:
    """The schemes whose kernels vLLM runs without further packages."""

    def is_plain(rule: dict[str, Any]) -> bool:
        kernels = serving_kernels(Scheme(rule["bits"], rule["group_size"], rule["symmetric"]), format_name)
        return not kernels.requirement()

    return [rule for rule in schemes if is_plain(rule)]


def iterate_slots(
    model: StudyModel, per: Granularity, names: Sequence[str]
) -> Iterator[tuple[Component, int | None, str | None]]:
    """Component, block and role of every slot; omits components that vLLM cannot load packed.

    Linears that vLLM fuses have one role, so they share a slot. Raises PlanError for an unknown component.
    """
    component_names = [component.name for component in model.family.components]
    for name in names:
        if name not in component_names:
            raise PlanError(
                f"no component '{name}'",
                f"the components of family {model.family.name} are {', '.join(component_names)}",
            )
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
    """The setup for sensitivities: the training split, and a separate table."""
    return replace(setup, split="train", table=TABLE)


def measure(
    setup: Setup,
    per: Granularity,
    names: Sequence[str],
    schemes: Sequence[dict[str, Any]],
    pool: WorkerPool,
    on_event: Listener,
) -> tuple[list[Slot], int, Outcome]:
    """Measure the sensitivities on the training split.

    Returns every slot with its options, the size of the model in 16 bits (bytes), and the outcome of the run.
    """
    model = open_model(setup)
    slot_keys = list(iterate_slots(model, per, names))
    settings, slot_indices = [Setting((), (("place", "full"), ("scheme", "16")))], [-1]
    for slot_index, (component, block, role) in enumerate(slot_keys):
        for scheme in schemes:
            block_range = None if block is None else f"{block}:{block + 1}"
            method = scheme["method"]
            if component.without_data and METHODS[method].Statistics is not None:
                method = "rtn"
            rule = Rule(component=component.name, blocks=block_range, role=role, **{**scheme, "method": method})
            if _fits(model, component, block, role, rule):
                settings.append(Setting((rule,), _about(component, block, role, rule)))
                slot_indices.append(slot_index)
    outcome = run(on_training(setup), settings, pool, on_event)
    full = outcome.settings[0].bytes
    options: list[list[Option]] = [[Option(None, 0, 0.0)] for _ in slot_keys]
    for index, setting, scored in list(zip(slot_indices, settings, outcome.settings, strict=True))[1:]:
        options[index].append(Option(setting.rules[0], full - scored.bytes, scored.scores["kl"]))
    slots = [
        Slot(component.name, block, role, _undominated(options[i]))
        for i, (component, block, role) in enumerate(slot_keys)
    ]
    return slots, full, outcome


def _about(component: Component, block: int | None, role: str | None, rule: Rule) -> tuple[tuple[str, str | int], ...]:
    scheme = rule.scheme()
    assert scheme is not None
    label = component.name + (f" {block}" if block is not None and "{i}" in component.blocks else "")
    label += f" {role}" if role else ""
    return (("place", label), ("scheme", scheme.label()), ("method", rule.method), ("bits", rule.bits))


def _fits(model: StudyModel, component: Component, block: int | None, role: str | None, rule: Rule) -> bool:
    """Whether the format can store the rule's scheme in every linear of the slot."""
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
    """Options without dominated ones, by cost: each saves more bytes than all cheaper ones."""
    undominated: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, -o.saved)):
        if not undominated or option.saved > undominated[-1].saved:
            undominated.append(option)
    return tuple(undominated)


def table(settings: Sequence[ScoredSetting]) -> dict[str, dict[str, float]]:
    """Slot -> scheme -> KL per token."""
    kl_by_slot: dict[str, dict[str, float]] = {}
    for setting in settings:
        kl_by_slot.setdefault(str(setting.about["place"]), {})[str(setting.about["scheme"])] = setting.scores["kl"]
    return kl_by_slot
