"""A prompt to stand before its answer, with the log-probabilities of its own tokens where they are asked for."""

import torch

from fusionroute.decoding.engine import Engine
from fusionroute.decoding.rows import Logprobs, Request
from fusionroute.reading import read
from fusionroute.serving.replies import Echo


def echo(engine: Engine, request: Request) -> Echo:
    """The prompt of a request; call it in the engine's thread."""
    ids = list(request.prompt)
    text = engine.tokenizer.decode(ids, skip_special_tokens=False)
    if request.logprobs is None:
        return Echo(text, ids, [None] * len(ids))
    policy = {"expert": request.expert, "alpha": request.alpha, "routing": request.routing}
    rows = torch.tensor([ids])
    logits = read(engine.model, rows, torch.ones_like(rows), policy, keep=len(ids), prompt_length=len(ids))[0]
    found: list[Logprobs | None] = [None]
    # A piece at a time: in float32 and over the whole vocabulary a long prompt would not fit.
    for start in range(0, len(ids) - 1, 64):
        logprobs = logits[start : start + 64].float().log_softmax(-1)
        for row, token in zip(logprobs, ids[start + 1 : start + 65], strict=False):
            values, top = row.topk(min(request.logprobs, len(row)))
            found.append(Logprobs(float(row[token]), list(zip(top.tolist(), values.tolist(), strict=True))))
    return Echo(text, ids, found)
