"""Collab: at every token each expert's candidates, rolled out by that expert and scored by a reward model.

A baseline of the paper's Table 1 (Chakraborty et al., arXiv 2503.21720). The token taken is that of the best rollout;
with α above 0 a rollout also pays for how far its expert strays from a reference expert, by the one-sample estimate
`Σ log π_expert − log π_reference` over candidate and rollout. Candidates share the keys and values of the text before
them; where all experts propose one and the same token nothing is rolled out, for there is nothing to choose.

It takes and gives what the engine does (`submit`, `step`, `abandon`), so whatever drives the engine drives it. Knows no
task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fusionroute.decoding.members import Job, Members
from fusionroute.decoding.rows import ALL, Event, Request
from fusionroute.decoding.text import TextPieces
from fusionroute.errors import FusionRouteError, UsageError, require
from fusionroute.fusion import TokenTrace

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


class Reward(Protocol):
    """How good answers so far are."""

    def __call__(self, row: int, prompt: str, answers: Sequence[str]) -> Sequence[float]:
        """Of several beginnings of one row's answer."""

    def forget(self, row: int) -> None:
        """The row has ended."""


@dataclass(frozen=True)
class CollabSettings:
    """The knobs.

    Attributes:
        candidates: tokens that each expert proposes at most, its likeliest.
        top_p: and no more than reach this probability together.
        rollout: tokens that the expert writes after a candidate, greedily.
        alpha: weight of the distance to the reference; 0 is the reward alone.
        reference: the expert that distances are to; None is the first. Not run if `alpha` is 0.
    """

    candidates: int = 3
    top_p: float = 0.9
    rollout: int = 8
    alpha: float = 0.0
    reference: str | None = None

    def __post_init__(self) -> None:
        rules = {
            "candidates must be at least 1": self.candidates >= 1,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "rollout must be at least 0": self.rollout >= 0,
            "alpha must be at least 0": self.alpha >= 0,
        }
        require(self, rules, "collab: ")


@dataclass(frozen=True, kw_only=True)
class TextRequest(Request):
    """A request whose prompt's text the reward model reads."""

    text: str


@dataclass
class _Candidate:
    """One expert's proposal and what that expert writes after it; `number` is its row in the members' caches."""

    expert: int
    row: int
    number: int
    token: int
    ids: list[int]  # of the whole row, and the rollout
    divergence: float  # log π_expert − log π_reference, of the proposal and then summed over the rollout
    logprobs: list[float] = field(default_factory=list)  # the expert's, of the rollout's tokens


def _disputed(contest: Sequence[_Candidate]) -> bool:
    """Whether different tokens are proposed."""
    return len({candidate.token for candidate in contest}) > 1


class _Row:
    def __init__(self, number: int, request: TextRequest, limit: int, tokenizer: Any) -> None:
        self.number, self.request, self.limit = number, request, limit
        self.ids = list(request.prompt)
        self.text = TextPieces(tokenizer, request.stop)


class Collab:
    """Decodes with the experts of a collection, without its router.

    Args:
        reward: scores candidates.
        members: the collection's members in their pools, to share an idle engine's.
    """

    waiting: tuple[()] = ()  # every row begins with the next step

    def __init__(
        self,
        model: "FusionRouteForCausalLM",
        tokenizer: Any,
        reward: Reward,
        settings: CollabSettings | None = None,
        *,
        members: Members | None = None,
    ) -> None:
        self.settings = settings or CollabSettings()
        self.tokenizer, self.reward = tokenizer, reward
        self.members = Members(model) if members is None else members
        self.device = model.device
        self.names = model.config.expert_names
        self.context: int = model.config.max_position_embeddings
        ends = model.generation_config.eos_token_id
        self.ends = frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
        reference = self.settings.reference
        self.reference = 0 if reference is None else model.config.expert_index(reference)
        self.active: list[_Row] = []
        self._numbers = 0

    def submit(self, request: TextRequest) -> int:
        """Add a row and return its number.

        Raises:
            UsageError: an empty prompt, or one that leaves no room in the context.
        """
        if not len(request.prompt):
            raise UsageError("the prompt has no token")
        # A rollout may reach beyond the row's own end.
        room = self.context - self.settings.rollout - 1
        if len(request.prompt) >= room:
            raise UsageError(f"the prompt has {len(request.prompt)} tokens, the context and a rollout leave {room}")
        limit = min(len(request.prompt) + request.max_new_tokens, room)
        row = _Row(self._next_number(), request, limit, self.tokenizer)
        self.active.append(row)
        return row.number

    def abandon(self) -> None:
        """Drop every row, as after a step that failed."""
        for row in self.active:
            self.reward.forget(row.number)
        self.active.clear()
        self.members.reset()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance every row by one token."""
        rows = list(self.active)
        if not rows:
            return []
        n = len(self.names)
        logprobs = self._logprobs([Job(e + 1, row.number, row.ids, 1) for row in rows for e in range(n)])
        events = []
        contests = [self._candidates(row, logprobs[i * n : (i + 1) * n]) for i, row in enumerate(rows)]
        self._roll_out([c for contest in contests if _disputed(contest) for c in contest])
        for place, (row, contest) in enumerate(zip(rows, contests, strict=True)):
            values = self._values(row, contest)
            if all(map(math.isfinite, values)):
                chosen = contest[max(range(len(contest)), key=lambda i: (values[i], -i))]
                own = int(logprobs[place * n + chosen.expert].argmax())
                events.append(self._take(row, chosen, contest, values, own))
            else:
                error = FusionRouteError(f"the reward model's scores are {values}")
                events.append(Event(row.number, finish="error", error=error))
                self._retire(row)
            for candidate in contest:
                self.members.release(candidate.number)
        return events

    def _values(self, row: _Row, contest: Sequence[_Candidate]) -> list[float]:
        """What each candidate is worth; 0 where all are the same token, and nothing was rolled out."""
        if not _disputed(contest):
            return [0.0] * len(contest)
        rewards = self.reward(row.number, row.request.text, [self._answer(row, c.ids) for c in contest])
        alpha = self.settings.alpha
        return [r - alpha * c.divergence if alpha else r for r, c in zip(rewards, contest, strict=True)]

    def _next_number(self) -> int:
        # Below zero, where no engine has rows.
        self._numbers -= 1
        return self._numbers

    def _logprobs(self, jobs: Sequence[Job]) -> Tensor:
        """Log-probabilities `[positions, V]` of the jobs' wanted positions, end to end."""
        hidden = self.members.run(jobs)
        logits = self.members.logits([(job.member, h) for job, h in zip(jobs, hidden, strict=True)])
        return torch.cat(logits).float().log_softmax(-1)

    def _candidates(self, row: _Row, logprobs: Tensor) -> list[_Candidate]:
        """What each expert proposes, given its log-probabilities `[n, V]`: its likeliest tokens first."""
        settings, found = self.settings, []
        for expert in range(len(self.names)):
            values, tokens = logprobs[expert].topk(settings.candidates)
            before = values.exp().cumsum(-1) - values.exp()
            for value, token, mass in zip(values.tolist(), tokens.tolist(), before.tolist(), strict=True):
                if mass < settings.top_p:
                    divergence = value - float(logprobs[self.reference, token])
                    found.append(
                        _Candidate(expert, row.number, self._next_number(), token, [*row.ids, token], divergence)
                    )
        return found

    def _roll_out(self, candidates: Sequence[_Candidate]) -> None:
        """Let each candidate's expert go on from it, and compare with the reference if that counts."""
        starts = {c.number: len(c.ids) for c in candidates}
        for candidate in candidates:
            for expert in {candidate.expert, self.reference if self.settings.alpha else candidate.expert}:
                self.members.fork(expert + 1, candidate.row, candidate.number)
        for _ in range(self.settings.rollout):
            going = [c for c in candidates if c.ids[-1] not in self.ends]
            if not going:
                break
            logprobs = self._logprobs([Job(c.expert + 1, c.number, c.ids, 1) for c in going])
            best = logprobs.max(dim=-1)
            for candidate, value, token in zip(going, best.values.tolist(), best.indices.tolist(), strict=True):
                candidate.ids.append(token)
                candidate.logprobs.append(value)
        if not self.settings.alpha:
            return
        judged = [c for c in candidates if c.expert != self.reference and c.logprobs]
        if not judged:
            return
        keeps = [len(c.ids) - starts[c.number] for c in judged]
        found = self._logprobs(
            [Job(self.reference + 1, c.number, c.ids[:-1], keep) for c, keep in zip(judged, keeps, strict=True)]
        )
        for candidate, keep, part in zip(judged, keeps, found.split(keeps), strict=True):
            tokens = torch.tensor(candidate.ids[-keep:], device=part.device).unsqueeze(-1)
            candidate.divergence += sum(candidate.logprobs) - float(part.gather(-1, tokens).sum())

    def _answer(self, row: _Row, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids[len(row.request.prompt) :], skip_special_tokens=True))

    def _take(
        self, row: _Row, chosen: _Candidate, contest: Sequence[_Candidate], values: Sequence[float], own: int
    ) -> Event:
        """The row's next token, and its end if this is it."""
        token = chosen.token
        event = Event(row.number)
        row.ids.append(token)
        if token in self.ends:
            event.finish = "stop"
        else:
            last = len(row.ids) >= row.limit
            best = [
                max((v for v, c in zip(values, contest, strict=True) if c.expert == e)) for e in range(len(self.names))
            ]
            event.tokens.append(
                TokenTrace(
                    id=token,
                    text=row.text.push(token, last=last),
                    expert=self.names[chosen.expert] if _disputed(contest) else ALL,
                    weights=dict(zip(self.names, torch.tensor(best).softmax(-1).tolist(), strict=True)),
                    expert_choice=own,
                    router_choice=token,  # there is no router: the reward model decides
                    fused_choice=token,
                    overruled=token != own,
                    gap=0.0,
                )
            )
            if row.text.stopped:
                event.finish = "stop"
            elif last:
                event.finish = "length"
        if event.finish is not None:
            event.tail = "" if row.text.stopped else row.text.flush()
            self._retire(row)
        return event

    def _retire(self, row: _Row) -> None:
        self.active.remove(row)
        self.members.release(row.number)
        self.reward.forget(row.number)
