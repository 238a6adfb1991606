"""Rows in, one step for all of them, rows out: the fast way to the tokens that `modeling.py` defines.

A step advances every active row by at least one token. The router runs over what it has not seen, drafted tokens
included; of the experts only those that a row is routed to run, and they catch up and see the new tokens in one pass.
What a row emits is drawn from the fused logits at each position (Eq. 1); a drafted token is kept when it is what was
drawn, so drafts, batches and the order of rows change nothing. Rows join and leave between steps, within a budget of
KV memory. Knows ids and a tokenizer's text; nothing of HTTP.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from fusionroute import fusion
from fusionroute.decoding.budget import KVBudget
from fusionroute.decoding.drafting import Drafter, RouterDraft
from fusionroute.decoding.emitting import Drawn, emit
from fusionroute.decoding.fused import Span, fused_logits
from fusionroute.decoding.members import Job, Members
from fusionroute.decoding.pace import Acceptance, CostModel, FastestMode
from fusionroute.decoding.passes import Mode, behind, beside_router, chosen, guesses
from fusionroute.decoding.prefixes import Prefixes
from fusionroute.decoding.rows import Block, Completion, Event, Finish, Request, Row
from fusionroute.decoding.sampling import draw
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.fusion import TokenTrace

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


class Engine:
    """Decodes with a collection.

    Args:
        model: the collection.
        tokenizer: decodes the traces' text and finds stop strings; None leaves text empty.
        mode: which experts run in the router's pass; `auto` takes what is measured to be fastest.
        members: the collection's members in their pools, to share them with another engine that is idle meanwhile, or
            to run adapters from merged copies (`Members(model, separate=True)`).
        drafter: who proposes tokens; None proposes none.
        draft_length: tokens of a draft.
        kv_budget: bytes of keys and values on each device, else rows wait. None takes half of what is free there.
        reuse: keep what was read for rows that have ended, in what the budget has left, for rows that begin alike.

    Raises:
        UsageError: an unknown mode or drafts of no token; a drafter, or reuse, for a member whose cache cannot take
            tokens back.
    """

    def __init__(
        self,
        model: "FusionRouteForCausalLM",
        tokenizer: Any = None,
        *,
        mode: Mode = "auto",
        members: Members | None = None,
        drafter: Drafter | RouterDraft | None = None,
        draft_length: int = 8,
        kv_budget: int | None = None,
        reuse: bool = False,
    ) -> None:
        if mode not in get_args(Mode):
            raise UsageError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
        if draft_length < 1:
            raise UsageError(f"draft_length must be at least 1, not {draft_length}")
        self.model, self.tokenizer = model, tokenizer
        self.members = Members(model) if members is None else members
        self.context: int = model.config.max_position_embeddings
        ends = model.generation_config.eos_token_id
        self.ends = frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
        self.names = model.config.expert_names
        self.drafter, self.draft_length = drafter, draft_length
        if (drafter is not None or reuse) and not self.members.rewindable:
            raise UsageError(
                "a member's cache cannot take tokens back, so nothing can be drafted or used again: "
                "leave the drafter and reuse out"
            )
        self.prefixes = Prefixes(self.members) if reuse else None
        self.budget = KVBudget(self.members, kv_budget)
        beside = any(beside_router(self.members, expert) for expert in range(len(self.names)))
        modes = ["predicted", "all"] if mode == "auto" and beside else ["lazy" if mode == "auto" else mode]
        # Drafts row by row pay or are not made; that they pay as a whole is measured too, as a mode of its own.
        drafting = [False] if drafter is None else [True, False]
        self.modes = FastestMode([(mode, drafts) for mode in modes for drafts in drafting])
        self.costs = {mode: CostModel() for mode in modes}  # of a step, for the price of a draft
        self.draft_cost = CostModel()  # of a pass in which the router drafts
        self.acceptance = Acceptance(draft_length, decay=0.98)  # of all rows, where a new one starts
        self.max_rows: int | None = None  # at once; None is as many as the budget holds
        self.proposed = 0  # drafted tokens, since the start
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []
        self._inboxes: dict[int, deque[Event]] = {}  # of rows that `generate` or `stream` waits for
        self._numbers = 0

    # -------------------------------------------------------------------------------------------------- rows

    def submit(self, request: Request) -> int:
        """Queue a row and return its number.

        Raises:
            UsageError: what `Request.check` refuses, an unknown expert, more than the KV budget holds.
        """
        text = self.tokenizer is not None
        request.check(context=self.context, vocab_size=self.model.config.vocab_size, text=text)
        row = Row(self._numbers, request, self)
        if refusal := self.budget.refusal(self._need(row)):
            tokens = f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones"
            raise UsageError(f"{tokens} need {refusal}: ask for fewer, or raise the budget")
        self._numbers += 1
        self.waiting.append(row)
        return row.number

    def cancel(self, number: int) -> None:
        """Take a row out and free its memory; nothing if it has ended."""
        for row in [*self.waiting, *self.active]:
            if row.number == number:
                self._retire(row)

    def abandon(self) -> None:
        """Drop every active row and all that is kept of any: after a step that failed, no state is to be trusted."""
        self.active.clear()
        self.members.reset()
        if self.prefixes is not None:
            self.prefixes.shrink(0)

    def _need(self, row: Row) -> int:
        return row.limit + (0 if self.drafter is None else self.draft_length)

    def _retire(self, row: Row) -> None:
        if row in self.waiting:
            self.waiting.remove(row)
        else:
            self.active.remove(row)
            if self.prefixes is not None:
                # What stands at the last place may be a draft that was not kept.
                self.prefixes.keep(row.number, row.ids[:-1])
            self.members.release(row.number)
            if self.prefixes is not None:
                self.prefixes.shrink(self._room(self.active))

    def _admit(self) -> None:
        while self.waiting:
            full = self.max_rows is not None and len(self.active) >= self.max_rows
            if full or self._room([*self.active, self.waiting[0]]) < 0:
                return
            row = self.waiting.popleft()
            self.active.append(row)
            if self.prefixes is not None:
                self.prefixes.give(row.number, row.ids)
                self.prefixes.shrink(self._room(self.active))
            if self.drafter is not None and not isinstance(self.drafter, RouterDraft):
                row.draft = self.drafter.start()
                row.draft.extend(row.ids)

    def _room(self, rows: Sequence[Row]) -> int:
        """Bytes of the budget that these rows leave, once what is kept for others has made way."""
        return self.budget.room([self._need(row) for row in rows])

    # ------------------------------------------------------------------------------------------------- drains

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run the requests to their ends and return their answers in order.

        Raises:
            UsageError: a request that can never run; before any has.
            Exception: what a step raised; every row of the engine is dropped then.
        """
        wanted = list(requests)
        answers = [Completion() for _ in wanted]
        with closing(self._drain(wanted)) as events:
            for index, event in events:
                answers[index].add(event)
        return answers

    def stream(self, request: Request) -> Iterator[TokenTrace]:
        """Yield the trace of each new token; an end id ends the row and is not yielded.

        A token whose text may still go on comes with the one after it. Streams may be read by turns.

        Raises:
            UsageError: a request that can never run.
            FusionRouteError: the row was dropped, since a step that another waited for had failed.
            Exception: what the request's mask, or the step, raised.
        """
        kept: list[TokenTrace] = []
        finish: Finish | None = None
        with closing(self._drain([request])) as events:
            for _, event in events:
                kept += event.tokens
                if event.tail:
                    kept[-1] = replace(kept[-1], text=kept[-1].text + event.tail)
                ready = len(kept) - event.withheld
                yield from kept[:ready]
                del kept[:ready]
                finish = event.finish
                if event.error is not None:
                    raise event.error
        if finish is None:
            raise FusionRouteError("the answer is cut off: a step failed and every row was dropped; ask again")

    def _drain(self, requests: Sequence[Request]) -> Generator[tuple[int, Event], None, None]:
        """Run requests to their ends; yields (index of the request, what a step gave it).

        Others may step the engine meanwhile: what that gives these rows waits in their inbox. Rows that have not ended
        when the caller leaves, or when one is refused, are taken out; all rows are when a step fails.
        """
        inbox: deque[Event] = deque()
        indices: dict[int, int] = {}  # by row
        try:
            for index, request in enumerate(requests):
                number = self.submit(request)
                indices[number], self._inboxes[number] = index, inbox
            left = len(indices)
            while left and (inbox or self.waiting or self.active):
                if not inbox:
                    try:
                        self.step()
                    except BaseException:
                        self.abandon()
                        raise
                while inbox:
                    event = inbox.popleft()
                    left -= event.finish is not None
                    yield indices[event.row], event
        finally:
            for number in indices:
                del self._inboxes[number]
                self.cancel(number)

    # -------------------------------------------------------------------------------------------------- a step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance every active row, after admitting those that have room."""
        self._admit()
        if not self.active:
            return []
        visits, prompts = self.members.visits, any(not row.new for row in self.active)
        mode, drafting = self.modes.current(len(self.active))
        began = time.perf_counter()
        drafts = self._drafts(mode) if drafting else [([], [])] * len(self.active)
        blocks = [row.pending or Block(row, *drafted) for row, drafted in zip(self.active, drafts, strict=True)]
        missed, read = behind(self.members, blocks, mode), sum(self.members.tokens)
        started = time.perf_counter()
        undone = blocks
        while undone:
            self._run(undone, mode)
            self._decide(undone)
            undone = [block for block in undone if not block.done]
            if mode == "predicted":
                # A wrong guess waits for the next step's pass: one of its own would cost the other rows a token.
                break
        for block in blocks:
            block.row.pending = None if block.done else block
            if block.done:
                self._settle(block)
        ended = time.perf_counter()
        late = (ended - started) * missed / max(sum(self.members.tokens) - read, 1)
        self.modes.toll(len(blocks), late)
        # A prefill says nothing of what a step costs.
        if self.members.visits == visits and not prompts:
            tokens = sum(len(block.event.tokens) for block in blocks if block.done)
            self.modes.add((mode, drafting), len(blocks), tokens, ended - began - late)
            self.costs[mode].add(len(blocks), sum(len(drafted) for drafted, _ in drafts), ended - started)
        return [self._event(block) for block in blocks]

    def _event(self, block: Block) -> Event:
        """What the step gave the block's row, also into the inbox of whoever waits for it."""
        event, text = block.event if block.done else Event(block.row.number), block.row.text
        event.withheld = event.finish is None and text is not None and text.withholds
        if (inbox := self._inboxes.get(event.row)) is not None:
            inbox.append(event)
        return event

    def _drafts(self, mode: str) -> list[tuple[list[int], list[Tensor]]]:
        """A draft for each active row, possibly empty, and the router's hidden states if it made it."""
        count = len(self.active)
        price = self.costs[mode].price(count, self.draft_cost.seconds(count) / count)
        # A row that ends early leaves its place to one that waits. Where none does, and others go on, it saves its own
        # part of the steps that it need not take, and no step.
        worth = 1.0 if self.waiting or count == 1 else self.costs[mode].share(count)
        counts = [
            0 if row.pending else min(row.acceptance.count(price, worth), row.limit - len(row.ids) - 1)
            for row in self.active
        ]
        if isinstance(self.drafter, RouterDraft):
            started, visits = time.perf_counter(), self.members.visits
            made = self.drafter.propose(self.members, self.active, counts)
            passes = max(len(drafts) for drafts, _ in made)
            if passes and self.members.visits == visits:
                rows = sum(len(drafts) for drafts, _ in made) / passes
                self.draft_cost.add(rows, 0, (time.perf_counter() - started) / passes)
            return made
        return [
            (row.draft.propose(count) if row.draft is not None and count > 0 else [], [])
            for row, count in zip(self.active, counts, strict=True)
        ]

    def _run(self, blocks: Sequence[Block], mode: str) -> None:
        """One pass: the router over the blocks that it has not seen, with experts that are likely to be chosen; of the
        others, the experts that were."""
        jobs: list[Job] = []
        owners: list[tuple[Block, int | None, int]] = []
        for block in blocks:
            row, begun = block.row, block.begun
            block.begun = True
            if row.routed and not begun:
                jobs.append(Job(0, row.number, block.ids, block.count - len(block.held)))
                owners.append((block, None, 0))
            for expert, start, end in chosen(self.members, block) if begun else guesses(self.members, block, mode):
                jobs.append(Job(expert + 1, row.number, block.ids[: block.first + end], end - start + 1))
                owners.append((block, expert, start))
        for (block, owner, start), hidden in zip(owners, self.members.run(jobs), strict=True):
            if owner is None:
                block.router = torch.cat([*block.held, hidden])
            else:
                block.experts[owner] = (start, hidden)
        routed = [block for block, owner, _ in owners if owner is None]
        if routed:
            scores = self.model.router.route_head(torch.cat([block.router for block in routed]))  # type: ignore[misc]
            routes = fusion.route(scores).tolist()
            at = 0
            for block in routed:
                block.scores = scores[at : at + block.count]
                block.decide(routes[at : at + block.count])
                at += block.count

    def _decide(self, blocks: Sequence[Block]) -> None:
        """Draw at every position whose expert has run, until a draft fails or the row ends."""
        spans: list[Span] = []
        for block in blocks:
            upto = block.at
            while upto < block.count and block.has(upto):
                upto += 1
            if upto > block.at:
                spans.append(Span(block, block.at, upto))
        for found in self._logits(spans):
            self._draw_all(*found)

    def _draw_all(self, spans: Sequence[Span], fused: Tensor, expert_logits: Tensor, router_logits: Tensor) -> None:
        choices = fused.argmax(dim=-1).tolist()
        drawn: list[Drawn] = []
        place = 0
        for block, start, upto in spans:
            for position in range(start, upto):
                where = place + position - start
                token = self._draw(block, position, fused[where], choices[where])
                if token is None:
                    break
                drawn.append(Drawn(block, position, where, token))
                block.at = position + 1
                if position == block.count - 1 or token != block.drafts[position] or token in block.row.ends:
                    block.done = True
                    break
                block.kept += 1
            place += upto - start
        emit(drawn, fused, expert_logits, router_logits, self.names)

    def _draw(self, block: Block, position: int, logits: Tensor, choice: int) -> int | None:
        row = block.row
        if row.request.sampling.greedy:
            return choice
        try:
            ids = block.ids[: block.first + position]
            return draw(logits, row.request.sampling, ids=ids, new=row.new + position, ends=row.ends)
        except Exception as error:  # of this row's own mask: the others go on
            block.failure, block.done = error, True
            return None

    def _logits(self, spans: Sequence[Span]) -> Iterator[tuple[Sequence[Span], Tensor, Tensor, Tensor]]:
        return fused_logits(self.members, spans)

    def _settle(self, block: Block) -> None:
        """Take the block's tokens into the row, lower watermarks to what is true, retire the row if it ended."""
        row, event = block.row, block.event
        if event.finish is None and block.failure is not None:
            event.finish, event.error = "error", block.failure
        tokens = [token.id for token in event.tokens]
        row.ids += tokens
        self.proposed += len(block.drafts)
        if event.finish is not None:
            event.tail = "" if row.text is None or row.text.stopped else row.text.flush()
            self._retire(row)
            return
        if block.drafts:
            for acceptance in (row.acceptance, self.acceptance):
                acceptance.add(block.kept, len(block.drafts))
            self.members.rewind(row.number, len(row.ids) - 1)
        if row.draft is not None:
            row.draft.extend(tokens)
        row.last_route = block.routes[block.at - 1]
