"""One row's life in the engine: what was asked, what is written so far, what one step decides, what comes out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fusionroute.configuration import ROUTER
from fusionroute.decoding.drafting import Draft
from fusionroute.decoding.pace import Acceptance
from fusionroute.decoding.sampling import Sampling
from fusionroute.decoding.text import TextPieces
from fusionroute.errors import UsageError, require
from fusionroute.fusion import TokenTrace

if TYPE_CHECKING:
    from fusionroute.configuration import FusionRouteConfig
    from fusionroute.decoding.engine import Engine

Finish = Literal["stop", "length", "error", "cancelled"]
ALL = "all"  # in the place of an expert's name, where none is chosen
ALONE = -1  # in the place of an expert's index, where the router writes alone; as a member its number is 0


@dataclass(frozen=True)
class Request:
    """One row to be: a prompt and how to go on from it.

    Attributes:
        prompt: ids, as `collection.encode_chat` gives them.
        stop: strings that end the text; they may span tokens.
        ignore_end: go on after an end id.
        alpha: weight of the complement; None takes the collection's.
        expert: always this expert, whatever the scores; `router` is the router alone.
        routing: `token`: a decision per token. `query`: one, at the prompt's end. `uniform`: none, the product of all
            experts, which traces call `all`.
        logprobs: that many likeliest alternatives with their log-probabilities at each token, of the fused distribution
            before temperature; 0 gives the emitted token's alone, None nothing.
        candidates: that many likeliest tokens of each side at each token; 0 is none.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    ignore_end: bool = False
    alpha: float | None = None
    expert: str | None = None
    routing: Literal["token", "query", "uniform"] = "token"
    logprobs: int | None = None
    candidates: int = 0

    def check(self, *, context: int, vocab_size: int, text: bool) -> None:
        """Refuse what can never run on a collection.

        Args:
            context: tokens that a row may have, prompt included.
            vocab_size: ids that the members share.
            text: whether ids can be decoded, as stop strings need.

        Raises:
            UsageError: an empty prompt, no room in the context, ids outside the vocabulary, an unknown routing, numbers
                out of their ranges, stop strings without text.
        """
        if not len(self.prompt):
            raise UsageError("the prompt has no token")
        if len(self.prompt) >= context:
            raise UsageError(f"the prompt has {len(self.prompt)} tokens and the context {context}: shorten it")
        for what, ids in (("prompt", list(self.prompt)), ("bias", list(self.sampling.bias or [0]))):
            if not 0 <= min(ids) <= max(ids) < vocab_size:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise UsageError(f"the {what} has token id {wrong}, the members share {vocab_size} ids")
        rules = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "alpha must be finite": self.alpha is None or math.isfinite(self.alpha),
            "routing must be token, query or uniform": self.routing in ("token", "query", "uniform"),
            "logprobs must be at least 0": self.logprobs is None or self.logprobs >= 0,
            "candidates must be at least 0": self.candidates >= 0,
        }
        require(self, rules)
        if self.stop and not text:
            raise UsageError("stop strings need a tokenizer: give the engine one")


@dataclass(frozen=True)
class Logprobs:
    """Of one emitted token: its log-probability, and the likeliest (id, log-probability) pairs."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Candidates:
    """Where one token was drawn: the likeliest (id, log-probability) pairs of Eq. 1, the expert and the router."""

    fused: list[tuple[int, float]]
    expert: list[tuple[int, float]]
    router: list[tuple[int, float]]


@dataclass
class Event:
    """What one step gave one row: its new tokens, and why it ended if it did.

    `withheld` says that the last token's text may still go on: it ends within a character, or in what may begin a stop
    string. `tail` is what was so held back when the row ended; `end` the end id that ended it, which is not among its
    tokens, with its log-probability where those are asked for.
    """

    row: int
    tokens: list[TokenTrace] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    candidates: list[Candidates] = field(default_factory=list)
    finish: Finish | None = None
    error: Exception | None = None
    withheld: bool = False
    tail: str = ""
    end: tuple[int, Logprobs] | None = None


@dataclass
class Completion:
    """One whole answer; `tail` is text that was held back for a stop string that did not come, and has no token.

    `finish` is `cancelled` if the row was taken out before it ended.
    """

    tokens: list[TokenTrace] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    candidates: list[Candidates] = field(default_factory=list)
    finish: Finish = "cancelled"
    error: Exception | None = None
    tail: str = ""

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.tail

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def add(self, event: Event) -> None:
        """Take in what one step gave the row."""
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.candidates += event.candidates
        if event.finish is not None:
            self.finish, self.error, self.tail = event.finish, event.error, event.tail


class Row:
    """A sequence that is being written."""

    def __init__(self, number: int, request: Request, engine: "Engine") -> None:
        config = engine.model.config
        self.number, self.request = number, request
        self.ids = list(request.prompt)
        self.names = engine.names
        self.alpha = config.alpha if request.alpha is None else request.alpha
        self.expert = None if request.expert is None else _index(config, request.expert)
        if self.expert == ALONE:
            self.alpha = 0.0
        self.uniform = request.routing == "uniform" and self.expert is None
        self.routed = (self.expert is None and not self.uniform) or self.alpha != 0
        self.ends = frozenset() if request.ignore_end else engine.ends
        self.limit = min(len(self.ids) + request.max_new_tokens, engine.context)
        self.last_route = self.expert
        self.text = None if engine.tokenizer is None else TextPieces(engine.tokenizer, request.stop)
        self.draft: Draft | None = None
        self.acceptance = Acceptance(engine.draft_length, engine.acceptance)
        self.pending: Block | None = None  # begun in the last step, and still without the chosen expert

    @property
    def new(self) -> int:
        return len(self.ids) - len(self.request.prompt)


def _index(config: "FusionRouteConfig", expert: str) -> int:
    return ALONE if expert == ROUTER else config.expert_index(expert)


class Block:
    """What one step decides for one row: the token after each of its last tokens, drafted ones included.

    Position j decides token `first + j`; there are `len(drafts) + 1` positions.
    """

    def __init__(self, row: Row, drafts: list[int], held: Sequence[Tensor] = ()) -> None:
        self.row, self.drafts = row, drafts
        self.held = list(held)  # the router's hidden states [1, d] from drafting
        self.first = len(row.ids)
        self.ids = row.ids + drafts
        self.count = len(drafts) + 1
        self.router: Tensor | None = None  # hidden states [count, d]
        self.scores: Tensor | None = None  # [count, n]
        decided = row.uniform or row.expert is not None
        # A uniform row has no routes; what stands there is not read.
        self.routes: list[int] = [row.expert or 0] * self.count if decided else []
        self.experts: dict[int, tuple[int, Tensor]] = {}  # expert: (first position, hidden states from there on)
        self.at = 0
        self.begun = self.done = False
        self.kept = 0  # drafted tokens that were drawn
        self.failure: Exception | None = None
        self.event = Event(row.number)

    def decide(self, routes: list[int]) -> None:
        """Take the router's decisions, as far as the row's policy leaves them to it."""
        row = self.row
        if self.routes:
            return
        if row.request.routing == "query":
            # At the prompt's end, for the whole answer; without a complement the router is done.
            row.expert = routes[0]
            row.routed = row.alpha != 0
            routes = routes[:1] * self.count
        self.routes = routes

    def writer(self, position: int) -> str:
        """Who decides there, as traces say."""
        if self.row.uniform:
            return ALL
        route = self.routes[position]
        return ROUTER if route == ALONE else self.row.names[route]

    def running(self, position: int) -> list[int]:
        """The experts whose logits count at `position`: the chosen one, or all."""
        return sorted(self.experts) if self.row.uniform else [self.routes[position]]

    def has(self, position: int) -> bool:
        """Whether those experts have run at `position`."""
        if self.row.uniform:
            return bool(self.experts)
        found = self.experts.get(self.routes[position])
        return found is not None and found[0] <= position

    def hidden(self, expert: int, position: int) -> Tensor:
        """What the expert's LM head reads there, `[1, d]`."""
        first, states = self.experts[expert]
        return states[position - first : position - first + 1]
