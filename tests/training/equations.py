"""Eq. 2 and Eq. 3 written out on full logits, one sequence at a time: what the trainer is held against."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from fusionroute.training.data import Item
from fusionroute.training.trainer import RouterArguments, RouterForTraining

VOCAB = 300  # fewer than the model has, so that cropping matters


def reference_terms(
    model: RouterForTraining, items: Sequence[Item], *, route_loss: str, bias: str, beta: float, routing: str
) -> dict[str, Any]:
    """Every term of Eq. 2 and Eq. 3 from transformers' own logits and hidden states, unpadded."""
    terms: dict[str, Any] = {k: [] for k in ("lm", "route", "hard", "right", "informative", "pairs", "routes")}
    for item in items:
        sides = []
        for tokens, columns in zip(item.sequences, item.annotations, strict=True):
            output = model.lm(input_ids=torch.tensor([tokens.ids]), output_hidden_states=True, use_cache=False)
            logprobs = output.logits[0, :, :VOCAB].float().log_softmax(-1)
            hidden = output.hidden_states[-1][0].float()
            own, expert = [], []
            for t in range(tokens.start, len(tokens.ids)):
                at = t - tokens.start
                own.append(logprobs[t - 1, tokens.ids[t]])
                scores = model.route_head.weight @ hidden[t - 1]
                frozen = item.is_pair and routing == "frozen"
                chosen = int(columns["routes"][at] if frozen else scores.argmax())
                terms["routes"].append((item.domain, chosen))
                labels = columns["logprobs"][at]
                expert.append(float(labels[chosen]))
                if item.is_pair:
                    continue
                terms["lm"].append(-own[-1])
                terms["informative"].append(len(set(columns["greedy"][at].tolist())) > 1)
                if terms["informative"][-1]:
                    weights = torch.softmax(scores, 0)
                    mixed = (
                        -(weights * labels).sum()
                        if route_loss == "geometric"
                        else -(weights * labels.exp()).sum().log()
                    )
                    terms["route"].append(mixed)
                    terms["hard"].append(-expert[-1])
                    terms["right"].append(float(chosen == int(labels.argmax())))
            sides.append((sum(own), float(columns["reference"].sum()) if item.is_pair else 0.0, expert))
        if item.is_pair:
            (chosen_own, chosen_ref, chosen_expert), (other_own, other_ref, other_expert) = sides
            delta = (chosen_own - chosen_ref) - (other_own - other_ref)
            total = {"sum": sum, "mean": statistics.fmean, "none": lambda _: 0.0}[bias]
            shift = total(chosen_expert) - total(other_expert)
            terms["pairs"].append((-functional.logsigmoid(beta * delta + beta * shift), float(delta.detach()), shift))
    return terms


def terms_of(model: RouterForTraining, items: Sequence[Item], args: RouterArguments) -> dict[str, Any]:
    return reference_terms(
        model, items, route_loss=args.route_loss, bias=args.bias, beta=args.beta, routing=args.routing
    )
