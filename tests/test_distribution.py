"""The distribution's name stands in one place, and every hint names what really installs."""

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from exporter.artifact import artifact
from exporter.commands import doctor
from exporter.distribution import DISTRIBUTION, PROGRAM, VERSION, install_extra, installed_version
from exporter.methods import METHODS
from exporter.quantization import identity

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PLACES = ("exporter", "docs", "serving", "tools", "recipes", "bench", ".github")
FILES = ("README.md", "CONTRIBUTING.md", "Dockerfile", "Makefile")
INSTALL = re.compile(r"pip install ([^`\n]*)")


def texts() -> Iterator[tuple[str, str]]:
    """Name and text of every file that may tell a user what to install."""
    below = [path for place in PLACES for path in (ROOT / place).rglob("*") if path.is_file()]
    for path in [*below, *(ROOT / name for name in FILES)]:
        if path.suffix in {".py", ".md", ".sh", ".yaml", ".yml", ".jinja", ".txt", ""} and "__pycache__" not in str(
            path
        ):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def extras(text: str) -> set[str]:
    """Extras of mmq that a text names."""
    written = re.findall(r"""pip install[^`\n]*['" ]\.\[([\w,-]+)\]""", text)
    called = re.findall(r"""install_extra\(['"]([\w-]+)['"]\)""", text)
    return {name for names in [*written, *called] for name in names.split(",")}


def wrong_hints(text: str) -> list[str]:
    """What a text tells a user to install that is another project of the index, or that no index has."""
    name = re.compile(rf"['\"]?(?:{PROGRAM}|{DISTRIBUTION})(?![\w-])")
    commands = [re.split(r" (?:in|into|and|from|with) |[#;]", hint)[0] for hint in INSTALL.findall(text)]
    commands_with_name = [command for command in commands if any(name.match(word) for word in command.split())]
    return commands_with_name + re.findall(rf"(?<![\w-])(?:{PROGRAM}|{DISTRIBUTION})\[[a-z]", text)


def test_the_project_has_the_name_and_the_version_of_the_code() -> None:
    assert PROJECT["project"]["name"] == DISTRIBUTION
    assert PROJECT["project"]["scripts"] == {PROGRAM: "exporter.__main__:main"}
    assert PROJECT["project"]["dynamic"] == ["version"]
    source = (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^VERSION = "(.+)"', source, re.MULTILINE) == [VERSION]
    wheel = f"{DISTRIBUTION.replace('-', '_')}-*.whl"
    assert f"/wheels/{wheel} " in (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("installed", [None, "9.9"], ids=["nothing is installed", "the other project is installed"])
def test_the_program_knows_its_version_by_itself(installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed_version("torch") == installed
    assert installed_version(PROGRAM) == VERSION
    assert identity.package_versions()["mmq"] == VERSION
    assert doctor.examine()["mmq"] == VERSION


def test_files_name_the_program_and_never_the_distribution() -> None:
    """Manifests and fingerprints keep their keys: another name would make every unit and study stale."""
    assert identity.PACKAGES[0] == artifact.PACKAGES[0] == PROGRAM == "mmq"
    assert DISTRIBUTION not in {*identity.PACKAGES, *artifact.PACKAGES}


def test_every_hint_names_what_really_installs() -> None:
    wrong = {name: hints for name, text in texts() if (hints := wrong_hints(text))}
    assert wrong == {}


def test_every_extra_that_is_named_exists() -> None:
    declared = PROJECT["project"]["optional-dependencies"].keys()
    named = {name: names for name, text in texts() if (names := extras(text))}
    assert {extra for names in named.values() for extra in names} >= {"verify", "study", "report", "hub", "ray"}
    assert {name: names - declared for name, names in named.items() if names - declared} == {}


@pytest.mark.parametrize("wrong", ["mmq[verify]", "pip install mmq", "pip install 'mmq-vlm>=1'", "pip install -U mmq."])
def test_a_wrong_hint_is_noticed(wrong: str) -> None:
    assert wrong_hints(f"text\n{wrong}\ntext")
    assert not wrong_hints(install_extra("verify"))


def test_an_extra_is_read_from_texts_and_calls() -> None:
    assert extras("`pip install '.[docs,dev]'`") == {"docs", "dev"}
    assert extras('install_extra("nonsense")') == {"nonsense"}


def test_the_metadata_names_authors_and_the_paper_that_the_readme_cites() -> None:
    project = PROJECT["project"]
    assert project["authors"] == [{"name": "The mmq developers"}]
    number = project["urls"]["Paper"].removeprefix("https://arxiv.org/abs/")
    assert f"arXiv {number}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= set(project["classifiers"])


def test_the_metadata_is_complete_and_invents_no_address() -> None:
    """A license as SPDX expression excludes classifiers of licenses; the only address is that of the paper."""
    project = PROJECT["project"]
    assert project["license"] == "Apache-2.0"
    assert [(ROOT / file).exists() for file in project["license-files"]] == [True]
    assert (ROOT / project["readme"]).exists()
    assert list(project["urls"]) == ["Paper"]
    assert not any(line.startswith("License ::") for line in project["classifiers"])
    assert len(project["description"]) < 120
    versions = [Version(line.rpartition(" ")[2]) for line in project["classifiers"] if ":: Python :: 3." in line]
    allowed = SpecifierSet(project["requires-python"])
    assert versions == [v for v in (Version(f"3.{minor}") for minor in range(8, 20)) if v in allowed]
    assert set(METHODS) - {"rtn"} <= set(project["keywords"])
    assert {"vllm", "quantization", "llava", "blip-2"} <= set(project["keywords"])
