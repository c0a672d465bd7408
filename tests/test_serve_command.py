"""`mmq serve` without an engine: the printed command, refusals, and errors for a server that exits."""

import json
import shlex
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exporter.artifact.artifact import Artifact
from exporter.commands.main import cli
from exporter.device import capability, choose
from exporter.errors import ServeError
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.numerics.quantized import Scheme
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe_file import load_recipe
from exporter.planning.vllm_kernels import Hardware
from exporter.planning.vllm_rules import head_size
from exporter.serving.faster_flags import FLASHINFER, HUMMING, FlagAdvice, faster_flags
from exporter.serving.launch import Program, launch
from exporter.serving.other_recipes import recipe_hint, served_recipes
from exporter.serving.preflight import refuse_plan, refuse_processor, refuse_unservable
from exporter.serving.vllm_engine import ending, free_port
from tests.children import running_command
from tests.headers.read import load_header

DEMO = str(MODELS["demo-llava"])


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without vLLM, whose processor has AVX-512."""
    monkeypatch.delenv("MMQ_VLLM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    processor(tmp_path, monkeypatch, "sse2 avx2 avx512f")


def processor(folder: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None) -> None:
    """Let mmq read these instruction sets of the machine; None: a system that lists none."""
    (folder / "cpuinfo").write_text("Features : asimd\n" if flags is None else f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr("exporter.serving.cpu_instructions.CPUINFO", folder / "cpuinfo")


@pytest.fixture
def vllm(tmp_path: Path) -> str:
    """A fake vLLM that reports a version and exits instead of serving."""
    path = tmp_path / "stand-in"
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 0.32.0+cpu && exit 0\nkill -9 $$\n')
    path.chmod(0o755)
    return str(path)


def serve(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["serve", *arguments])


def test_print_works_without_vllm() -> None:
    done = serve(DEMO, "--print")
    assert done.exit_code == 0, done.output
    assert "vllm serve" in done.stdout
    assert "--enforce-eager" not in done.stdout
    assert "vllm is not installed" in done.stderr


@pytest.mark.parametrize("named", ["option", "environment"])
def test_a_vllm_program_that_is_set_must_exist(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if named == "environment":
        monkeypatch.setenv("MMQ_VLLM", "/nowhere/vllm")
    done = serve(DEMO, "--print", *(["--vllm", "/nowhere/vllm"] if named == "option" else []))
    assert done.exit_code == 1
    assert "the program '/nowhere/vllm' does not exist" in done.stderr


def test_serving_without_vllm_is_an_error() -> None:
    done = serve(DEMO)
    assert done.exit_code == 1
    assert "serving/cpu/install.sh" in done.stderr


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """demo-llava with 4-bit language weights and a float8 cache."""
    folder = tmp_path_factory.mktemp("faster")
    recipe, out = folder / "recipe.yaml", folder / "artifact"
    text = CliRunner().invoke(cli, ["recipes", "llava-w4"]).stdout.replace("gptq", "rtn")
    recipe.write_text(text + "kv_cache: fp8\n")
    command = ["export", "--recipe", str(recipe), "--model", "demo-llava", "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(cli, [*command, "--skip-evaluation"])
    assert result.exit_code == 0, result.output
    return str(out)


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ((), shlex.join(HUMMING.flags + FLASHINFER.flags)),
        (("--linear-backend", "machete"), shlex.join(FLASHINFER.flags)),
        (("--kernel-config.linear_backend=auto", "--kv-cache-dtype", "auto"), ""),
        (("--attention_backend=TRITON_ATTN",), shlex.join(HUMMING.flags)),
    ],
)
def test_faster_flags_are_printed_unless_the_user_set_them(given: tuple[str, ...], flags: str, artifact: str) -> None:
    done = serve(artifact, "--print", "--", *given)
    assert done.exit_code == 0, done.output
    assert (f"note: faster on a Hopper GPU: `-- {flags}" in done.stderr) == bool(flags)
    assert ("faster" in done.stderr) == bool(flags)


def test_no_faster_flags_are_printed_on_a_cpu(artifact: str, vllm: str) -> None:
    done = serve(artifact, "--print", "--vllm", vllm)
    assert done.exit_code == 0, done.output
    assert "faster" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "build", "refused"),
    [("sse2 avx2", "+cpu", True), ("avx2 avx512f", "+cpu", False), (None, "+cpu", False), ("sse2 avx2", "", False)],
)
def test_4_bits_are_refused_at_once_where_vllms_cpu_build_has_no_kernel(
    flags: str | None,
    build: str,
    refused: bool,
    artifact: str,
    vllm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(vllm).write_text(Path(vllm).read_text().replace("+cpu", build))
    processor(tmp_path, monkeypatch, flags)
    done = serve(artifact, "--vllm", vllm)
    assert done.exit_code == 1  # otherwise it tries to start the stand-in
    assert ("needs AVX-512" in done.stderr) == refused
    check = CliRunner().invoke(cli, ["check", artifact, "--vllm", vllm, "--questions", "1", "--device", "cpu"])
    assert check.exit_code == 1
    assert ("needs AVX-512" in check.stderr) == refused
    assert serve(artifact, "--print", "--vllm", vllm).exit_code == 0  # for another machine


def test_16_bits_and_float8_are_served_without_avx_512(
    vllm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processor(tmp_path, monkeypatch, "sse2 avx2")
    assert "AVX-512" not in serve(DEMO, "--vllm", vllm).stderr
    program, recipe = (
        Program(vllm, "0.32.0+cpu", cpu=True),
        load_recipe("llava-w4-vit8").adjusted(model={"repo": "a b"}),
    )
    refuse_processor(
        program, [None, *(rule.scheme() for rule in load_recipe("llava-fp8-vit16").quantize)], recipe, FAMILIES["llava"]
    )
    with pytest.raises(ServeError, match="needs AVX-512") as caught:
        refuse_processor(program, [None, Scheme(4, 128, True)], recipe, FAMILIES["llava"])
    export = "`mmq export --recipe llava-fp8-vit16 --model 'a b'`"
    assert caught.value.hint == f"without AVX-512 vLLM serves llava-fp8-vit16 on this CPU: {export}"


@pytest.mark.parametrize(
    ("flags", "cache", "needed"),
    [
        ("avx2", None, ["VNNI (avx512_vnni or avx_vnni)"]),
        ("avx2 avx512f", None, ["VNNI (avx512_vnni or avx_vnni)"]),
        ("avx2 avx_vnni", None, []),
        ("avx512f avx512_vnni", "fp8", []),
        ("avx2 avx_vnni", "fp8", ["AVX-512 (avx512f)"]),
        ("avx2", "fp8", ["VNNI (avx512_vnni or avx_vnni)", "AVX-512 (avx512f)"]),
        (None, "fp8", []),
    ],
)
def test_int8_inputs_need_vnni_and_a_float8_cache_avx_512(
    flags: str | None, cache: str | None, needed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(tmp_path, monkeypatch, flags)
    schemes, recipe = [None, Scheme(8, "row", True, activations="int8")], load_recipe("llava-w4-vit8")
    refuse = partial(refuse_processor, schemes=schemes, recipe=recipe, family=FAMILIES["llava"], kv_cache=cache)
    refuse(Program("vllm", "0.32.0", cpu=False))
    with pytest.raises(ServeError) if needed else nullcontext() as caught:
        refuse(Program("vllm", "0.32.0+cpu", cpu=True))
    lines = str(caught.value).splitlines()[1:] if caught else []
    assert [line.partition("it needs ")[2] for line in lines] == needed


@pytest.mark.parametrize(("flags", "noted"), [("avx2", True), ("avx2 avx512f", True), ("avx512f avx512_vnni", False)])
def test_a_plan_for_a_cpu_says_what_this_one_lacks(
    flags: str, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(tmp_path, monkeypatch, flags)
    words = ["plan", "--recipe", "llava-w4-vit8a8", "--model", "demo-llava", "--device", "cpu", "--serve-on", "cpu"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert ("without VNNI" in " ".join(done.output.split())) == noted


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [("avx2", "llava-fp8-vit16"), ("avx2 avx512f avx512_vnni", "llava-w4-vit8a8"), ("avx2 avx512f", "llava-w4-vit4")],
)
def test_a_refused_artifact_leads_to_a_recipe_that_this_processor_runs(
    flags: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(tmp_path, monkeypatch, flags)
    out = str(tmp_path / "out")
    words = ["export", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--samples", "2", "--out", out]
    assert CliRunner().invoke(cli, [*words, "--skip-evaluation", "--device", "cpu"]).exit_code == 0
    with pytest.raises(ServeError) as caught:
        refuse_unservable(Artifact.open(Path(out)), "cpu", 1)
    assert f"`mmq export --recipe {recipe} --model demo-llava`" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("flags", "head", "served"),
    [
        ("avx2 avx512f", 128, True),
        ("avx2 avx512f", 48, False),  # vLLM's cache needs multiples of 32
        ("avx2 avx512f", None, False),
        ("avx2", 128, False),
    ],
)
def test_a_recipe_with_a_float8_cache_is_served_by_a_cpu_with_avx_512_and_whole_heads(
    flags: str, head: int | None, served: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(tmp_path, monkeypatch, flags)
    names = served_recipes(FAMILIES["llava"], "cpu", head)
    assert ("llava-fp8-vit16-cache8" in names) == served
    assert "llava-fp8-vit16" in names


def test_the_hint_of_a_plan_uses_the_models_head_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(tmp_path, monkeypatch, "avx2 avx512f avx512_vnni")
    recipe = load_recipe("llava-w4-vit8").adjusted(model={"repo": "demo-llava"})
    plan, checkpoint = prepare(recipe, choose("cpu"), headers_only=True)
    assert plan.head_size == head_size(checkpoint.config) is not None
    for size, served in ((64, True), (48, False)):
        with pytest.raises(ServeError) as caught:
            refuse_plan(replace(plan, head_size=size), checkpoint.config, "cpu")
        assert ("llava-fp8-vit16-cache8" in (caught.value.hint or "")) == served


@pytest.mark.parametrize(
    ("family", "on", "names", "closest"),
    [
        ("llava", "cpu", {"llava-w4", "llava-w4-vit4", "llava-w4-vit8a8", "llava-fp8-vit16"}, "llava-w4-vit8a8"),
        ("llava", (10, 0), {"llava-w4-vit8", "llava-w8", "llava-fp8-vit16-cache8"}, "llava-w4-vit8"),
        ("blip2", (8, 0), {"blip2-caption-w4", "llava-w4-vit8a8"}, "llava-w4-vit8"),
    ],
)
def test_a_refusal_names_the_recipes_that_are_served_and_a_command_to_paste(
    family: str, on: Hardware, names: set[str], closest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(tmp_path, monkeypatch, "avx2 avx512f avx512_vnni")
    recipe = load_recipe("llava-w4-vit8").adjusted(model={"repo": "demo-llava"})
    hint, served = recipe_hint(recipe, FAMILIES[family], on, None), served_recipes(FAMILIES[family], on, None)
    assert names <= set(served)
    assert hint.endswith(f"`mmq export --recipe {closest} --model demo-llava`")
    assert (family == "blip2") == any(name.startswith("blip2") for name in served)
    assert all(name in hint for name in served)
    without = {
        "cpu": {"llava-w8", "llava-fp8-vit16-cache8"},
        (10, 0): {"llava-w4-vit8a8"},
        (8, 0): {"llava-w4a8-vitfp8-cache8"},
    }
    assert not without[on] & set(served)  # type: ignore[index]
    visual = replace(FAMILIES[family], components=FAMILIES[family].components[:1])
    assert recipe_hint(recipe, visual, on, None).startswith(f"no built-in recipe for {family} has kernels on ")


@pytest.mark.parametrize(
    ("visible", "printed", "code", "expected"),
    [
        (None, "9.0\n", 0, (9, 0)),
        (None, "12.0\n12.0\n", 0, (12, 0)),
        (None, "9.0\n8.0\n", 0, None),
        ("1", "8.9\n", 0, (8, 9)),
        ("", "9.0\n", 0, None),
        (None, "NVIDIA-SMI has failed\n", 9, None),
    ],
)
def test_the_driver_reports_the_compute_capability(
    visible: str | None, printed: str, code: int, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert capability() is None  # there is no such program
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\nprintf '%s' '{printed}'\necho \"$@\" >&2\n[ \"$4\" = '{visible or ''}' ] && exit {code}\n"
    )
    program.chmod(0o755)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert capability() == expected


def test_a_gpu_without_the_kernel_is_refused_if_vllm_is_installed(
    artifact: str, vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(vllm).write_text(Path(vllm).read_text().replace("+cpu", ""))
    for card, code in (((7, 0), 1), ((7, 5), 0), (None, 0)):
        monkeypatch.setattr("exporter.serving.preflight.capability", lambda card=card: card)
        done = serve(artifact, "--print", "--vllm", vllm)
        assert done.exit_code == code, done.output
        assert ("rule kernel: W4 g128 is not served on compute capability 7.0" in done.stderr) == bool(code)
        assert serve(artifact, "--print").exit_code == 0  # a command for another machine


@pytest.mark.parametrize(
    ("recipe", "cache", "known"),
    [
        ("llava-w4-vit8", None, [HUMMING]),
        ("llava-w4-vit8", "fp8", [HUMMING, FLASHINFER]),
        ("llava-fp8-vit16-cache8", "fp8", [FLASHINFER]),
        ("llava-w4-vit8a8", None, []),
        ("llava-w4a8-vitfp8-cache8", "fp8", []),
        ("llava-w3-vit4", None, []),
        ("llava-w8", None, []),
    ],
)
def test_faster_flags_depend_on_schemes_cache_and_head_size(
    recipe: str, cache: str | None, known: list[FlagAdvice]
) -> None:
    schemes = [(rule.component, rule.scheme()) for rule in load_recipe(recipe).quantize]
    language = {scheme for component, scheme in schemes if scheme and component == "language"}
    others = {scheme for _, scheme in schemes if scheme} - language
    true = head_size(load_header("llava-hf--llava-1.5-7b-hf")[0])
    assert faster_flags(language, others, cache, true) == known
    assert FLASHINFER not in faster_flags(language, others, cache, 80)


@pytest.mark.parametrize("command", ["serve", "check"])
def test_the_error_for_a_misplaced_vllm_flag_names_its_place(command: str) -> None:
    done = CliRunner().invoke(cli, [command, DEMO, "--max-num-seqs", "4"])
    assert done.exit_code == 2
    assert "'--max-num-seqs'. Put flags of `vllm serve` after `--`." in done.stderr


@pytest.mark.parametrize(
    "flags", [("--port", "9"), ("--port=9",), ("--host", "::"), ("-tp", "3"), ("--tensor_parallel_size=3",)]
)
def test_address_and_number_of_gpus_are_options_of_mmq(flags: tuple[str, ...]) -> None:
    done = serve(DEMO, "--print", "--", *flags)
    assert done.exit_code == 1
    assert "is not allowed after `--`: mmq needs this value" in done.stderr
    assert "before `--`, give" in done.stderr


@pytest.mark.parametrize("flags", [("--served-model-name", "mine"), ("--served_model_name=mine",)])
def test_requests_use_the_served_model_name(flags: tuple[str, ...]) -> None:
    serve_command = launch(MODELS["demo-llava"], {}, Program("vllm", "0.32.0", cpu=False), extra=flags)
    assert serve_command.model == "mine"
    assert "demo-llava" not in serve_command.command


def test_a_server_that_is_killed_during_its_start_is_an_error(vllm: str, tmp_path: Path) -> None:
    with running_command(["serve", DEMO, "--vllm", vllm, "--port", str(free_port()), "--json"], tmp_path) as command:
        assert command.ended() == 1
    error = json.loads(command.stdout.read_text())["error"]
    assert error.startswith("vllm was killed by signal 9 (possibly out of memory) before it was")


class FakeEngine:
    """A server that a signal stops, or that exits with a code."""

    pid = 7

    def __init__(self, launch: Any) -> None:
        self.entered = False

    def __enter__(self) -> "FakeEngine":
        self.entered = True
        return self

    def __exit__(self, *error: object) -> None:
        self.entered = False

    def wait_healthy(self, seconds: float) -> float:
        assert self.entered
        if FakeEngine.end == "stopped early":
            raise KeyboardInterrupt
        return 12.5

    def wait(self) -> int:
        assert self.entered
        if FakeEngine.end == "stopped":
            raise KeyboardInterrupt
        return int(FakeEngine.end)

    end = "0"


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("0", 0, ""),
        ("stopped", 0, "stopped: the server has exited"),
        ("stopped early", 130, "stopped before the server was healthy; it has exited"),
        ("3", 1, "vllm exited with code 3; its log is above"),
        ("-9", 1, "vllm was killed by signal 9 (possibly out of memory); its log is above"),
    ],
)
def test_the_exit_code_of_a_server_that_ends(
    end: str, code: int, message: str, vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.serving.vllm_engine.Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "end", end)
    done = serve(DEMO, "--vllm", vllm, "--port", "9")
    assert done.exit_code == code, done.output
    assert message in done.stderr
    served = "demo-llava is served at http://127.0.0.1:9/v1 (Ctrl-C stops it); example requests:"
    assert (served in done.stdout.splitlines()) == (end != "stopped early")


def test_a_served_artifact_in_json_has_its_address_and_process(vllm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.serving.vllm_engine.Engine", FakeEngine)
    state = json.loads(serve(DEMO, "--vllm", vllm, "--port", "9", "--json").stdout)
    assert {name: state[name] for name in ("url", "model", "pid", "startup_seconds")} == {
        "url": "http://127.0.0.1:9",
        "model": "demo-llava",
        "pid": 7,
        "startup_seconds": 12.5,
    }
    assert state.keys() >= {"ask", "curl", "python"}


@pytest.mark.parametrize(
    ("code", "fragment"),
    [
        (1, "vllm exited with code 1"),
        (-11, "vllm was killed by signal 11"),
        (-9, "vllm was killed by signal 9 (possibly"),
    ],
)
def test_an_exit_of_the_server_is_reported(code: int, fragment: str) -> None:
    assert ending(code).startswith(fragment)
