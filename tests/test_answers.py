"""The answer store and the server back end: keys, resume, retries and errors."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.data import image_key
from exporter.data.tasks.sample import Sample
from exporter.errors import CheckpointError, DataError
from exporter.evaluation.answers import ABOUT, Answerer, Backend, Store, collect_answers
from exporter.events import Event, ignore
from exporter.files.hub import retry_after
from exporter.model.families import FAMILIES
from exporter.model.inference.predict_server import KEY, ServedPredictor, Server
from tests.chat_server import ChatServer, chat_server
from tests.children import run_killed

FAMILY = FAMILIES["llava"]


def sample(i: int, question: str | None = "what?") -> Sample:
    return Sample(f"s{i}", partial(Image.new, "RGB", (4, 4), (i, 2 * i % 256, 9)), question, ("yes",))


class Counting:
    """Answers with the sample's identity in batches of `size`, and records the samples."""

    def __init__(self, size: int = 3, dies_at: int | None = None, skips: str = "") -> None:
        self.size, self.dies_at, self.skips = size, dies_at, skips
        self.answered: list[str] = []
        self.opened = 0

    def pieces(self, samples: Sequence[Sample]) -> Iterator[dict[int, str]]:
        for start in range(0, len(samples), self.size):
            indices = range(start, min(start + self.size, len(samples)))
            if self.dies_at is not None and len(self.answered) >= self.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.answered += [samples[i].identity for i in indices]
            yield {i: f"I am {samples[i].identity}" for i in indices if samples[i].identity != self.skips}

    def model(self, **identity: Any) -> Answerer:
        @contextmanager
        def opened() -> Iterator[Backend]:
            self.opened += 1
            yield self

        return Answerer("artifact", {"weights": "w", **identity}, lambda s: str(s.question), opened)


def run(
    backend: Counting, samples: Mapping[str, Sequence[Sample]], store: Store | None, **identity: Any
) -> dict[str, list[str]]:
    pictures = {task: [image_key(s.image()) for s in of_task] for task, of_task in samples.items()}
    return collect_answers(backend.model(**identity), samples, pictures, store, ignore)


def test_a_second_evaluation_runs_no_samples_and_a_larger_one_only_new_samples(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = Counting()
    tasks = {"vqa": [sample(i) for i in range(7)], "captioning": [sample(i, None) for i in range(2)]}
    first_answers = run(first, tasks, store)
    assert first_answers == {"vqa": [f"I am s{i}" for i in range(7)], "captioning": ["I am s0", "I am s1"]}
    assert len(first.answered) == 9
    second = Counting()
    assert run(second, tasks, Store(tmp_path)) == first_answers
    assert (second.answered, second.opened) == ([], 0)
    larger = Counting()
    run(larger, {"vqa": [sample(i) for i in range(9)]}, store)
    assert larger.answered == ["s7", "s8"]


def test_everything_that_determines_an_answer_is_part_of_its_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(Counting(), {"vqa": [sample(1)]}, store, dtype="float32")
    for other, identity in (
        (sample(1), {"dtype": "bfloat16"}),
        (sample(2), {"dtype": "float32"}),
        (sample(1, "why?"), {"dtype": "float32"}),
    ):
        backend = Counting()
        run(backend, {"vqa": [other]}, store, **identity)
        assert len(backend.answered) == 1
    assert sorted(json.loads(p.read_text())["dtype"] for p in tmp_path.glob(f"*/{ABOUT}")) == ["bfloat16", "float32"]
    renamed = Counting()
    original = sample(1)
    run(renamed, {"vqa": [Sample("other name", original.image, original.question, ("no",))]}, store, dtype="float32")
    assert renamed.answered == []


def test_equal_samples_run_once_and_all_get_the_answer() -> None:
    backend = Counting()
    assert run(backend, {"vqa": [sample(1), sample(2), sample(1)]}, None) == {"vqa": ["I am s1", "I am s2", "I am s1"]}
    assert backend.answered == ["s1", "s2"]


def test_a_killed_evaluation_resumes_at_the_same_place(tmp_path: Path) -> None:
    samples = {"vqa": [sample(i) for i in range(10)]}
    whole = run(Counting(), samples, None)
    run_killed(run, Counting(dies_at=6), samples, Store(tmp_path))
    rest = Counting()
    assert run(rest, samples, Store(tmp_path)) == whole
    assert rest.answered == ["s6", "s7", "s8", "s9"]


WRONG_SUM = json.dumps({"answers": {"k": "a"}, "sha256": "0" * 64})
DAMAGED = ["", '{"a": ', "[1]", '{"k": 3}', "\x00", '{"answers": {}}', '{"answers": [], "sha256": ""}', WRONG_SUM]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_loses_only_its_batch(content: str, tmp_path: Path) -> None:
    samples = {"vqa": [sample(i) for i in range(6)]}
    whole = run(Counting(), samples, Store(tmp_path))
    files = sorted(p for p in tmp_path.glob("*/*.json") if p.name != ABOUT)
    assert len(files) == 2
    files[0].write_text(content)
    rest, notes = Counting(), list[Event]()

    def listen(event: Event) -> None:
        notes.append(event)
        assert event.stage != "note" or not files[0].exists()

    pictures = {"vqa": [image_key(s.image()) for s in samples["vqa"]]}
    assert collect_answers(rest.model(), samples, pictures, Store(tmp_path), listen) == whole
    assert len(rest.answered) == 3
    assert [event.message for event in notes if event.stage == "note"] == [
        f"{files[0]} was damaged and is deleted: its samples run again"
    ]
    assert run(Counting(), samples, Store(tmp_path)) == whole


@pytest.mark.parametrize("place", [20, -90, -20])
def test_a_changed_letter_in_a_file_is_detected(place: int, tmp_path: Path) -> None:
    samples = {"vqa": [sample(i) for i in range(3)]}
    whole = run(Counting(), samples, Store(tmp_path))
    [file] = [p for p in tmp_path.glob("*/*.json") if p.name != ABOUT]
    content = bytearray(file.read_bytes())
    content[place] ^= 2
    file.write_bytes(bytes(content))
    rest = Counting()
    assert run(rest, samples, Store(tmp_path)) == whole
    assert len(rest.answered) == 3


def test_answers_of_changed_weights_are_not_stored(tmp_path: Path) -> None:
    backend = Counting(size=2)

    def require_unchanged() -> None:
        if len(backend.answered) > 2:
            raise CheckpointError("the model changed")

    samples = {"vqa": [sample(i) for i in range(6)]}
    pictures = {"vqa": [image_key(s.image()) for s in samples["vqa"]]}
    model = replace(backend.model(), require_unchanged=require_unchanged)
    with pytest.raises(CheckpointError):
        collect_answers(model, samples, pictures, Store(tmp_path), ignore)
    assert len(Store(tmp_path).read(model.identity)) == 2


def test_a_sample_without_an_answer_is_an_error_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did not answer 1 of 4 samples, first s2"):
        run(Counting(skips="s2"), {"vqa": [sample(i) for i in range(4)]}, Store(tmp_path))


def test_progress_counts_stored_answers(tmp_path: Path) -> None:
    samples = {"vqa": [sample(i) for i in range(5)]}
    pictures = {"vqa": [image_key(s.image()) for s in samples["vqa"]]}
    run(Counting(), {"vqa": samples["vqa"][:2]}, Store(tmp_path))
    received: list[Event] = []
    collect_answers(Counting(size=2).model(), samples, pictures, Store(tmp_path), received.append)
    assert [(e.done, e.total) for e in received] == [(2, 5), (4, 5), (5, 5)]
    assert {e.message for e in received} == {"artifact: vqa"}


def color(text: str, image: Image.Image) -> str:
    return f" {image.getpixel((0, 0))[0]} {text.split()[0]} "


def served(server: ChatServer, samples: Sequence[Sample], **options: Any) -> tuple[list[str], list[float]]:
    """Answers in order, and the pauses between attempts."""
    pauses: list[float] = []
    where = Server(server.url, pause=pauses.append, **options)
    by_index: dict[int, str] = {}
    for piece in ServedPredictor(where, FAMILY, str(where.served()["id"])).pieces(samples):
        assert not by_index.keys() & piece.keys()
        by_index |= piece
    return [by_index[i] for i in range(len(samples))], pauses


def test_a_server_gets_pictures_and_the_familys_words_and_greedy_settings() -> None:
    with chat_server(color) as server:
        samples = [sample(i, f"w{i} here?" if i % 3 else None) for i in range(80)]
        answers, _ = served(server, samples, concurrent=8)
    assert answers == [f"{i} w{i}" if i % 3 else f"{i} Provide" for i in range(80)]
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["n"]) == ("tiny", 0, 1)
        caption = body["messages"][0]["content"][1]["text"] == FAMILY.caption_prompt
        assert body["max_tokens"] == FAMILY.max_new_tokens["captioning" if caption else "vqa"]
    assert all("Authorization" not in headers for headers in server.headers)


def test_requests_in_flight_reach_the_bound_and_never_pass_it() -> None:
    with chat_server(color) as server:
        server.gate = threading.Barrier(4)  # answers only when four are open
        served(server, [sample(i) for i in range(12)], concurrent=4)
    assert server.most_at_once == 4


def test_pictures_arrive_pixel_by_pixel() -> None:
    noise = Image.effect_noise((9, 5), 80).convert("RGB")
    decoded: list[bytes] = []

    def keep(text: str, image: Image.Image) -> str:
        decoded.append(image.convert("RGB").tobytes())
        return "ok"

    with chat_server(keep) as server:
        served(server, [Sample("n", lambda: noise, "q?", ())])
    assert decoded == [noise.tobytes()]
    assert server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_busy_server_is_asked_again_after_growing_pauses() -> None:
    with chat_server(color) as server:
        server.faults = [(503, {}, "loading"), (500, {}, "oops"), (429, {"Retry-After": "7"}, "slow"), (502, {}, "")]
        answers, pauses = served(server, [sample(3)], concurrent=1)
    assert answers == ["3 what?"]
    assert pauses == [0.5, 1.0, 7.0, 4.0]


def test_a_server_that_stays_busy_is_named_with_its_message() -> None:
    with chat_server(color) as server:
        server.faults = [(503, {"Retry-After": "9999"}, '{"error": {"message": "no room\\nat all"}}')] * 9
        with pytest.raises(DataError, match=r"503 no room at all \(tried 3 times\)") as caught:
            served(server, [sample(3)], concurrent=1, tries=3)
    assert "same command again" in str(caught.value.hint)
    assert len(server.faults) == 6


@pytest.mark.parametrize(
    ("status", "body", "fragment"),
    [
        (400, '{"error": {"message": "image too large"}}', "400: image too large"),
        (404, '{"detail": "Not Found"}', "404: .*Not Found"),
        (401, "{}", "401"),
        (302, "", "302"),
        (307, "", "307"),
    ],
)
def test_a_refusal_is_an_error_at_once(status: int, body: str, fragment: str) -> None:
    with chat_server(color) as server:
        server.faults = [(status, {"Location": "http://127.0.0.1:1/"}, body)]
        with pytest.raises(DataError, match=fragment):
            served(server, [sample(3)], concurrent=1)
    assert len(server.headers) == 1


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with chat_server(color) as server:
        assert served(server, [sample(3)]) == (["3 what?"], [])


def test_nobody_listens() -> None:
    with chat_server(color) as server:
        url = server.url
    pauses: list[float] = []
    with pytest.raises(DataError, match=r"no response .*tried 2 times"):
        Server(url, tries=2, pause=pauses.append).served()
    assert pauses == [0.5]


@pytest.mark.parametrize("body", ["<html>", "[]", '{"choices": []}', '{"choices": [{"message": null}]}'])
def test_an_answer_that_is_none(body: str) -> None:
    with chat_server(color) as server:
        server.faults = [(200, {}, body)]
        with pytest.raises(DataError, match=r"did not return a JSON object|returned no message"):
            served(server, [sample(3)])


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "s3cret")
    with chat_server(color) as server:
        server.faults = [(403, {}, "no")]
        with pytest.raises(DataError) as caught:
            served(server, [sample(1)])
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in f"{caught.value.message} {caught.value.hint} {Server(server.url)!r}"


def test_the_served_name() -> None:
    with chat_server(color, "one") as server:
        assert Server(f"{server.url}/v1/").served()["id"] == "one"
        with pytest.raises(DataError, match=r"does not serve 'two'; it serves: one"):
            Server(server.url, "two").served()
    with chat_server(color, "one", "two") as server:
        assert Server(server.url, "two").served()["id"] == "two"
        with pytest.raises(DataError, match="does not serve exactly one model; it serves: one, two"):
            Server(server.url).served()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", "http://user:pw@127.0.0.1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(DataError, match=r"is not an HTTP server URL|must not contain a user name") as caught:
        Server(url).served()
    assert ":pw" not in caught.value.message


@pytest.mark.parametrize(
    ("start", "lacks"),
    [(("^", ""), True), (("^", "^"), False), (("", ""), False), (("", "^"), False), (None, False)],
    ids=["plain vllm serve", "mmq serve", "no start token", "only the template has one", "another server"],
)
def test_the_start_token_is_asked_for_where_the_template_lacks_it(start: tuple[str, str] | None, lacks: bool) -> None:
    with chat_server(color) as server:
        server.start = start
        where = Server(server.url)
        assert where.lacks_start("tiny") is lacks
        predictor = ServedPredictor(where, FAMILIES["llava"], "tiny", lacks)
        list(predictor.pieces([sample(3)]))
    assert ("add_special_tokens" in server.bodies[0]) is lacks
    assert server.bodies[0].get("add_special_tokens", True) is True


def test_retry_after_is_seconds_or_nothing() -> None:
    assert retry_after(" 7 ") == 7.0
    assert [retry_after(header) for header in (None, "", "soon", "-1", "\u0663", "Wed, 21 Oct 2026 07:28:00 GMT")] == [
        None
    ] * 6
