"""Rewrite the generated parts of the documentation: map, families, recipes, kernels, commands, exit codes, API.

    python -m docs.generate            rewrite them
    python -m docs.generate --check    exit 1 when they are stale

`make_plan` computes the sizes from the headers of the real models, so they equal the sizes that an export writes.
"""

import ast
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from docs.api_pages import api_reference, exit_code_page
from docs.family_pages import support_table
from docs.family_support import family_support
from docs.few_bits_page import calibration_table, method_tables
from docs.ideas_page import cache_table, ideas_table, rotation_table
from docs.measured_pages import gpu_checks, lineage_tables, model_checks, whole_checks
from docs.recipe_sizes import family_sizes
from exporter.amounts import size
from exporter.commands.main import cli
from exporter.device import Device
from exporter.model import embedded
from exporter.model.families import FAMILIES
from exporter.model.source import open_source
from exporter.numerics.quantized import GroupSize, Scheme
from exporter.planning.plan import make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import built_in, load_recipe
from exporter.planning.vllm_kernels import ARCHITECTURES, Capability, SchemeKernels, capability_label, serving_kernels
from tests.headers.read import write_sparse_checkpoint

ROOT = Path(__file__).parent.parent
MODELS = {  # a recipe's default model -> heading of its column
    "llava-hf/llava-1.5-7b-hf": "LLaVA-1.5-7B",
    "Salesforce/blip2-opt-2.7b": "BLIP-2 OPT-2.7b",
    "Salesforce/blip2-itm-vit-g-coco": "BLIP-2 ITM",
}
OF_FAMILIES = (
    "Sizes for the smallest published checkpoint of each family; in parentheses the `--group-size` that it needs, "
    "because groups of 128\ndo not divide all inputs:"
)
TASKS = {"vqa": "questions", "captioning": "captions", "retrieval": "image-text retrieval"}
USUAL: tuple[GroupSize, ...] = ("row", "tensor", 64, 128)
ALL: tuple[GroupSize, ...] = (*USUAL, 16, 32, 256)
FP8 = Scheme(8, "row", number="fp8")
BLOCKS = Scheme(8, "block", number="fp8")
ODD = (2, 3, 5, 6, 7)
KERNEL_ROWS: tuple[tuple[str, str, list[Scheme]], ...] = (  # schemes with the same cells
    (
        "W4, rows or groups of 64, 128",
        "compressed_tensors",
        [Scheme(4, g, s) for g in USUAL for s in (True, False)],
    ),
    ("W4, groups of 32", "compressed_tensors", [Scheme(4, 32), Scheme(4, 32, symmetric=False)]),
    ("W4, other groups", "compressed_tensors", [Scheme(4, 16), Scheme(4, 256)]),
    ("W8, rows or groups of 64, 128", "compressed_tensors", [Scheme(8, group) for group in USUAL]),
    ("W8, groups of 32", "compressed_tensors", [Scheme(8, 32)]),
    ("W8, other groups", "compressed_tensors", [Scheme(8, 16), Scheme(8, 256), Scheme(8, 32, symmetric=False)]),
    (
        "W8 asymmetric, rows or groups of 64, 128",
        "compressed_tensors",
        [Scheme(8, g, symmetric=False) for g in USUAL],
    ),
    ("W2, W3, W5, W6, W7", "compressed_tensors", [Scheme(bits, g) for bits in ODD for g in ALL]),
    ("W8A8 int8", "compressed_tensors", [Scheme(8, "row", activations="int8")]),
    ("FP8", "compressed_tensors", [replace(FP8, activations="fp8")]),
    ("FP8, weights alone", "compressed_tensors", [FP8]),
    ("W4, groups of 128, FP8 inputs", "compressed_tensors", [Scheme(4, 128, activations="fp8")]),
    ("FP8, blocks of 128 x 128, FP8 inputs", "compressed_tensors", [replace(BLOCKS, activations="fp8")]),
    ("FP8, blocks of 128 x 128, weights alone", "compressed_tensors", [BLOCKS]),
    ("NVFP4, weights alone", "compressed_tensors", [Scheme(4, 16, number="nvfp4")]),
    ("MXFP4, weights alone", "compressed_tensors", [Scheme(4, 32, number="mxfp4")]),
    ("MXFP8, weights alone", "compressed_tensors", [Scheme(8, 32, number="mxfp8")]),
    (
        "W2, W3, W5, W6, W7, int8 inputs",
        "compressed_tensors",
        [Scheme(b, g, activations="int8") for b in ODD for g in ALL],
    ),
    ("W4 symmetric", "gptq", [Scheme(4, group) for group in USUAL]),
    ("W8 symmetric", "gptq", [Scheme(8, group) for group in USUAL]),
    ("W4", "awq", [Scheme(4, group, symmetric=False) for group in USUAL]),
)
ROOMY = Device("cpu", "CPU", 2**50)


def recipe_table() -> str:
    """Markdown: a table for every default model, the built-in recipes with their sizes for it."""
    recipes = [load_recipe(name) for name in built_in()]
    unknown = {recipe.model.repo for recipe in recipes} - MODELS.keys()
    assert not unknown, f"no heading for {unknown}"
    return "\n\n".join(model_table(repo, [r for r in recipes if r.model.repo == repo]) for repo in MODELS)


def model_table(repo: str, recipes: Sequence[Recipe]) -> str:
    """Markdown: the recipes of one default model."""
    lines = [f"| recipe | what it does | {MODELS[repo]} | bits per weight |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        source = write_sparse_checkpoint(Path(folder) / "model", repo.replace("/", "--"))
        for recipe in recipes:
            checkpoint, family = open_source(str(source), dtype=recipe.model.dtype)
            plan = make_plan(recipe, checkpoint, family, ROOMY)
            bits = f"{plan.bits_per_weight:.2f}"
            lines.append(f"| `{recipe.name}` | {recipe.summary} | {size(plan.bytes_after)} | {bits} |")
        lines.insert(2, f"| (none) | the source, 16 bits | {size(plan.bytes_before)} | 16.00 |")
    return "\n".join(lines)


def family_table(page: str) -> str:
    """Markdown: the families with their models and tasks. page: relative path of the reference page."""
    demos = {open_source(str(folder), headers_only=True)[1].name: name for name, folder in embedded.MODELS.items()}
    lines = ["| family | models | tasks | demo model |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        tasks = ", ".join(TASKS[task] for task in family.tasks)
        shipped = f"`{demos[name]}`" if name in demos else ""
        lines.append(f"| [`{name}`]({page}#{family.heading}) | {family.models} | {tasks} | {shipped} |")
    return "\n".join(lines)


def prompt_table() -> str:
    """Markdown: the prompts of each family, and its longest answers in tokens."""
    lines = ["| family | question | caption | longest answer |", "|---|---|---|---|"]
    for family in FAMILIES.values():
        cells = [_prompt(text) for text in (family.question_prompt, family.caption_prompt)]
        lengths = ", ".join(f"{task} {count}" for task, count in family.max_new_tokens.items())
        lines.append(f"| `{family.name}` | {cells[0]} | {cells[1]} | {lengths or 'answers are ranks'} |")
    return "\n".join(lines)


def _prompt(text: str) -> str:
    """A prompt in a cell of a table."""
    return " + newline + ".join(f"`{line}`" for line in text.split("\n")) if text else "no prompt"


def recipe_page(sizes: str) -> str:
    """Markdown: the recipes with their gates and evidence."""
    parts = ["# Recipes", "", "Generated from `recipes/*.yaml` by `docs/generate.py`.", "", sizes, ""]
    parts += [
        "A recipe works with every model that has the components that its rules name (`--model`). Sizes are for its",
        "default model and include all tensors and scales. `mmq recipes NAME > mine.yaml` writes one to edit.",
        "Each section lists the gates (maximum loss as a share of the full-precision score) and the evidence.",
        "",
    ]
    for name in built_in():
        recipe = load_recipe(name)
        gates = ", ".join(f"{g.task} {g.metric} {g.max_drop:.0%}" for g in recipe.gates)
        parts += [f"## {name}", "", f"Maximum loss: {gates}.", ""]
        parts += ["| finding | figures | source |", "|---|---|---|"]
        parts += [f"| {e.finding} | {e.figures} | {e.source} |" for e in recipe.evidence]
        parts.append("")
    return "\n".join(parts)


def kernel_table() -> str:
    """Markdown: the kernel of each scheme on each architecture."""
    cards = [card for card in ARCHITECTURES if card not in ((8, 6), (12, 0))]
    heads = [f"{capability_label(card)} {ARCHITECTURES[card]}" for card in cards]
    lines = ["| scheme | format | " + " | ".join(heads) + " | CPU |", "|---" * (len(cards) + 3) + "|"]
    for label, format_name, schemes in KERNEL_ROWS:
        (cells,) = {_cells(serving_kernels(scheme, format_name), cards) for scheme in schemes}
        lines.append(f"| {label} | {format_name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(runs: SchemeKernels, cards: Sequence[Capability]) -> tuple[str, ...]:
    """The kernel on every card, and on a CPU."""
    return (*(kernel.name if (kernel := runs.on_gpu(card)) else "-" for card in cards), runs.cpu or "-")


def command_reference() -> str:
    """Markdown: `--help` of the program and of every command."""
    parts = ["# Command line", "", "Generated from `--help` by `docs/generate.py`.", ""]
    root = click.Context(cli, info_name="mmq", terminal_width=100, max_content_width=100)
    for context in (root, *_below(root, cli)):
        text = context.command.get_help(context).rstrip()
        parts += [f"## {context.command_path}", "", "```", text, "```", ""]
    return "\n".join(parts)


def _below(parent: click.Context, group: click.Group) -> Iterator[click.Context]:
    """A context for every command of a group, and of the groups in it."""
    for name, command in group.commands.items():
        context = click.Context(command, info_name=name, parent=parent)
        yield context
        if isinstance(command, click.Group):
            yield from _below(context, command)


def room_table() -> str:
    """Markdown: the packages of `exporter/` from top to bottom, with the first line of each docstring and all files."""
    lines = ["| package | job | files |", "|---|---|---|"]
    for name in rooms():
        folder = ROOT / "exporter" / name
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        job = text.partition("\n")[0]
        nested = sorted(path.parent for path in folder.glob("*/**/__init__.py"))
        lists = [_files(folder), *(f"`{path.relative_to(folder).as_posix()}/` {_files(path)}" for path in nested)]
        lines.append(f"| `{name}` | {job} | {'<br>'.join(lists)} |")
    return "\n".join(lines)


def _files(package: Path) -> str:
    """The modules directly inside a package, in backticks."""
    return " ".join(f"`{path.stem}`" for path in sorted(package.glob("*.py")) if path.stem != "__init__")


def rooms() -> list[str]:
    """The packages of `exporter/` in the order of the import contract, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    names = [name for row in contracts[0]["layers"] for name in row.split(" | ")]
    return [name for name in names if (ROOT / "exporter" / name / "__init__.py").is_file()]


def between(text: str, name: str, new: str) -> str:
    """`text` with a new section between the marks of `name`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise SystemExit(f"a page lacks the marks {begin} and {end}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Each page and its expected text."""
    readme, sizes, of_families = ROOT / "README.md", recipe_table(), family_sizes()
    served = ROOT / "docs" / "reference" / "serving.md"
    families, index = ROOT / "docs" / "reference" / "families.md", ROOT / "docs" / "index.md"
    api_page, prompts = ROOT / "docs" / "reference" / "python-api.md", ROOT / "docs" / "how-to" / "own-prompts.md"
    map_page = ROOT / "docs" / "architecture.md"
    checked = ROOT / "docs" / "measurements" / "families.md"
    trained = ROOT / "docs" / "measurements" / "lineages.md"
    few_bits = ROOT / "docs" / "measurements" / "few-bits.md"
    ideas = ROOT / "docs" / "measurements" / "ideas.md"
    return {
        ideas: between(
            between(between(ideas.read_text(encoding="utf-8"), "ideas", ideas_table()), "rotations", rotation_table()),
            "caches",
            cache_table(),
        ),
        few_bits: between(
            between(few_bits.read_text(encoding="utf-8"), "methods", method_tables()),
            "calibration",
            calibration_table(),
        ),
        trained: between(trained.read_text(encoding="utf-8"), "lineages", lineage_tables()),
        checked: between(
            between(between(checked.read_text(encoding="utf-8"), "checks", model_checks()), "gpu-checks", gpu_checks()),
            "whole-checks",
            whole_checks(),
        ),
        map_page: between(map_page.read_text(encoding="utf-8"), "rooms", room_table()),
        served: between(served.read_text(encoding="utf-8"), "kernels", kernel_table()),
        readme: between(
            between(
                between(readme.read_text(encoding="utf-8"), "recipes", sizes),
                "families",
                family_table("docs/reference/families.md"),
            ),
            "sizes",
            of_families,
        ),
        families: between(
            between(
                between(families.read_text(encoding="utf-8"), "families", family_table("families.md")),
                "checkpoints",
                support_table(),
            ),
            "checks",
            family_support(),
        ),
        index: between(index.read_text(encoding="utf-8"), "families", family_table("reference/families.md")),
        prompts: between(prompts.read_text(encoding="utf-8"), "prompts", prompt_table()),
        ROOT / "docs" / "reference" / "recipes.md": recipe_page(f"{sizes}\n\n{OF_FAMILIES}\n\n{of_families}"),
        ROOT / "docs" / "reference" / "cli.md": command_reference(),
        ROOT / "docs" / "reference" / "exit-codes.md": exit_code_page(),
        api_page: between(api_page.read_text(encoding="utf-8"), "api", api_reference()),
    }


def main() -> None:
    """Write, or check with `--check`."""
    made = pages()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run python -m docs.generate")
        raise SystemExit(1 if stale else 0)
    for path in stale:
        path.write_text(made[path], encoding="utf-8")


if __name__ == "__main__":
    main()
