"""Answers of artifacts from in-process vLLM engines, one after the other; needs vLLM but not mmq.

    python bench/gpu_replies.py FOLDER NAME [NAME ...]

`bench/gpu_serving.py prepare` creates FOLDER/NAME/questions.json, engine.json (arguments of vLLM), and the artifacts
FOLDER/NAME/artifact and FOLDER/NAME/doubled. Writes FOLDER/NAME/replies.json (or error.json) after each case.
"""

import gc
import io
import json
import os
import sys
import time
import traceback
from base64 import b64decode
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, so that libraries are imported once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
TOP = 5


def linears(model: Any) -> dict[str, list[str]]:
    """Name of every quantized linear -> class names of its scheme (or method) and its kernel."""
    names = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        scheme = getattr(module, "scheme", None) or method
        kernel = getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None)
        if kernel is not None and type(method).__name__ != "UnquantizedLinearMethod":
            names[name] = [type(scheme).__name__, type(kernel).__name__]
    return names


def answer(artifact: Path, questions: list[dict[str, Any]], engine: dict[str, Any]) -> dict[str, Any]:
    """Greedy replies to all questions in one batch, with log-probabilities, and the engine's `linears`."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    start = time.perf_counter()
    cpu = not Path("/proc/driver/nvidia").exists()
    sizes = {} if cpu else {"kv_cache_memory_bytes": 2**28, "gpu_memory_utilization": 0.03}
    llm = LLM(
        model=str(artifact),
        dtype="bfloat16",
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
        skip_mm_profiling=True,
        enable_prefix_caching=False,
        **sizes,
        **engine,
    )
    startup = time.perf_counter() - start
    prompts, settings = [], []
    for question in questions:
        image = Image.open(io.BytesIO(b64decode(question["png"]))).convert("RGB")
        prompts.append({"prompt_token_ids": question["ids"], "multi_modal_data": {"image": image}})
        settings.append(SamplingParams(temperature=0, max_tokens=question["longest"], logprobs=TOP))
    replies = [reply(output) for output in llm.generate(prompts, settings, use_tqdm=False)]
    result = {"replies": replies, "linears": llm.apply_model(linears)[0], "startup_s": startup}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result | {"seconds": time.perf_counter() - start}


def reply(output: Any) -> dict[str, Any]:
    """One answer as plain data."""
    completion = output.outputs[0]
    return {
        "text": completion.text,
        "prompt": list(output.prompt_token_ids),
        "tokens": list(completion.token_ids),
        "logprobs": [
            step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
        ],
        "top": [
            {token: token_logprob.logprob for token, token_logprob in step.items()} for step in completion.logprobs
        ],
    }


def register(folder: Path) -> None:
    """Register the model classes; otherwise vLLM inspects them in a new process that imports everything again."""
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    for model in (LlamaForCausalLM, LlavaForConditionalGeneration):
        ModelRegistry.register_model(model.__name__, model)
    plugin = folder / "mmq_vllm_blip2.py"
    if plugin.exists():
        sys.path.insert(0, str(folder))
        import mmq_vllm_blip2  # type: ignore[import-not-found]

        mmq_vllm_blip2.refuse(vllm.__version__)
        ModelRegistry.register_model(mmq_vllm_blip2.ARCHITECTURE, mmq_vllm_blip2.PackedBlip2)


def main() -> None:
    """Command line."""
    start, folder = time.perf_counter(), Path(sys.argv[1])
    import vllm

    register(folder)
    print(f"imported in {time.perf_counter() - start:.0f} s", flush=True)
    for name in sys.argv[2:]:
        case = folder / name
        questions = json.loads((case / "questions.json").read_text())
        engine = json.loads((case / "engine.json").read_text())
        try:
            result: dict[str, Any] = {"vllm": vllm.__version__, "plain": answer(case / "artifact", questions, engine)}
            if (case / "doubled").exists():
                result["doubled"] = answer(case / "doubled", questions, engine)
            (case / "replies.json").write_text(json.dumps(result))
            kinds = sorted({" ".join(pair) for pair in result["plain"]["linears"].values()})
            seconds = [round(result[part]["seconds"], 1) for part in ("plain", "doubled") if part in result]
            print(f"answered {name} {seconds} s {kinds}", flush=True)
        except Exception as error:  # noqa: BLE001 - the error is recorded, and the next case runs
            text = "".join(traceback.format_exception(error))[-4000:]
            (case / "error.json").write_text(json.dumps({"vllm": vllm.__version__, "error": text}))
            print(f"failed {name}: {' '.join(str(error).split())[:600]}", flush=True)


if __name__ == "__main__":
    main()
