"""Inputs of linears in forward passes of a whole model, in the order in which GPTQ quantizes the linears."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exporter.model.families import Component, Family
from exporter.model.families.component import Config
from exporter.model.inference.forward_hooks import ForwardStopped, run_until_stopped
from exporter.planning.plan import Plan
from exporter.planning.recipe import Rule
from tests.tiny_models import QUICK


def rules(family: Family, method: str = "gptq") -> tuple[Rule, ...]:
    """A method for every component that calibration data can quantize."""
    return tuple(
        Rule(
            component=component.name,
            method=method,
            bits=8 if method == "gptq" else 4,
            group_size="row",
            store="dequantized" if component.unpackable else "packed",
            options=QUICK[method],
        )
        for component in family.components
        if not component.without_data
    )


def stacks(plan: Plan) -> list[tuple[Component, list[str]]]:
    """Modules that GPTQ quantizes in one call, in order."""
    result = []
    for unit in plan.units:
        component = plan.family.component(unit.component)
        for phase in component.phases:
            if modules := [row.module for row in unit.rows if row.linear in phase]:
                result.append((component, modules))
    return result


def stop(*_: Any) -> None:
    """A hook that ends a forward pass."""
    raise ForwardStopped


def captured_rows(
    model: Any,
    family: Family,
    component: Component,
    module: str,
    config: Config,
    batches: Sequence[Mapping[str, Tensor]],
) -> Tensor:
    """The inputs of a linear in forward passes of the whole model, without padding, `[rows, in]`."""
    linear, rows = model.get_submodule(family.live_name(module)), []
    blocks = [component.block(i) for i in range(component.used(config))]
    last = model.get_submodule(family.live_name(next(name for name in blocks if f"{module}.".startswith(f"{name}."))))
    for entry in component.passes:
        for batch in batches:
            captured: list[Tensor] = []
            handles = [
                linear.register_forward_pre_hook(lambda _, args, captured=captured: captured.append(args[0])),
                last.register_forward_hook(stop),  # the retrieval model calls its Q-Former again, which is another pass
            ]
            run_until_stopped(entry.run, model, batch)
            for handle in handles:
                handle.remove()
            for x in captured:
                mask = batch["attention_mask"].bool()
                if not entry.padded or any(module.endswith(f".{name}") for name in component.unpadded):
                    rows.append(x.reshape(-1, x.shape[-1]))
                    continue
                tokens = x.reshape(len(mask), -1, x.shape[-1])
                before = torch.ones(len(mask), max(0, tokens.shape[1] - mask.shape[1]), dtype=torch.bool)
                rows.append(tokens[torch.cat([before, mask], 1)[:, -tokens.shape[1] :]])
    return torch.cat(rows).double()
