"""The main job: stock `torch.compile` against the same `torch.compile` with fi_ops enabled.

    make demo                                  # sets everything up first
    python examples/demo.py [--only checkpoint | --only real-shape] [--threads N]

1. A real checkpoint (`examples/demo_model/`, a Llama of two million parameters trained by `train_demo_model.py`) is
   loaded by `from_pretrained`, compiled twice, and continues a prompt greedily: text, tokens, what was rewritten, ms.
2. A real shape: layers of Llama-3.2-1B's shapes with random bfloat16 weights, 2,000 tokens in a cache built for 4,096,
   temperature + top-k + top-p sampling inside the compiled step, batch 1 and 8; for a Hugging Face Llama over a
   `StaticCache` and for the gpt-fast style model of `gpt_fast_model.py`.

No model knows about fi_ops; the only difference is `fi_ops.enable()` before the second `torch.compile`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler prints a line each time it starts and stops

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging as transformers_logging

import fi_ops

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "demo_model"
sys.path.insert(0, str(HERE))
from gpt_fast_model import ModelArgs, Transformer  # noqa: E402

PROMPT = '''<|begin|>"""Utility functions for paths."""

import os


def join(path, *paths):
    """Join path components."""
    path = os.fspath(path)'''
STOCK, OURS = "torch.compile", "+ fi_ops"
ONE_TOKEN = torch.zeros(1, 1, dtype=torch.long)


# ------------------------------------------------------------------------------------------------ output and timing

BEGAN = time.time()


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def progress(text: str) -> None:
    print(f"[{time.time() - BEGAN:5.0f} s] {text}", flush=True)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells), flush=True)


def typical(seconds: Iterable[float]) -> float:
    """The lower quartile: what other work on the machine adds to some steps is not what is measured here."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 4]


def ms(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`fi_ops.enabled()` without its warning that what was compiled before stays stock: here it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fi_ops.enable")
        with fi_ops.enabled():
            yield


def compile_step(fn: Callable, ours: bool, *args) -> tuple[Callable, float]:
    """`torch.compile(fn)` and its first call on args, with fi_ops enabled or not: the compiled function, seconds.

    Dynamo keeps compiled code by code object and does not look at Inductor's settings, so each side gets a code object
    of its own; then both live side by side in this process and can be timed in turns.
    """
    own = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    step = torch.compile(own, fullgraph=True, dynamic=False)
    began = time.perf_counter()
    with enabled() if ours else contextlib.nullcontext():
        step(*args)
    return step, time.perf_counter() - began


# ------------------------------------------------------------------------------------------------ 1. the checkpoint


@dataclass
class Generation:
    tokens: list[int]
    prefill: float  # seconds
    steps: list[float]  # seconds a token


class Greedy:
    """A static-cache greedy loop around a compiled prefill and a compiled decode step."""

    def __init__(self, model: LlamaForCausalLM, cache_len: int) -> None:
        config = model.config
        self.model = model
        self.cache = StaticCache(config, max_cache_len=cache_len)
        self.cache.early_initialization(1, config.num_key_value_heads, config.head_dim, model.dtype, model.device)

    def forward(self) -> Callable:
        model, cache = self.model, self.cache

        def next_token(ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

        return next_token

    def compile(self, ids: torch.Tensor, ours: bool) -> float:
        self.cache.reset()
        self.prefill, prefill_s = compile_step(self.forward(), ours, ids)
        self.decode, decode_s = compile_step(self.forward(), ours, ONE_TOKEN)
        return prefill_s + decode_s

    def generate(self, ids: torch.Tensor, new_tokens: int) -> Generation:
        self.cache.reset()
        began = time.perf_counter()
        token = self.prefill(ids)
        out = Generation([token.item()], time.perf_counter() - began, [])
        while len(out.tokens) < new_tokens:
            began = time.perf_counter()
            token = self.decode(token)
            out.tokens.append(token.item())
            out.steps.append(time.perf_counter() - began)
        return out


def checkpoint_demo(new_tokens: int = 200, rounds: int = 8) -> bool:
    heading("1. A real checkpoint: examples/demo_model, greedy, float32, static cache")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    parameters = sum(p.numel() for p in model.parameters())
    progress(f"loaded {parameters:,} parameters; the prompt has {ids.shape[1]} tokens")

    sides = {}
    for name, ours in ((STOCK, False), (OURS, True)):
        sides[name] = Greedy(model, cache_len=512)
        first = "" if ours else " (with what Inductor builds once)"
        progress(f"compiled prefill and decode, {name}: {sides[name].compile(ids, ours):.1f} s{first}")
    progress("what fi_ops rewrote in the decode step:")
    sides[OURS].cache.reset()
    with enabled():
        fi_ops.explain(sides[OURS].forward(), ONE_TOKEN)

    runs: dict[str, list[Generation]] = {STOCK: [], OURS: []}
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(rounds):
            for name, side in sides.items():
                runs[name].append(side.generate(ids, new_tokens))
    tokens = {name: generations[0].tokens for name, generations in runs.items()}
    eager = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)[
        0, ids.shape[1] :
    ].tolist()

    print("\n" + tokenizer.decode(ids[0], skip_special_tokens=True) + "\033[1m" * sys.stdout.isatty(), end="")
    print(tokenizer.decode(tokens[OURS]) + "\033[0m" * sys.stdout.isatty() + "\n")

    agree = tokens[OURS] == tokens[STOCK]
    same = next((i for i, (a, b) in enumerate(zip(*tokens.values(), strict=True)) if a != b), new_tokens)
    verdict = "OK" if agree else "DIFFERENT"
    print(f"greedy tokens, fi_ops against stock torch.compile: {same} of {new_tokens} equal, {verdict}")
    print(f"greedy tokens, fi_ops against eager model.generate: {'OK' if tokens[OURS] == eager else 'different'}\n")

    rows = []
    for name, generations in runs.items():
        prefill = typical(g.prefill for g in generations)
        step = typical(s for g in generations for s in g.steps)
        rows.append((name, prefill, step))
    print_table(
        ["float32, batch 1, cache of 512", f"prefill of {ids.shape[1]}, ms", "decode, ms/token"],
        [[name, ms(prefill), ms(step)] for name, prefill, step in rows]
        + [["stock / fi_ops", *(f"{rows[0][i] / rows[1][i]:.2f} x" for i in (1, 2))]],
    )
    return agree


# ------------------------------------------------------------------------------------------------ 2. the real shape

TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95
CACHE_LEN, IN_CACHE, VOCAB, LAYERS = 4096, 2000, 128256, 2
MATMULS = {
    "fi::linear",
    "aten::mm",
    "aten::addmm",
    "mkldnn::_linear_pointwise",
}  # the products with weights, and nothing else

# Hugging Face's own sampling, the one `generate(do_sample=True)` runs; here inside the compiled step.
WARPERS = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)])


def sample(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(torch.softmax(WARPERS(None, logits.float()), dim=-1), num_samples=1)


class HuggingFaceLlama:
    """`LlamaForCausalLM` with the configuration of Llama-3.2-1B, less layers."""

    name = "Hugging Face Llama, StaticCache"

    def __init__(self) -> None:
        self.config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=LAYERS,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        )
        self.model = LlamaForCausalLM._from_config(self.config, dtype=torch.bfloat16).eval()

    def prepare(self, batch: int) -> None:
        self.cache = StaticCache(self.config, max_cache_len=CACHE_LEN)
        self.cache.early_initialization(batch, 8, 64, torch.bfloat16, torch.device("cpu"))
        for layer in self.cache.layers:
            layer.keys[:, :, :IN_CACHE].normal_()
            layer.values[:, :, :IN_CACHE].normal_()

    def rewind(self) -> None:
        """Back to 2,000 tokens in the cache."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(IN_CACHE)

    def position(self) -> tuple:
        return ()  # the cache counts

    def step(self) -> Callable:
        model, cache = self.model, self.cache

        def step(token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model(input_ids=token, past_key_values=cache).logits[:, -1]
            return sample(logits), logits

        return step


class GptFast:
    """The gpt-fast style model in the same shapes."""

    name = "gpt-fast style model"

    def __init__(self) -> None:
        shapes = {"n_layer": LAYERS, "n_head": 32, "n_kv_head": 8, "dim": 2048, "intermediate_size": 8192}
        with torch.device("meta"):
            model = Transformer(ModelArgs(block_size=CACHE_LEN, vocab_size=VOCAB, rope_base=500000.0, **shapes))
        self.model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
        self.model.output.weight = self.model.tok_embeddings.weight  # tied, as in Llama-3.2-1B
        for parameter in self.model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)

    def prepare(self, batch: int) -> None:
        self.model.setup_caches(batch, CACHE_LEN)
        for layer in self.model.layers:
            layer.attention.kv_cache.k_cache[:, :, :IN_CACHE].normal_()
            layer.attention.kv_cache.v_cache[:, :, :IN_CACHE].normal_()
        self.rewind()

    def rewind(self) -> None:
        self.next_position = IN_CACHE

    def position(self) -> tuple:
        self.next_position += 1
        return (torch.tensor([self.next_position - 1]),)

    def step(self) -> Callable:
        model = self.model

        def step(token: torch.Tensor, input_pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model(token, input_pos)[:, -1]
            return sample(logits), logits

        return step


@dataclass
class Timing:
    """Seconds of one decode step: measured alone; under the profiler, in all and in products with weights."""

    steps: list[float] = field(default_factory=list)
    profiled: list[float] = field(default_factory=list)
    matmuls: list[float] = field(default_factory=list)
    ops: list[dict[str, float]] = field(default_factory=list)

    @property
    def step(self) -> float:
        return typical(self.steps)

    @property
    def matmul(self) -> float:
        return typical(self.matmuls)

    @property
    def rest(self) -> float:
        return typical(total - mm for total, mm in zip(self.profiled, self.matmuls, strict=True))

    def biggest(self, n: int = 3) -> str:
        """The operators that take most of the rest; what no operator accounts for is Inductor's generated code."""
        names = {name for ops in self.ops for name in ops} - MATMULS
        medians = {name: typical(ops.get(name, 0.0) for ops in self.ops) for name in names}
        medians["generated code and calls"] = self.rest - sum(medians.values())
        top = sorted(medians.items(), key=lambda item: -item[1])[:n]
        return ", ".join(f"{name} {ms(seconds)} ms" for name, seconds in top)


def run_steps(model, step: Callable, token: torch.Tensor, count: int) -> list[float]:
    model.rewind()
    seconds = []
    for _ in range(count):
        position = model.position()
        began = time.perf_counter()
        token, _ = step(token, *position)
        seconds.append(time.perf_counter() - began)
    return seconds


def profile_steps(model, step: Callable, token: torch.Tensor, count: int, timing: Timing) -> None:
    model.rewind()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            position = model.position()
            with record_function("demo::step"):
                token, _ = step(token, *position)
    main = [e for e in profiler.events() if e.name == "demo::step"]
    # outermost operators of the main thread inside a step
    for window in main:
        ops: dict[str, float] = {}
        end = 0.0
        inside = [e for e in profiler.events() if e.thread == window.thread and "::" in e.name and e is not window]
        for e in sorted(inside, key=lambda e: (e.time_range.start, -e.time_range.end)):
            start, stop = e.time_range.start, e.time_range.end
            if start < max(end, window.time_range.start) or stop > window.time_range.end:
                continue
            ops[e.name] = ops.get(e.name, 0.0) + (stop - start) * 1e-6
            end = stop
        timing.profiled.append((window.time_range.end - window.time_range.start) * 1e-6)
        timing.matmuls.append(sum(ops.get(name, 0.0) for name in MATMULS))
        timing.ops.append(ops)


def check_real_shape(model, steps: dict[str, Callable], token: torch.Tensor) -> bool:
    """The same step on both sides: logits close, and every draw of fi_ops in the set that the warpers keep.

    In the set is what is not below its smallest logit: among equal logits at the edge of top-p, frequent in bfloat16,
    the warpers keep what their sort happens to put last.
    """
    logits, kept, draws = {}, 0, 0
    for name, step in steps.items():
        for _ in range(1 if name == STOCK else 8):
            model.rewind()
            drawn, logits[name] = step(token, *model.position())
            scores = WARPERS(None, logits[name].float())
            least = scores.masked_fill(scores == -float("inf"), float("inf")).amin(-1, keepdim=True) * TEMPERATURE
            fits = logits[name].float().gather(1, drawn.long()) >= least * (1 - 1e-6 * least.sign())
            kept += int(fits.sum()) if name == OURS else 0
            draws += drawn.numel() if name == OURS else 0
    stock, ours = logits[STOCK].float(), logits[OURS].float()
    difference = ((ours - stock).abs().max() / stock.abs().max()).item()
    ok = kept == draws and difference < 0.05
    progress(f"logits differ by at most {difference:.2%} of the largest; {kept} of {draws} draws are in the kept set")
    return ok


def real_shape_demo(batches: tuple[int, ...] = (1, 8), seconds_a_side: float = 5.0, rounds: int = 4) -> bool:
    heading(
        f"2. A real shape: {LAYERS} layers of Llama-3.2-1B's (32/8 heads x 64, dim 2048, vocab {VOCAB:,}), bfloat16, "
        f"{IN_CACHE:,} tokens in a cache of {CACHE_LEN:,}, temperature {TEMPERATURE}, top-k {TOP_K}, top-p {TOP_P}"
    )
    ok, rows, notes = True, [], []
    for make in (HuggingFaceLlama, GptFast):
        progress(f"{make.name}: random weights")
        torch.manual_seed(0)
        model = make()
        for batch in batches:
            torch._dynamo.reset()
            model.prepare(batch)
            token = torch.randint(VOCAB, (batch, 1))
            steps, timings = {}, {STOCK: Timing(), OURS: Timing()}
            for name, ours in ((STOCK, False), (OURS, True)):
                model.rewind()
                steps[name], took = compile_step(model.step(), ours, token, *model.position())
                progress(f"{make.name}, batch {batch}: compiled, {name}: {took:.1f} s")
            if batch == batches[0]:
                with enabled():
                    fi_ops.explain(model.step(), token, *model.position())
            with torch.compiler.set_stance("fail_on_recompile"):
                ok &= check_real_shape(model, steps, token)
                for _ in range(rounds):
                    for name, step in steps.items():
                        once = min(run_steps(model, step, token, 2))
                        count = max(2, min(20, int(seconds_a_side / 2 / rounds / once)))
                        timings[name].steps += run_steps(model, step, token, count)
                        profile_steps(model, step, token, count, timings[name])
            for name, timing in timings.items():
                matmul, rest = timing.matmul, timing.rest
                rows.append([f"{make.name}, B={batch}, {name}", ms(timing.step), ms(matmul), ms(rest)])
                notes.append(f"{make.name}, B={batch}, {name}: {timing.biggest()}")
            stock, ours = timings[STOCK], timings[OURS]
            ratios = (stock.step / ours.step, stock.matmul / ours.matmul, stock.rest / ours.rest)
            rows.append(["  stock / fi_ops", *(f"{ratio:.1f} x" for ratio in ratios)])
            progress(f"{make.name}, batch {batch}: {' '.join(rows[-1]).strip()}")
        del model
    print()
    print_table(["one decode step, ms", "whole step", "matmuls", "the rest"], rows)
    print(
        "\nmatmuls: the operators that multiply with weights, by torch.profiler. The rest: the profiled step less that;"
        "\nit is attention, RoPE, cache writes and sampling, and also the norms, SwiGLU, embedding and call overhead"
        "\nthat both sides have. Lower quartiles of steps taken in turns. Largest in the rest:"
    )
    for note in notes:
        print(f"  {note}")
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["checkpoint", "real-shape"], help="one of the two parts")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    threads, isa = torch.get_num_threads(), fi_ops.cpu_isa()
    print(f"torch {torch.__version__}, fi_ops {fi_ops.__version__} ({isa} kernels), {threads} threads")
    print(f"{STOCK}: stock. {OURS}: the same torch.compile of the same model, after fi_ops.enable()")
    ok = True
    with torch.no_grad():
        if args.only != "real-shape":
            ok &= checkpoint_demo()
        if args.only != "checkpoint":
            ok &= real_shape_demo()
    progress("done" if ok else "done, but the two sides DISAGREE (see above)")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
