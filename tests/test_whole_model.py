"""Memory of a whole model, counted from real headers, equals what transformers holds."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exporter.device import Device
from exporter.dtypes import BFLOAT16, FLOAT16, FLOAT32, Dtype
from exporter.model.checkpoint import TensorInfo
from exporter.model.families import FAMILIES, Component, Family
from exporter.model.source import open_source
from exporter.model.stream import build_skeleton
from exporter.planning.memory import pass_elements
from exporter.planning.placement import choose_placement
from exporter.planning.whole_model import EMBEDDED, ROOM_SHARE, WholeModel, _activations, whole_model
from tests.headers import make
from tests.headers.read import HEADER_NAMES, SMALLEST
from tests.slow import some
from tests.tiny_models import random_weights, tiny_inputs

GIB = 2**30
CPU = Device("cpu", "CPU", 64 * GIB)
GPU = Device("cuda:0", "H100", 80 * GIB)


def counts(folder: Path) -> WholeModel:
    """The counts of a checkpoint."""
    checkpoint, family = open_source(str(folder))
    return whole_model(checkpoint.tensors, family, checkpoint.config)


@pytest.mark.parametrize("name", some(HEADER_NAMES, SMALLEST))
def test_weights_are_those_that_transformers_builds(name: str, sparse_checkpoint: Callable[[str], Path]) -> None:
    folder = sparse_checkpoint(name)
    checkpoint, family = open_source(str(folder))
    model, actual = build_skeleton(family, checkpoint.config, torch.device("meta")), counts(folder)
    assert actual.parameters == sum(parameter.numel() for parameter in model.parameters())
    wide = [p.numel() for n, p in model.named_parameters() if family.float32 and n.startswith(family.float32)]
    assert actual.weight_bytes(2) == 2 * actual.parameters + 2 * sum(wide)
    largest = max(
        sum(p.numel() for p in block.parameters())
        for stack in model.modules()
        if isinstance(stack, torch.nn.ModuleList)
        for block in stack
    )
    assert actual.block == largest
    assert actual.weight_bytes(2, streamed=True) < actual.weight_bytes(2) / 2


@pytest.mark.parametrize(("name", "gib"), [(make.LLAVA_7B, 13.16), (make.LLAVA_13B, 24.87), (make.LLAVA_34B, 64.73)])
def test_sizes_of_the_true_models(name: str, gib: float, sparse_checkpoint: Callable[[str], Path]) -> None:
    """Packed words would say a quarter of it. Keys and values: 704 tokens of 32, 40 and 60 blocks."""
    actual = counts(sparse_checkpoint(name))
    assert actual.weight_bytes(2) / GIB == pytest.approx(gib, abs=0.01)
    features = {make.LLAVA_7B: 32 * 4096, make.LLAVA_13B: 40 * 5120, make.LLAVA_34B: 60 * 1024}  # heads are shared
    assert actual.cache == 704 * 2 * features[name]


def grouped() -> dict[str, Any]:
    """A tiny LLaVA whose six heads of queries share two of keys and values."""
    config = dict(FAMILIES["llava"].tiny_config())
    config["text_config"] = {**config["text_config"], "num_attention_heads": 6, "num_key_value_heads": 2}
    return config


def test_keys_and_values_are_those_that_transformers_keeps() -> None:
    family, config = FAMILIES["llava"], grouped()
    model: Any = build_skeleton(family, config, torch.device("cpu")).to_empty(device="cpu")
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    longest = family.component("language").tokens(config) + max(family.max_new_tokens.values())
    assert whole_model(infos(model, family), family, config).cache == elements // 10 * longest


def infos(model: Any, family: Family) -> dict[str, TensorInfo]:
    """The header of a live model, by checkpoint names."""
    result = {}
    for live, parameter in model.named_parameters():
        name = family.canonical_name(live)
        result[name] = TensorInfo(name, name, FLOAT32, tuple(parameter.shape), "model.safetensors")
    return result


class LiveMemory(TorchDispatchMode):
    """Largest number of bytes of tensors that operations made beside a model's own and that were alive at once."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._users: dict[int, int] = {}
        self._own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self._add(tensor, tensor.untyped_storage())
        return result

    def _add(self, tensor: torch.Tensor, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._own:
            return
        if key not in self._users:
            self._now += size
            self.peak = max(self.peak, self._now)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._now -= size


@pytest.mark.parametrize("config", [FAMILIES["llava"].tiny_config(), grouped()], ids=["heads", "groups"])
def test_a_pass_needs_the_predicted_memory(config: Any) -> None:
    """The prompt's pass over a batch, with its keys and values, as torch's operations make and drop tensors."""
    family, batch = FAMILIES["llava"], 4
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = random_weights(family.skeleton(config)).eval()
    predicted = whole_model(infos(model, family), family, config)
    length, letters = family.component("language").tokens(config), 6
    around = tiny_inputs(family, batch, letters, config)["input_ids"].shape[1] - letters
    inputs = tiny_inputs(family, batch, length - around, config)
    assert inputs["input_ids"].shape == (batch, length)
    with torch.no_grad(), LiveMemory(model) as memory:
        model(**inputs, use_cache=True, logits_to_keep=1)
    cache = predicted.cache * length // (length + max(family.max_new_tokens.values()))
    expected = batch * (cache + predicted.activations) * 4
    assert 0.8 * expected < memory.peak < 1.1 * expected, (expected, memory.peak)


def test_all_outputs_of_the_tower_count_where_the_features_come_from_one() -> None:
    """transformers then returns the input of every block and the last output; other components keep `EMBEDDED`."""
    family, config = FAMILIES["llava"], FAMILIES["llava"].tiny_config()
    with torch.device("cpu"):
        model = random_weights(family.skeleton(config)).eval()
    with torch.no_grad():
        tower = model.model.vision_tower(torch.zeros(1, 3, 32, 32), output_hidden_states=True)
    tensors, (vision, *_), language = infos(model, family), family.components, family.component("language")

    def beside_the_block(component: Component, config: Any) -> int:
        return _activations(tensors, family, component, config) - pass_elements(tensors, component, config)

    output = tower.hidden_states[0].numel()
    assert vision.tokens(config) * config["vision_config"]["hidden_size"] == output
    assert beside_the_block(vision, config) == len(tower.hidden_states) * output
    plain = {key: value for key, value in config.items() if key != "vision_feature_layer"}
    assert beside_the_block(vision, plain) == EMBEDDED * output
    words = language.tokens(config) * config["text_config"]["hidden_size"]
    assert beside_the_block(language, config) == EMBEDDED * words


@pytest.fixture
def seven(sparse_checkpoint: Callable[[str], Path]) -> WholeModel:
    """LLaVA-1.5-7B's counts."""
    return counts(sparse_checkpoint(make.LLAVA_7B))


@pytest.mark.parametrize(
    ("device", "room", "dtype", "batch", "streamed"),
    [
        (GPU, 80, FLOAT16, 32, False),
        (GPU, 24, FLOAT16, 20, False),
        (GPU, 12, FLOAT16, 23, True),
        (CPU, 64, FLOAT32, 32, False),
        (CPU, 23, BFLOAT16, 18, False),
        (CPU, 10, FLOAT32, 7, True),
    ],
)
def test_a_7b_gets_the_first_placement_that_fits(
    device: Device, room: int, dtype: Dtype, batch: int, streamed: bool, seven: WholeModel
) -> None:
    placement = choose_placement(seven, FLOAT16, device, room * GIB, 32)
    assert (placement.dtype, placement.batch, placement.streamed, placement.fits) == (dtype, batch, streamed, True)
    assert placement.bytes <= ROOM_SHARE * room * GIB
    more = seven.weight_bytes(dtype.itemsize, streamed) + (batch + 1) * seven.sample_bytes(dtype.itemsize)
    assert batch == 32 or more > ROOM_SHARE * room * GIB  # the largest batch that fits
    assert bool(placement.note) == (batch < 32 or streamed or dtype == BFLOAT16)


def test_a_7b_that_never_fits_reports_the_smallest_placement(seven: WholeModel) -> None:
    placement = choose_placement(seven, FLOAT16, GPU, GIB, 32)
    assert (placement.fits, placement.batch, placement.streamed) == (False, 1, True)
    assert "one sample at a time, and even that needs 1.7 GiB" in placement.note


def test_a_smaller_requested_batch_is_used(seven: WholeModel) -> None:
    assert choose_placement(seven, FLOAT16, GPU, 24 * GIB, 4).batch == 4
    assert choose_placement(seven, FLOAT16, GPU, 24 * GIB, 4).note == ""
