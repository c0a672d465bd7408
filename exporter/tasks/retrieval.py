"""Retrieval of texts by picture and of pictures by text: recall from a matrix of similarities.

It has no prompts and no answers, so it is not in `TASKS`: whoever has a model that scores pairs calls `recalls`. On
Flickr30k 1K the convention is 1,000 pictures with five texts each and recall at 1, 5 and 10, both ways.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

RANKS = (1, 5, 10)
MOST_WORDS = 50

_MARKS = re.compile(r'[.!"()*#:;~]')


def recalls(similarity: Tensor, owners: Sequence[int]) -> dict[str, list[float]]:
    """`text_r1` .. `text_r10`, one value (0 or 1) a picture, and `image_r1` .. `image_r10`, one a text.

    similarity: float `[pictures, texts]`, higher is closer. owners: the picture of each text. A picture finds a text
    when the best of its own is among the first k; a text that is none of its own and scores the same counts as before
    it, so scores that are all equal find nothing. ValueError for shapes that do not fit, pictures without text, or
    similarities that are not numbers (minus infinity is one: it marks pairs that were not scored).
    """
    pictures, texts = similarity.shape
    if len(owners) != texts or set(owners) != set(range(pictures)):
        raise ValueError(f"{len(owners)} owners for {texts} texts of {pictures} pictures, each with at least one text")
    if bool(similarity.isnan().any()):
        raise ValueError("similarities that are not numbers")
    owner = torch.tensor(owners)
    own = owner[None, :] == torch.arange(pictures)[:, None]  # [pictures, texts]
    lowest = float("-inf")
    best = similarity.masked_fill(~own, lowest).amax(dim=1)  # [pictures]
    text_ranks = ((similarity >= best[:, None]) & ~own).sum(dim=1)
    mine = similarity[owner, torch.arange(texts)]  # [texts]
    image_ranks = ((similarity >= mine[None, :]) & ~own).sum(dim=0)
    found = {f"text_r{k}": (text_ranks < k).float().tolist() for k in RANKS}
    return found | {f"image_r{k}": (image_ranks < k).float().tolist() for k in RANKS}


def prepare(caption: str) -> str:
    """A caption as BLIP-2's retrieval reads it: lower case, without most punctuation, at most 50 words."""
    words = _MARKS.sub(" ", caption.lower()).split()
    return " ".join(words[:MOST_WORDS])
