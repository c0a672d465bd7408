"""LoRA adapters are merged as peft merges them; adapters that cannot be merged exactly are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.artifact.manifest import read_manifest
from exporter.artifact.verify import verify
from exporter.commands.main import cli
from exporter.device import choose
from exporter.errors import CheckpointError, MmqError, PlanError
from exporter.events import ignore
from exporter.model.adapter import SETTINGS, WEIGHTS
from exporter.model.checkpoint import Checkpoint
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.model.source import open_source
from exporter.model.stream import load_whole
from exporter.pipeline.export import export
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe_file import load_recipe
from tests.slow import some
from tests.tiny_models import CONFIGS, write_tiny

DEMO = MODELS["demo-llava"]
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"], "bias": "none"}
QUERY = "language_model.model.layers.0.self_attn.q_proj"
WORDS = "model.language_model.embed_tokens"
PATCHES = "model.vision_tower.embeddings.patch_embedding"
TOWER = "vision_tower.vision_model.encoder.layers.1.mlp.fc1"
LIVE = {QUERY: "model.language_model.layers.0.self_attn.q_proj", TOWER: "model.vision_tower.encoder.layers.1.mlp.fc1"}


def halves(rank: int = 4, names: dict[str, str] = LIVE) -> dict[str, Tensor]:
    """Random LoRA of a language and a vision linear, under the names of transformers 5."""
    torch.manual_seed(3)
    tensors = {}
    for hub, live in names.items():
        outputs, inputs = (128, 128) if hub == QUERY else (512, 128)
        tensors[f"base_model.model.{live}.lora_A.weight"] = torch.randn(rank, inputs) / 8
        tensors[f"base_model.model.{live}.lora_B.weight"] = torch.randn(outputs, rank) / 8
    return tensors


def adapter(folder: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    folder.mkdir()
    (folder / SETTINGS).write_text(json.dumps(PLAIN | settings))
    stored = halves() if tensors is None else tensors
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / WEIGHTS)
    return folder


def merged(folder: Path) -> Checkpoint:
    return open_source("demo-llava", adapter=str(folder))[0]


@pytest.mark.parametrize(
    ("settings", "query", "tower"),
    [
        ({}, 2.0, 2.0),
        ({"use_rslora": True}, 4.0, 4.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 16}}, 4.0, 2.0),
        ({"alpha_pattern": {"fc1": 2, "mlp.fc1": 4}}, 2.0, 0.5),
        ({"alpha_pattern": {"c1": 2}}, 2.0, 2.0),
    ],
)
def test_a_merged_weight_is_the_naive_sum(tmp_path: Path, settings: dict[str, Any], query: float, tower: float) -> None:
    base, tensors = Checkpoint.open(DEMO, FAMILIES["llava"].canonical_name), halves()
    model = merged(adapter(tmp_path / "a", **settings))
    for module, scale in ((QUERY, query), (TOWER, tower)):
        a, b = (tensors[f"base_model.model.{LIVE[module]}.lora_{part}.weight"] for part in "AB")
        expected = base.read(f"{module}.weight").float() + (b @ a) * scale
        assert torch.equal(model.read(f"{module}.weight"), expected.to(torch.bfloat16))
    untouched = "language_model.model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(model.read(untouched), base.read(untouched))


def test_names_of_every_transformers_version_and_tensors_trained_whole(tmp_path: Path) -> None:
    projector = {
        "base_model.model.multi_modal_projector.linear_1.modules_to_save.weight": torch.ones(128, 128),
        "base_model.model.model.multi_modal_projector.linear_1.bias": torch.zeros(128),
    }
    old = {QUERY: QUERY, TOWER: TOWER}
    model = merged(adapter(tmp_path / "a", halves(names=old) | projector))
    new = merged(adapter(tmp_path / "b"))
    for module in old:
        assert torch.equal(model.read(f"{module}.weight"), new.read(f"{module}.weight"))
    assert model.read("multi_modal_projector.linear_1.weight").eq(1).all()
    assert model.read("multi_modal_projector.linear_1.bias").eq(0).all()
    assert model.read("multi_modal_projector.linear_1.weight").dtype == torch.bfloat16


def saved_by_peft(model: str, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Write a random adapter of `model` with peft; return the parameters that peft's own merge makes, by live name."""
    peft = pytest.importorskip("peft")
    checkpoint, family = open_source(model)
    names = list(checkpoint.tensors)
    whole = load_whole(family, checkpoint.config, names, checkpoint.read, torch.device("cpu"), torch.bfloat16)
    tuned = peft.get_peft_model(whole, peft.LoraConfig(r=4, lora_alpha=7, **settings), autocast_adapter_dtype=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 8)
    tuned.save_pretrained(folder)
    return dict(tuned.merge_and_unload().named_parameters())


def test_peft_merges_the_same_with_settings_of_single_modules(tmp_path: Path) -> None:
    settings = {"use_rslora": True, "target_modules": ["q_proj", "fc1", "linear_2"], "rank_pattern": {"fc1": 2}}
    settings |= {"alpha_pattern": {"layers.1.mlp.fc1": 3}, "modules_to_save": ["linear_1"]}
    expected = saved_by_peft("demo-llava", tmp_path / "a", **settings)
    model, family = merged(tmp_path / "a"), FAMILIES["llava"]
    assert model.adapter is not None
    assert (len(model.adapter.pairs), len(model.adapter.whole)) == (7, 2)
    for name in model.tensors:
        assert torch.equal(model.read(name), expected[family.live_name(name)]), name


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # peft stores the weight of the head
@pytest.mark.parametrize("name", some(FAMILIES, ("llava", "qwen2.5-vl")))
def test_peft_merges_the_same_in_every_family(name: str, tmp_path: Path) -> None:
    """LoRA of every linear of every component, the output head included, and one norm that is trained in full."""
    family, config = CONFIGS[name]
    source = write_tiny(tmp_path / "m", family)
    linears = [
        family.live_name(part.module(i, linear))
        for part in family.components
        for i in range(part.stored(config))
        for linear in part.linears_of(config, i)
    ]
    shapes = {key: info.shape for key, info in Checkpoint.open(source, family.canonical_name).tensors.items()}
    norm = next(key for key, shape in shapes.items() if len(shape) == 1 and "norm" in key)
    trained = [family.live_name(norm).removesuffix(".weight").removesuffix(".bias")]
    expected = saved_by_peft(str(source), tmp_path / "a", target_modules=linears, modules_to_save=trained)
    checkpoint, _ = open_source(str(source), adapter=str(tmp_path / "a"))
    assert checkpoint.adapter is not None
    assert {family.live_name(weight) for weight in checkpoint.adapter.pairs} == {f"{live}.weight" for live in linears}
    assert norm in checkpoint.adapter.whole
    for tensor in shapes:
        read = checkpoint.read(tensor)
        assert torch.equal(read, expected[family.live_name(tensor)].to(read.dtype)), tensor


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type: expected LORA"),
    ({"peft_type": None}, "peft_type: expected LORA, got null"),
    ({"use_dora": True}, "use_dora: true is not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"layer_replication": [[0, 2]]}, "layer_replication: a list is not supported"),
    ({"bias": "all"}, "bias: only none"),
    (
        {"init_lora_weights": "pissa"},
        "init_lora_weights: the text 'pissa' changes the base model's weights, which is not supported",
    ),
    ({"init_lora_weights": []}, "init_lora_weights"),
    ({"lora_alpha": "x"}, "lora_alpha: expected a positive number"),
    ({"lora_alpha": None}, "lora_alpha"),
    ({"alpha_pattern": {"(a+)+$": 1}}, "is not a module name"),
    ({"alpha_pattern": {"a": "b"}}, "alpha_pattern"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_settings_that_are_not_merged_are_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match="the adapter cannot be merged") as caught:
        merged(adapter(tmp_path / "a", **settings))
    assert reason in caught.value.message.replace("\n", " ")


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown module": (renamed(halves(), "q_proj", "qkv"), "the base model has no linear"),
    "half": ({k: v for k, v in halves().items() if "q_proj.lora_B" not in k}, "other matrix of the pair is missing"),
    "ranks": ({k: v[:3] if "lora_A" in k else v for k, v in halves().items()}, "do not multiply to"),
    "sizes": ({k: v[:, :64] if "lora_A" in k else v for k, v in halves().items()}, r"do not multiply to \[128, 128\]"),
    "convolution": (
        {f"base_model.model.{PATCHES}.lora_{part}.weight": torch.ones(4, 4, 1, 1) for part in "AB"},
        r"mmq merges only LoRA matrices of linears, and .*patch_embedding\.weight has the shape \[128, 3, 8, 8\]",
    ),
    "flat": ({k: v.reshape(-1) for k, v in halves().items()}, "do not multiply to"),
    "rank 0": ({k: v[:0] if "lora_A" in k else v[:, :0] for k, v in halves().items()}, "do not multiply to"),
    "integers": ({k: v.to(torch.int8) for k, v in halves().items()}, "stored as int8"),
    "embedding": ({f"base_model.model.{WORDS}.lora_embedding_A": torch.ones(4, 256)}, "LoRA matrices of linears"),
    "magnitude": (
        {f"base_model.model.{LIVE[QUERY]}.lora_magnitude_vector.weight": torch.ones(128)},
        "LoRA matrices of linears",
    ),
    "resized": ({"base_model.model.lm_head.weight": torch.ones(300, 128)}, r"\[300, 128\], expected \[256"),
    "foreign": ({"base_model.model.score.weight": torch.ones(2, 128)}, "the base model has no tensor score.weight"),
    "nothing": ({}, "it has no tensors"),
    "another rank": (halves(rank=3), "its rank is 3, but adapter_config.json has the number 4"),
    "twice": (
        halves() | renamed(halves(), ".weight", ".default.weight"), "has this tensor twice",
    ),
    "two names of one module": (halves() | halves(names={QUERY: QUERY}), f"the adapter has {QUERY}.weight twice"),
    "LoRA and whole": (
        halves() | {f"base_model.model.{LIVE[QUERY]}.weight": torch.ones(128, 128)},
        f"the adapter has {QUERY}.weight twice",
    ),
    "whole twice": (
        {f"base_model.model.lm_head.{part}weight": torch.ones(256, 128) for part in ("", "modules_to_save.")},
        "has this tensor twice",
    ),
}  # fmt: skip


def test_ranks_of_single_modules_are_compared_unless_they_are_regular_expressions(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in halves(rank=3).items() if "fc1" not in name}
    merged(adapter(tmp_path / "a", tensors, rank_pattern={"self_attn.q_proj": 3}))
    merged(adapter(tmp_path / "b", tensors, rank_pattern={"^.*q_proj$": 3}))
    with pytest.raises(CheckpointError, match=r"its rank is 3, but adapter_config\.json has the number 2"):
        merged(adapter(tmp_path / "c", tensors, rank_pattern={"q_proj": 2}))


@pytest.mark.parametrize("what", WRONG)
def test_tensors_that_cannot_be_merged_are_refused(tmp_path: Path, what: str) -> None:
    tensors, reason = WRONG[what]
    with pytest.raises(CheckpointError, match=reason):
        merged(adapter(tmp_path / "a", tensors))


def test_nonfinite_values_are_an_error_when_they_are_read(tmp_path: Path) -> None:
    tensors = halves()
    tensors[f"base_model.model.{LIVE[QUERY]}.lora_A.weight"][0, 0] = float("nan")
    model = merged(adapter(tmp_path / "a", tensors))
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight has values that are not finite"):
        model.read(f"{QUERY}.weight")


def test_a_pickled_adapter_and_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no {SETTINGS}"):
        merged(tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps(PLAIN))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=f"no {WEIGHTS}") as caught:
        merged(tmp_path)
    assert "not pickles" in (caught.value.hint or "")


def recipe_for(folder: Path, **model: Any) -> Any:
    return load_recipe("llava-w8").adjusted(model={"repo": str(folder)} | model)


def test_an_adapter_next_to_the_weights_is_merged_on_request_and_refused_otherwise(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "m"))
    for path in adapter(tmp_path / "a").iterdir():
        shutil.copy(path, folder)
    with pytest.raises(PlanError, match="contains both weights and an adapter") as caught:
        prepare(recipe_for(folder), choose("cpu"), headers_only=True)
    assert f"--adapter {folder}" in (caught.value.hint or "")
    plan, _ = prepare(recipe_for(folder, adapter=str(folder)), choose("cpu"), headers_only=True)
    assert "adapter m: merged into 2 linears" in plan.warnings


def test_a_folder_with_only_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    shutil.copy(DEMO / "config.json", folder)
    with pytest.raises(MmqError, match="contains an adapter but no model"):
        prepare(recipe_for(folder), choose("cpu"), headers_only=True)


def test_an_artifact_of_base_and_adapter_equals_that_of_the_merged_model(tmp_path: Path) -> None:
    """On a Qwen2.5-VL whose head shares the embedding's tensor, under names of transformers 5 and of older versions."""
    family, config = CONFIGS["qwen2.5-vl"]
    source = write_tiny(tmp_path / "m", family, config={**config, "tie_word_embeddings": True})
    modules = {
        "visual.blocks.1.attn.qkv": "model.visual.blocks.1.attn.qkv",
        "visual.merger.mlp.2": "visual.merger.mlp.2",
    }
    modules |= {"model.layers.0.mlp.up_proj": "model.language_model.layers.0.mlp.up_proj"}
    tensors = {}
    for hub, saved in modules.items():
        outputs, inputs = Checkpoint.open(source, family.canonical_name).tensors[f"{hub}.weight"].shape
        tensors[f"base_model.model.{saved}.lora_A.weight"] = torch.randn(4, inputs) / 8
        tensors[f"base_model.model.{saved}.lora_B.weight"] = torch.randn(outputs, 4) / 8
    folder = adapter(tmp_path / "a", tensors)
    both = open_source(str(source), adapter=str(folder))[0]
    whole = Path(shutil.copytree(source, tmp_path / "whole"))
    (shard,) = whole.glob("*.safetensors")
    stored = load_file(shard)
    save_file({name: both.read(name) for name in stored}, shard, {"format": "pt"})
    changed = [name for name, tensor in load_file(shard).items() if not torch.equal(tensor, stored[name])]
    assert sorted(changed) == sorted(f"{hub}.weight" for hub in modules)
    outs = {}
    for name, recipe in (("one", recipe_for(source, adapter=str(folder))), ("two", recipe_for(whole))):
        export(recipe, out=tmp_path / name, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
        outs[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert outs["one"] == outs["two"]
    verify(tmp_path / "one", choose("cpu"), ignore, "nothing", both)
    manifest = read_manifest(tmp_path / "one").source
    assert manifest.adapter == "a"
    assert {SETTINGS, WEIGHTS, shard.name} == manifest.shards.keys()
    assert not list((tmp_path / "one").glob("adapter*"))


def test_another_adapter_is_another_model(tmp_path: Path) -> None:
    first, other = merged(adapter(tmp_path / "a")), merged(adapter(tmp_path / "b", lora_alpha=9))
    assert len({checkpoint.digest() for checkpoint in (first, other, open_source("demo-llava")[0])}) == 3


def test_the_command_line_takes_an_adapter(tmp_path: Path) -> None:
    arguments = ["plan", "--recipe", "llava-w8", "--model", "demo-llava"]
    folder = adapter(tmp_path / "mine")
    done = CliRunner().invoke(cli, [*arguments, "--adapter", str(folder)])
    assert done.exit_code == 0, done.stderr
    assert "adapter mine: merged into 2 linears" in done.stdout


@pytest.mark.parametrize("name", ["lm_head", WORDS])
def test_an_adapter_that_unties_the_head_is_refused(name: str, tmp_path: Path) -> None:
    """In peft the other of the two keeps its values; transformers and vLLM would read different models."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    lora = adapter(tmp_path / "a", {f"base_model.model.{name}.weight": torch.ones(256, 128)})
    with pytest.raises(CheckpointError, match=r"ties language_model\.lm_head\.weight to|has no tensor"):
        open_source(str(folder), adapter=str(lora))
    open_source(str(folder), adapter=str(adapter(tmp_path / "b")))
