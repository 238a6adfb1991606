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
        self.first = self.read = 0  # ids before `read` are written; those of the last piece begin at `first`
        self.held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    @property
    def withholds(self) -> bool:
        """Whether the text so far goes on: it ends within a character, or in what may begin a stop string."""
        return bool(self.held) or self.read < len(self.ids)

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that `token` completes; `stopped` says whether a stop string ended it."""
        piece = self._decode(token, last)
        if not self.stops:
            return piece
        self.held += piece
        # The first to be complete ends the text, wherever tokens are cut; of several at once the longest.
        found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self.held = self.held[: min(found)[1]], ""
            return piece
        keep = 0 if last else max(_overlap(self.held, stop) for stop in self.stops)
        at = len(self.held) - keep
        piece, self.held = self.held[:at], self.held[at:]
        return piece

    def flush(self) -> str:
        """What was held back: for a stop string that did not come, or of a character that was not finished."""
        piece, self.held = self.held + self._piece(), ""
        return piece

    def _decode(self, token: int, last: bool) -> str:
        """The characters that `token` completes; held back while the text ends inside one."""
        self.ids.append(token)
        piece = self._piece()
        if piece.endswith("\ufffd") and not last:
            return ""
        self.first, self.read = self.read, len(self.ids)
        return piece

    def _piece(self) -> str:
        """Text of the ids that are not written yet, decoded after the last piece.

        Some tokenizers drop the space of a first token, and some take neighbouring bytes together.
        """
        before = self.tokenizer.decode(self.ids[self.first : self.read], skip_special_tokens=True)
        text = self.tokenizer.decode(self.ids[self.first :], skip_special_tokens=True)
        return str(text[len(before) :])


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` begin `stop`."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
