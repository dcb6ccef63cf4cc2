"""One line about the engine: in place on a terminal, else a line every ten seconds while it works."""

from __future__ import annotations

import sys
import time

from .engine import Engine, Stats


class StatusLine:
    """`update()` after each step (and when there is none to run); writes at most twice a second."""

    def __init__(self, engine: Engine, out=sys.stderr) -> None:
        self.engine, self._out = engine, out
        self._in_place = out.isatty()
        self._every = 0.5 if self._in_place else 10.0
        self._last, self._tokens, self._width = time.monotonic(), (0, 0), 0
        self._idle = False

    def update(self) -> None:
        now, idle = time.monotonic(), self.engine.unfinished == 0
        if now - self._last < self._every and not (idle and self._in_place and not self._idle):
            return
        stats, seconds = self.engine.stats, max(now - self._last, 1e-6)
        tokens = (stats.generated_tokens, stats.computed_tokens)
        if tokens != self._tokens or not self._idle:
            generated, computed = ((new - old) / seconds for new, old in zip(tokens, self._tokens, strict=True))
            self._write(describe(self.engine, generated, computed))
        self._last, self._tokens, self._idle = now, tokens, idle

    def _write(self, line: str) -> None:
        if self._in_place:
            self._out.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._out.write(line + "\n")
        self._out.flush()

    def close(self) -> None:
        if self._in_place and self._width:
            self._out.write("\n")


def describe(engine: Engine, generated: float, computed: float) -> str:
    """running, waiting, tokens a second, pages, what the prefix cache gave, preemptions."""
    stats, pool = engine.stats, engine.pool
    parts = [
        f"running {len(engine.running):3d}",
        f"waiting {len(engine.waiting):3d}",
        f"{generated:7.0f} tokens/s out, {computed:7.0f} computed",
        f"pages {pool.used}/{pool.num_pages}",
        f"prefix hits {100 * hit_rate(stats):.0f}%",
        f"done {stats.finished}",
    ]
    return "  ".join(parts + ([f"preempted {stats.preempted}"] if stats.preempted else []))


def hit_rate(stats: Stats) -> float:
    """Tokens of prompts that were in the cache, of all that started."""
    return stats.shared_tokens / max(stats.prompt_tokens, 1)
