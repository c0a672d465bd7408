"""Training of the retrieval model: contrast, matching and captioning (Li et al., BLIP-2, arXiv 2301.12597, 3.1).

Captioning is an auxiliary loss, as are two losses per object of a caption: its attributes, and whether it is in the
picture as described. Their tensors are not saved. Contrast and matching use captions with one wrong detail as hard
negatives; matching also uses negatives sampled by contrastive score.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.data.demo.scenes import CELLS, Scenes, draw, scenes
from tools.demo_training.blip2_folder import QUERIES
from tools.demo_training.blip2_packing import encode_image
from tools.demo_training.blip2_retrieval import captioning, matching, picture_features, text_features
from tools.demo_training.folder import EOS, HIDDEN, PAD
from tools.demo_training.packing import normalize
from tools.demo_training.score_retrieval import exam, grade
from tools.demo_training.texts import COUNTS, NAMED, STYLES, CaptionTokens, hard_negatives, lexicon_tokens, texts
from tools.demo_training.train_loop import Training

CHUNK = 4000
COLUMNS = ("cell", "color", "size", "shape", "dot")
ANSWERS = (len(CELLS), *COUNTS.values())  # how many values each column has
WEIGHTS = (1.0, 1.0, 0.5, 0.5, 1.0)  # contrast, matching, captioning, attributes, presence


class AuxiliaryHeads(nn.Module):
    """Parameters that only training uses.

    attributes: predict cell, color, size, shape and dot of an object from the outputs of the first two blocks.
    presence: predicts from the second block's output whether the object is in the picture. scale: log of the inverse
    temperature.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attributes = nn.ModuleList(nn.Linear(HIDDEN, sum(ANSWERS)) for _ in range(2))
        self.presence = nn.Linear(HIDDEN, 2)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def _select(batch: Scenes, rows: Tensor) -> Scenes:
    return Scenes(batch.split, batch.index[rows], *(getattr(batch, name)[rows] for name in COLUMNS))


def batches(pixels: Tensor, all_scenes: Scenes, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches.

    Pictures, uint8 `[size, 3, 64, 64]`; tokens `[size, 40]` of the caption in a random style, of the same caption
    without an opening, and of a hard negative; objects and at_positions of the first and the last; and whether the
    caption describes dots, bool `[size]`.
    """
    device = pixels.device
    generator = torch.Generator(device).manual_seed(seed)
    lex = lexicon_tokens(device)
    while True:
        rows = torch.randint(pixels.shape[0], (size,), device=device, generator=generator)
        batch = _select(all_scenes, rows)
        style = torch.randint(STYLES, (size,), device=device, generator=generator)
        right, exact = texts(batch, style, lex), texts(batch, style // NAMED * NAMED, lex)
        wrong = texts(hard_negatives(batch, style, generator), style, lex)
        has_dots = style < NAMED
        yield pixels[rows], right.tokens, exact.tokens, wrong.tokens, *_parts(right), *_parts(wrong), has_dots


def _parts(caption: CaptionTokens) -> tuple[Tensor, Tensor]:
    return caption.objects, caption.at_positions


@torch.no_grad()
def start_from(model: Any, answering: Any) -> None:
    """Initialize ViT, query tokens, Q-Former and word embeddings from the question-answering model.

    A model does not learn colors and shapes from names alone, because the name table has no pattern. The feed-forwards
    for queries are wider here; the output weights of the added features start at zero.
    """
    weights = answering.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in weights:
            continue
        old = weights[name]
        if name.endswith("output_query.dense.weight"):
            tensor[:, old.shape[1] :].zero_()
        tensor[tuple(slice(side) for side in old.shape)].copy_(old)
    model.embeddings.word_embeddings.weight.copy_(weights["language_model.model.decoder.embed_tokens.weight"])


def _contrastive_loss(similarity: Tensor) -> Tensor:
    """similarity `[n, 2 n]`: the n correct texts, then n hard negatives, which are wrong for every picture."""
    n = similarity.shape[0]
    own = torch.arange(n, device=similarity.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity[:, :n].T, own)) / 2


def _sample_negatives(similarity: Tensor) -> Tensor:
    """For every picture a wrong text, sampled by softmax of the similarity, int64 `[n]`."""
    diagonal = torch.eye(similarity.shape[0], dtype=torch.bool, device=similarity.device)
    noise = -torch.log(-torch.log(torch.rand_like(similarity).clamp(1e-9, 1 - 1e-7)))
    return (similarity.detach() + noise).masked_fill(diagonal, -math.inf).argmax(dim=1)


def _next_tokens(tokens: Tensor) -> Tensor:
    """The label of each token of a text: the next token, then `</s>`, then none (-100)."""
    ends = (tokens != PAD).sum(1, keepdim=True) - 1
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], PAD)], dim=1).scatter(1, ends, EOS)
    return following.masked_fill(following == PAD, -100)


def _gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """`hidden` `[n, t, 128]` at `positions` `[n, 4]`: float32 `[n, 4, 128]`."""
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1])).float()


def _attribute_loss(head: nn.Module, hidden: Tensor, objects: Tensor, positions: Tensor, has_dots: Tensor) -> Tensor:
    """Mean cross-entropy of the attributes of each object, predicted from its token "at"."""
    absent, total = objects[:, :, 0] < 0, hidden.new_zeros((), dtype=torch.float32)
    for i, scores in enumerate(head(_gather_positions(hidden, positions)).split(ANSWERS, dim=-1)):
        ignored = absent if COLUMNS[i] != "dot" else absent | ~has_dots[:, None]
        targets = objects[:, :, i].masked_fill(ignored, -100)
        total = total + F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=-100)
    return total / len(ANSWERS)


def presence_labels(in_picture: Tensor, in_text: Tensor, has_dots: Tensor) -> Tensor:
    """Whether each object of the text is in the picture, int64 `[n, 4]`, -100 for no object.

    in_picture, in_text: objects `[n, 4, 5]`. has_dots: bool `[n]`, whether the text describes dots.
    """
    is_dot = torch.arange(len(COLUMNS), device=in_text.device) == COLUMNS.index("dot")
    same = (in_picture[:, None] == in_text[:, :, None]) | is_dot & ~has_dots[:, None, None, None]
    return same.all(-1).any(-1).long().masked_fill(in_text[:, :, 0] < 0, -100)


def losses_of(model: Any, heads: AuxiliaryHeads) -> Callable[..., tuple[Tensor, ...]]:
    """The losses of contrast, matching, captioning, attributes and presence as a function of one batch."""

    def losses(pixels: Tensor, right: Tensor, exact: Tensor, wrong: Tensor, *annotations: Tensor) -> tuple[Tensor, ...]:
        objects, positions, wrong_objects, wrong_positions, has_dots = annotations
        n = len(right)
        text_outputs: list[Tensor] = []
        pair_outputs: list[Tensor] = []
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            image = encode_image(model, normalize(pixels))
            shifted = torch.cat([torch.full_like(exact[:, :1], EOS), exact[:, 1:]], dim=1)
            queries, scores = captioning(model, image, shifted)
            image_vectors = picture_features(model, queries)
            text_vectors = text_features(model, torch.cat([right, wrong]), text_outputs)
        similarity = torch.einsum("iqd,jd->iqj", image_vectors.float(), text_vectors.float()).amax(dim=1)  # [n, 2 n]
        similarity = similarity * heads.scale.exp().clamp(max=100.0)
        other = _sample_negatives(similarity[:, :n])
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            candidates = torch.cat([right, wrong, right[other]])
            match = matching(model, image.repeat(3, 1, 1), candidates, pair_outputs).float()
        fits = (torch.arange(3 * n, device=match.device) < n).long()
        match_losses = F.cross_entropy(match, fits, reduction="none")
        text_objects, text_positions = torch.cat([objects, wrong_objects]), torch.cat([positions, wrong_positions])
        attribute_losses = [
            _attribute_loss(head, hidden, text_objects, text_positions, has_dots.repeat(2))
            for head, hidden in zip(heads.attributes, text_outputs, strict=False)
        ]
        pair_objects = torch.cat([text_objects, objects[other]])
        pair_dots = torch.cat([has_dots.repeat(2), has_dots[other]])
        labels = presence_labels(objects.repeat(3, 1, 1), pair_objects, pair_dots)
        hidden = _gather_positions(pair_outputs[1], torch.cat([text_positions, positions[other]]) + QUERIES)
        return (
            _contrastive_loss(similarity),
            (match_losses[:n].mean() + match_losses[n:].mean()) / 2,
            F.cross_entropy(scores.float().transpose(1, 2), _next_tokens(exact), ignore_index=-100),
            torch.stack(attribute_losses).mean(),
            F.cross_entropy(heads.presence(hidden).transpose(1, 2), labels, ignore_index=-100),
        )

    return losses


def training(model: Any, save: Callable[[], None], options: argparse.Namespace, device: torch.device) -> Training:
    """The training of the retrieval model, initialized from the model in `options.start`."""
    from transformers import Blip2ForConditionalGeneration

    start_from(model, Blip2ForConditionalGeneration.from_pretrained(options.start, dtype=torch.float32))
    all_scenes = scenes("train", torch.arange(options.scenes, device=device))
    pixels = torch.cat([draw(scenes("train", part)) for part in all_scenes.index.split(CHUNK)])
    source = batches(pixels, all_scenes, options.batch, options.seed)
    heads = AuxiliaryHeads().to(device)
    losses, weights = losses_of(model, heads), torch.tensor(WEIGHTS, device=device)
    checks = {name: exam("validation", 400, device, name == "plain") for name in ("names", "plain")}

    def loss(*batch: Tensor) -> Tensor:
        return torch.stack(losses(*batch)) @ weights

    @torch.no_grad()
    def metrics() -> dict[str, float]:
        now = [value.item() for value in losses(*next(source))]
        figures = dict(zip(("contrast", "matching", "captioning", "attributes", "presence"), now, strict=True))
        return figures | {f"{n} {key}": v for n, check in checks.items() for key, v in grade(model, check).items()}

    return Training([*model.parameters(), *heads.parameters()], loss, source, metrics, save)


def final(model: Any, device: torch.device) -> dict[str, Any]:
    """Scores of a trained model on the test split: `summary`."""
    names, plain = (grade(model, exam("test", 1000, device, words)) for words in (False, True))
    return {"summary": names | {f"plain {key}": value for key, value in plain.items()}}
