"""A small continuous-batching server over fi_ops: any Hugging Face Llama on disk, by default the demo checkpoint.

    python examples/serve.py                                 # http://127.0.0.1:8000, CPU or the GPU there is
    python examples/serve.py --model /path/to/Llama-3.1-8B --dtype bfloat16 --port 8080
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "import os\\n\\ndef join(", "max_tokens": 40, "temperature": 0}'
    curl -N http://127.0.0.1:8000/v1/completions -d '{"prompt": "class A:", "max_tokens": 40, "seed": 1, "stream": true}'
    python examples/serve.py --bench 64                      # no server: 64 requests at once, against one at a time

Paged cache with prefix sharing, chunked prefill, sampling parameters and seeds of each request, preemption; all of a step is one
compiled function (on CUDA one graph), its plan included. The code is in `examples/serving/`, the shape of the API in `api.py`.
Stop it with Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from serving.engine import Engine, SamplingParams, generate
from serving.model import Llama, LlamaConfig
from serving.pages import PagePool
from serving.server import Server
from serving.status import StatusLine, hit_rate
from serving.step import Step
from serving.text import load_tokenizer

DEMO_MODEL = Path(__file__).resolve().parent / "demo_model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, help="directory of a checkpoint (default: the demo model)")
    add("--name", help="the model's name in the API (default: its directory's)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=list(DTYPES), help="of weights and cache (default: float32 on the CPU, bfloat16 on CUDA)")
    add("--kv-dtype", choices=list(KV_DTYPES), help="of the cache alone")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1")
    add("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    add("--max-requests", type=int, default=64, help="requests that run at once (default: 64)")
    add("--max-queue", type=int, default=1024, help="unfinished requests, waiting ones included; more get 429")
    add("--step-tokens", type=int, default=256, help="tokens of a step: decodes and chunks of prompts (default: 256)")
    add("--max-len", type=int, help="tokens of a request, prompt and output (default: the model's)")
    add("--page-size", type=int, default=16, help="tokens of a page (default: 16)")
    add(
        "--pages", type=int, help="pages of the cache (default: what all requests can need, in --cache-gib at the most)"
    )
    add("--cache-gib", type=float, help="GiB of cache (default: 1 on the CPU, 80%% of what is free on CUDA)")
    add("--no-prefix-sharing", action="store_true", help="compute every prompt from its beginning")
    add(
        "--random-weights",
        action="store_true",
        help="of --model read config.json and tokenizer.json alone: for --bench",
    )
    add("--eager", action="store_true", help="don't compile the model (on CUDA still captured in graphs)")
    add("--threads", type=int, help="torch's threads on the CPU")
    add("--quiet", action="store_true", help="no status line")
    add("--bench", type=int, metavar="N", help="serve nothing: N requests at once, and one at a time; tokens a second")
    return parser.parse_args(argv)


def make_engine(args: argparse.Namespace, say=lambda text: None) -> Engine:
    """The engine that the arguments describe; ValueError for what can't be."""
    config = LlamaConfig.from_directory(args.model)
    tokenizer = load_tokenizer(args.model)
    max_len = min(args.max_len or config.max_position_embeddings, config.max_position_embeddings)
    dtype = model_dtype(args)
    kv_dtype = KV_DTYPES[args.kv_dtype] if args.kv_dtype else dtype
    if args.random_weights:
        model = Llama.with_random_weights(config, dtype, args.device, max_len)
    else:
        model = Llama.from_directory(args.model, dtype, args.device, max_len)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{args.model}: {parameters:,} parameters{', random' * args.random_weights}, {dtype}, on {args.device}")
    pages_each = -(-max_len // args.page_size)
    num_pages = args.pages or min(args.max_requests * pages_each, _pages_that_fit(args, config, kv_dtype))
    step = Step(
        model, num_pages=num_pages, page_size=args.page_size, kv_dtype=kv_dtype, max_requests=args.max_requests,
        sizes={1, min(8, args.max_requests), args.max_requests, max(args.step_tokens, args.max_requests)},
        max_pages=args.max_requests * pages_each, compiled=not args.eager,
    )  # fmt: skip
    say(f"cache of {num_pages} pages of {args.page_size} tokens, {kv_dtype}")
    step.prepare(say)
    pool = PagePool(num_pages, args.page_size, sharing=not args.no_prefix_sharing)
    return Engine(step, pool, max_len=max_len, eos_token_ids=config.eos_token_ids, tokenizer=tokenizer)


def model_dtype(args: argparse.Namespace) -> torch.dtype:
    return DTYPES[args.dtype] if args.dtype else torch.bfloat16 if args.device == "cuda" else torch.float32


def _pages_that_fit(args: argparse.Namespace, config: LlamaConfig, kv_dtype: torch.dtype) -> int:
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * kv_dtype.itemsize
    if args.cache_gib:
        free = args.cache_gib * 2**30
    else:
        free = 0.8 * torch.cuda.mem_get_info()[0] if args.device == "cuda" else 2**30
    return max(1, int(free / (token * args.page_size)))


async def serve(args: argparse.Namespace, engine: Engine, say) -> None:
    """Until SIGINT or SIGTERM."""
    status = StatusLine(engine)
    server = Server(
        engine, args.name or args.model.resolve().name, args.max_queue, (lambda: None) if args.quiet else status.update
    )
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    host, port = await server.start(args.host, args.port)
    say(f"serving {server.model_name} at http://{host}:{port}/v1/completions")
    await stop.wait()
    status.close()
    say("stopping")
    await server.stop()


BENCH_TEXT = """import os
import sys


class Files:
    def __init__(self, path):
        self.path = path

"""


def bench(engine: Engine, args: argparse.Namespace, new_tokens: int = 64) -> None:
    """Greedy completions of prompts with a common beginning: one after the other, by transformers too, then all at once."""
    count, few = args.bench, max(1, args.bench // 8)
    prompts = [engine.tokenizer.encode(f"{BENCH_TEXT}    def method_{i}(self, x):\n").ids for i in range(count)]
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    def timed(name: str, fn: Callable[[list[list[int]]], list[list[int]]], prompts: list[list[int]]) -> list[list[int]]:
        began = time.perf_counter()
        outputs = fn(prompts)
        rate = len(prompts) * new_tokens / (time.perf_counter() - began)
        print(
            f"{name:<32} {rate:9.1f} tokens/s ({len(prompts)} requests of {len(prompts[0])} + {new_tokens} tokens)",
            flush=True,
        )
        return outputs

    if (theirs := None if args.random_weights else _transformers_generate(args, new_tokens)) is not None:
        theirs(prompts[:1])
        expected = timed("transformers, one at a time", theirs, prompts[:few])
    generate(engine, prompts[-1:], [params])
    alone = timed(
        "this engine, one at a time", lambda some: [generate(engine, [p], [params])[0] for p in some], prompts[:few]
    )
    together = timed("this engine, all at once", lambda some: generate(engine, some, [params] * count), prompts)
    for name, others in (("one at a time", alone), *([("transformers", expected)] if theirs else [])):
        same = sum(a == b for a, b in zip(others, together, strict=False))
        print(f"all at once against {name}: {same} of {few} outputs the same, token for token")
    stats = engine.stats
    print(f"{stats.steps} steps; prefix hits {100 * hit_rate(stats):.0f}% of {stats.prompt_tokens} tokens of prompts")


def _transformers_generate(args: argparse.Namespace, new_tokens: int) -> Callable | None:
    """`generate` of transformers where it is installed, eager, one prompt after the other."""
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        return None
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=model_dtype(args)).eval().to(args.device)

    def run(prompts: list[list[int]]) -> list[list[int]]:
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=args.device)
            options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids))
            outputs.append(model.generate(ids, max_new_tokens=new_tokens, **options)[0, len(prompt) :].tolist())
        return outputs

    return run


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    say = lambda text: print(f"serve: {text}", file=sys.stderr, flush=True)  # noqa: E731
    try:
        engine = make_engine(args, say)
    except (ValueError, RuntimeError) as error:
        say(str(error))
        return 2
    if args.bench:
        bench(engine, args)
        return 0
    try:
        asyncio.run(serve(args, engine, say))
    except OSError as error:  # the address
        say(f"{args.host}:{args.port}: {error.strerror}; choose another --port (0: any that is free)")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
