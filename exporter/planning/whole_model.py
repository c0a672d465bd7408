"""Memory of a whole model during inference: weights, key-value cache, activations.

Counts parameters, not the packed words, because transformers computes with dequantized weights. Quantizing needs one
block at a time (`memory`); evaluation and the reference of `mmq check` need the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.model.checkpoint import TensorInfo
from exporter.model.families import Component, Family
from exporter.model.families.component import Config
from exporter.model.inference.batch_size import PAIRS
from exporter.planning.memory import pass_elements

WIDE_BYTES = 4  # per element that transformers always computes in float32
ROOM_FOR_ACTIVATIONS = 1.25  # memory of weights and one sample's activations, relative to that of the weights
ROOM_SHARE = 0.9  # share of free memory to fill: allocators round up, and libraries need workspaces
PAIRS_OF_PICTURE = 6 * 128  # pairs in retrieval: a picture and its five texts, each with the paper's candidates
EMBEDDED = 2  # embeddings that live until the last block is done: before and after picture features are inserted
CROSS = 1.5  # memory relative to the input of cross-attention: the input, its float32 copy, keys and values


@dataclass(frozen=True)
class WholeModel:
    """Element and operation counts of one model.

    parameters: of the whole model. wide: those that are always float32. outside: parameters that are in no block, which
    stay in memory when blocks are streamed. block: parameters of the largest block.
    cache: elements of the key-value cache of one sample with its longest answer.
    activations, wide_activations: the most elements of activations per sample, in the model's dtype and in float32.
    operations: floating-point operations of all passes over one sample, except those of generated tokens.
    depth: blocks that run for one generated token.
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
        """Bytes of the weights in a dtype of `itemsize` bytes.

        streamed: blocks are loaded and freed, and the next one is loaded while the previous one is in memory.
        """
        if streamed:
            return (self.outside + 2 * self.block) * itemsize + self.wide * WIDE_BYTES
        return (self.parameters - self.wide) * itemsize + self.wide * WIDE_BYTES

    def sample_bytes(self, itemsize: int) -> int:
        """Bytes of cache and activations per sample of a batch."""
        return self.cache * itemsize + max(self.activations * itemsize, self.wide_activations * WIDE_BYTES)

    def batch_within(self, room: int, itemsize: int, streamed: bool = False) -> int:
        """The largest batch that fits into `room` bytes together with the weights; 0 when none fits."""
        available = int(room * ROOM_SHARE) - self.weight_bytes(itemsize, streamed)
        return max(0, available) // self.sample_bytes(itemsize)


def whole_model(tensors: Mapping[str, TensorInfo], family: Family, config: Config) -> WholeModel:
    """The counts of a checkpoint in full precision; those of its dequantized artifact are the same."""
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
    """Operations (multiplications and additions) of the component's linears per sample; for retrieval, of all pairs."""
    names = [f"{component.module(0, linear)}.weight" for linear in component.linears_of(config, 0)]
    weights = sum(tensors[name].size for name in names) * component.used(config)
    pairs = PAIRS_OF_PICTURE if component.context(config) and not family.max_new_tokens else 1
    return 2 * weights * component.tokens(config) * pairs


def _activations(tensors: Mapping[str, TensorInfo], family: Family, component: Component, config: Config) -> int:
    """Most elements of activations per sample in this component, without the key-value cache."""
    elements = pass_elements(tensors, component, config) + int(CROSS * component.context(config))
    outputs = EMBEDDED
    if component is family.components[0] and "vision_feature_layer" in config:
        outputs = component.stored(config) + 1  # transformers returns every block's output when features come from one
    hidden = tensors[f"{component.module(0, component.phases[0][0])}.weight"].shape[1]
    elements += component.tokens(config) * hidden * outputs
    return elements * (PAIRS if component.context(config) and not family.max_new_tokens else 1)


def _cache(tensors: Mapping[str, TensorInfo], family: Family, config: Config) -> int:
    """Elements of keys and values of one sample with its longest answer, counting shared heads once."""
    if not family.max_new_tokens:
        return 0
    language = family.component("language")
    names = [name for name in language.linears if name.endswith((".k_proj", ".v_proj"))]
    features = sum(tensors[f"{language.module(0, name)}.weight"].shape[0] for name in names)
    longest = language.tokens(config) + max(family.max_new_tokens.values())
    return longest * features * language.used(config)
