"""Texts about a demo scene: caption, paraphrases, and questions with one correct answer of one or two words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exporter.data.demo.scenes import CELLS, COLORS, FIRST_WORDS, SECOND_WORDS, SHAPES, SIZES, SceneObject

_MASK = (1 << 64) - 1
NUMBERS = ("one", "two", "three", "four")


class Dice:
    """Small counter-based random generator (splitmix64), identical in every Python version."""

    def __init__(self, seed: int) -> None:
        self.state = seed & _MASK

    def roll(self, sides: int) -> int:
        """The next random number, uniform in `0 .. sides-1`."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        x = self.state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((x ^ (x >> 31)) >> 33) % sides

    def pick(self, options: Sequence[str]) -> str:
        """One of `options`."""
        return options[self.roll(len(options))]

    def pick_object(self, options: Sequence[SceneObject]) -> SceneObject | None:
        """One of `options`, or None if it is empty."""
        return options[self.roll(len(options))] if options else None


@dataclass(frozen=True)
class Question:
    """A question about one scene and its only correct answer."""

    kind: str
    text: str
    answer: str


def _enumerate(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def caption(objects: Sequence[SceneObject]) -> str:
    """The caption on which the models are trained: every object's name and cell, in reading order."""
    return _enumerate([f"a {item.name} at the {item.cell}" for item in objects]) + "."


def captions(objects: Sequence[SceneObject]) -> tuple[str, ...]:
    """The exact caption, then three paraphrases of it."""
    exact = caption(objects)
    described = _enumerate([f"a {t.name} at the {t.cell}" for t in reversed(objects)])
    return exact, f"there is {exact}", f"an image with {exact}", f"an image with {described}."


def plain_captions(objects: Sequence[SceneObject]) -> tuple[str, ...]:
    """Captions in plain words, for models that do not know the made-up names."""
    parts = [f"a {t.size} {t.color} {t.shape} at the {t.cell}" for t in objects]
    text = _enumerate(parts)
    return f"{text}.", f"there is {text}.", f"an image with {_enumerate(parts[::-1])}."


def _unique(objects: Sequence[SceneObject], key: Callable[[SceneObject], object]) -> list[SceneObject]:
    keys = [key(item) for item in objects]
    return [item for item, k in zip(objects, keys, strict=True) if keys.count(k) == 1]


def _property(
    kind: str,
    objects: Sequence[SceneObject],
    dice: Dice,
    key: Callable[[SceneObject], object],
    prefix: str,
    template: str,
) -> Question:
    """A question about one object's property.

    The question refers to the object by a unique description, or by its cell if no description is unique and in one of
    three cases. key: the properties used by the description. prefix: the question up to the object. template: format
    of the description of a SceneObject `t`.
    """
    item = dice.pick_object(_unique(objects, key))
    if item is None or dice.roll(3) == 0:
        item = objects[dice.roll(len(objects))]
        words = f"the {'dot' if kind == 'dot' else 'object'} at the {item.cell}"
    else:
        words = template.format(t=item)
    return Question(kind, f"{prefix} {words}?", getattr(item, kind))


def _color(objects: Sequence[SceneObject], dice: Dice) -> Question | None:
    prefix, template = "what color is", "the {t.size} {t.shape}"
    return _property("color", objects, dice, lambda t: (t.size, t.shape), prefix, template)


def _shape(objects: Sequence[SceneObject], dice: Dice) -> Question | None:
    prefix, template = "what shape is", "the {t.size} {t.color} object"
    return _property("shape", objects, dice, lambda t: (t.size, t.color), prefix, template)


def _size(objects: Sequence[SceneObject], dice: Dice) -> Question | None:
    prefix, template = "what size is", "the {t.color} {t.shape}"
    return _property("size", objects, dice, lambda t: (t.color, t.shape), prefix, template)


def _dot(objects: Sequence[SceneObject], dice: Dice) -> Question | None:
    prefix, template = "what color is", "the dot on the {t.color} {t.shape}"
    return _property("dot", objects, dice, lambda t: (t.color, t.shape), prefix, template)


def _place(objects: Sequence[SceneObject], dice: Dice) -> Question | None:
    item = dice.pick_object(_unique(objects, lambda t: (t.color, t.shape)))
    return None if item is None else Question("place", f"where is the {item.color} {item.shape}?", item.cell)


def _find(objects: Sequence[SceneObject], dice: Dice) -> Question | None:
    item = dice.pick_object(_unique(objects, lambda t: t.name))
    return None if item is None else Question("find", f"where is the {item.name}?", item.cell)


def _name(objects: Sequence[SceneObject], dice: Dice) -> Question | None:
    item = objects[dice.roll(len(objects))]
    return Question("name", f"what is the object at the {item.cell} called?", item.name)


def _exists(objects: Sequence[SceneObject], dice: Dice) -> Question | None:
    """Half of the answers are yes; an absent object shares its color or its shape with a present one."""
    item = objects[dice.roll(len(objects))]
    if dice.roll(2) == 0:
        return Question("exists", f"is there {_article(item.color)} {item.shape}?", "yes")
    color, shape = item.color, item.shape
    if dice.roll(2) == 0:
        color = dice.pick(tuple(COLORS))
    else:
        shape = dice.pick(SHAPES)
    is_present = any(t.color == color and t.shape == shape for t in objects)
    return None if is_present else Question("exists", f"is there {_article(color)} {shape}?", "no")


def _count(objects: Sequence[SceneObject], dice: Dice) -> Question | None:
    return Question("count", "how many objects are there?", NUMBERS[len(objects) - 1])


QUESTIONS: dict[str, Callable[[Sequence[SceneObject], Dice], Question | None]] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "dot": _dot,
    "place": _place,
    "find": _find,
    "name": _name,
    "exists": _exists,
    "count": _count,
}


def question(kind: str, objects: Sequence[SceneObject], seed: int) -> Question | None:
    """One question of a kind, or None if the scene has no valid one; a pure function of its arguments."""
    return QUESTIONS[kind](objects, Dice(seed * 16 + tuple(QUESTIONS).index(kind)))


def vocabulary() -> list[str]:
    """All words of captions, questions, answers and prompts, lower case, sorted, without punctuation."""
    fixed = (
        "a an and the at on of in there is are image with what where how many color shape size object objects dot "
        "called yes no does not contain present rectangle "
        "user assistant answer question using single word or phrase provide one-sentence caption for provided"
    )
    drawn = [*COLORS, *SIZES, *SHAPES, *NUMBERS, *" ".join(CELLS).split(), *FIRST_WORDS, *SECOND_WORDS]
    return sorted({*fixed.split(), *drawn})
