"""Speed and error of vLLM's decoding attention kernels at LLaVA-1.5-7B's shape; needs vLLM and a Hopper GPU, not mmq.

    python bench/serve_attention.py [--length 704] [--clients 1 64]

One query per client, 32 heads of 128, a paged KV cache in 16 bits or float8. Prints milliseconds for the model's 32
blocks (from a CUDA graph, over KV caches larger than the GPU's L2 cache), the read bandwidth, and the relative error
against float32 on the cached values. FlashInfer compiles its kernels at their first use (nvcc, half a minute).
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HEADS, SIZE, PAGE, BLOCKS, SCALE = 32, 128, 16, 32, 128**-0.5
FLOAT8 = torch.float8_e4m3fn
Calls = list[Callable[[], Any]]


class Batch:
    """Queries, and several caches in place of the model's blocks; consecutive calls use different caches."""

    def __init__(self, clients: int, length: int, dtype: torch.dtype) -> None:
        pages = clients * length // PAGE
        self.clients, self.length, self.float8 = clients, length, dtype == FLOAT8
        self.table = torch.randperm(pages, device="cuda", dtype=torch.int32).view(clients, -1)
        shape = (2, pages, PAGE, HEADS, SIZE)
        count = max(2, BLOCKS // clients)
        self.caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(count)]
        self.query = torch.randn(clients, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.query)
        self.lengths = torch.full((clients,), length, device="cuda", dtype=torch.int32)
        self.starts = torch.arange(clients + 1, device="cuda", dtype=torch.int32)
        self.ones = torch.ones(clients, HEADS, device="cuda")

    def expected(self) -> Tensor:
        """The first cache's answer in float32."""
        keys, values = (x[self.table.long()].reshape(self.clients, -1, HEADS, SIZE).float() for x in self.caches[0])
        scores = torch.einsum("bhd,bthd->bht", self.query.float(), keys) * SCALE
        return torch.einsum("bht,bthd->bhd", scores.softmax(-1), values)

    def bytes(self) -> int:
        """Bytes of one cache."""
        return self.caches[0].numel() * self.caches[0].element_size()


def flash(batch: Batch, splits: int) -> Calls:
    """FlashAttention 3; queries are float8 if the cache is. splits: parts of a sequence, 0 for its default."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    query = batch.query.to(FLOAT8) if batch.float8 else batch.query
    scales = dict.fromkeys(("q_descale", "k_descale", "v_descale"), batch.ones if batch.float8 else None)
    options = {"seqused_k": batch.lengths, "softmax_scale": SCALE, "causal": True, "block_table": batch.table}
    options |= {"out": batch.out, "num_splits": splits, "fa_version": 3, **scales}

    def call(cache: Tensor) -> Any:
        return flash_attn_varlen_func(query, cache[0], cache[1], 1, batch.starts, batch.length, **options)

    return [lambda cache=cache: call(cache) for cache in batch.caches]  # type: ignore[misc]


def triton(batch: Batch, float8_query: bool) -> Calls:
    """vLLM's Triton kernel."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    max_sequences, parts = 128 // HEADS, 16
    query = batch.query.to(FLOAT8) if float8_query else batch.query
    q_scale = torch.ones((), device="cuda") if float8_query else None
    scales = batch.ones if batch.float8 else None
    segments = {"softmax_segm_output": torch.empty(max_sequences, HEADS, parts, SIZE, device="cuda")}
    segments |= {
        f"softmax_segm_{name}": torch.empty(max_sequences, HEADS, parts, device="cuda") for name in ("max", "expsum")
    }
    mode = KVQuantMode.FP8_PER_TENSOR if batch.float8 else KVQuantMode.NONE
    more = {"seq_threshold_3D": max_sequences, "num_par_softmax_segments": parts, "kv_quant_mode": mode, **segments}

    def call(cache: Tensor) -> Any:
        ends = (batch.starts, 1, batch.lengths, batch.length, SCALE, True, (-1, -1), batch.table, 0)
        return unified_attention(query, cache[0], cache[1], batch.out, *ends, q_scale, scales, scales, **more)

    return [lambda cache=cache: call(cache) for cache in batch.caches]  # type: ignore[misc]


def flashinfer_native(batch: Batch, tensor_cores: bool) -> Calls:
    """FlashInfer's decoding kernel, with 16-bit queries."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    workspace = torch.zeros(2**29, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    pages = batch.length // PAGE
    starts = torch.arange(0, batch.clients * pages + 1, pages, dtype=torch.int32)
    full = torch.full((batch.clients,), PAGE, dtype=torch.int32)
    kinds = {"q_data_type": batch.query.dtype, "kv_data_type": batch.caches[0].dtype}
    wrapper.plan(starts, batch.table.flatten(), full, HEADS, HEADS, SIZE, PAGE, **kinds)

    def call(cache: Tensor) -> Any:
        return wrapper.run(batch.query, (cache[0], cache[1]), out=batch.out, k_scale=1.0, v_scale=1.0)

    return [lambda cache=cache: call(cache) for cache in batch.caches]  # type: ignore[misc]


def xqa(batch: Batch) -> Calls:
    """The kernel behind vLLM's `--attention-backend FLASHINFER` on Hopper, with 16-bit queries."""
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    options: dict[str, Any] = {"workspace_buffer": torch.zeros(2**28, dtype=torch.uint8, device="cuda")}
    options |= {"block_tables": batch.table, "seq_lens": batch.lengths, "max_seq_len": batch.length, "backend": "xqa"}
    options |= {"bmm1_scale": SCALE, "bmm2_scale": 1.0, "kv_layout": "NHD", "out": batch.out, "query": batch.query}
    return [
        lambda cache=cache: trtllm_batch_decode_with_kv_cache(kv_cache=(cache[0], cache[1]), **options)  # type: ignore[misc]
        for cache in batch.caches
    ]


KERNELS: dict[str, tuple[torch.dtype, Callable[[Batch], Calls]]] = {
    "FlashAttention 3, 16 bits": (torch.bfloat16, lambda batch: flash(batch, 0)),
    "FlashAttention 3, float8": (FLOAT8, lambda batch: flash(batch, 0)),
    "FlashAttention 3, float8, not split": (FLOAT8, lambda batch: flash(batch, 1)),
    "Triton, 16 bits": (torch.bfloat16, lambda batch: triton(batch, False)),
    "Triton, float8, 16-bit queries": (FLOAT8, lambda batch: triton(batch, False)),
    "Triton, float8, float8 queries": (FLOAT8, lambda batch: triton(batch, True)),
    "FlashInfer, float8, CUDA cores": (FLOAT8, lambda batch: flashinfer_native(batch, False)),
    "FlashInfer, float8, tensor cores": (FLOAT8, lambda batch: flashinfer_native(batch, True)),
    "FlashInfer XQA, 16 bits": (torch.bfloat16, xqa),
    "FlashInfer XQA, float8": (FLOAT8, xqa),
}


def milliseconds(calls: Calls) -> float:
    """Milliseconds per call: the best of four replays of a CUDA graph of all calls."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    best = float("inf")
    for _ in range(4):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / len(calls))
    return best


def measure(name: str, clients: int, length: int) -> str:
    """One line of the table."""
    dtype, make = KERNELS[name]
    torch.manual_seed(0)
    batch = Batch(clients, length, dtype)
    calls = make(batch)
    calls[0]()
    expected = batch.expected()
    error = float((batch.out.float() - expected).norm() / expected.norm())
    ms = milliseconds(calls)
    speed = batch.bytes() / ms / 1e9
    return f"{clients:3} {name:36} {BLOCKS * ms:7.3f} ms per step {speed:5.2f} TB/s  error {error:.4f}"


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=704, help="tokens in the cache of a client, a multiple of 16")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64])
    options = parser.parse_args(words)
    for clients in options.clients:
        for name in KERNELS:
            try:
                print(measure(name, clients, options.length), flush=True)
            except Exception as error:  # noqa: BLE001 - the error is printed, and the next kernel runs
                print(
                    f"{clients:3} {name:36} {' '.join(f'{type(error).__name__}: {error}'.split())[-200:]}", flush=True
                )
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
