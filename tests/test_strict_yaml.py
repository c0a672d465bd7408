"""YAML of unknown origin (recipes of artifacts on the hub): plain data of bounded size, or one error at once."""

from pathlib import Path

import pytest

from exporter.errors import RecipeError
from exporter.files import strict_yaml
from exporter.files.strict_yaml import DEEPEST, MOST_VALUES, parse_yaml
from exporter.planning.recipe_file import parse_recipe
from exporter.study.grid import read_grid

TENFOLD = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 40))
FEW = 2000  # values: as many as mmq allows take seconds to read
REFUSED = {
    "nested lists": ("[" * 20_000, "nested too deeply"),
    "nested mappings": ("{a: " * 20_000, "nested too deeply"),
    "nested blocks": ("".join(" " * i + "a:\n" for i in range(300)), "nested too deeply"),
    "a value of 10^39 values": (f"a0: &a0 [x]\n{TENFOLD}", f"more than {MOST_VALUES:,} values"),
    "many values": (f"a: [{'1,' * (FEW + 1)}]", f"more than {FEW:,} values"),
    "a list in itself": ("a: &a [*a]", "contains itself"),
    "a mapping in itself": ("a: &a {b: *a}", "contains itself"),
    "a long text": (f"a: {'x' * 10**6}", "characters; mmq reads at most"),
    "a day of no month": ("a: 2020-99-99", "month must be in"),
    "too many digits": (f"a: {'9' * 5000}", "4300 digits"),
    "a key twice": ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice"),
    "a key twice inside": ("x: {a: 1, 'a': 1}", "the key 'a' occurs twice"),
    "an escape sequence": ('a: "\\x1b[2J"', r"control character '\\x1b'"),
    "half a character": ('a: ["\\ud800"]', r"control character '\\ud800'|invalid Unicode character escape code"),
    "a control character in a key": ('"\\x07": 1', r"control character '\\x07'"),
    "code": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "two documents": ("a: 1\n---\nb: 1", "single document"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_yaml_that_is_no_bounded_plain_data_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "many values":
        monkeypatch.setattr(strict_yaml, "MOST_VALUES", FEW)
    text, reason = REFUSED[name]
    with pytest.raises(RecipeError, match=reason):
        parse_yaml(text, "r.yaml")
    with pytest.raises(RecipeError, match=r"^r\.yaml"):
        parse_recipe(text, "r.yaml")
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"grid\.yaml"):
        read_grid(tmp_path / "grid.yaml")


def test_values_are_read_to_the_deepest_level_that_is_allowed() -> None:
    for opening, closing in (("[", "]"), ("{a: ", "}")):
        assert parse_yaml(opening * DEEPEST + closing * DEEPEST, "r.yaml")
        with pytest.raises(RecipeError, match="nested too deeply"):
            parse_yaml(opening * (DEEPEST + 1) + closing * (DEEPEST + 1), "r.yaml")


def test_plain_data_with_repeated_values_is_read() -> None:
    text = "rule: &rule {bits: 4, text: 'a\tb \U0001fae0'}\nagain: {<<: *rule, bits: 8}\nboth: [*rule, *rule]\nnone: ~"
    rule = {"bits": 4, "text": "a\tb \U0001fae0"}
    assert parse_yaml(text, "r.yaml") == {"rule": rule, "again": rule | {"bits": 8}, "both": [rule, rule], "none": None}


@pytest.mark.parametrize("section", ["calibration", "evaluation"])
@pytest.mark.parametrize("value", ["samples: 0xffffffffffff", "batch: 9999999999", "seed: -1", "seed: 4294967296"])
def test_numbers_of_data_are_bounded(section: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"{section}.{value.partition(':')[0]}: Input should be"):
        parse_recipe(f"quantize: [{{component: language, bits: 4}}]\n{section}: {{{value}}}", "r.yaml")
