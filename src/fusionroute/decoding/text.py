"""Ids to text as they come: whole characters, and nothing that a stop string will take back."""

from collections.abc import Sequence
from typing import Any


class TextPieces:
    """Text of one row's new tokens, piece by piece.

    Args:
        tokenizer: what decodes.
        stops: strings that end the text; they may span tokens and are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.ids: list[int] = []
        self.start = 0  # ids before it are wholly decoded
        self.decoded = ""  # text of the ids since `start`
        self.held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that `token` completes; `stopped` says whether a stop string ended it."""
        piece = self._decode(token, last)
        if not self.stops:
            return piece
        self.held += piece
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self.held = self.held[: min(found)], ""
            return piece
        keep = 0 if last else max(_overlap(self.held, stop) for stop in self.stops)
        at = len(self.held) - keep
        piece, self.held = self.held[:at], self.held[at:]
        return piece

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        piece, self.held = self.held, ""
        return piece

    def _decode(self, token: int, last: bool) -> str:
        """The characters that `token` completes; held back while the text ends inside one."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:
            return ""
        piece = text[len(self.decoded) :]
        # Decoding goes on from the last whole token, since some tokenizers drop a leading space.
        self.start, self.decoded = len(self.ids) - 1, self.tokenizer.decode([token], skip_special_tokens=True)
        return str(piece)


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` begin `stop`."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
