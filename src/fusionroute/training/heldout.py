"""How well a collection routes on rows kept out of training: teacher-forced, on S, by domain, with intervals.

S are the positions where some two experts' greedy tokens differ (Eq. 2). Nothing is generated; the figures say which
expert each token goes to, what that costs in log-probability, and how often each system's first choice is the label.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusionroute import fusion
from fusionroute.lm_head import Head, hidden_states
from fusionroute.progress import Meter
from fusionroute.training.annotation import batches, pad_batch
from fusionroute.training.data import Item, Tokens
from fusionroute.training.logprobs import CHUNK, score_labels, score_logits
from fusionroute.training.losses import informative, routed_logprobs

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


@torch.no_grad()
def measure(
    model: "FusionRouteForCausalLM", items: Sequence[Item], *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Routing figures of `model` on the SFT `items`, by domain and over all.

    Args:
        draws, seed: of the bootstrap over rows.

    Returns:
        `{"domains": {DOMAIN: {"rows", "tokens", "informative", "nll": {SYSTEM: [value, low, high]}, "top1": {…},
        "shares": {EXPERT: fraction}, "gap_closed": […], "over_best_expert": …}, "all": {…}}}`; nll in nats per token of
        S, 95 % bootstrap intervals over rows.
    """
    names = model.config.expert_names
    sequences = [item.sequences[0] for item in items]
    heads = [Head(member.model, model.config.vocab_size) for member in model.members]
    for member, head in zip(model.members, heads, strict=True):
        member.activate()
        head.check(member.model)
    rows: dict[int, dict[str, Tensor]] = {}
    with Meter("measuring on held-out rows", sum(len(s.ids) for s in sequences)) as meter:
        for batch in batches(sequences, range(len(sequences))):
            rows |= dict(zip(batch, _measure_batch(model, heads, [sequences[i] for i in batch]), strict=True))
            meter.advance(sum(len(sequences[i].ids) for i in batch))
    table = {key: torch.stack([rows[i][key] for i in range(len(items))]) for key in rows[0]}
    generator = torch.Generator().manual_seed(seed)
    domains = sorted({item.domain for item in items})
    result: dict[str, Any] = {"domains": {}, "alpha": model.config.alpha}
    for domain in [*domains, "all"]:
        mask = torch.tensor([domain in ("all", item.domain) for item in items])
        result["domains"][domain] = _summary({k: v[mask] for k, v in table.items()}, names, draws, generator)
    result["all"] = result["domains"].pop("all")
    return result


def hidden_at_labels(
    model: "FusionRouteForCausalLM", sequences: Sequence[Tokens]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """One pass of every member over the sequences, teacher-forced.

    Returns:
        What each member's LM head reads where a completion token is predicted, `[N, d]` with the router first; those
        N tokens, and which of the sequences each belongs to.
    """
    inputs, positions, labels = pad_batch(sequences, model.device)
    hidden = []
    for member in model.members:
        member.activate()
        hidden.append(hidden_states(member.model, **inputs).flatten(0, 1)[positions])
    lengths = torch.tensor([len(s.completion) for s in sequences], device=model.device)
    return hidden, labels, torch.repeat_interleave(torch.arange(len(sequences), device=model.device), lengths)


def expert_values(
    logprobs: Tensor, greedy: Tensor, routes: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """What routing costs at N tokens, by figure; of `nll/…` in nats, of the others 0 or 1.

    `best per token` is what no routing can beat: the highest label log-probability, and some expert's first choice
    that is right. `accuracy`: the chosen expert gives the label that highest log-probability.

    Args:
        logprobs, greedy: each expert's label log-probability and first choice, `[N, n]`.
        routes, labels: the chosen expert and the token, `[N]`.
    """
    routed, best = routed_logprobs(logprobs, routes), logprobs.amax(dim=-1)
    hits = greedy == labels.unsqueeze(-1)
    values = {
        "nll/routed": -routed,
        "nll/best per token": -best,
        "top1/routed": hits.gather(-1, routes.unsqueeze(-1)).squeeze(-1).float(),
        "top1/best per token": hits.any(dim=-1).float(),
        # Of experts that are equally sure, each is the best.
        "accuracy": (routed >= best).float(),
    }
    for index, name in enumerate(names):
        values[f"nll/expert {name}"] = -logprobs[:, index]
        values[f"top1/expert {name}"] = hits[:, index].float()
    return values


def system_values(name: str, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`nll/NAME` and `top1/NAME` of a system with these `logits [N, V]` at N tokens."""
    scores = score_logits(logits, labels)
    return {f"nll/{name}": -scores.logprobs, f"top1/{name}": (scores.greedy == labels).float()}


def sums_by_sequence(values: dict[str, Tensor], owner: Tensor, count: int) -> dict[str, Tensor]:
    """Sums `[count]` float64 of `values [N]` over each sequence; `owner [N]` says whose a token is."""
    empty = torch.zeros(count, dtype=torch.float64)
    return {name: empty.index_add(0, owner.cpu(), v.cpu().double()) for name, v in values.items()}


def _measure_batch(
    model: "FusionRouteForCausalLM", heads: list[Head], sequences: list[Tokens]
) -> list[dict[str, Tensor]]:
    """Per sequence, sums over its S: counts, label log-probabilities and hits by system, tokens by expert."""
    names = model.config.expert_names
    hidden, labels, owner = hidden_at_labels(model, sequences)
    scored = [score_labels(h, head, labels) for h, head in zip(hidden[1:], heads[1:], strict=True)]
    logprobs = torch.stack([scores.logprobs for scores in scored], dim=-1)
    greedy = torch.stack([scores.greedy for scores in scored], dim=-1)
    lengths = torch.bincount(owner, minlength=len(sequences))
    where = torch.nonzero(informative(greedy)).squeeze(-1)
    hidden = [h[where] for h in hidden]
    labels, owner, logprobs, greedy = labels[where], owner[where], logprobs[where], greedy[where]
    scores = model.router.route_head(hidden[0])
    routes = fusion.route(scores)
    values = expert_values(logprobs, greedy, routes, labels, names)
    values["nll/soft"] = -(scores.softmax(-1) * logprobs).sum(-1)
    values |= {f"share/{name}": (routes == index).float() for index, name in enumerate(names)}
    fused: dict[str, list[Tensor]] = {}
    # Also of no token at all, so that every system has its figures.
    for start in range(0, max(len(labels), 1), CHUNK):
        piece = slice(start, start + CHUNK)
        logits = [head(h[piece]).float() for head, h in zip(heads, hidden, strict=True)]
        systems = {
            "router": logits[0],
            "fused": fusion.fuse(logits[0], fusion.select(logits[1:], routes[piece]), model.config.alpha),
            "uniform": fusion.product(logits[1:]),
        }
        systems |= {
            f"fixed {name}": fusion.fuse(logits[0], expert, model.config.alpha)
            for name, expert in zip(names, logits[1:], strict=True)
        }
        for system, of_system in systems.items():
            for name, found in system_values(system, of_system, labels[piece]).items():
                fused.setdefault(name, []).append(found)
    values |= {name: torch.cat(parts) for name, parts in fused.items()}
    sums = sums_by_sequence(values, owner, len(sequences))
    sums["informative"] = torch.bincount(owner, minlength=len(sequences)).cpu().double()
    sums["tokens"] = lengths.cpu().double()
    return [{name: total[row] for name, total in sums.items()} for row in range(len(sequences))]


def _summary(table: dict[str, Tensor], names: list[str], draws: int, generator: torch.Generator) -> dict[str, Any]:
    """Ratios of sums over rows with 95 % bootstrap intervals; `table` has one value per row and name."""
    count = len(table["tokens"])
    picks = torch.randint(count, (draws, count), generator=generator)
    weights = torch.zeros(draws + 1, count, dtype=torch.float64)
    weights[0] = 1  # the rows as they are
    weights[1:].scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    totals = {name: weights @ values for name, values in table.items()}
    size = totals["informative"].clamp(min=1)

    # A draw without a position of S says nothing; rows without one at all have zeros for figures.
    used = totals["informative"][1:] > 0

    def interval(values: Tensor) -> list[float]:
        if not used.any() or totals["informative"][0] == 0:
            return [0.0, 0.0, 0.0]
        low, high = values[1:][used].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return [float(values[0]), low, high]

    means = {name: total / size for name, total in totals.items() if "/" in name or name == "accuracy"}
    experts = torch.stack([means[f"nll/expert {name}"] for name in names])
    best = experts[:, 0].argmin()  # the best expert on the rows as they are, kept for every draw
    gap = experts[best] - means["nll/best per token"]
    result: dict[str, Any] = {
        "rows": count,
        "tokens": int(totals["tokens"][0]),
        "informative": int(totals["informative"][0]),
        "best_expert": names[int(best)],
        "nll": {k.removeprefix("nll/"): interval(v) for k, v in means.items() if k.startswith("nll/")},
        "top1": {k.removeprefix("top1/"): interval(v) for k, v in means.items() if k.startswith("top1/")},
        "shares": {name: float(means[f"share/{name}"][0]) for name in names},
        "routing_accuracy": interval(means["accuracy"]),
        "gap_closed": interval(torch.where(gap > 1e-6, (experts[best] - means["nll/routed"]) / gap, 0.0)),
        "over_best_expert": interval(means["nll/routed"] / experts[best] - 1),
    }
    return result


def scores(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures that a model card shows: name to value, interval and number of rows."""
    whole = result["all"]
    chosen = {
        f"top-1 on S, {name}": whole["top1"][name]
        for name in ("fused", "router", "routed", *(f"expert {e}" for e in whole["shares"]))
    }
    chosen["NLL on S, routed"] = whole["nll"]["routed"]
    chosen[f"NLL on S, best expert ({whole['best_expert']})"] = whole["nll"][f"expert {whole['best_expert']}"]
    chosen["share of the gap to the best expert per token closed"] = whole["gap_closed"]
    return {
        name: {"value": value, "low": low, "high": high, "n": whole["rows"]}
        for name, (value, low, high) in chosen.items()
    }


def render(result: dict[str, Any]) -> str:
    """The figures as Markdown: one table for negative log-likelihood, one for first choices, one for shares."""
    sections = {**result["domains"], "all": result["all"]}
    lines = []
    for title, key, digits in (("NLL on S (nats per token)", "nll", 3), ("Top-1 on S", "top1", 3)):
        systems = list(result["all"][key])
        lines += [f"**{title}**", "", "| system | " + " | ".join(sections) + " |", "|---" * (len(sections) + 1) + "|"]
        for system in systems:
            cells = []
            for section in sections.values():
                value, low, high = section[key][system]
                cells.append(f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
            lines.append(f"| {system} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["**Routing on S**", "", "| | " + " | ".join(sections) + " |", "|---" * (len(sections) + 1) + "|"]
    lines.append(
        "| rows / tokens / S | "
        + " | ".join(f"{s['rows']} / {s['tokens']} / {s['informative']}" for s in sections.values())
        + " |"
    )
    for name in result["all"]["shares"]:
        lines.append(f"| share of {name} | " + " | ".join(f"{s['shares'][name]:.3f}" for s in sections.values()) + " |")
    for label, key in (
        ("routing accuracy", "routing_accuracy"),
        ("gap to the best expert per token closed", "gap_closed"),
        ("routed NLL over the best expert's", "over_best_expert"),
    ):
        cells = [f"{s[key][0]:+.3f} [{s[key][1]:+.3f}, {s[key][2]:+.3f}]" for s in sections.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
