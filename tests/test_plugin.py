"""The vLLM plugin for BLIP-2: entry point, off by default, refused in unsupported versions."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from exporter.device import choose
from exporter.errors import PlanError, ServeError
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe import Recipe
from exporter.serving import vllm_blip2
from exporter.serving.launch import Launch
from exporter.serving.plugin import MODULE, plugin_folder, with_plugin
from exporter.serving.vllm_blip2 import refuse, register, replace_linears


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_folder_is_found_by_its_entry_point_and_is_off_by_default() -> None:
    code = (
        "import sys; from importlib.metadata import entry_points; "
        f"point = entry_points(group='vllm.general_plugins')['{MODULE}']; point.load()(); "
        "print(point.value, 'vllm' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(plugin_folder())}
    environment.pop("MMQ_VLLM_PLUGIN", None)
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [f"{MODULE}:register", "False"], done.stderr


def test_a_changed_copy_is_written_again() -> None:
    path = plugin_folder() / f"{MODULE}.py"
    path.write_text("raise SystemExit")
    assert "PackedBlip2" in (plugin_folder() / f"{MODULE}.py").read_text()


def test_the_launch_switches_it_on_and_keeps_the_users_path() -> None:
    command = with_plugin(
        Launch(("vllm", "serve", "x"), {"A": "1"}, "http://127.0.0.1:1", "x"), "0.32.0", {"PYTHONPATH": "/mine"}
    )
    folder = str(plugin_folder())
    assert command.environment == {"A": "1", "MMQ_VLLM_PLUGIN": "1", "PYTHONPATH": f"/mine{os.pathsep}{folder}"}
    words = ("env", "PYTHONPATH=/site", "python3", "-m", "vllm", "serve", "PYTHONPATH=kept")
    command = with_plugin(Launch(words, {}, "http://127.0.0.1:1", "x"), "0.32.0", {})
    assert command.command == ("env", f"PYTHONPATH=/site{os.pathsep}{folder}", *words[2:])


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0", "0.34.0rc1+cpu", "dev"])
def test_other_versions_of_vllm_are_refused(version: str) -> None:
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.26 to 0\.33"):
        refuse(version)


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1.dev3"])
def test_these_versions_are_supported(version: str) -> None:
    refuse(version)


def test_another_version_is_refused_before_the_start() -> None:
    command = Launch(("vllm", "serve", "x"), {}, "http://127.0.0.1:1", "x")
    with pytest.raises(ServeError, match=r"supports vLLM 0\.26 to 0\.33, this is 0\.40\.1") as caught:
        with_plugin(command, "0.40.1")
    assert caught.value.hint


def test_an_enabled_plugin_in_an_unsupported_vllm_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = ModuleType("vllm")
    vllm.__version__, vllm.ModelRegistry = "0.40.0", None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setenv("MMQ_VLLM_PLUGIN", "1")
    with pytest.raises(RuntimeError, match="store: dequantized"):
        register()


class Unquantized:
    """Fake of vLLM's method for linears that the config does not name."""


class Replicated(nn.Module):
    """Fake of vLLM's linear; the config is the set of names of quantized linears."""

    def __init__(self, rows: int, columns: int, *, bias: bool, quant_config: set[str], prefix: str, return_bias: bool):
        super().__init__()
        assert not return_bias
        self.made_of = (rows, columns, bias, prefix)
        self.quant_method: Any = object() if prefix in quant_config else Unquantized()


def test_only_named_linears_of_the_part_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    replacement = ModuleType("vllm.model_executor.layers.linear")
    replacement.ReplicatedLinear, replacement.UnquantizedLinearMethod = Replicated, Unquantized  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, replacement.__name__, replacement)
    model = nn.Module()
    model.qformer = nn.ModuleDict({"query": nn.Linear(4, 6), "key": nn.Linear(4, 4, bias=False)})
    model.qformer_other, model.language_projection = nn.Linear(2, 2), nn.Linear(6, 8)
    config = {"qformer.query", "qformer_other", "language_projection"}
    assert replace_linears(model, "qformer", config) == ["qformer.query"]
    assert replace_linears(model, "language_projection", config) == ["language_projection"]
    assert model.qformer["query"].made_of == (4, 6, True, "qformer.query")
    assert type(model.qformer["key"]) is type(model.qformer_other) is nn.Linear


def planned(store: str, component: str = "qformer") -> Any:
    evidence = [{"finding": "a", "figures": "b", "source": "c"}]
    model = {"repo": "demo-blip2", "family": "blip2"}
    rule = {"component": component, "bits": 8, "store": store}
    data = {"name": "x", "summary": "x", "model": model, "quantize": [rule], "gates": [], "evidence": evidence}
    return prepare(Recipe.model_validate(data), choose("cpu"))[0]


def test_a_plan_packs_it_only_where_the_recipe_counts_on_the_plugin() -> None:
    decisions = {row.decision for row in planned("plugin").rows if row.component == "qformer" and row.linear}
    assert decisions == {"packed"}
    with pytest.raises(PlanError, match="store: plugin"):
        planned("packed")
    with pytest.raises(PlanError, match="needs no plugin"):
        planned("plugin", "vision")


def vllm_with(monkeypatch: pytest.MonkeyPatch, **names: Any) -> ModuleType:
    """Install a stand-in for vLLM's blip2.py that has these names."""
    blip2 = ModuleType("vllm.model_executor.models.blip2")
    models = ModuleType("vllm.model_executor.models")
    vars(blip2).update(names)
    models.blip2 = blip2  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, models.__name__, models)
    monkeypatch.setitem(sys.modules, blip2.__name__, blip2)
    return blip2


@pytest.mark.parametrize("quant_config", [None, {"qformer.query"}])
def test_the_model_is_vllms_with_a_named_vision_tower_and_replaced_linears(
    quant_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers: list[str] = []

    class Original:
        def __init__(self, *, vllm_config: Any, prefix: str) -> None:
            blip2.BlipVisionModel(vllm_config)
            if prefix == "damaged":
                raise ValueError(prefix)

    def tower(vllm_config: Any, prefix: str = "") -> None:
        towers.append(prefix)

    blip2 = vllm_with(monkeypatch, BlipVisionModel=tower, Blip2ForConditionalGeneration=Original)
    replaced: list[tuple[str, Any]] = []
    monkeypatch.setattr(vllm_blip2, "replace_linears", lambda model, part, config: replaced.append((part, config)))
    made = vllm_blip2._make()
    assert (made.__name__, made.__module__, made.__bases__) == ("PackedBlip2", vllm_blip2.__name__, (Original,))
    made(vllm_config=SimpleNamespace(quant_config=quant_config), prefix="")
    parts = [] if quant_config is None else ["qformer", "language_projection"]
    assert replaced == [(part, quant_config) for part in parts]
    with pytest.raises(ValueError, match="damaged"):
        made(vllm_config=SimpleNamespace(quant_config=None), prefix="damaged")
    assert towers == ["vision_model"] * 2
    assert blip2.BlipVisionModel is tower  # others that use the module get vLLM's own


def test_a_vllm_without_the_classes_that_the_plugin_changes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_with(monkeypatch, BlipVisionModel=None)
    with pytest.raises(RuntimeError, match=r"vLLM's blip2.py has no Blip2ForConditionalGeneration$"):
        vllm_blip2._make()
    vllm_with(monkeypatch)
    with pytest.raises(RuntimeError, match="has no BlipVisionModel and no Blip2ForConditionalGeneration"):
        vllm_blip2._make()


def test_the_module_has_no_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_blip2, "_make", lambda: "the class")
    monkeypatch.setattr(vllm_blip2, "PackedBlip2", None, raising=False)  # removed after the test
    del vllm_blip2.PackedBlip2
    assert vllm_blip2.PackedBlip2 == "the class"
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        vllm_blip2.Other  # noqa: B018


def test_the_model_is_registered_where_the_plugin_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[str, str]] = []
    vllm = ModuleType("vllm")
    registry = SimpleNamespace(register_model=lambda *names: registered.append(names))
    vllm.__version__, vllm.ModelRegistry = "0.32.0", registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.delenv("MMQ_VLLM_PLUGIN", raising=False)
    register()
    assert not registered
    monkeypatch.setenv("MMQ_VLLM_PLUGIN", "1")
    register()
    assert registered == [("Blip2ForConditionalGeneration", f"{vllm_blip2.__name__}:PackedBlip2")]
