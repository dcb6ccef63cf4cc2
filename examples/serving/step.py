"""The one step: tokens of any requests in, one sampled token a request out. Compiled once for each of a few sizes.

A size is a number of tokens and of requests; what a step does not fill is padding, which the ops leave out (its tokens belong
to no request, its requests have no tokens). Everything that changes from step to step is in the contents of tensors: lengths,
the page table, sampling parameters, random seeds. The plan of attention is made of them on the device, inside the step. So on
CUDA the step is captured in a graph, and a step costs the host one copy and one launch.
"""

from __future__ import annotations

import time
import types
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

import fi_ops

from .model import Llama, PagedBatch, new_caches

INT, FLOAT, LONG = torch.int32, torch.float32, torch.int64


@dataclass
class Row:
    """A request's part of a step."""

    tokens: Sequence[int]
    pages: array  # 'i': those of the `kv_len` tokens that it has in the cache behind this step
    kv_len: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    drawn: int = 0  # tokens drawn so far: seed and this make the random number


class Inputs:
    """The small tensors of a step, in one buffer on the host (pinned) and one on the device, so that one copy brings all."""

    def __init__(self, tokens: int, requests: int, pages: int, device: str) -> None:
        shapes = {
            "tokens": (INT, tokens), "qo_indptr": (INT, requests + 1), "kv_indptr": (INT, requests + 1),
            "kv_last_page_len": (INT, requests), "temperature": (FLOAT, requests), "top_k": (INT, requests),
            "top_p": (FLOAT, requests), "min_p": (FLOAT, requests), "seed": (LONG, requests), "drawn": (LONG, requests),
            "kv_indices": (INT, pages),
        }  # fmt: skip
        places, end = {}, 0
        for name, (dtype, count) in shapes.items():
            places[name] = (end, dtype, count)
            end += -(-count * dtype.itemsize // 64) * 64  # aligned as an allocation of its own would be
        on_cuda = torch.device(device).type == "cuda"
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=on_cuda)
        self._device = torch.zeros(end, dtype=torch.uint8, device=device) if on_cuda else self._host
        self._table_begins = places["kv_indices"][0]

        def views(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: buffer[at : at + n * d.itemsize].view(d) for name, (at, d, n) in places.items()}

        self.host, self.device = views(self._host), views(self._device)

    def fill(self, rows: Sequence[Row], page_size: int) -> None:
        """Requests behind the last row get no tokens and no pages."""
        tokens: list[int] = []
        qo_indptr, kv_indptr, table = [0], [0], bytearray()
        for row in rows:
            tokens += row.tokens
            qo_indptr.append(len(tokens))
            kv_indptr.append(kv_indptr[-1] + len(row.pages))
            table += row.pages
        requests = len(self.host["top_k"])
        self._put("tokens", tokens)
        self._put("qo_indptr", qo_indptr + [qo_indptr[-1]] * (requests - len(rows)))
        self._put("kv_indptr", kv_indptr + [kv_indptr[-1]] * (requests - len(rows)))
        last = [(row.kv_len - 1) % page_size + 1 for row in rows]
        self._put("kv_last_page_len", last + [0] * (requests - len(rows)))
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "drawn"):
            self._put(name, [getattr(row, name) for row in rows])
        if table:
            self.host["kv_indices"][: kv_indptr[-1]] = torch.frombuffer(table, dtype=INT)
        if self._device is not self._host:
            used = self._table_begins + len(table)
            self._device[:used].copy_(self._host[:used], non_blocking=True)

    def _put(self, name: str, values: list) -> None:
        tensor = self.host[name]
        tensor[: len(values)] = torch.tensor(values, dtype=tensor.dtype)


class Step:
    """The compiled step of a model, over the caches that it owns.

    Args:
        sizes: numbers of tokens to compile for; a step takes the smallest that holds its own.
        max_requests: rows of a step at the most.
        max_pages: pages of all rows together at the most (shared ones counted each time).
        compiled: False runs the model eagerly (on CUDA still captured in graphs).
    """

    def __init__(
        self, model: Llama, *, num_pages: int, page_size: int, kv_dtype: torch.dtype, sizes: Iterable[int],
        max_requests: int, max_pages: int, compiled: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.page_size = model, page_size
        self.device = model.cos_sin.device.type
        self.caches = new_caches(model.config, num_pages, page_size, kv_dtype, self.device)
        self.sizes, self.max_requests = sorted(sizes), max_requests
        self.inputs = Inputs(self.sizes[-1], max_requests, max_pages, self.device)
        self._compiled = compiled
        self._steps: dict[int, Callable[[], torch.Tensor]] = {}
        # Scratch of all graphs, which never run at once.
        self._pool = torch.cuda.graph_pool_handle() if self.device == "cuda" else None

    def prepare(self, say: Callable[[str], object] = lambda text: None) -> None:
        """Compile, and on CUDA capture, all sizes: nothing is compiled from then on."""
        for size in reversed(self.sizes):  # the largest first: the others find its scratch large enough
            began = time.monotonic()
            self._step_of(size)
            say(f"step of {size} tokens ready in {time.monotonic() - began:.1f} s")

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, destination) in all layers."""
        source, destination = torch.tensor(pairs, dtype=INT, device=self.device).t().contiguous()
        for k_cache, v_cache in self.caches:
            torch.ops.fi.copy_pages(k_cache, v_cache, source, destination)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> list[int]:
        """One token for each row, drawn from the logits of its last token."""
        self.inputs.fill(rows, self.page_size)
        count = sum(len(row.tokens) for row in rows)
        size = next(size for size in self.sizes if size >= count)
        return self._step_of(size)()[: len(rows)].tolist()

    def _step_of(self, size: int) -> Callable[[], torch.Tensor]:
        if size not in self._steps:
            self._steps[size] = self._make(size)
        return self._steps[size]

    def _make(self, size: int) -> Callable[[], torch.Tensor]:
        """The step of `size` tokens (and as many requests at the most) as a call without arguments."""
        inputs, model, caches = self.inputs.device, self.model, self.caches
        requests, page_size = min(size, self.max_requests), self.page_size
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        tokens, kv_indices = inputs["tokens"][:size], inputs["kv_indices"]
        qo_indptr, kv_indptr = inputs["qo_indptr"][: requests + 1], inputs["kv_indptr"][: requests + 1]
        last, temperature, top_k, top_p, min_p, seed, drawn = (
            inputs[name][:requests]
            for name in ("kv_last_page_len", "temperature", "top_k", "top_p", "min_p", "seed", "drawn")
        )

        def step() -> torch.Tensor:
            seq_lens = torch.ops.fi.get_seq_lens(kv_indptr, last, page_size)
            batch_indices, positions = torch.ops.fi.get_batch_indices_positions(qo_indptr, seq_lens, size)
            plan = torch.ops.fi.batch_attention_plan(qo_indptr, kv_indptr, last, size, group, page_size, causal=True)
            batch = PagedBatch(qo_indptr, kv_indices, kv_indptr, last, batch_indices, positions, plan)
            logits = model(tokens, batch, caches)
            return fi_ops.top_k_top_p_sampling_from_logits(
                logits, top_k, top_p, temperature=temperature, min_p=min_p, seed=seed, offset=drawn
            )

        call = _compiled(step) if self._compiled else step
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="fi_ops.enable"
            )  # what was compiled before stays as it is: meant so
            with fi_ops.enabled():
                if self.device == "cuda":
                    return _captured(call, self._pool)
                if self._compiled:
                    call()  # compiles; a step that is run twice does the same twice
        return call


def _compiled(step: Callable) -> Callable:
    """`torch.compile(step)`, with a code object of its own: Dynamo keeps what it compiles by code object, and a limit for each."""
    own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def _captured(call: Callable, pool) -> Callable[[], torch.Tensor]:
    """The call as a CUDA graph; whatever it does first (compiling, loading kernels) is done before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay
