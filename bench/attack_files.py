"""Damaged files of users for `bench.attack`: recipes, official data layouts, answers to score, finished blocks."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import yaml

from bench.damage import damaged_bytes, damaged_json
from exporter import data
from exporter.device import choose
from exporter.errors import DataError
from exporter.evaluation.score_file import score
from exporter.events import ignore
from exporter.pipeline.export import export
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe_file import built_in, load_recipe
from exporter.study.grid import read_grid
from tests import layouts
from tests.published_artifact import recipe, tiny_model

KEYS = ("bits", "group_size", "options", "blocks", "number", "activations", "kv_cache", "max_drop", "samples", "else")
SNIPPETS = (
    *("- a\n", "a: &a [*a]\n", "[" * 3000, "? [a]\n: b\n", "a: 2020-99-99\n", "!!python/name:os.system ''\n", "---\n"),
    *("\t", "\0", "\x1b", "%YAML 9\n", "<<: *x\n", "&a ", "*a ", "! ", "|\n", ">-\n", '"\\ud800"\n', "~: 1\n"),
)
LAYOUTS: dict[str, Callable[[Path], object]] = {
    "coco": layouts.coco,
    "vqav2": layouts.vqav2,
    "gqa": layouts.gqa,
    "flickr30k": layouts.flickr30k,
}
TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]
CONVERSATIONS = [{"id": "1", "image": "a.png", "conversations": TURNS}, {"id": "2", "image": "a.png"}]


def damage_recipe(folder: Path, random: Random) -> None:
    """A built-in recipe of the demo model with damaged values or text; or the grid of a study."""
    path = folder / random.choice(("recipe.yaml", "recipe.yaml", "grid.yaml"))
    content = yaml.safe_load(built_in()[random.choice(("llava-w4", "llava-w4-vit8", "llava-w8"))].read_text())
    content["model"]["repo"] = "demo-llava"
    if path.name == "grid.yaml":
        axis = {"bits": [3, 4], "blocks": ["all", "0:1"], "roles": ["all"]}
        content = {"components": {"vision": axis, "language": axis}, "methods": ["rtn"], "group_sizes": [32, "row"]}
    if random.random() < 0.7:
        return _write(path, damaged_json(content, random, KEYS))  # JSON is YAML
    text = yaml.safe_dump(content, sort_keys=False)
    for _ in range(random.choice((1, 2, 3))):
        at, more = random.randrange(len(text)), random.randrange(1, 30)
        text = random.choice((text[:at] + random.choice(SNIPPETS) + text[at:], text[:at] + text[at + more :]))
    _write(path, text.encode("utf-8", "surrogatepass"))


def try_recipe(folder: Path, accepted: Callable[[], None]) -> None:
    """Read a grid; or read a recipe, print it, and plan it for the demo model."""
    if (folder / "grid.yaml").exists():
        read_grid(folder / "grid.yaml").model_dump_json().encode()
        return
    made = load_recipe(str(folder / "recipe.yaml")).adjusted(model={"repo": "demo-llava"})
    made.digest()
    yaml.safe_dump(made.model_dump(mode="json")).encode()
    plan, _ = prepare(made, choose("cpu"), headers_only=True)
    accepted()
    "\n".join([plan.recipe.description(), *plan.warnings]).encode()


def damage_layout(folder: Path, random: Random) -> None:
    """One JSON file of a data set in its official layout, a table, or LLaVA's conversations."""
    kind = random.choice((*LAYOUTS, "llava", "table"))
    place = folder / kind
    place.mkdir(parents=True)
    if kind in LAYOUTS:
        LAYOUTS[kind](place)
        path = random.choice(sorted(place.rglob("*.json")))
        return _write(path, damaged_json(json.loads(path.read_text()), random))
    layouts.picture(place / "a.png")
    if kind == "llava":
        return _write(place / "chats.json", damaged_json(CONVERSATIONS, random, ("image", "conversations")))
    _write(place / "metadata.csv", damaged_bytes(b'file_name,caption,id\na.png,"a, b",1\na.png,c,2\n', random))


def try_layout(folder: Path, accepted: Callable[[], None]) -> None:
    """Read all samples of every task and split."""
    (place,) = folder.iterdir()
    name, problems = "folder" if place.name == "table" else place.name, []
    tasks = [(task, split) for task in data.ANY_TASK for split in ("train", "validation", "test")]
    for task, split in tasks:
        try:
            samples = data.samples(name, place, task, split, 9, 0)
        except DataError as error:
            problems.append(error)
            continue
        for sample in samples:
            sample.image()
            f"{sample.identity}{sample.question}{sample.references}{sample.kind}".encode()
    if len(problems) == len(tasks):
        raise problems[0]


def damage_answers(folder: Path, random: Random) -> None:
    """A file of answers to COCO's captions."""
    layouts.coco(folder / "coco")
    answers = [{"image_id": i, "caption": f"Caption 1 of picture {i}."} for i in range(1, 5)]
    plain = {entry["image_id"]: entry["caption"] for entry in answers} if random.random() < 0.3 else answers
    _write(folder / "answers.json", damaged_json(plain, random, ("question_id", "answer", "id")))


def try_answers(folder: Path, accepted: Callable[[], None]) -> None:
    """Score it."""
    scored = score(folder / "answers.json", [f"coco:{folder / 'coco'}"], "captioning", "test", 9, 0)
    json.dumps([scored.figures, scored.unanswered, scored.unknown], allow_nan=False).encode()


@cache
def finished() -> Path:
    """`work`: the finished blocks of an export. `out`: its artifact. `model`: its source. Made once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="mmq-attack-work-"))
    atexit.register(shutil.rmtree, folder, True)
    made = recipe(tiny_model(folder / "model"))
    export(made, out=folder / "out", device=choose("cpu"), on_event=ignore, skip_evaluation=True, work=folder / "work")
    return folder


def damage_work(folder: Path, random: Random) -> None:
    """One finished block, the file that names the job, or a file in place of another."""
    work = Path(shutil.copytree(finished() / "work", folder / "work"))
    files = sorted(path for path in work.iterdir() if path.suffix in (".safetensors", ".json"))
    path = random.choice(files)
    how = random.random()
    if path.suffix == ".json":
        _write(path, damaged_json(json.loads(path.read_text()), random))
    elif how < 0.2:
        shutil.copyfile(random.choice([other for other in files if other != path]), path)
    elif how < 0.3:
        path.unlink()
    else:
        _write(path, damaged_bytes(path.read_bytes(), random))


def try_work(folder: Path, accepted: Callable[[], None]) -> None:
    """Resume the export. AssertionError when the artifact's weights then differ from those of an undisturbed run."""
    made, out = recipe(finished() / "model"), folder / "out"
    export(made, out=out, device=choose("cpu"), on_event=ignore, skip_evaluation=True, work=folder / "work")
    accepted()
    for name in ("model.safetensors", "mmq_manifest.json"):
        assert (out / name).read_bytes() == (finished() / "out" / name).read_bytes(), f"other bytes in {name}"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
