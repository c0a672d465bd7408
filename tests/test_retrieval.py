"""Retrieval: the optimized ranks equal those from transformers' forward pass of every pair; format of the answers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from exporter.commands.report_tables import report_page
from exporter.data import CONVENTIONS
from exporter.data import samples as data_samples
from exporter.data.tasks import TASKS, retrieval
from exporter.data.tasks.retrieval import METRICS, RANKS, format_answer, recalls, score, with_pool
from exporter.data.tasks.sample import Pool, Sample, task_of
from exporter.errors import DataError
from exporter.evaluation.answers import Answerer, Backend, Store, collect_answers
from exporter.evaluation.backends import _query
from exporter.evaluation.evaluate import measure as compare_models
from exporter.events import Event, ignore
from exporter.model.families import FAMILIES
from exporter.model.inference.batch_size import BatchSize
from exporter.model.inference.predict import Predictor
from exporter.model.inference.retrieval import _best, _rank, rank
from exporter.planning.recipe_file import load_recipe
from exporter.publishing.artifact_summary import read_place
from exporter.publishing.report import collect, html
from tools.demo_training.blip2_folder import build, config, save

CPU = torch.device("cpu")
CANDIDATES = 5
COUNT = 11  # more than the largest rank that counts


@cache
def model() -> Any:
    """An untrained retrieval model; its scores are arbitrary, and contrast and matching differ about as much."""
    result = build(config("retrieval"), 3).eval()
    with torch.no_grad():
        result.itm_head.weight.mul_(0.15)
    return result


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo model's processor."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("itm")
    save(model(), config("retrieval"), folder)
    return AutoProcessor.from_pretrained(folder)


@cache
def demo_samples() -> list[Sample]:
    """Scenes of which every third lost a caption, so that pictures differ in how many they have."""
    loaded = data_samples("demo", None, "retrieval", "test", COUNT, 1)
    cut = [replace(s, among=None, references=s.references[: 1 + (i % 3 > 0)]) for i, s in enumerate(loaded)]
    return with_pool(cut, CANDIDATES)


def naive(processor: Any) -> dict[str, list[float]]:
    """Recalls from whole matrices: every pair through the model by itself."""
    texts = [text for sample in demo_samples() for text in sample.references]
    owners = [i for i, sample in enumerate(demo_samples()) for _ in sample.references]
    contrast, match = torch.zeros(COUNT, len(texts)), torch.zeros(COUNT, len(texts))
    pictures = [sample.image() for sample in demo_samples()]
    pixels = [processor(images=picture, text=texts[0], return_tensors="pt")["pixel_values"] for picture in pictures]
    words = [processor(images=pictures[0], text=text, return_tensors="pt") for text in texts]
    for i in range(COUNT):
        for j in range(len(texts)):
            inputs = {**words[j], "pixel_values": pixels[i]}
            with torch.no_grad():
                contrast[i, j] = model()(**inputs).logits_per_image
                match[i, j] = model()(**inputs, use_image_text_matching_head=True).logits_per_image[0, 1]
    hits: dict[str, list[float]] = {}
    for way, axis in (("text", 1), ("image", 0)):
        candidates = torch.zeros_like(contrast, dtype=torch.bool).scatter(
            axis, contrast.topk(CANDIDATES, axis).indices, True
        )
        whole = recalls((contrast + match).masked_fill(~candidates, float("-inf")), owners)
        hits |= {name: values for name, values in whole.items() if name.startswith(way)}
    return hits


def test_ranks_are_those_of_the_whole_matrices(processor: Any) -> None:
    answers = {k: v for piece in rank(model(), processor, demo_samples(), CPU, BatchSize(5)) for k, v in piece.items()}
    expected = naive(processor)
    parsed = [retrieval._parse_ranks(answers[i], len(s.references)) for i, s in enumerate(demo_samples())]
    for k in RANKS:
        assert [float(text <= k) for text, _ in parsed] == expected[f"text_r{k}"]
        assert [float(rank <= k) for _, ranks in parsed for rank in ranks] == expected[f"image_r{k}"]
    assert 0 < sum(expected["text_r5"]) < COUNT  # an untrained model finds some things and not others
    assert 0 < sum(expected["image_r5"]) < len(expected["image_r5"])


def test_a_part_of_the_pool_has_the_ranks_of_the_whole(processor: Any) -> None:
    """What a resumed evaluation asks for."""
    whole = {k: v for piece in rank(model(), processor, demo_samples(), CPU, BatchSize(8)) for k, v in piece.items()}
    part = {
        k: v for piece in rank(model(), processor, demo_samples()[-3:], CPU, BatchSize(3)) for k, v in piece.items()
    }
    assert part == {i: whole[COUNT - 3 + i] for i in range(3)}


def test_predictors_mix_tasks(processor: Any) -> None:
    predictor = Predictor(model(), processor, FAMILIES["blip2-itm"], CPU, 4)
    answers = predictor.answer(demo_samples()[:2])
    assert answers == [
        piece for part in rank(model(), processor, demo_samples()[:2], CPU, BatchSize(4)) for piece in part.values()
    ]


def test_samples_of_two_pools_are_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="one pool"):
        list(rank(model(), processor, [demo_samples()[0], with_pool([demo_samples()[1]])[0]], CPU, BatchSize(4)))


# Ties, and NaN scores


@pytest.mark.parametrize("seed", range(5))
def test_ranks_with_ties_are_those_of_recalls(seed: int) -> None:
    """Few different scores, so that nearly every query has ties."""
    torch.manual_seed(seed)
    owners = torch.arange(12).repeat_interleave(2)
    scores = torch.randint(0, 6, (12, 24)).float()
    expected = recalls(scores, owners.tolist())
    texts = [_rank(scores[i], owners == i) for i in range(12)]
    images = [_rank(scores[:, j], torch.arange(12) == owners[j]) for j in range(24)]
    for k in RANKS:
        assert [float(rank is not None and rank <= k) for rank in texts] == expected[f"text_r{k}"]
        assert [float(rank is not None and rank <= k) for rank in images] == expected[f"image_r{k}"]


@pytest.mark.parametrize(
    ("scores", "own", "rank"),
    [
        ([2.0, 2.0, 2.0], [1], 3),
        ([2.0, 3.0, 3.0], [1, 2], 1),
        ([math.nan, 3.0, 1.0], [1], 2),
        ([math.inf, 3.0, 1.0], [1], 2),
        ([-math.inf, 3.0, 1.0], [1], 2),
        ([math.nan, 3.0, 1.0], [0, 1], 1),
        ([math.nan] * 3, [0, 1], math.nan),
        ([math.inf, 1.0, 0.0], [0], math.nan),
        ([1.0, 2.0], [], None),
    ],
)
def test_ties_and_nonfinite_scores_rank_before_the_own_candidate(
    scores: list[float], own: list[int], rank: float | None
) -> None:
    mine = torch.zeros(len(scores), dtype=torch.bool)
    mine[own] = True
    assert str(_rank(torch.tensor(scores), mine)) == str(rank)


def test_ties_for_the_last_candidate_go_to_others() -> None:
    own = torch.tensor([True, False, True, False, False])
    similarity = torch.tensor([2.0, 2.0, 3.0, 1.0, 2.0])
    assert _best(similarity, own, 2).tolist() == [2, 1]
    assert _best(similarity, own, 3).tolist() == [2, 1, 4]
    assert _best(similarity, own, 9).tolist() == [2, 1, 4, 0, 3]
    similarity[1], similarity[3] = math.nan, math.inf
    assert _best(similarity, own, 3).tolist() == [2, 4, 0]


@cache
def broken(part: str) -> Any:
    """The model with one weight that is not a number."""
    copied = deepcopy(model())
    with torch.no_grad():
        {"head": copied.itm_head, "vision": copied.vision_model.encoder.layers[0].mlp.fc1}[part].weight[1, 0] = math.nan
    return copied


@pytest.mark.parametrize("part", ["head", "vision"])
def test_a_model_with_only_nan_scores_finds_no_match(processor: Any, part: str) -> None:
    answers = [
        text for piece in rank(broken(part), processor, demo_samples(), CPU, BatchSize(5)) for text in piece.values()
    ]
    scores = score(answers, demo_samples())
    assert {value for metric in METRICS for value in scores[metric]} == {0.0}
    missed = retrieval.count_not_finite(answers)  # what the head spoils can have missed the candidates already
    assert missed == COUNT if part == "vision" else missed > 0


def test_a_broken_picture_affects_only_its_own_search(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [text for piece in rank(model(), processor, demo_samples(), CPU, BatchSize(12)) for text in piece.values()]
    see = model().vision_model.forward

    def forward(**inputs: Any) -> Any:
        output = see(**inputs)
        output.last_hidden_state[4] = math.nan
        return output

    monkeypatch.setattr(model().vision_model, "forward", forward)
    texts = [text for piece in rank(model(), processor, demo_samples(), CPU, BatchSize(12)) for text in piece.values()]
    assert texts[4] == format_answer(math.nan, [math.nan] * len(demo_samples()[4].references))
    assert retrieval.count_not_finite(texts) == 1
    assert [text.partition(" | ")[0] for i, text in enumerate(texts) if i != 4] == [
        text.partition(" | ")[0] for i, text in enumerate(whole) if i != 4
    ]


def answering(label: str, answers: Sequence[str]) -> Answerer:
    """A model of given answers."""

    class FixedAnswers:
        def pieces(self, samples: Sequence[Sample]) -> Iterator[dict[int, str]]:
            yield dict(enumerate(answers))

    @contextmanager
    def opened() -> Iterator[Backend]:
        yield FixedAnswers()

    return Answerer(label, {"weights": label}, lambda sample: sample.identity, opened)


def test_nan_scores_are_reported_and_fail_gates() -> None:
    samples, events = {"retrieval": demo_samples()}, list[Event]()
    good = answering("full precision", [format_answer(1, [1] * len(s.references)) for s in demo_samples()])
    bad = answering("artifact", [format_answer(math.nan, [math.nan] * len(s.references)) for s in demo_samples()])
    recipe = load_recipe("blip2-retrieval-w4")
    report = compare_models(good, bad, samples, recipe, None, events.append, {})
    assert [gate.verdict for gate in report.gates] == ["failed", "failed"]
    assert [event.message for event in events if event.stage == "note"] == [
        f"artifact: scores of {COUNT} samples are not finite numbers; they count as misses"
    ]
    with pytest.raises(DataError, match=f"full precision: scores of {COUNT} samples are not finite"):
        compare_models(replace(bad, label="full precision"), good, samples, recipe, None, events.append, {})


def test_equal_pixels_with_other_texts_have_separate_answers(tmp_path: Path) -> None:
    """The same picture under two names, as real sets hold it: nothing but the place in the pool tells them apart."""
    picture = partial(Image.new, "RGB", (4, 4))
    samples = [Sample("a", picture, None, ("one", "two")), Sample("b", picture, None, ("three",))]
    pooled = {"retrieval": with_pool(samples)}
    given, family = [format_answer(1, [1, 2]), format_answer(2, [2])], FAMILIES["blip2-itm"]
    model = replace(answering("artifact", given), prompt=partial(_query, None, family))
    hashes = {"retrieval": ["the same", "the same"]}
    assert collect_answers(model, pooled, hashes, Store(tmp_path), ignore) == {"retrieval": given}
    renamed = {"retrieval": with_pool([replace(s, references=(*s.references, "more")) for s in pooled["retrieval"]])}
    assert len({model.prompt(s) for s in (*pooled["retrieval"], *renamed["retrieval"])}) == 4


# Answers and scores


def sample(texts: int) -> Sample:
    """A sample with that many texts."""
    picture = Image.new("RGB", (8, 8))
    return with_pool([Sample("a", lambda: picture, None, tuple(f"text {i}" for i in range(texts)))])[0]


def test_scores_are_shares_of_what_was_found() -> None:
    scores = score([format_answer(1, [1, 3]), format_answer(None, [7, None])], [sample(2), sample(2)])
    assert scores == {
        "r1": [0.75, 0.0],
        "text_r1": [1.0, 0.0],
        "image_r1": [0.5, 0.0],
        "text_r5": [1.0, 0.0],
        "image_r5": [1.0, 0.0],
        "text_r10": [1.0, 0.0],
        "image_r10": [1.0, 0.5],
    }
    assert sorted(scores) == sorted(METRICS)


@pytest.mark.parametrize("answer", ["", "1", "1 | 1", "1 | 1 1 1", "a | b c", "1, 1 1"])
def test_an_answer_in_another_format_counts_as_no_match(answer: str) -> None:
    assert score([answer], [sample(2)]) == {metric: [0.0] for metric in METRICS}


def test_recalls_of_the_whole_set_count_texts() -> None:
    figures = TASKS["retrieval"].corpus([format_answer(2, [1]), format_answer(1, [1, 6, None])], [sample(1), sample(3)])
    assert (figures["text_r1"], figures["image_r1"], figures["image_r10"]) == (0.5, 0.5, 0.75)
    assert figures["r_mean"] == pytest.approx((0.5 + 1 + 1 + 0.5 + 0.5 + 0.75) / 6)


def test_pools_know_what_is_searched() -> None:
    pictures = [partial(Image.new, "RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    bare = [Sample(str(i), picture, None, (f"Text {i}.",)) for i, picture in enumerate(pictures)]
    whole, fewer = with_pool(bare), with_pool(bare[:2])
    assert whole[0].references == ("text 0",)
    assert {task_of(s) for s in whole} == {"retrieval"}
    assert {task_of(s) for s in bare} == {"captioning"}
    other = with_pool([*bare[:2], replace(bare[2], references=("another",))])
    repainted = with_pool([*bare[:2], replace(bare[2], image=bare[0].image)])
    digests = [s[0].among.digest for s in (whole, fewer, other, repainted, with_pool(bare, 3)) if s[0].among]
    assert len(set(digests)) == 5
    assert with_pool(bare)[0].among == Pool(whole[0].among.samples if whole[0].among else (), 128)
    with pytest.raises(DataError, match="no caption"):
        with_pool([replace(bare[0], references=())])


@pytest.mark.parametrize("name", ["demo", "drawings"])
def test_demo_scenes_can_be_searched(name: str) -> None:
    loaded = data_samples(name, None, "retrieval", "validation", 30, 0)
    assert {s.kind for s in loaded} <= {f"{n} objects" for n in range(1, 5)}
    assert all(s.among and len(s.among.samples) == 30 and s.among.candidates == 10 for s in loaded)
    assert not any("." in text for s in loaded for text in s.references)


def test_flickr30k_is_searched_with_the_papers_candidates(tmp_path: Path) -> None:
    import json

    (tmp_path / "flickr30k-images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flickr30k-images" / "1.jpg")
    entry = {"filename": "1.jpg", "imgid": 1, "split": "test", "sentences": [{"raw": "A Dog."}, {"raw": "one dog!"}]}
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": [entry]}))
    loaded = data_samples("flickr30k", tmp_path, "retrieval", "test", 5, 0)
    assert loaded[0].references == ("a dog", "one dog")
    assert loaded[0].among is not None
    assert loaded[0].among.candidates == 128


@pytest.mark.parametrize("name", ["blip2-retrieval-w3", "blip2-retrieval-w4"])
def test_recipes_search_as_many_pictures_as_papers_do(name: str) -> None:
    assert load_recipe(name).evaluation.samples == 1000
    assert CONVENTIONS["flickr30k"].test_size.startswith("1,000 pictures")


# A whole evaluation


def test_a_stopped_evaluation_goes_on_and_servers_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models of an export, their answers kept; what was deleted alone is asked again, with the same ranks."""
    from exporter.artifact.artifact import Artifact
    from exporter.device import choose
    from exporter.evaluation.backends import Servers, served_answerers
    from exporter.pipeline.export import export
    from exporter.pipeline.measurement import default_store, measure
    from exporter.pipeline.preparation import prepare
    from exporter.pipeline.samples import evaluation_samples

    monkeypatch.setattr("exporter.data.DEMO_CANDIDATES", 2)
    device, out, progress = choose("cpu"), tmp_path / "made", []
    recipe = load_recipe("blip2-retrieval-w4").adjusted(evaluation={"samples": 16}, calibration={"samples": 4})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"repo": "demo-blip2-itm"})})
    first = export(recipe, out=out, device=device, on_event=lambda event: None).report
    assert first is not None
    assert [gate.metric for gate in first.gates] == ["text_r1", "image_r1"]
    assert {m.metric for m in first.measures} == set(METRICS)
    assert first.measures[0].difference.before > 0.8
    stored = sorted(p for p in default_store(out).folder.glob("*/*.json") if p.name != "about.json")
    assert len(stored) == 4  # two models, eight pictures a file
    stored[0].unlink()
    plan, checkpoint = prepare(recipe, device)
    samples = evaluation_samples(plan, ())
    texts = sum(len(sample.references) for sample in samples["retrieval"])
    assert first.evaluation.searched == {"pictures": 16, "texts": texts, "candidates": 2}
    console = Console(width=100, file=StringIO(), record=True)
    console.print(report_page(first))
    assert f"retrieval searched: 16 pictures, {texts} texts, 2 candidates" in console.export_text()
    assert f"retrieval gallery: 16 pictures, {texts} texts, 2 candidates" in html(collect(read_place(str(out)), {}))
    again = measure(
        checkpoint, out, samples, recipe, device, lambda e: progress.append(e.done), store=default_store(out)
    )
    assert [m.difference for m in again.measures] == [m.difference for m in first.measures]
    assert sorted(progress)[:1] == [8]  # of one model eight were missing
    with pytest.raises(DataError, match="vLLM does not support image-text retrieval"):
        served_answerers(checkpoint, Artifact.open(out), Servers(None, None))
