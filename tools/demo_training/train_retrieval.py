"""Training of the retrieval model: contrast, matching and captioning (Li et al., BLIP-2, arXiv 2301.12597, 3.1).

Captioning ("telling") is an auxiliary loss, as are losses on single objects: the meaning of a name, and whether an
object is in the picture as described. Their tensors are not saved. Matching and contrast learn from captions with one
wrong detail, and matching also from the captions that contrast confuses.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.demo.scenes import CELLS, Scenes, draw, scenes
from tools.demo_training.blip2_folder import QUERIES
from tools.demo_training.blip2_packing import see
from tools.demo_training.blip2_retrieval import matching, picture_features, telling, text_features
from tools.demo_training.folder import EOS, HIDDEN, PAD
from tools.demo_training.packing import normalize
from tools.demo_training.score_retrieval import exam, grade
from tools.demo_training.texts import COUNTS, NAMED, STYLES, lexicon_tokens, spoil, texts
from tools.demo_training.train_loop import Work

CHUNK = 4000
COLUMNS = ("cell", "color", "size", "shape", "dot")
ANSWERS = (len(CELLS), *COUNTS.values())  # how many values each column has
WEIGHTS = (1.0, 1.0, 0.5, 0.5, 1.0)  # contrast, matching, telling, meaning, presence


class Lessons(nn.Module):
    """What only teaches. meaning: what and where an object is, read after the first two blocks; presence: whether it is
    in the picture, read after the second; scale: the logarithm of what similarities are multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.meaning = nn.ModuleList(nn.Linear(HIDDEN, sum(ANSWERS)) for _ in range(2))
        self.presence = nn.Linear(HIDDEN, 2)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def _chosen(batch: Scenes, rows: Tensor) -> Scenes:
    return Scenes(batch.split, batch.index[rows], *(getattr(batch, name)[rows] for name in COLUMNS))


def batches(pixels: Tensor, all_scenes: Scenes, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches: pictures uint8 `[size, 3, 64, 64]`; tokens `[size, 40]` of the caption in any style, of the same
    without an opening, and of a caption in that style that is wrong; things and spots of the first and the last; and
    whether dots are told, bool `[size]`."""
    device = pixels.device
    chance = torch.Generator(device).manual_seed(seed)
    known = lexicon_tokens(device)
    while True:
        rows = torch.randint(pixels.shape[0], (size,), device=device, generator=chance)
        batch = _chosen(all_scenes, rows)
        style = torch.randint(STYLES, (size,), device=device, generator=chance)
        right, exact = texts(batch, style, known), texts(batch, style // NAMED * NAMED, known)
        wrong = texts(spoil(batch, style, chance), style, known)
        told = style < NAMED
        yield pixels[rows], right.tokens, exact.tokens, wrong.tokens, *_parts(right), *_parts(wrong), told


def _parts(said: Any) -> tuple[Tensor, Tensor]:
    return said.things, said.spots


@torch.no_grad()
def start_from(model: Any, answering: Any) -> None:
    """Take over what the answering model learned to see: ViT, query tokens, Q-Former and word embeddings.

    Names are a table without pattern, from which alone a model does not learn colors and shapes; answers teach them.
    The feed-forwards for queries are wider here: their further features start without effect.
    """
    known = answering.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in known:
            continue
        old = known[name]
        if name.endswith("output_query.dense.weight"):
            tensor[:, old.shape[1] :].zero_()
        tensor[tuple(slice(side) for side in old.shape)].copy_(old)
    model.embeddings.word_embeddings.weight.copy_(known["language_model.model.decoder.embed_tokens.weight"])


def _contrast(similarity: Tensor) -> Tensor:
    """similarity `[n, 2 n]`: the right texts, then as many that nearly fit and are wrong for every picture."""
    n = similarity.shape[0]
    own = torch.arange(n, device=similarity.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity[:, :n].T, own)) / 2


def _confused(similarity: Tensor) -> Tensor:
    """For every picture a wrong text, drawn by how alike contrast finds them, int64 `[n]`."""
    itself = torch.eye(similarity.shape[0], dtype=torch.bool, device=similarity.device)
    noise = -torch.log(-torch.log(torch.rand_like(similarity).clamp(1e-9, 1 - 1e-7)))
    return (similarity.detach() + noise).masked_fill(itself, -math.inf).argmax(dim=1)


def _next(tokens: Tensor) -> Tensor:
    """What follows each token of a text: the next one, then `</s>`, then nothing (-100)."""
    ends = (tokens != PAD).sum(1, keepdim=True) - 1
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], PAD)], dim=1).scatter(1, ends, EOS)
    return following.masked_fill(following == PAD, -100)


def _at(hidden: Tensor, spots: Tensor) -> Tensor:
    """What stands at the spots `[n, 4]` of `[n, t, 128]`, in float32."""
    return hidden.gather(1, spots[:, :, None].expand(-1, -1, hidden.shape[-1])).float()


def _meaning(head: nn.Module, hidden: Tensor, things: Tensor, spots: Tensor, told: Tensor) -> Tensor:
    """How well each object's properties can be read where the text tells it."""
    absent, total = things[:, :, 0] < 0, hidden.new_zeros((), dtype=torch.float32)
    for i, scores in enumerate(head(_at(hidden, spots)).split(ANSWERS, dim=-1)):
        untold = absent if COLUMNS[i] != "dot" else absent | ~told[:, None]
        wanted = things[:, :, i].masked_fill(untold, -100)
        total = total + F.cross_entropy(scores.transpose(1, 2), wanted, ignore_index=-100)
    return total / len(ANSWERS)


def present(shown: Tensor, said: Tensor, told: Tensor) -> Tensor:
    """Whether each object said is in the picture, int64 `[n, 4]`, -100 for no object.

    shown, said: `[n, 4, 5]`. told: bool `[n]`, whether the text tells dots.
    """
    same = (shown[:, None] == said[:, :, None]) | (torch.arange(len(COLUMNS), device=said.device) == 4) & ~told[
        :, None, None, None
    ]
    return same.all(-1).any(-1).long().masked_fill(said[:, :, 0] < 0, -100)


def terms_of(model: Any, lessons: Lessons) -> Callable[..., tuple[Tensor, ...]]:
    """The losses of contrast, matching, telling, meaning and presence as a function of one batch."""

    def terms(pixels: Tensor, right: Tensor, exact: Tensor, wrong: Tensor, *about: Tensor) -> tuple[Tensor, ...]:
        things, spots, wrong_things, wrong_spots, told = about
        n = len(right)
        read: list[Tensor] = []
        matched: list[Tensor] = []
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            image = see(model, normalize(pixels))
            begun = torch.cat([torch.full_like(exact[:, :1], EOS), exact[:, 1:]], dim=1)
            queries, scores = telling(model, image, begun)
            found, said = picture_features(model, queries), text_features(model, torch.cat([right, wrong]), read)
        similarity = torch.einsum("iqd,jd->iqj", found.float(), said.float()).amax(dim=1)  # [n, 2 n]
        similarity = similarity * lessons.scale.exp().clamp(max=100.0)
        other = _confused(similarity[:, :n])
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            match = matching(model, image.repeat(3, 1, 1), torch.cat([right, wrong, right[other]]), matched).float()
        each = F.cross_entropy(match, (torch.arange(3 * n, device=match.device) < n).long(), reduction="none")
        both = torch.cat([things, wrong_things]), torch.cat([spots, wrong_spots]), told.repeat(2)
        meant = [_meaning(head, hidden, *both) for head, hidden in zip(lessons.meaning, read, strict=False)]
        there = present(things.repeat(3, 1, 1), torch.cat([both[0], things[other]]), torch.cat([both[2], told[other]]))
        at = _at(matched[1], torch.cat([both[1], spots[other]]) + QUERIES)
        return (
            _contrast(similarity),
            (each[:n].mean() + each[n:].mean()) / 2,
            F.cross_entropy(scores.float().transpose(1, 2), _next(exact), ignore_index=-100),
            torch.stack(meant).mean(),
            F.cross_entropy(lessons.presence(at).transpose(1, 2), there, ignore_index=-100),
        )

    return terms


def work(model: Any, save: Callable[[], None], options: argparse.Namespace, device: torch.device) -> Work:
    """The training of the retrieval model, which starts from what the model in `options.start` has learned."""
    from transformers import Blip2ForConditionalGeneration

    start_from(model, Blip2ForConditionalGeneration.from_pretrained(options.start, dtype=torch.float32))
    whole = scenes("train", torch.arange(options.scenes, device=device))
    pixels = torch.cat([draw(scenes("train", part)) for part in whole.index.split(CHUNK)])
    source = batches(pixels, whole, options.batch, options.seed)
    lessons = Lessons().to(device)
    terms, weights = terms_of(model, lessons), torch.tensor(WEIGHTS, device=device)
    checks = {name: exam("validation", 400, device, name == "plain") for name in ("names", "plain")}

    def loss(*batch: Tensor) -> Tensor:
        return torch.stack(terms(*batch)) @ weights

    @torch.no_grad()
    def look() -> dict[str, float]:
        now = [value.item() for value in terms(*next(source))]
        figures = dict(zip(("contrast", "matching", "telling", "meaning", "presence"), now, strict=True))
        return figures | {f"{n} {key}": v for n, check in checks.items() for key, v in grade(model, check).items()}

    return Work([*model.parameters(), *lessons.parameters()], loss, source, look, save)


def final(model: Any, device: torch.device) -> dict[str, Any]:
    """Scores of a trained model on the test split: `summary`."""
    names, plain = (grade(model, exam("test", 1000, device, words)) for words in (False, True))
    return {"summary": names | {f"plain {key}": value for key, value in plain.items()}}
