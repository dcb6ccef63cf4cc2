"""The engine in a thread of its own; others ask it for what they want between two of its steps."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from .engine import Engine, Event

T = TypeVar("T")


class Stopped(RuntimeError):
    """The engine runs no more."""


class Worker:
    """Steps the engine while it has requests.

    Args:
        on_events: called in this thread with what a step did; with None when the engine runs no more.
        on_step: called in this thread after each step, and when it has nothing to do.
    """

    def __init__(
        self,
        engine: Engine,
        on_events: Callable[[list[Event] | None], object],
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.engine, self._on_events, self._on_step = engine, on_events, on_step
        self._calls: deque[tuple[Future, Callable]] = deque()
        self._wake, self._stop = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._stop

    def call(self, fn: Callable[[], T]) -> Future[T]:
        """Run fn in the engine's thread, before its next step."""
        future: Future[T] = Future()
        with self._wake:
            if self._stop:
                future.set_exception(Stopped("the engine has stopped"))
            else:
                self._calls.append((future, fn))
                self._wake.notify()
        return future

    def stop(self) -> None:
        with self._wake:
            self._stop = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._ready():
                if events := self.engine.step():
                    self._on_events(events)
                self._on_step()
        except Exception:
            traceback.print_exc()  # a fault of the engine: whoever waits is told, and it takes no more requests
        with self._wake:
            self._stop = True
            calls = list(self._calls)
            self._calls.clear()
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(Stopped("the engine has stopped"))
        self._on_events(None)

    def _ready(self) -> bool:
        """Do what was asked for; wait for more where there is nothing to do. False: stop."""
        with self._wake:
            if not (self._calls or self._stop or self.engine.unfinished):
                self._on_step()
                self._wake.wait()
            calls = list(self._calls)
            self._calls.clear()
        for future, fn in calls:
            if not future.set_running_or_notify_cancel():  # whoever asked has gone
                continue
            try:
                future.set_result(fn())
            except Exception as error:
                future.set_exception(error)
        return not self._stop
