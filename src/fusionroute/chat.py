"""What `fusionroute generate` and `chat` show: text coloured by expert as it comes, then one line of figures."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusionroute import collection as collections
from fusionroute.fusion import TokenTrace, overruled_rate, shares, switch_rate

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")


@dataclass(frozen=True)
class Answer:
    """One answer and who wrote it; `names` are those of the experts, `quantised` of those with rounded weights."""

    tokens: list[TokenTrace]
    names: list[str]
    seconds: float
    quantised: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """What `generate --json` prints."""
        return {
            "text": self.text,
            "tokens": [token.to_dict() for token in self.tokens],
            "shares": shares(self.tokens, self.names),
            "switch_rate": switch_rate(self.tokens),
            "overruled_rate": overruled_rate(self.tokens),
            "tokens_per_second": len(self.tokens) / self.seconds if self.tokens else 0.0,
            **({"quantised": self.quantised} if self.quantised else {}),
        }

    def summary(self) -> str:
        """One line: shares, switches, overruled, tokens/s."""
        data = self.to_dict()
        label = {name: f" ({form})" for name, form in self.quantised.items()}
        parts = "  ".join(f"{name}{label.get(name, '')} {share:.0%}" for name, share in data["shares"].items())
        return (
            f"{parts}  |  switches {data['switch_rate']:.0%}  overruled {data['overruled_rate']:.0%}  "
            f"{len(self.tokens)} tokens, {data['tokens_per_second']:.1f} tokens/s"
        )


class Session:
    """A loaded collection that answers.

    Args:
        collection: folder, Hub id or packaged name; None is the default.
        quiet: no line about loading.
        loading: arguments of `fusionroute.loading.load_engine`.
    """

    def __init__(self, collection: str | None, *, quiet: bool = False, **loading: Any) -> None:
        from rich.console import Console

        folder = collections.locate(collection)
        config = collections.read_config(folder)
        self.console = Console(highlight=False, soft_wrap=True)
        self.names = config.expert_names
        self.styles = dict(zip(self.names, COLOURS * (len(self.names) // len(COLOURS) + 1), strict=False))
        if not quiet:
            print(f"loading {collection or collections.DEFAULT}: {', '.join(self.names)}…", file=sys.stderr, flush=True)
        from fusionroute.loading import load_engine

        self.engine = load_engine(folder, **loading)

    def answer(self, messages: Sequence[dict[str, str]], settings: dict[str, Any], *, show: bool = True) -> Answer:
        """Answer the conversation, printing it as it comes if `show`; `settings` are those of `Request`.

        Raises:
            UsageError: as `Engine.submit`.
        """
        from rich.text import Text

        from fusionroute.decoding.rows import Request
        from fusionroute.members import quantised

        request = Request(collections.encode_chat(self.engine.tokenizer, messages), **settings)
        tokens: list[TokenTrace] = []
        started = time.monotonic()
        for token in self.engine.stream(request):
            tokens.append(token)
            if show:
                # The router alone is no expert and has no colour.
                self.console.print(Text(token.text, style=self.styles.get(token.expert, "")), end="")
        answer = Answer(tokens, self.names, time.monotonic() - started, quantised(self.engine.model.members))
        if show:
            self.console.print()
            legend = Text()
            for name in self.names:
                legend.append(f"■ {name}  ", style=self.styles[name])
            if self.console.is_terminal:
                self.console.print(legend, end="")
            self.console.print(Text(answer.summary(), style="dim"))
        return answer

    def talk(self, settings: dict[str, Any]) -> None:
        """A conversation on the terminal; the model sees all of it each turn."""
        messages: list[dict[str, str]] = []
        while True:
            try:
                line = self.console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if not line:
                return
            messages.append({"role": "user", "content": line})
            answer = self.answer(messages, settings)
            messages.append({"role": "assistant", "content": answer.text})
