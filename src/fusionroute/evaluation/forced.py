"""Teacher-forced figures of a collection on the benchmarks' reference answers: token by token, nothing is generated.

At each token of a reference every member says what it would write, in one pass each; from these logits come the chosen
expert, the best one, Eq. 1 and its sweep of α. Sums per item are measured and kept here; what they come to is in
`forced_figures`. Loads torch only to measure.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.benchmarks import CODE, Benchmark
from fusionroute.evaluation.extraction import unix_lines
from fusionroute.evaluation.forced_figures import swept
from fusionroute.evaluation.store import Store, key_of
from fusionroute.training.formats import strip_calculator_marks

if TYPE_CHECKING:
    from torch import Tensor

    from fusionroute.lm_head import Head
    from fusionroute.modeling import FusionRouteForCausalLM
    from fusionroute.training.data import Tokens

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
MAX_TOKENS = 300  # of a reference; what is longer is cut there, and the row says so


@dataclass(frozen=True)
class Reference:
    """A right answer, in the form that the training rows have.

    Attributes:
        given: how it begins with what the prompt already says, which is not measured.
        text: the rest, which is.
    """

    given: str
    text: str


def reference(task: str, raw: Mapping[str, Any]) -> Reference | None:
    """The reference answer of a benchmark's row; None if it has none, as in IFEval and the general prompts."""
    given = ""
    if task == "gsm8k":
        text = strip_calculator_marks(raw["answer"])
    elif task == "math500":
        text = raw["solution"] or ""
    elif task == "mbpp":
        text = unix_lines(raw["code"] or "")
    elif task == "humaneval":
        given, text = f"```python\n{unix_lines(raw['prompt']).lstrip()}", unix_lines(raw["canonical_solution"] or "")
    else:
        return None
    text = text.strip("\n").rstrip()
    if not text:
        return None
    if task in CODE:
        text = ("" if given else "```python\n") + text + "\n```"
    return Reference(given, text)


def plan(
    benchmarks: Sequence[Benchmark], identity: Mapping[str, Any], alpha: float, dtype: str | None
) -> dict[str, Any]:
    """What is to be measured, as JSON knows it: of every benchmark with references, the key of each item's row.

    Args:
        identity: of the system `fusionroute`; an α of `ALPHAS` is no part of the keys, since all of these are measured.
    """
    settings = {"max_tokens": MAX_TOKENS, "alphas": sorted({*ALPHAS, float(alpha)}), "dtype": dtype}
    tasks: dict[str, list[str | None]] = {}
    for task in benchmarks:
        wanted = [None if item.defect else reference(task.name, item.raw) for item in task.items]
        keys = [
            None
            if answer is None
            else key_of(
                "forced",
                identity["weights"],
                identity["text"],
                identity["vocab_size"],
                settings,
                item.prompt,
                answer.given,
                answer.text,
            )
            for item, answer in zip(task.items, wanted, strict=True)
        ]
        if any(keys):
            tasks[task.name] = keys
    without = [task.name for task in benchmarks if task.name not in tasks]
    return {**settings, "alpha": float(alpha), "tasks": tasks, "without_references": without}


def fill(
    planned: Mapping[str, Any],
    benchmarks: Sequence[Benchmark],
    store: Store,
    load: "Callable[[], tuple[FusionRouteForCausalLM, Any]]",
) -> None:
    """Measure the items that have no row yet. `load` gives the model and its tokenizer."""
    todo = {
        key: (task.name, item)
        for task in benchmarks
        for key, item in zip(planned["tasks"].get(task.name, ()), task.items, strict=False)
        if key is not None and store.get(key) is None
    }
    if not todo:
        return
    model, tokenizer = load()
    sequences: dict[str, Tokens] = {}
    cut: dict[str, bool] = {}

    def put(key: str, row: Mapping[str, Any]) -> None:
        task, item = todo[key]
        try:
            store.put(key, {"task": task, "item": item.id, "cut": cut.get(key, False), "error": None, **row})
        except FusionRouteError as error:
            print(f"teacher-forced, {task} {item.id}: {error}", file=sys.stderr)

    for key, (task, item) in todo.items():
        answer = reference(task, item.raw)
        assert answer is not None
        try:
            sequences[key], cut[key] = tokens_of(tokenizer, item.prompt, answer, model.config)
        except FusionRouteError as error:
            put(key, {"error": str(error)})
    try:
        for key, row in measure(model, sequences, planned["alphas"]):
            put(key, row)
    except FusionRouteError as error:
        print(f"teacher-forced figures: {error}", file=sys.stderr)


def tokens_of(tokenizer: Any, prompt: str, answer: Reference, config: Any) -> "tuple[Tokens, bool]":
    """The sequence that is measured, prompt and answer, and whether the answer was cut.

    The answer's end of turn belongs to it.

    Raises:
        FusionRouteError: the context has no room for a token of the answer.
    """
    from fusionroute.training.data import Tokens

    whole = _render(tokenizer, prompt, answer.given + answer.text)
    start = whole.start
    if answer.given:
        pairs = zip(whole.ids, _render(tokenizer, prompt, answer.given).ids, strict=False)
        start = next(place for place, (a, b) in enumerate(pairs) if a != b)
    end = min(len(whole.ids), start + MAX_TOKENS, config.max_position_embeddings or len(whole.ids))
    if end <= start:
        raise FusionRouteError(f"its prompt has {start} tokens and the context {config.max_position_embeddings}")
    if max(whole.ids[:end]) >= config.vocab_size:
        raise FusionRouteError(f"token id {max(whole.ids[:end])}: the members share {config.vocab_size} ids")
    return Tokens(whole.ids[:end], start), end < len(whole.ids)


def _render(tokenizer: Any, prompt: str, answer: str) -> "Tokens":
    from fusionroute.collection import encode_chat
    from fusionroute.training.data import Tokens, tokenize_turns

    user = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is not None:
        return tokenize_turns(tokenizer, user, [{"role": "assistant", "content": answer}])
    head = encode_chat(tokenizer, user)
    ids = [*head, *tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Tokens(tuple(ids), len(head))


def measure(
    model: "FusionRouteForCausalLM", sequences: "Mapping[str, Tokens]", alphas: Sequence[float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure sequences, those of like length together, and yield each one's row with its key.

    A row holds `tokens`, `disagree` (those at which the experts' first choices differ), and by figure the sums over
    all of them, `sums`, and over those at which they differ, `sums_disagree`; see `token_values`. One whose sums are
    not finite has an `error` instead.

    Raises:
        FusionRouteError: a member's architecture treats its logits in a way that is not known here.
    """
    from fusionroute.lm_head import Head
    from fusionroute.progress import Meter
    from fusionroute.training.annotation import batches

    heads = [Head(member.model, model.config.vocab_size) for member in model.members]
    for member, head in zip(model.members, heads, strict=True):
        member.activate()
        head.check(member.model)
    keys = list(sequences)
    listed = [sequences[key] for key in keys]
    with Meter("teacher-forcing the references", sum(len(tokens.ids) for tokens in listed)) as meter:
        for batch in batches(listed, range(len(listed))):
            rows = _measure_batch(model, heads, [listed[i] for i in batch], alphas)
            yield from zip((keys[i] for i in batch), rows, strict=True)
            meter.advance(sum(len(listed[i].ids) for i in batch))


def _measure_batch(
    model: "FusionRouteForCausalLM", heads: "Sequence[Head]", sequences: "Sequence[Tokens]", alphas: Sequence[float]
) -> list[dict[str, Any]]:
    import torch

    from fusionroute import fusion
    from fusionroute.training.heldout import hidden_at_labels, sums_by_sequence
    from fusionroute.training.logprobs import CHUNK

    with torch.inference_mode():
        hidden, labels, owner = hidden_at_labels(model, sequences)
        routes = fusion.route(model.router.route_head(hidden[0]))
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(labels), CHUNK):
            piece = slice(start, start + CHUNK)
            logits = [head(h[piece]).float() for head, h in zip(heads, hidden, strict=True)]
            found = token_values(logits, routes[piece], labels[piece], model.config.expert_names, alphas)
            for name, column in found.items():
                parts.setdefault(name, []).append(column)
        values = {name: torch.cat(pieces) for name, pieces in parts.items()}
        where = torch.nonzero(values.pop("disagree")).squeeze(-1)
        sums = sums_by_sequence(values, owner, len(sequences))
        on_disagree = sums_by_sequence({name: v[where] for name, v in values.items()}, owner[where], len(sequences))
        disagree = torch.bincount(owner[where], minlength=len(sequences)).tolist()
    rows = []
    for place, sequence in enumerate(sequences):
        row: dict[str, Any] = {
            "tokens": len(sequence.completion),
            "disagree": disagree[place],
            "sums": {name: float(total[place]) for name, total in sums.items()},
            "sums_disagree": {name: float(total[place]) for name, total in on_disagree.items()},
        }
        finite = all(math.isfinite(value) for value in row["sums"].values())
        rows.append(row if finite else {"error": "a log-probability is not finite; try --dtype float32"})
    return rows


def token_values(
    logits: "Sequence[Tensor]", routes: "Tensor", labels: "Tensor", names: Sequence[str], alphas: Sequence[float]
) -> "dict[str, Tensor]":
    """Every figure at N tokens, `[N]` each: those of `heldout.expert_values`, and `nll/…` and `top1/…` of systems.

    The systems are `router`, `uniform` (the product of all experts) and, for every α, `alpha …` (Eq. 1). `disagree`
    (bool): the experts' first choices differ.

    Args:
        logits: each member's, the router's first, `[N, V]`.
        routes, labels: the chosen expert and the token, `[N]`.
    """
    import torch

    from fusionroute import fusion
    from fusionroute.training.heldout import expert_values, system_values
    from fusionroute.training.logprobs import score_logits
    from fusionroute.training.losses import informative

    router, *experts = logits
    scored = [score_logits(each, labels) for each in experts]
    greedy = torch.stack([scores.greedy for scores in scored], dim=-1)
    logprobs = torch.stack([scores.logprobs for scores in scored], dim=-1)
    values = expert_values(logprobs, greedy, routes, labels, names)
    values |= system_values("router", router, labels)
    values |= system_values("uniform", fusion.product(experts), labels)
    chosen = fusion.select(experts, routes)
    for alpha in alphas:
        values |= system_values(swept(alpha), fusion.fuse(router, chosen, alpha), labels)
    return values | {"disagree": informative(greedy)}
