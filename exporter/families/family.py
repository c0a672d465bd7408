"""What mmq knows of a model family: data tables and small pure functions, no behavior.

Names: a *checkpoint name* is the tensor's name on the hub and the only identity; the live module name (in the
transformers class) and the runtime name (inside vLLM) are derived from it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["attention", "mlp"]
Config = Mapping[str, Any]  # a parsed config.json


@dataclass(frozen=True)
class Smoothing:
    """One exact fold: divide `source`'s output by s, multiply the input columns of every target by s.

    source, targets: names relative to the block. rows: which part of a fused source feeds the targets,
    as (index, parts): (2, 3) is the last third of a fused qkv.
    """

    source: str
    targets: tuple[str, ...]
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Component:
    """A part of the model that is quantized as a chain of blocks.

    blocks: checkpoint prefix of block `{i}`; a component of one block has no `{i}`.
    used: blocks that run at inference; stored: blocks the checkpoint holds (the rest is kept, with `unused`).
    phases: linears of a block in the order the data meets them; members of one phase share their input.
    target: pattern that finds block `{i}` under its runtime name and its live name alike (what configs are made of).
    tokens: rows of its input that one sample makes, to predict memory.
    padded: its activations are `[batch, tokens, in]` with padding that the attention mask marks.
    fused: runtime module -> the linears the serving engine fuses into it; these must share one scheme.
    packable: None, or why the serving engine cannot load this component packed.
    """

    name: str
    blocks: str
    used: Callable[[Config], int]
    stored: Callable[[Config], int]
    phases: tuple[tuple[str, ...], ...]
    roles: Mapping[str, Role]
    target: str
    tokens: Callable[[Config], int]
    unused: str = ""
    padded: bool = False
    smoothings: tuple[Smoothing, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packable: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a block, in data order."""
        return tuple(name for phase in self.phases for name in phase)

    def block(self, i: int) -> str:
        """Checkpoint prefix of block `i`."""
        return self.blocks.format(i=i)


@dataclass(frozen=True)
class Family:
    """Everything that differs between model families.

    architectures: values of config.json's `architectures` it answers to.
    components: in data order, upstream first.
    kept: linears that are never quantized: pattern over checkpoint names (without `.weight`) and the reason.
    canonical_name: maps names that other savers wrote to the hub's own names.
    live_name, runtime_name: checkpoint name -> name in the transformers class / inside vLLM.
    skeleton: config -> transformers model, built under whatever default device is set.
    tiny_config: a config small enough for tests, with the real structure.
    question_prompt has `{question}`; fallback_prompt (for processors without chat template) has `{text}`.
    """

    name: str
    architectures: tuple[str, ...]
    components: tuple[Component, ...]
    kept: tuple[tuple[str, str], ...]
    canonical_name: Callable[[str], str]
    live_name: Callable[[str], str]
    runtime_name: Callable[[str], str]
    skeleton: Callable[[Config], Any]
    tiny_config: Callable[[], Config]
    question_prompt: str
    caption_prompt: str
    fallback_prompt: str
    max_new_tokens: Mapping[str, int]
    tasks: tuple[str, ...]

    def component(self, name: str) -> Component:
        """The component called `name` (KeyError when there is none)."""
        return {component.name: component for component in self.components}[name]

    def text(self, question: str | None) -> str:
        """What a user says beside the picture: the question in the family's wording, or the request for a caption."""
        return self.caption_prompt if question is None else self.question_prompt.format(question=question)

    def reason_kept(self, module: str) -> str | None:
        """Why the linear `module` (a checkpoint name without `.weight`) is never quantized, or None."""
        return next((reason for pattern, reason in self.kept if re.fullmatch(pattern, module)), None)

    def engine_name(self, module: str) -> str:
        """Runtime name of the linear that `module` (a checkpoint name) becomes: the fused one's if it is fused."""
        name = self.runtime_name(module)
        for component in self.components:
            if module.startswith(component.blocks.partition("{i}")[0]):
                for fused, members in component.fused.items():
                    for member in members:
                        if name.endswith(f".{member}"):
                            return name.removesuffix(member) + fused
        return name
