"""Several conversations about one picture in one sequence, and the forward pass that training and scoring share.

A row is `<s> USER: [image]` followed by slots. Every slot holds the rest of one conversation, starts at the same
position after the picture, and attends only to the picture and itself. Its logits equal those of a sequence with this
conversation alone (a test compares with transformers), and the picture is encoded once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.data.demo.scenes import SIDE
from exporter.model.families.llava import FAMILY
from tools.demo_training.folder import BOS, HIDDEN, IMAGE, MEAN, PAD, PATCH, STD, tokenizer

IMAGE_TOKENS = (SIDE // PATCH) ** 2
PREFIX = 3 + IMAGE_TOKENS  # <s> user : <image> * 64

Forward = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]  # model, pixels, tokens, mask, positions -> logits


@dataclass(frozen=True)
class PromptLayout:
    """The prompts of a model and the layout of its rows.

    prefix: tokens before the slots. start: ids at the start of every slot. question: prompt with `{question}`; caption:
    prompt for a caption; the answer follows. caption_slot, question_slot: tokens. words: words of the tokenizer beyond
    the demo vocabulary. forward: makes the forward pass for a device.
    """

    prefix: int
    start: tuple[int, ...]
    question: str
    caption: str
    caption_slot: int
    question_slot: int
    words: tuple[str, ...]
    forward: Callable[[torch.device], Forward]


@dataclass(frozen=True)
class Rows:
    """tokens, labels: int16 `[n, slots' tokens]`; a label is the next token, -100 outside answers."""

    tokens: Tensor
    labels: Tensor


def normalize(pixels: Tensor) -> Tensor:
    """uint8 `[n, 3, 64, 64]` to float32, as CLIP's processor does."""
    mean = torch.tensor(MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # [n, heads, t, d]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def encoder(tower: Any, x: Tensor, heads: int, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The blocks of CLIP's and SigLIP's towers on embeddings `[n, t, width]`."""
    for block in tower.encoder.layers:
        normed, attention = block.layer_norm1(x), block.self_attn
        q, k, v = (_split_heads(f(normed), heads) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + attention.out_proj(mixed)
        x = x + block.mlp.fc2(activation(block.mlp.fc1(block.layer_norm2(x))))
    return x


def encode_image(model: Any, pixels: Tensor) -> Tensor:
    """Image tokens `[n, 64, 128]` of LLaVA from normalized pixels."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    heads = model.config.vision_config.num_attention_heads
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    x = encoder(tower, x, heads, lambda hidden: hidden * torch.sigmoid(1.702 * hidden))
    projector = model.model.multi_modal_projector
    result: Tensor = projector.linear_2(F.gelu(projector.linear_1(x[:, 1:])))
    return result


def logits(model: Any, pixels: Tensor, tokens: Tensor, mask: Tensor, positions: Tensor, user: Tensor) -> Tensor:
    """Next-token logits `[n, slots' tokens, vocabulary]`; pixels normalized, user = the ids of `USER:`, int64 [2]."""
    before = torch.cat([torch.full_like(user[:1], BOS), user])
    image = encode_image(model, pixels)
    return text_logits(model, model.model.language_model, image, (before, user[:0]), tokens, mask, positions)


def text_logits(
    model: Any,
    language: Any,
    image: Tensor,
    around: tuple[Tensor, Tensor],
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor,
) -> Tensor:
    """Next-token logits of a Llama after a picture. language: its decoder. around: ids before and after the picture."""
    n, heads, first = tokens.shape[0], model.config.text_config.num_attention_heads, around[0].shape[0]
    width = HIDDEN // heads
    words = language.embed_tokens(torch.cat([*(ids.expand(n, -1) for ids in around), tokens], dim=1))
    x = torch.cat([words[:, :first], image.to(words.dtype), words[:, first:]], dim=1)
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device).float() / width)
    angles = torch.cat([positions[:, None] * rates] * 2, dim=-1)  # [t, d]
    cos, sin = angles.cos().to(image.dtype), angles.sin().to(image.dtype)
    for block in language.layers:
        normed, attention = block.input_layernorm(x), block.self_attn
        q, k, v = (_split_heads(f(normed), heads) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + attention.o_proj(mixed)
        normed = block.post_attention_layernorm(x)
        x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed))
    result: Tensor = model.lm_head(language.norm(x[:, -tokens.shape[1] :]))
    return result


def user_ids() -> Tensor:
    """The ids of `USER:`, int64 `[2]`."""
    coder = tokenizer()
    ids = coder.encode("USER:", add_special_tokens=False).ids
    if IMAGE in ids or len(ids) != PREFIX - IMAGE_TOKENS - 1:
        raise ValueError("the prefix does not tokenize as expected")
    return torch.tensor(ids)


def _forward(device: torch.device) -> Forward:
    user = user_ids().to(device)

    def forward(model: Any, pixels: Tensor, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return logits(model, pixels, tokens, mask, positions, user)

    return forward


LLAVA = PromptLayout(
    prefix=PREFIX,
    start=(),
    question=f"{FAMILY.question_prompt} ASSISTANT:",
    caption=f"{FAMILY.caption_prompt} ASSISTANT:",
    caption_slot=51,
    question_slot=26,  # a training row then has 352 tokens, a multiple of 32
    words=(),
    forward=_forward,
)


def slot_lengths(captions: int, questions: int, layout: PromptLayout = LLAVA) -> tuple[int, ...]:
    """Lengths of a row's slots, captions first."""
    return (layout.caption_slot,) * captions + (layout.question_slot,) * questions


def _slot(ids: list[int], prompt_length: int, length: int) -> tuple[list[int], list[int]]:
    """Padded tokens and labels of one conversation."""
    if len(ids) > length:
        raise ValueError(f"a conversation of {len(ids)} tokens does not fit a slot of {length}")
    labels = [ids[i + 1] if i + 1 >= prompt_length and i + 1 < len(ids) else -100 for i in range(len(ids))]
    padding = length - len(ids)
    return ids + [PAD] * padding, labels + [-100] * padding


def pack(
    rows: Sequence[Sequence[tuple[str | None, str] | None]], lengths: Sequence[int], layout: PromptLayout = LLAVA
) -> Rows:
    """Tokenize rows of (question or None for a caption, answer); a None entry leaves its slot empty."""
    coder = tokenizer(layout.words)
    coder.post_processor = None
    flat = [entry for row in rows for entry in row if entry is not None]
    texts = [layout.caption if question is None else layout.question.format(question=question) for question, _ in flat]
    prompts = coder.encode_batch(texts)
    answers = coder.encode_batch([f" {answer}</s>" for _, answer in flat])
    pairs = iter(zip(prompts, answers, strict=True))
    tokens, labels = [], []
    for row in rows:
        slots = []
        for entry, length in zip(row, lengths, strict=True):
            prompt, answer = next(pairs) if entry is not None else (None, None)
            before = [] if prompt is None else [*layout.start, *prompt.ids]
            slots.append(_slot(before + (answer.ids if answer else []), len(before), length))
        tokens.append([t for slot in slots for t in slot[0]])
        labels.append([t for slot in slots for t in slot[1]])
    return Rows(torch.tensor(tokens, dtype=torch.int16), torch.tensor(labels, dtype=torch.int16))


def mask_and_positions(lengths: Sequence[int], device: torch.device, prefix: int = PREFIX) -> tuple[Tensor, Tensor]:
    """Attention mask, bool `[t, t]`, and positions, int64 `[t]`, of the picture followed by slots."""
    slot = torch.cat([torch.zeros(prefix)] + [torch.full((n,), float(i + 1)) for i, n in enumerate(lengths)])
    order = torch.arange(slot.numel())
    mask = (order[:, None] >= order) & ((slot[:, None] == slot) | (slot == 0))
    offsets = torch.cat([torch.arange(prefix)] + [prefix + torch.arange(n) for n in lengths])
    return mask.to(device), offsets.to(device)
