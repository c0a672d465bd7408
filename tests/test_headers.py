"""The stored headers are those of the real checkpoints: published counts, and the modules transformers builds."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from exporter.model.families import FAMILIES
from tests.headers import make
from tests.headers.published import CONFIGS, TOTALS
from tests.headers.read import HEADER_NAMES, HEADERS, ITEM_BYTES, SMALLEST, header, header_config, header_file, shards
from tests.slow import some

LLAVA, OPT, ITM = make.LLAVA_7B, make.OPT_27B, make.ITM_COCO
BLIP2 = (OPT, make.OPT_67B, ITM, make.ITM)
NOT_QUANTIZED = ("lm_head", "embed", "_projection.weight", "projector", "itm_head")  # linears and tables left at 16 bit


def parameters(name: str, prefix: str = "") -> int:
    """All parameters below `prefix`."""
    return sum(prod(shape) for tensor, (_, shape) in header(name).items() if tensor.startswith(prefix))


def quantizable(name: str, prefix: str) -> int:
    """Parameters of the block linears below `prefix`."""
    return sum(
        prod(shape)
        for tensor, (_, shape) in header(name).items()
        if tensor.startswith(prefix) and len(shape) == 2 and not any(word in tensor for word in NOT_QUANTIZED)
    )


def test_the_headers_are_those_that_make_writes():
    assert set(HEADER_NAMES) == set(make.HEADERS)
    assert len(HEADER_NAMES) == 7 + len(CONFIGS)


# Transformers builds the published models, which takes time; headers of other sizes differ in numbers.
@pytest.mark.parametrize("name", some(HEADER_NAMES, {*HEADER_NAMES} - {*CONFIGS} | {*SMALLEST}))
def test_every_header_is_the_one_that_make_writes(name):
    assert (HEADERS / f"{name}.json").read_text(encoding="utf-8") == make.render(make.HEADERS[name]())


@pytest.mark.parametrize(
    ("name", "count", "total"),
    [
        (LLAVA, 686, 7_063_427_072),
        (make.LLAVA_13B, 758, 13_351_494_656),
        (make.LLAVA_34B, 938, 34_752_076_800),
        (OPT, 1_247, 3_744_761_856),
        (ITM, 809, 1_172_623_618),
    ],
)
def test_published_totals(name, count, total):
    assert len(header(name)) == count
    assert parameters(name) == total


@pytest.mark.parametrize("name", TOTALS)
def test_rebuilt_headers_have_the_published_totals(name):
    assert parameters(name) == TOTALS[name]


@pytest.mark.parametrize(
    ("name", "prefix", "total"),
    [
        (LLAVA, "vision_tower.", 301_989_888),
        (LLAVA, "language_model.", 6_476_005_376),
        (make.LLAVA_13B, "language_model.", 12_687_769_600),  # 40 blocks of 4 squares of 5,120 and 3 of 13,824 x 5,120
        (make.LLAVA_34B, "vision_tower.", 301_989_888),
        (make.LLAVA_34B, "language_model.", 33_470_545_920),  # 60 blocks; keys and values have 1,024 rows
        (OPT, "vision_model.", 984_023_040),
        (OPT, "qformer.", 104_988_672),
        (OPT, "language_model.", 2_516_582_400),
        (ITM, "vision_model.", 984_023_040),
        (ITM, "qformer.", 161_611_776),
        (make.ITM, "vision_model.", 984_023_040),
        (make.ITM, "qformer.", 161_611_776),
        (make.OPT_67B, "qformer.", 104_988_672),
        (make.OPT_67B, "language_model.", 6_442_450_944),  # 32 blocks of 12 squares of 4,096
    ],
)
def test_published_quantizable_totals(name, prefix, total):
    assert quantizable(name, prefix) == total


def to_live(name: str) -> Callable[[str], str]:
    """The name transformers gives a tensor of the file; written out here, not taken from the families."""
    if name in BLIP2:
        return lambda tensor: tensor
    if name in CONFIGS:
        back = [(hub, live) for live, hub in CONFIGS[name][1]]
        back = sorted(back, key=lambda pair: -len(pair[0]))
        return lambda tensor: next((live + tensor[len(hub) :] for hub, live in back if tensor.startswith(hub)), tensor)
    pairs = [
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ]
    return lambda tensor: next(live + tensor[len(stored) :] for stored, live in pairs if tensor.startswith(stored))


@pytest.mark.parametrize("name", some(HEADER_NAMES, SMALLEST))
def test_transformers_builds_these_names_and_shapes(name):
    import transformers

    values = header_config(name)
    architecture = getattr(transformers, values["architectures"][0])
    with torch.device("meta"):
        model = architecture(architecture.config_class(**values))
    built = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert {to_live(name)(tensor): shape for tensor, (_, shape) in header(name).items()} == built


def test_tensors_come_block_by_block():
    names = [name for name in header(OPT) if name.startswith("qformer.encoder.layer.")]
    blocks = [int(name.split(".")[3]) for name in names]
    assert blocks == sorted(blocks)
    assert {int(name.split(".")[3]) for name in names if "crossattention" in name} == {0, 2, 4, 6, 8, 10}


@pytest.mark.parametrize("name", HEADER_NAMES)
def test_sparse_checkpoint_reads_back_at_its_real_size(name, sparse_checkpoint):
    folder: Path = sparse_checkpoint(name)
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(tensor)
                shapes[tensor] = (part.get_dtype(), tuple(part.get_shape()))
    assert shapes == header(name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors"))
    assert size > sum(prod(shape) * ITEM_BYTES[dtype] for dtype, shape in shapes.values())
    assert on_disk < 2**20
    assert json.loads((folder / "config.json").read_text()) == header_file(name)["config"]


def test_sparse_index_lists_every_tensor_of_every_shard(sparse_checkpoint):
    folder: Path = sparse_checkpoint(LLAVA)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 7_063_427_072
    assert list(index["weight_map"]) == list(header(LLAVA))
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(set(index["weight_map"].values())) == 3
    assert max(sum(prod(shape) * ITEM_BYTES[dtype] for dtype, shape in part.values()) for part in shards(LLAVA)) <= 5e9
    for file in set(index["weight_map"].values()):
        with safe_open(folder / file, framework="pt") as shard:
            assert set(shard.keys()) == {tensor for tensor, where in index["weight_map"].items() if where == file}


def test_every_cell_of_the_sizes_in_the_readme_has_a_size_or_a_reason() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- sizes:begin -->")[2].partition("<!-- sizes:end -->")[0]
    rows = [row.strip("|").split("|") for row in table.strip().splitlines()[2:]]
    assert {row[0].strip(" `") for row in rows} == set(FAMILIES)
    assert all(cell.strip() for row in rows for cell in row)
