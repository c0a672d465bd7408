"""What a whole model takes in memory while it answers: weights, keys and values, activations.

Parameters are counted, never the words that they are packed into: transformers computes with dequantized weights.
Quantizing needs one block at a time (`memory`); evaluation and the reference of `mmq check` need all of this.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.inference.retrieval import PAIRS
from exporter.model.checkpoint import TensorInfo
from exporter.model.families import Component, Family
from exporter.model.families.family import Config
from exporter.planning.memory import pass_elements

WIDE_BYTES = 4  # of what transformers computes in float32 whatever the others are
ROOM_FOR_ACTIVATIONS = 1.25  # times the weights, of one sample at a time
ROOM_SHARE = 0.9  # of free memory that is filled: allocators round up, and libraries have workspaces
PAIRS_OF_PICTURE = 6 * 128  # of retrieval: a picture and its five texts, each with the candidates of the paper
EMBEDDED = 2  # inputs of the first block that stay until the last one is done: before and after pictures were put in
CROSS = 1.5  # times what cross-attention reads: as it came, in float32, as keys, as values; of both passes over it


@dataclass(frozen=True)
class WholeModel:
    """Counts of elements of one model.

    parameters, wide: all of them, and those among them that are always float32.
    outside: parameters that lie in no block: they stay when blocks come and go. block: those of the largest block.
    cache: keys and values that one sample leaves with its longest answer.
    activations, wide_activations: the most that a pass over one sample holds beside them, in the model's own numbers
    and in float32.
    operations: floating-point operations of all passes over one sample, but for those of generated tokens.
    depth: blocks that a generated token passes.
    """

    parameters: int
    wide: int
    outside: int
    block: int
    cache: int
    activations: int
    wide_activations: int
    operations: int
    depth: int

    def weight_bytes(self, itemsize: int, streamed: bool = False) -> int:
        """Bytes of the weights, in numbers of `itemsize` bytes.

        streamed: blocks come and go, the next one is loaded beside the last.
        """
        if streamed:
            return (self.outside + 2 * self.block) * itemsize + self.wide * WIDE_BYTES
        return (self.parameters - self.wide) * itemsize + self.wide * WIDE_BYTES

    def sample_bytes(self, itemsize: int) -> int:
        """Bytes that one sample of a batch takes."""
        return self.cache * itemsize + max(self.activations * itemsize, self.wide_activations * WIDE_BYTES)

    def batch_within(self, room: int, itemsize: int, streamed: bool = False) -> int:
        """How many samples fit into `room` bytes beside the weights; 0 when not even these fit."""
        rest = int(room * ROOM_SHARE) - self.weight_bytes(itemsize, streamed)
        return max(0, rest) // self.sample_bytes(itemsize)


def whole_model(tensors: Mapping[str, TensorInfo], family: Family, config: Config) -> WholeModel:
    """The counts of a checkpoint in full precision; an artifact of it has the same, once it is dequantized."""
    blocks: dict[str, int] = {}
    stacked = {component.blocks.partition("{i}")[0] for component in family.components if "{i}" in component.blocks}
    for info in tensors.values():
        stack = next((prefix for prefix in stacked if info.name.startswith(prefix)), None)
        name = "" if stack is None else stack + info.name.removeprefix(stack).partition(".")[0]
        blocks[name] = blocks.get(name, 0) + info.size
    outside = blocks.pop("", 0)
    wide = sum(info.size for info in tensors.values() if info.name.startswith(family.float32))
    narrow, broad, operations = [0], [0], 0
    for component in family.components:
        if component.used(config):
            elements = _activations(tensors, family, component, config)
            (broad if component.blocks.startswith(family.float32) else narrow).append(elements)
            operations += _operations(tensors, family, component, config)
    return WholeModel(
        parameters=sum(info.size for info in tensors.values()),
        wide=wide,
        outside=outside,
        block=max(blocks.values(), default=0),
        cache=_cache(tensors, family, config),
        activations=max(narrow),
        wide_activations=max(broad),
        operations=operations,
        depth=family.components[-1].used(config) if family.max_new_tokens else 0,
    )


def _operations(tensors: Mapping[str, TensorInfo], family: Family, component: Component, config: Config) -> int:
    """Multiplications and additions of one sample's linears in this component, for retrieval of all its pairs."""
    names = [f"{component.module(0, linear)}.weight" for linear in component.linears_of(config, 0)]
    weights = sum(tensors[name].size for name in names) * component.used(config)
    pairs = PAIRS_OF_PICTURE if component.context(config) and not family.max_new_tokens else 1
    return 2 * weights * component.tokens(config) * pairs


def _activations(tensors: Mapping[str, TensorInfo], family: Family, component: Component, config: Config) -> int:
    """Elements that a pass over one sample holds in this component, beside keys and values that stay."""
    elements = pass_elements(tensors, component, config) + int(CROSS * component.context(config))
    outputs = EMBEDDED
    if component is family.components[0] and "vision_feature_layer" in config:
        outputs = component.stored(config) + 1  # transformers keeps all where features are those of one of them
    hidden = tensors[f"{component.module(0, component.phases[0][0])}.weight"].shape[1]
    elements += component.tokens(config) * hidden * outputs
    return elements * (PAIRS if component.context(config) and not family.max_new_tokens else 1)


def _cache(tensors: Mapping[str, TensorInfo], family: Family, config: Config) -> int:
    """Keys and values of one sample and its longest answer: shared by heads where the model shares them."""
    if not family.max_new_tokens:
        return 0
    language = family.component("language")
    names = [name for name in language.linears if name.endswith((".k_proj", ".v_proj"))]
    features = sum(tensors[f"{language.module(0, name)}.weight"].shape[0] for name in names)
    longest = language.tokens(config) + max(family.max_new_tokens.values())
    return longest * features * language.used(config)
