"""Tokens to text, as they come: a piece is out as soon as nothing behind it can change it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTEXT = 4  # tokens of the prompt that decoding starts with: some tokenizers decode a first token differently


def load_tokenizer(directory: Path) -> Any:
    """`tokenizer.json` of a checkpoint, by the tokenizers package (which comes with transformers)."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{directory} has no tokenizer.json; save the checkpoint's fast tokenizer there")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RuntimeError("serving text needs tokenizers; pip install safetensors tokenizers") from None
    return Tokenizer.from_file(str(path))


class TextStream:
    """The text of one completion. Held back: bytes of an unfinished character, and what may become a stop string."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-CONTEXT:])
        self._begin, self._read = 0, len(self._ids)  # decoded from `begin` on, out up to `read`
        self._held = ""
        self.stopped = False  # by a stop string, which is not part of the text

    def push(self, token: int) -> str:
        """The text that is new with this token, without what is held back."""
        self._ids.append(token)
        return self._filtered(self._decoded(final=False))

    def finish(self) -> str:
        """What was held back."""
        text = self._filtered(self._decoded(final=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decoded(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._begin : self._read])
        after = self._tokenizer.decode(self._ids[self._begin :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _filtered(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
