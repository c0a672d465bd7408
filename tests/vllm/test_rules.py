"""Serve-lint's matching beside vLLM's own functions, on the patterns of every recipe and on broken ones."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from exporter.checkpoint import Checkpoint
from exporter.device import Device
from exporter.families import FAMILIES
from exporter.plan import engine_linears, make_plan
from exporter.quantized import Scheme
from exporter.recipe_file import built_in, load_recipe
from exporter.runtime.serve_lint import matched_scheme
from exporter.targets import groups, kept_modules

H100 = Device(torch.device("cuda", 0), "H100", 78 * 2**30)
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
BREAKS = (  # pattern of a recipe -> a pattern that a person might have written
    lambda target: target.replace("re:.*", "re:^model\\."),
    lambda target: target.replace("q_proj|", ""),
    lambda target: target.replace("|self_attn\\.qkv_proj", ""),
    lambda target: target.replace("vision_tower", "vision_model"),
    lambda target: "re:.*[kv]_proj$",
    lambda target: target.removesuffix("$").replace("mlp", "m"),
)


def ask(python: str, questions: list[dict]) -> list[str | None]:
    """vLLM's answers."""
    command = [python, str(Path(__file__).with_name("match.py"))]
    done = subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_matching_agrees_with_vllm(engine_python: str, sparse_checkpoint: Callable[[str], Path]):
    family = FAMILIES["llava"]
    checkpoint = Checkpoint.open(sparse_checkpoint("llava-hf--llava-1.5-7b-hf"), family.canonical_name)
    questions, expected = [], []
    for name in [name for name in built_in() if name.startswith("llava")]:
        plan = make_plan(load_recipe(name), checkpoint, family, H100)
        found = [(group.scheme, list(group.targets)) for group in groups(plan)]
        kept = kept_modules(plan)
        for change in (lambda target: target, *BREAKS):
            changed = [(scheme, [change(target) for target in targets]) for scheme, targets in found]
            members: dict[str, list[str]] = {}
            for linear in engine_linears(plan.rows, family):
                members.setdefault(linear.engine, []).append(linear.name)
            for engine, names in members.items():
                targets = [target for _, listed in changed for target in listed]
                questions.append({"engine": engine, "targets": targets, "ignore": kept, "fused": FUSED})
                expected.append((matched_scheme(engine, names, changed, kept), dict(_by_target(changed))))
    answers = ask(engine_python, questions)
    assert len(answers) > 5000
    assert len({str(answer) for answer in answers}) > 5
    for question, (ours, by_target), theirs in zip(questions, expected, answers, strict=True):
        assert ours == (by_target[theirs] if theirs else None), (question["engine"], question["targets"], theirs)


def _by_target(found: list[tuple[Scheme, list[str]]]) -> list[tuple[str, Scheme]]:
    """Target -> its scheme; the first wins, as in vLLM's map from targets."""
    return [(target, scheme) for scheme, targets in reversed(found) for target in reversed(targets)]
