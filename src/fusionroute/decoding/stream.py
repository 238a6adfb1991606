"""One answer, token by token, from the reference model: what `fusionroute generate` and `chat` print.

Every member runs at every token. Knows text only through the tokenizer it is given.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fusionroute.decoding.sampling import draw
from fusionroute.errors import UsageError
from fusionroute.fusion import TokenTrace, trace_token

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


class TextPieces:
    """Ids to text as they come: a piece is held back while it ends inside a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # ids before it are wholly written
        self.written = ""  # text of the ids since `start`

    def push(self, token: int, *, last: bool = False) -> str:
        """The characters that `token` completes."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:
            return ""
        piece = text[len(self.written) :]
        # Decoding goes on from the last whole token, since some tokenizers drop a leading space.
        self.start, self.written = len(self.ids) - 1, self.tokenizer.decode([token], skip_special_tokens=True)
        return piece


@torch.inference_mode()
def stream(
    model: "FusionRouteForCausalLM",
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    alpha: float | None = None,
    expert: str | None = None,
) -> Iterator[TokenTrace]:
    """Yield the trace of each new token; ends at an end id, which is not yielded, or at `max_new_tokens`.

    Args:
        prompt: ids, as `collection.encode_chat` gives them.
        temperature: 0 is greedy; else the fused, normalised distribution is tempered.
        seed: the same seed gives the same text.

    Raises:
        UsageError: the prompt leaves no room in the context, is empty or has ids outside the common vocabulary.
    """
    context = model.config.max_position_embeddings
    if not prompt:
        raise UsageError("the prompt has no token")
    if len(prompt) >= context:
        raise UsageError(f"the prompt has {len(prompt)} tokens and the context {context}: shorten it")
    if max(prompt) >= model.config.vocab_size:
        raise UsageError(f"the prompt has token id {max(prompt)}, the members share {model.config.vocab_size} ids")
    ends = model.generation_config.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    names = model.config.expert_names
    pieces = TextPieces(tokenizer)
    cache = model.new_cache()
    ids = torch.tensor([list(prompt)], device=model.device)
    budget = min(max_new_tokens, context - len(prompt))
    for step in range(budget):
        output = model(ids, past_key_values=cache, logits_to_keep=1, alpha=alpha, expert=expert)
        logits = output.logits[0, -1]
        token = draw(logits, temperature=temperature, seed=seed, position=len(prompt) + step)
        if token in ends:
            return
        # With one expert forced and no complement the router does not run.
        router = output.router_logits if output.router_logits is not None else output.expert_logits
        scores = output.scores[0, -1] if output.scores is not None else torch.zeros(len(names))
        yield trace_token(
            token,
            pieces.push(token, last=step == budget - 1),
            names,
            int(output.routes[0, -1]),
            scores,
            router[0, -1],
            output.expert_logits[0, -1],
            logits,
        )
        ids = torch.tensor([[token]], device=model.device)
