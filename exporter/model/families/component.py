"""`Component`: a part of a model that is quantized as a chain of blocks; `Pass`: a way in which the model runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from exporter.model.families.parts.part import Parts, Role, Smoothing, part_of, size_of

Config = Mapping[str, Any]  # a parsed config.json
Inputs = Mapping[str, Any]  # the processor's output for a batch: name -> tensor


def run_whole(model: Any, inputs: Inputs) -> Any:
    """Run the model's own forward pass."""
    return model(**inputs, use_cache=False)


def logits(model: Any, inputs: Inputs) -> Any:
    """Logits of the next token, `[batch, tokens, vocabulary]`."""
    return run_whole(model, inputs).logits


@dataclass(frozen=True)
class Pass:
    """One way in which the model runs a component.

    run: calls the model on a batch (calibration stops it at the component's first block).
    padded: whether the first block's input is `[batch, tokens, in]` with padding; its last tokens are those of the
    attention mask, and tokens before them are never padding.
    """

    run: Callable[[Any, Inputs], Any] = run_whole
    padded: bool = False


@dataclass(frozen=True)
class Component:
    """A part of the model that is quantized as a chain of blocks.

    blocks: checkpoint prefix of block `{i}`. A component of one block has no `{i}`; one that is a single linear has the
    linear's name here and as its only linear.
    used: number of blocks that run at inference.
    stored: number of blocks in the checkpoint; unused ones are kept, for the reason `unused`.
    phases: linears of a block in data order; linears of one phase share their input.
    roles: role of each linear.
    has: whether block `i` has a linear, for components whose blocks differ.
    target: pattern that matches block `{i}` by its runtime name and its live name, for quantization configs.
    tokens: number of input rows per sample over all passes, to predict memory.
    context: number of values per sample that blocks receive besides their input over all passes (cross-attention).
    passes: how calibration runs the component; every pass over a batch gives inputs of its first block.
    unpadded: linears whose input has no padding even if the block's input has; other linears receive the block's
    last tokens, or all of them.
    fused: runtime module -> the linears that vLLM fuses into it, which must share one scheme.
    unpackable: why vLLM cannot load this component packed, or None.
    formats: the formats in which vLLM loads it packed; None: all.
    chained: whether every block runs on the output of the block before it; otherwise each has an input of its own.
    row_parallel: linears that tensor parallelism divides along their inputs.
    plain: why vLLM builds a linear in 16 bits regardless of the config, or None; such linears are kept.
    without_data: why only methods without calibration data can quantize it, or None.
    """

    name: str
    blocks: str
    used: Callable[[Config], int]
    stored: Callable[[Config], int]
    phases: tuple[tuple[str, ...], ...]
    roles: Mapping[str, Role]
    target: str
    tokens: Callable[[Config], int]
    has: Callable[[Config, int, str], bool] = lambda config, i, linear: True
    context: Callable[[Config], int] = lambda config: 0
    passes: tuple[Pass, ...] = (Pass(),)
    unpadded: frozenset[str] = frozenset()
    unused: str = ""
    smoothings: tuple[Smoothing, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unpackable: str | None = None
    formats: tuple[str, ...] | None = None
    chained: bool = True
    row_parallel: tuple[str, ...] = ()
    plain: Callable[[Config, str], str | None] = lambda config, linear: None
    without_data: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears that a block can have, in data order."""
        return tuple(name for phase in self.phases for name in phase)

    def linears_of(self, config: Config, i: int) -> tuple[str, ...]:
        """The linears of block `i`, in data order."""
        return tuple(name for name in self.linears if self.has(config, i, name))

    def module(self, i: int, linear: str) -> str:
        """Checkpoint name of a linear of block `i`, without `.weight`."""
        return self.block(i) if linear == self.blocks else f"{self.block(i)}.{linear}"

    def block(self, i: int) -> str:
        """Checkpoint prefix of block `i`."""
        return self.blocks.format(i=i)

    @property
    def prefix(self) -> str:
        """The common prefix of the checkpoint names of all its blocks, without the final dot."""
        return self.blocks.partition("{i}")[0].rstrip(".")

    def holds(self, name: str) -> bool:
        """Whether a tensor or module with this checkpoint name is in one of its blocks."""
        return f"{name}.".startswith(f"{self.prefix}.")


def stack(name: str, parts: Parts, key: str, prefix: str, config: Config, **changed: Any) -> Component:
    """The component of the blocks of the part that a config.json names under `key`.

    prefix: of the part's tensors in checkpoints. changed: fields of the component that differ from those of its part;
    `tokens` and `target` are required.
    """
    part = part_of(parts, config, key)
    blocks = part.stack

    def count(config: Config) -> int:
        return int(size_of(parts, config, key, blocks.count))

    own: dict[str, Any] = {
        "blocks": f"{prefix}.{blocks.path}",
        "used": count,
        "stored": count,
        "phases": blocks.phases,
        "roles": blocks.roles,
        "smoothings": blocks.smoothings,
        "fused": blocks.fused,
        "row_parallel": blocks.row_parallel,
    }
    return Component(name, **{**own, **changed})


def single(name: str, blocks: str, linears: tuple[str, ...], **changed: Any) -> Component:
    """A component of one block whose linears run one after the other; the role of each is mlp."""
    own: dict[str, Any] = {
        "used": lambda config: 1,
        "stored": lambda config: 1,
        "phases": tuple((linear,) for linear in linears),
        "roles": dict.fromkeys(linears, "mlp"),
    }
    return Component(name, blocks, **{**own, **changed})


def head(blocks: str, stored: Callable[[Config], int]) -> Component:
    """The output head as a component of one linear. stored: 1, or 0 when it shares the embedding's tensor."""
    return single(
        "head",
        blocks,
        (blocks,),
        used=stored,
        stored=stored,
        target=r".*lm_head",
        tokens=lambda config: 0,
        formats=("compressed_tensors",),  # vLLM's other loaders have one setting for the whole file
        without_data="its inputs are the outputs of the whole model; use rtn, which has no measurable loss at 8 bits",
    )
