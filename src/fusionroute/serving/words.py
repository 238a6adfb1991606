"""Single ids as text and as bytes, as log-probabilities show them."""

from functools import lru_cache
from typing import Any


class Words:
    """Ids of one tokenizer; what it is asked for once it remembers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
        self.byte_level = "ByteLevel" in str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
        self.bytes = lru_cache(maxsize=200_000)(self._bytes)

    def text(self, token: int) -> str:
        """The id's text; bytes that are no character by themselves as the protocol has them, `bytes:\\xe2\\x82`."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes(self, token: int) -> bytes:
        word = self.tokenizer.convert_ids_to_tokens(token)
        if word is None:
            return b""
        if word in self.special:
            return str(word).encode()
        if self.byte_level:
            table = _byte_level()
            return bytes(table[c] for c in word) if all(c in table for c in word) else str(word).encode()
        if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            return bytes([int(word[3:5], 16)])
        return str(word).replace("\u2581", " ").encode()


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for code points from 256 on."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in itself}
    others = [byte for byte in range(256) if byte not in itself]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
