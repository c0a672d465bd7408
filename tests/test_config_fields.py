"""Fields of a config.json: valid and invalid values at their limits, defaults, and names of tensors."""

from typing import Any

import pytest

from exporter.model.families.component import Component, head, single
from exporter.model.families.config_fields import (
    MAX_BLOCKS,
    MAX_NUMBER,
    MAX_ROWS,
    MAX_WIDTH,
    Choice,
    Field,
    Flag,
    Fraction,
    Number,
    PositiveNumber,
    Section,
    TokenIds,
    read_fields,
)
from exporter.model.families.llava_fields import Layers, TileLimit, TileSizes, fields
from exporter.model.families.names import Names

SECTION = Section("rope", kinds={"type": ("linear", "yarn")}, numbers=("factor",))
FIELDS: dict[str, tuple[Field, list[Any], list[Any]]] = {  # a field, its valid values, and invalid ones
    "number": (Number("n", 4), [1, 4, MAX_WIDTH], [0, -1, MAX_WIDTH + 1, 4.0, True, None, "4", [4]]),
    "bounded number": (Number("n", 4, least=0, most=9), [0, 9], [-1, 10]),
    "flag": (Flag("f", True), [True, False], [0, 1, None, "true"]),
    "choice": (Choice("c", "a", ("a", "b")), ["a", "b"], ["c", None, 1, ["a"]]),
    "choice or null": (Choice("c", "a", ("a", "b"), null=True), ["a", None], ["c", 0, False]),
    "token": (TokenIds("t"), [None, 0, -1, MAX_ROWS, [3, 4], []], [-2, MAX_ROWS + 1, [3, -2], 1.0, True, "3", [None]]),
    "fraction": (Fraction("d", 0.1), [0, 0.0, 0.5, 1, 1.0], [-0.01, 1.01, True, None, "0.5"]),
    "positive": (PositiveNumber("p"), [None, 1e-9, 1, MAX_NUMBER], [0, -1, MAX_NUMBER * 1.1, True, "1", [1]]),
    "section": (
        SECTION,
        [{}, {"type": "yarn"}, {"factor": None}, {"factor": 2.0, "other": []}],
        [None, [], "x", {"type": "x"}, {"type": None}, {"factor": 0}, {"factor": "2"}],
    ),
    "section or null": (Section("s", null=True), [None, {}], [0, []]),
    "layers": (Layers(), [-2, 0, [1, -1]], [[], None, 1.0, True, [1, None], "1"]),
    "sizes": (
        TileSizes(((336, 672),)),
        [[[1, MAX_WIDTH]], [[2, 3]] * MAX_BLOCKS],
        [[], [[2, 3]] * (MAX_BLOCKS + 1), [[2]], [[2, 3, 4]], [[0, 3]], [[2, MAX_WIDTH + 1]], [[2, 3.0]], [(2, 3)], 7],
    ),
    "limit": (TileLimit(), ["anyres_max_1", "anyres_max_9999"], ["anyres_max_0", "anyres_max_10000", "x", 9, None]),
}
DEFAULTS: dict[str, Any] = {
    "number": 4,
    "bounded number": 4,
    "flag": True,
    "choice": "a",
    "choice or null": "a",
    "token": None,
    "fraction": 0.1,
    "positive": None,
    "section": {},
    "section or null": {},
    "layers": -2,
    "sizes": [[336, 672]],
    "limit": "anyres_max_9",
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_takes_its_valid_values_and_no_other(name: str) -> None:
    field, valid, invalid = FIELDS[name]
    for value in valid:
        assert field.problem(value) is None, value
        if value is not None:
            assert field.of({field.key: value}) == value
    for value in invalid:
        problem = field.problem(value)
        assert problem, value
        assert "expected" in problem
    assert field.of({}) == DEFAULTS[name]
    assert field.problem(field.of({})) is None


def test_a_section_names_the_key_that_is_wrong() -> None:
    assert SECTION.problem({"type": "x"}) == "type: expected linear or yarn, got the text 'x'"
    assert str(SECTION.problem({"factor": 0})).startswith("factor: expected a positive number, got the number 0")
    assert str(Number("n", 1, most=2000).problem(0)).startswith("expected an integer from 1 to 2,000, got the number 0")


def test_defaults_and_null_may_follow_from_other_fields() -> None:
    heads = Number("kv", lambda values: values["heads"], null=lambda values: values["heads"] // 2)
    both = (Number("heads", 8), heads)
    assert read_fields({"heads": 6}, both, "") == ({"heads": 6, "kv": 6}, [])
    assert read_fields({"heads": 6, "kv": None}, both, "") == ({"heads": 6, "kv": 3}, [])
    assert read_fields({"heads": 6, "kv": 2, "other": 1}, both, "") == ({"heads": 6, "kv": 2}, [])
    values, problems = read_fields({"heads": -1, "kv": "x"}, both, "text_config.")
    assert values == {"heads": 8, "kv": 8}
    assert [problem.partition(":")[0] for problem in problems] == ["text_config.heads", "text_config.kv"]


def test_the_top_level_of_a_llava_has_transformers_defaults() -> None:
    values, problems = read_fields({}, fields(-2, "default", 32000), "")
    assert not problems
    assert values == {
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "image_token_index": 32000,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
    }
    assert read_fields({"image_token_index": 0}, fields(-2, "full", 32000), "")[0]["image_token_index"] == 0


def test_the_longest_prefix_of_a_name_is_replaced() -> None:
    names = Names(
        rows=(("model", "live.model", "run"), ("model.vision", "live.tower", "run.vit")),
        also=(("old", "model"), ("model.vision.old", "model.vision")),
    )
    assert names.live("model.a") == "live.model.a"
    assert names.live("model.vision.a") == "live.tower.a"
    assert names.live("model.visions.a") == "live.model.visions.a"
    assert names.live("model") == "live.model"
    assert names.live("other.a") == "other.a"
    assert names.runtime("model.vision.a") == "run.vit.a"
    assert [
        names.canonical(name) for name in ("live.tower.a", "old.a", "model.vision.old.a", "model.vision.a", "x")
    ] == ["model.vision.a", "model.a", "model.vision.a", "model.vision.a", "x"]
    twice = Names(rows=(("a", "live", "run"),), also=(("live", "b"),))
    assert twice.canonical("live.x") == "a.x"  # of equal prefixes the last one counts


def test_components_of_one_block() -> None:
    projector = single("projector", "proj", ("linear_1", "linear_2"), target="x", tokens=lambda config: 3)
    assert (projector.used({}), projector.stored({})) == (1, 1)
    assert projector.phases == (("linear_1",), ("linear_2",))
    assert projector.linears == projector.linears_of({}, 0) == ("linear_1", "linear_2")
    assert projector.roles == {"linear_1": "mlp", "linear_2": "mlp"}
    assert projector.module(0, "linear_1") == "proj.linear_1"
    assert (projector.context({}), projector.plain({}, "linear_1"), projector.has({}, 0, "linear_1")) == (0, None, True)
    assert [projector.holds(name) for name in ("proj", "proj.linear_1.weight", "project.x")] == [True, True, False]
    output = head("model.lm_head", lambda config: config["n"])
    assert [(output.used({"n": n}), output.stored({"n": n})) for n in (0, 1)] == [(0, 0), (1, 1)]
    assert output.module(0, "model.lm_head") == "model.lm_head"
    assert output.tokens({}) == 0
    blocks = Component("language", "layers.{i}", lambda c: 2, lambda c: 3, (("a", "b"), ("c",)), {}, "x", lambda c: 1)
    assert (blocks.block(7), blocks.module(7, "b"), blocks.prefix) == ("layers.7", "layers.7.b", "layers")
    assert blocks.linears == ("a", "b", "c")
