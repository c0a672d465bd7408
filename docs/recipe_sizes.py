"""The table of the README with an artifact's size by recipe, for the smallest published checkpoint of each family."""

import tempfile
from pathlib import Path

from docs.family_pages import sizes_of
from docs.family_support import smallest_name
from exporter.amounts import size
from exporter.device import Device
from exporter.errors import PlanError
from exporter.model.families import FAMILIES, Family
from exporter.model.source import open_source
from exporter.planning.overrides import Groups, adjusted
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe_file import load_recipe
from tests.headers.read import write_sparse_checkpoint

RECIPES = ("llava-w8", "llava-w4-vit8", "llava-w3-vit4")
OTHER = ("blip2-retrieval-w4", "blip2-retrieval-w3")  # of families without language model
GROUPS: tuple[Groups | None, ...] = (None, 64, (128, "row"), (64, "row"))  # values of --group-size, tried in this order
ROOMY = Device("cpu", "CPU", 2**50)


def family_sizes() -> str:
    """Markdown: a row per family, with the bytes of all tensors as `mmq plan` predicts them."""
    heads = ["family", "checkpoint", "16 bits", *(f"`{name}`" for name in RECIPES)]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *map(_row, FAMILIES.values())])


def _row(family: Family) -> str:
    header, fits = smallest_name(family), _fits(family)
    recipes = RECIPES if fits else OTHER
    with tempfile.TemporaryDirectory() as folder:
        source = write_sparse_checkpoint(Path(folder) / "model", header)
        cells = [_cell(source, recipe) for recipe in recipes]
    if not fits:
        cells = [
            "no recipe of 8 bits for retrieval",
            *(f"`{recipe}`: {cell}" for recipe, cell in zip(recipes, cells, strict=True)),
        ]
    checkpoint = header.partition("--")[2]
    return f"| {' | '.join([f'`{family.name}`', f'`{checkpoint}`', size(sizes_of(header)[0]), *cells])} |"


def _fits(family: Family) -> bool:
    """Whether a family has the components of `RECIPES`."""
    return not any(load_recipe(name).foreign_components(family) for name in RECIPES)


def _cell(source: Path, recipe: str) -> str:
    """The size, with the value of `--group-size` without which the recipe is refused."""
    for groups in GROUPS:
        try:
            planned = size(_plan(source, recipe, groups).bytes_after)
        except PlanError:
            continue
        text = ",".join(map(str, groups)) if isinstance(groups, tuple) else str(groups)
        return planned if groups is None else f"{planned} ({text})"
    raise SystemExit(f"{source}: no group size fits {recipe}")


def _plan(source: Path, recipe: str, groups: Groups | None) -> Plan:
    """The plan of a model whose float32 tensors are read in 16 bits, as exports read them."""
    changed = adjusted(load_recipe(recipe), source, group_size=groups)
    checkpoint, family = open_source(str(source), dtype=changed.model.dtype or "bfloat16")
    return make_plan(changed, checkpoint, family, ROOMY)
