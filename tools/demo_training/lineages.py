"""Train tiny models of other families from demo-llava: `python -m tools.demo_training.lineages FAMILY --out DIR`.

FAMILY is `llava-next` (the same parts on tiles, trained with the inputs that mmq itself makes, minutes on a CPU) or
`smolvlm` (a new tower of 4-pixel patches, a pixel shuffle and one linear, in front of demo-llava's text model). The new
parts of SmolVLM first learn demo-llava's picture features; then the whole model learns the demo's captions and
questions, as demo-llava did: minutes on a GPU (`--device cuda --compile`). The folder is one that mmq, transformers and
vLLM load.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from exporter.data.demo.samples import samples
from exporter.data.demo.scenes import SIDE
from exporter.data.tasks.sample import Sample
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES, Family
from exporter.model.inference.predict import conversations
from exporter.model.processors.processor import load_processor
from exporter.model.source import open_source
from exporter.model.stream import load_whole
from tools.demo_training import packing, smolvlm_packing, train_answers
from tools.demo_training.folder import CHAT_TEMPLATE, MEAN, STD, hub_tensors, tokenizer, write_generation, write_json
from tools.demo_training.train_loop import Training, run

TEACHER = MODELS["demo-llava"]
MARKS = ("<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)))
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
BATCH = 32


@dataclass(frozen=True)
class Lineage:
    """A family's model. change: config.json of demo-llava -> its own.

    pictures, settings: class and settings of its image processor. processor: fields of processor_config.json. train:
    trains the model in place (model, demo-llava, processor, options); returns scores.
    """

    change: Callable[[dict[str, Any]], dict[str, Any]]
    pictures: str
    settings: dict[str, Any]
    processor: dict[str, Any]
    train: Callable[[Any, Any, Any, argparse.Namespace], dict[str, Any]]


def next_config(config: dict[str, Any]) -> dict[str, Any]:
    """demo-llava with tiles."""
    own = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
    return {k: v for k, v in config.items() if k != "image_seq_length"} | own | {"image_grid_pinpoints": PINPOINTS}


def smolvlm_config(config: dict[str, Any]) -> dict[str, Any]:
    """demo-llava's text model behind a tower of 256 patches, of which four make a token."""
    vision = {"model_type": "smolvlm_vision", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": 4, "hidden_act": "gelu_pytorch_tanh"}
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "dtype": "bfloat16",
        "image_token_id": config["image_token_index"],
        "pad_token_id": config["pad_token_id"],
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "text_config": config["text_config"],
        "vision_config": vision,
    }


def write_folder(out: Path, lineage: Lineage) -> dict[str, Any]:
    """All files but the weights; returns config.json."""
    import transformers

    out.mkdir(parents=True)
    config = lineage.change(json.loads((TEACHER / "config.json").read_text()))
    write_json(out / "config.json", config)
    write_generation(out)
    getattr(transformers, lineage.pictures)(**lineage.settings).save_pretrained(out)
    write_json(out / "processor_config.json", lineage.processor)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<image>\\n", "<image>"))
    write_words(out)
    return config


def write_words(out: Path) -> None:
    """demo-llava's tokenizer, with marks of tiles in the place of unused tokens."""
    from tokenizers import AddedToken, Tokenizer

    text = tokenizer().to_str()
    for i, mark in enumerate(MARKS):
        assert f'"<unused{i}>"' in text
        text = text.replace(f'"<unused{i}>"', json.dumps(mark))
    words = Tokenizer.from_str(text)
    words.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    words.save(str(out / "tokenizer.json"))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (out / name).write_text((TEACHER / name).read_text())


def start(family: Family, config: dict[str, Any]) -> tuple[Any, Any]:
    """The new model, in float32, with every weight of demo-llava that it has, and demo-llava."""
    checkpoint, llava = open_source(str(TEACHER))
    names = list(checkpoint.tensors)
    teacher = load_whole(llava, checkpoint.config, names, checkpoint.read, torch.device("cpu"), torch.float32).eval()
    torch.manual_seed(0)
    model = family.skeleton(config).float().train()
    parameters = dict(model.named_parameters())
    parameters |= {name.replace("text_model", "language_model"): value for name, value in parameters.items()}
    with torch.no_grad():
        for name, value in teacher.named_parameters():
            if name in parameters and parameters[name].shape == value.shape:
                parameters[name].copy_(value)
    return model, teacher


def pool(seed: int) -> list[Sample]:
    """Captions and questions about the training scenes in random order."""
    both = [*samples("captioning", "train", 20_000, seed), *samples("vqa", "train", 20_000, seed)]
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))
    return [both[i] for i in order.tolist()]


def answer_loss(model: Any, processor: Any, family: Family, group: list[Sample]) -> Tensor:
    """Mean negative log-likelihood of the replies' tokens."""
    (talk,) = conversations(processor, family, group, len(group))
    logits = model(**talk.inputs, use_cache=False).logits
    rows = [
        logits[row, begin - 1 : begin - 1 + len(reply)]
        for row, (begin, reply) in enumerate(zip(talk.starts, talk.replies, strict=True))
    ]
    return F.cross_entropy(torch.cat(rows), torch.cat(talk.replies))


def train(model: Any, loss: Callable[[list[Sample]], Tensor], rate: float, steps: int, seed: int) -> None:
    """Train in place: AdamW, warm-up for 3 % of the steps, then cosine decay to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    order, begin = batches(seed), time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / steps / 0.03, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        value = loss(next(order))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19:
            print(f"{time.process_time() - begin:.0f} CPU s, step {step + 1}, loss {value.item():.4f}", flush=True)


def batches(seed: int) -> Iterator[list[Sample]]:
    """Groups of samples, without end."""
    while True:
        shuffled = pool(seed)
        yield from (shuffled[i : i + BATCH] for i in range(0, len(shuffled) - BATCH, BATCH))
        seed += 1


def train_answers_alone(model: Any, teacher: Any, processor: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Captions and answers with the processor's own inputs, on the CPU."""
    family = FAMILIES[options.family].of(model.config.to_dict())
    train(model, lambda group: answer_loss(model, processor, family, group), options.rate, options.steps or 400, 2)
    return {}


def feature_loss(model: Any, teacher: Any) -> Callable[..., Tensor]:
    """Squared distance between the picture features of both models, relative to the variance of the teacher's."""

    def loss(pixels: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        normalized = packing.normalize(pixels)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
            with torch.no_grad():
                expected = packing.encode_image(teacher, normalized)
            features = smolvlm_packing.encode_image(model, normalized)
        return F.mse_loss(features.float(), expected.float()) / expected.float().var()

    return loss


def train_new_tower(model: Any, teacher: Any, processor: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Picture features of demo-llava first, then captions and answers, on the device of the options."""
    device, layout = torch.device(options.device), smolvlm_packing.LAYOUT
    model.to(device)
    training = train_answers.training(model, lambda: None, layout, options, device)
    new = [value for name, value in model.named_parameters() if "text_model" not in name and "lm_head" not in name]
    distill = Training(new, feature_loss(model, teacher.to(device)), training.source, dict, training.save)
    report = partial(print, flush=True)
    run(distill, argparse.Namespace(**vars(options) | {"steps": options.distill, "rate": 2e-3}), report)
    figures = run(training, options, report)
    return figures | train_answers.final(model.to(torch.bfloat16), layout, device)


LINEAGES = {
    "llava-next": Lineage(
        next_config,
        "LlavaNextImageProcessorPil",
        {
            "size": {"shortest_edge": SIDE},
            "crop_size": {"height": SIDE, "width": SIDE},
            "image_grid_pinpoints": PINPOINTS,
        },
        {"processor_class": "LlavaNextProcessor", "patch_size": 8, "num_additional_image_tokens": 1}
        | {"vision_feature_select_strategy": "default", "image_token": "<image>"},
        train_answers_alone,
    ),
    "smolvlm": Lineage(
        smolvlm_config,
        "SmolVLMImageProcessorPil",
        {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}}
        | {"image_mean": list(MEAN), "image_std": list(STD)},
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 64},
        train_new_tower,
    ),
}


def main() -> None:
    """Train one model and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=LINEAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0, help="0: 400 for llava-next, --minutes for smolvlm")
    parser.add_argument("--rate", type=float, default=1e-3)
    smolvlm = parser.add_argument_group("smolvlm")
    smolvlm.add_argument("--minutes", type=float, default=2.5)
    smolvlm.add_argument("--distill", type=int, default=1000, help="steps for the picture features of new parts")
    smolvlm.add_argument("--device", default="cpu")
    smolvlm.add_argument("--compile", action="store_true", help="torch.compile the loss")
    smolvlm.add_argument("--workers", type=int, default=4, help="tokenizer processes")
    smolvlm.add_argument("--batch", type=int, default=256)
    smolvlm.add_argument("--scenes", type=int, default=80_000)
    parser.set_defaults(seed=0, decay=0.05, report=20.0, keep=2.0)
    options = parser.parse_args()
    lineage = LINEAGES[options.family]
    config = write_folder(options.out, lineage)
    family = FAMILIES[options.family].of(config)
    model, teacher = start(family, config)
    record = lineage.train(model, teacher, load_processor(options.out), options)
    save_file(hub_tensors(model, family.canonical_name), options.out / "model.safetensors", metadata={"format": "pt"})
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
