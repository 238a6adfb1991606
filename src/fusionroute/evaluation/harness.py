"""A collection, or any system made of one, as a model of lm-eval: its tasks and its command line, unchanged.

    fusionroute lm-eval --model fusionroute --model_args collection=smollm2,system=query-level --tasks gsm8k

lm-eval has no way of finding models in other packages, so the first word imports this module and hands over. Answers
come from the engine; log-likelihoods, which need no decoding, from the reference model.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fusionroute import collection as collections
from fusionroute.decoding.engine import Engine
from fusionroute.decoding.rows import Request
from fusionroute.decoding.sampling import Sampling
from fusionroute.errors import FusionRouteError
from fusionroute.evaluation.answering import answer, load_collection
from fusionroute.evaluation.systems import Sources, find
from fusionroute.reading import read


@register_model("fusionroute")
class FusionRouteLM(TemplateLM):
    """lm-eval's model arguments:

    Args:
        collection: folder, Hub id or packaged name; the default collection if none.
        system: as in `fusionroute evaluate --system`.
        max_gen_toks: new tokens where a task does not say.
        sft, finetuned, base, dtype: as on the command line.
    """

    def __init__(
        self,
        collection: str | None = None,
        system: str = "fusionroute",
        *,
        batch_size: int | str = 16,
        max_gen_toks: int = 400,
        sft: str | None = None,
        finetuned: str | None = None,
        base: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.work = tempfile.TemporaryDirectory()  # for merges
        sources = Sources(
            collections.locate(collection),
            Path(self.work.name),
            sft=None if sft is None else Path(sft),
            finetuned=finetuned,
            base=base,
        )
        self.system = find(system, sources)
        self.model, self.tokenizer = load_collection(self.system.folder, dtype, base, device)
        self.engine = Engine(self.model, self.tokenizer)
        # `auto:4` would look for the size four times.
        self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        ends = sorted(self.engine.ends)
        return ends[0] if ends else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        return str(self.system.folder)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            # A rendered template has its special tokens in the text.
            begin = self.tokenizer.bos_token
            add_special_tokens = begin is None or not string.startswith(begin)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers of all requests; greedy unless a task samples.

        What is sampled several times (a task's `repeats`) is drawn anew each time, unless the task names a seed.

        Raises:
            FusionRouteError: a request that cannot run, such as a prompt longer than the context.
        """
        wanted, before = list[tuple[str, Request]](), Counter[str]()
        for i, (context, settings) in enumerate(request.args for request in requests):
            wanted.append((str(i), self._request(context, settings, seed=before[context])))
            before[context] += 1
        found = dict(answer(self.engine, wanted, self.batch_size))
        failed = [f"request {key}: {each.error}" for key, each in found.items() if each.error]
        if failed:
            raise FusionRouteError(f"{len(failed)} of {len(requests)} requests failed; {failed[0]}")
        return [found[str(i)].text for i in range(len(requests))]

    def _request(self, context: str, settings: dict[str, Any], seed: int = 0) -> Request:
        """A request of lm-eval's as ours; `seed` is that of a sampled one that names none."""
        until = settings.get("until") or []
        sampling = Sampling()
        if settings.get("do_sample"):
            known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
            given: dict[str, Any] = {"temperature": 1.0, "seed": seed}
            sampling = Sampling(**given | {name: settings[name] for name in known if name in settings})
        return Request(
            self.tok_encode(context),
            int(settings.get("max_gen_toks") or self.max_gen_toks),
            sampling,
            stop=[until] if isinstance(until, str) else [stop for stop in until if stop],
            **self.system.policy,
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of (text, context ids, continuation ids): the continuation's log-probability, and whether it is greedy.

        Of what is longer than the model's context, the beginning is cut off.

        Raises:
            FusionRouteError: a continuation alone is longer.
        """
        room = self.engine.context
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > room:
            raise FusionRouteError(f"a continuation has {longest} tokens and the context {room}: it cannot be read")
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        # One decision per prompt is taken at its end, which differs from row to row.
        size = 1 if self.system.policy.get("routing") == "query" else self.batch_size
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            rows = [(requests[i][1] + requests[i][2])[-(room + 1) :] for i in batch]
            counts = [len(requests[i][2]) for i in batch]
            width, keep = max(map(len, rows)) - 1, max(counts)
            ids = torch.tensor([[0] * (width + 1 - len(row)) + row[:-1] for row in rows])
            mask = torch.tensor([[0] * (width + 1 - len(row)) + [1] * (len(row) - 1) for row in rows])
            policy, prompt = self.system.policy, len(rows[0]) - counts[0]
            logits = read(self.model, ids, mask, policy, keep=keep, prompt_length=prompt)
            logprobs = logits.float().log_softmax(-1)
            for i, row, count, found in zip(batch, rows, counts, logprobs, strict=True):
                labels = torch.tensor(row[len(row) - count :], device=found.device)
                found = found[keep - count :]
                total = found.gather(-1, labels.unsqueeze(-1)).sum().item()
                results[i] = (total, bool((found.argmax(-1) == labels).all()))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context's length, each token once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.engine.context, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals


def main(arguments: Sequence[str]) -> None:
    """lm-eval's command line, which knows this model now."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
