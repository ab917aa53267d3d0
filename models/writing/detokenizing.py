"""Tokens to text while they come: every piece is final, and the pieces joined are the text of the whole.

A token may end inside a character, and what a decoder says of a token may depend on those before it. So the text of a
token is the difference between two decodings with a few tokens of context, and what ends in half a character is held
back until the rest is here. White space around the whole is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"


class TextStream:
    """The text of one answer. `decode` turns token ids into text, without special tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # where the tokens begin that are decoded as context
        self._told = 0  # where the tokens begin whose text is not told yet
        self._space = ""  # white space that may turn out to be at the end
        self._begun = False

    def push(self, ids: Sequence[int]) -> str:
        """The next tokens. Returns the text that is certain by now, which may be none."""
        self._ids += ids
        known = self._decode(self._ids[self._context : self._told])
        text = self._decode(self._ids[self._context :])
        if text.endswith(_HALF) or len(text) <= len(known):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return self._trimmed(text[len(known) :])

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        known = self._decode(self._ids[self._context : self._told])
        text = self._decode(self._ids[self._context :])
        self._context = self._told = len(self._ids)
        return self._trimmed(text[len(known) :])

    def _trimmed(self, text: str) -> str:
        """White space at the beginning is dropped; white space at the end waits for a word behind it."""
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        text = self._space + text
        told = text.rstrip()
        self._space = text[len(told) :]
        return told
