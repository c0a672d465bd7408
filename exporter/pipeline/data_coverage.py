"""Built-in recipes whose tasks a data source has, and the options that make the others fit it."""

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.model.embedded import MODELS
from exporter.planning.fitting_recipes import recipes_for
from exporter.planning.recipe_file import load_recipe

FIRST = ("llava-w4-vit8", "blip2-retrieval-w4")  # the recipes to begin with: of questions and captions, of retrieval


@dataclass(frozen=True)
class Coverage:
    """What a source covers. options: recipe -> options of `mmq plan` and `mmq export` with which the data is enough."""

    options: dict[str, tuple[str, ...]]

    def lines(self) -> list[str]:
        """One line for each set of options, with its recipes."""
        by_options: dict[tuple[str, ...], list[str]] = {}
        for name, options in self.options.items():
            by_options.setdefault(options, []).append(name)
        return [
            f"recipes that this data covers{' with ' if options else ''}{' '.join(options)}: {', '.join(names)}"
            for options, names in sorted(by_options.items())
        ]

    def commands(self, source: str) -> list[list[str]]:
        """Words of a plan and of an export with this data, of the first recipe that it covers and a demo model."""
        name = _first(tuple(self.options))
        if not name:
            return []
        model = next(model for model in MODELS if name in recipes_for(model))
        words = ["--recipe", name, "--model", model, "--data", source, *self.options[name]]
        return [["plan", *words], ["export", *words]]


def first_recipe(model: str) -> str:
    """The built-in recipe to begin with for a model; empty if none fits."""
    return _first(recipes_for(model))


def _first(names: Sequence[str]) -> str:
    return next((name for name in FIRST if name in names), next(iter(names), ""))


def covered_recipes(usable: Sequence[str], trainable: Sequence[str]) -> Coverage:
    """The built-in recipes that data with these tasks covers.

    usable: tasks with samples to calibrate and to test. trainable: tasks with samples to calibrate.
    """
    options = {}
    for name in recipes_for(None):
        tasks = list(dict.fromkeys(gate.task for gate in load_recipe(name).gates))
        for able, more in ((usable, ()), (trainable, ("--skip-evaluation",))):
            covered = [task for task in tasks if task in able]
            if covered:
                only = () if covered == tasks else tuple(word for task in covered for word in ("--task", task))
                options[name] = (*only, *more)
                break
    return Coverage(options)
