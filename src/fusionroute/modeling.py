"""FusionRouteForCausalLM: the reference. Every member runs at every token; this is what the method means.

A transformers model: Auto classes, `forward` with left or right padding, `generate()` in all its modes,
`save_pretrained`. It is the slow way on purpose; every fast path is tested against it.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from fusionroute import collection, fusion, hub
from fusionroute.cache import FusionCache
from fusionroute.configuration import ROUTER, FusionRouteConfig, absolute_source
from fusionroute.errors import UsageError
from fusionroute.members import LoadOptions, Member, load_members, parse_dtype
from fusionroute.placement import Placement
from fusionroute.router import RouteHead, Router, head_width

Routing = Literal["token", "query", "uniform"]


@dataclass
class FusionRouteOutput(ModelOutput):
    """What `forward` returns; K positions are those kept by `logits_to_keep`.

    Attributes:
        loss: cross-entropy of the fused logits, if labels were given.
        logits: fused logits `[B, K, V]` float32 (Eq. 1).
        past_key_values: the `FusionCache`.
        scores: route scores `[B, K, n]` float32; None if the router did not run.
        routes: chosen experts `[B, K]`; −1 where `routing="uniform"` chose none.
        router_logits, expert_logits: the two terms of Eq. 1, `[B, K, V]`; the router's is None if it did not run.
        hidden_states, attentions: always None: members differ in both. `generate` asks for them.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: FusionCache | None = None
    scores: Tensor | None = None
    routes: Tensor | None = None
    router_logits: Tensor | None = None
    expert_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class FusionRouteForCausalLM(PreTrainedModel, GenerationMixin):
    """n frozen experts and a router that answer as one causal LM.

    Args:
        config: the collection's configuration.
        router: the router, with its route head.
        experts: the experts, in route order.
    """

    config_class = FusionRouteConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _is_stateful = False

    def __init__(self, config: FusionRouteConfig, router: Router, experts: list[Member]) -> None:
        super().__init__(config)
        self.router = router
        for expert in experts:
            setattr(self, f"expert_{expert.name}", expert)
        self.folder: Path | None = None
        self.eval()

    @property
    def experts(self) -> list[Member]:
        """The experts in route order."""
        return [getattr(self, spec.module) for spec in self.config.expert_specs]

    @property
    def members(self) -> list[Member]:
        """The router's member, then the experts."""
        return [self.router.member, *self.experts]

    def get_input_embeddings(self) -> Any:
        return self.router.member.model.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        # There is no single one: tying or resizing it would change one member behind the others' backs.
        return None

    def new_cache(self) -> FusionCache:
        """An empty cache of all members, for `forward` and `generate`."""
        return FusionCache({member.name: member.config for member in self.members})

    # ------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusionCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        alpha: float | None = None,
        expert: str | None = None,
        routing: Routing = "token",
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> FusionRouteOutput:
        """Fused logits of Eq. 1 at the kept positions.

        Args:
            input_ids: `[B, T]`; every member sees the same ids.
            attention_mask: `[B, past + T]`, zeros on padding, which may be left or right.
            labels: `[B, T]`, −100 is ignored; shifted inside.
            logits_to_keep: as in transformers: the last so many positions, or which ones; 0 keeps all.
            alpha: weight of the complement; None takes the configuration's. 0 leaves it out.
            expert: always this expert, whatever the scores.
            routing: `token`: a decision per position. `query`: one per prompt, taken at its last position and kept by
                the cache. `uniform`: no decision, the mean of all experts' logits.
            prompt_length: columns of the prompt, for `routing="query"` when there is no cache to remember the decision.

        Raises:
            UsageError: an unknown expert or routing, `inputs_embeds`, ids outside the common vocabulary.
        """
        self._refuse_bad_call(input_ids, past_key_values, routing, kwargs)
        assert input_ids is not None
        alpha = self.config.alpha if alpha is None else alpha
        forced = None if expert is None else self.config.expert_index(expert)
        cache = self.new_cache() if past_key_values is None and use_cache else past_key_values
        seen = 0 if cache is None else cache.get_seq_length()
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": _positions(input_ids, attention_mask, position_ids),
            "use_cache": cache is not None,
        }
        needs_router = forced is None or alpha != 0
        running = self.experts if forced is None else [self.experts[forced]]
        names = [ROUTER] * needs_router + [member.name for member in running]
        caches: dict[str, Any] = {} if cache is None else dict(cache.require(names))

        # The decision of `query` is read at one column of the prompt, which `logits_to_keep` may not cover.
        columns = self._decision_columns(input_ids, attention_mask, prompt_length, seen)
        undecided = cache is None or cache.query_routes is None
        deciding = routing == "query" and forced is None and undecided and columns is not None
        kept = _kept(logits_to_keep)
        router_logits = scores = None
        decided = cache.query_routes if cache is not None and routing == "query" else None
        if needs_router:
            output = self.router(
                **inputs, past_key_values=caches.get(ROUTER), logits_to_keep=0 if deciding else logits_to_keep
            )
            router_logits, scores = output.logits[..., : self.config.vocab_size], output.scores
            if deciding:
                rows = torch.arange(len(scores), device=scores.device)
                decided = fusion.route(scores[rows, columns])
                router_logits, scores = router_logits[:, kept], scores[:, kept]
                if cache is not None:
                    cache.query_routes = decided
        with torch.no_grad():
            each = [
                member(**inputs, past_key_values=caches.get(member.name), logits_to_keep=logits_to_keep).logits
                for member in running
            ]
        each = [logits[..., : self.config.vocab_size].to(self.device) for logits in each]
        shape = each[0].shape[:2]

        if forced is not None:
            routes = torch.full(shape, forced, device=self.device)
            expert_logits = each[0]
        elif routing == "uniform":
            routes = torch.full(shape, -1, device=self.device)
            expert_logits = fusion.product(each)
        else:
            assert scores is not None
            routes = fusion.route(scores) if decided is None else decided.unsqueeze(1).expand(shape)
            expert_logits = fusion.select(each, routes)
        logits = expert_logits.float() if router_logits is None else fusion.fuse(router_logits, expert_logits, alpha)
        if cache is not None:
            cache.advance(names, input_ids.shape[1])
            cache.record(routes, torch.arange(seen, seen + input_ids.shape[1], device=routes.device)[kept])
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")  # what a Trainer wants divided by, if it accumulates gradients
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=items)
        return FusionRouteOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            scores=scores,
            routes=routes,
            router_logits=router_logits,
            expert_logits=expert_logits,
        )

    def _refuse_bad_call(
        self, input_ids: Tensor | None, past_key_values: Any, routing: str, kwargs: dict[str, Any]
    ) -> None:
        unknown = sorted(set(kwargs) - _UNUSED)
        if unknown:
            raise UsageError(f"forward does not take {', '.join(unknown)}")
        if kwargs.get("inputs_embeds") is not None or input_ids is None:
            raise UsageError("pass input_ids: members differ in width, so they cannot share inputs_embeds")
        if routing not in ("token", "query", "uniform"):
            raise UsageError(f"routing must be token, query or uniform, not {routing!r}")
        _require_fusion_cache(past_key_values)
        if input_ids.numel() and int(input_ids.max()) >= self.config.vocab_size:
            raise UsageError(f"token id {int(input_ids.max())}: the members share {self.config.vocab_size} ids")

    @staticmethod
    def _decision_columns(
        input_ids: Tensor, attention_mask: Tensor | None, prompt_length: int | None, seen: int
    ) -> Tensor | None:
        """Of each row `[B]`, the column of `input_ids` where its prompt ends; None if that comes in a later chunk."""
        rows, width = input_ids.shape
        if prompt_length is not None:
            column = prompt_length - 1 - seen
            return torch.full((rows,), column, device=input_ids.device) if 0 <= column < width else None
        if attention_mask is None or attention_mask.dim() != 2:
            return torch.full((rows,), width - 1, device=input_ids.device)
        real = attention_mask[:, -width:].long()
        return (real * torch.arange(1, width + 1, device=real.device)).argmax(dim=-1)

    def train(self, mode: bool = True) -> "FusionRouteForCausalLM":
        """As in torch, but the experts stay in evaluation: their dropout would alter them."""
        super().train(mode)
        for expert in self.experts if hasattr(self, "config") and self.config.experts else []:
            expert.eval()
        return self

    # ------------------------------------------------------------------------------------------------ generate

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, plus `routes [B, N]` of the N new tokens if it returns a dict and keeps a cache.

        `alpha`, `expert` and `routing` are those of `forward`.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if kwargs.get("routing") == "query" and prompt is not None:
            kwargs.setdefault("prompt_length", prompt.shape[1])
        _require_fusion_cache(kwargs.get("past_key_values"))
        output = super().generate(inputs, *args, **kwargs)
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, FusionCache) and cache.routes is not None:
            # What was decided at a position wrote the token after it.
            first = (1 if prompt is None else prompt.shape[1]) - 1
            beams = getattr(output, "beam_indices", None)
            if beams is None:
                output["routes"] = cache.routes_from(first, output.sequences.shape[1] - first - 1)
            else:
                by_step = cache.routes_from(first, beams.shape[1])
                steps = torch.arange(beams.shape[1], device=beams.device)
                output["routes"] = by_step[beams.clamp(min=0), steps].masked_fill(beams < 0, -1)
        return output

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        # transformers hands the model's own arguments on to the assistant, which does not know ours.
        if "model_kwargs" in kwargs:
            ours = ("alpha", "expert", "routing", "prompt_length")
            kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k not in ours}
        return super()._get_candidate_generator(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # transformers would build a cache from one config; ours is made of all the members'.
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise UsageError(
                    f"cache_implementation={generation_config.cache_implementation!r} is not available for a "
                    "collection: leave it out"
                )
            model_kwargs["past_key_values"] = self.new_cache()
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    # ------------------------------------------------------------------------------------------- load and save

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        config: FusionRouteConfig | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        placement: Mapping[str, Placement] | None = None,
        base: str | None = None,
        alpha: float | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> "FusionRouteForCausalLM":
        """Load a collection: a folder, a Hub id, or the name of a packaged one; None is the default collection.

        Args:
            config: in place of the collection's own; the members are those it names.
            revision: branch, tag or commit of a Hub id.
            dtype: of all members; None takes what the collection says of each, else what their files hold.
            device, attn_implementation: likewise.
            placement: by name, of members that differ from the others. The router's device is the collection's: inputs
                come there, and logits are added there.
            base: replaces the base of the adapters; another digest is then a warning.
            alpha: replaces the configuration's complement weight.

        Raises:
            FusionRouteError: anything missing, half-written, or not what the collection was made with.
        """
        dtype = unknown.pop("torch_dtype", None) if dtype is None else dtype
        _refuse_unknown(unknown)
        folder = collection.locate(pretrained_model_name_or_path, revision=revision)
        config = collection.read_config(folder) if config is None else copy.deepcopy(config)
        collection.check_vocabulary_of(config, folder, base)
        other = None if base is None else absolute_source(base)
        options = LoadOptions(
            parse_dtype(dtype), device, attn_implementation, other, trust_remote_code, placement or {}
        )
        members = load_members(config.specs_on(base), folder, options)
        router = members[0]
        width, place = head_width(router.model), router.model.device
        head = RouteHead.load(folder / ROUTER, config.expert_names, width, place)
        if alpha is not None:
            config.alpha = alpha
        model = cls(config, Router(router, head), members[1:])
        model.folder = folder
        model.generation_config = collection.read_generation_config(folder)
        return model

    def save_pretrained(self, save_directory: str | Path, *, embed: bool = False, **kwargs: Any) -> None:
        """Write the collection; see `fusionroute.collection.save` for what is embedded and what referenced.

        With `push_to_hub=True` it is uploaded too, as `repo_id` (default: the folder's name); other arguments are then
        those of `push_to_hub`, and else ignored: what transformers' callers pass is about weights.
        """
        push = kwargs.pop("push_to_hub", False)
        if push and not embed:
            hub.refuse_local(self.config)
        collection.save(self, Path(save_directory), embed=embed)
        if push:
            hub.upload(Path(save_directory), kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(self, repo_id: str, *, embed: bool = False, **kwargs: Any) -> str:
        """Upload the collection to the main branch of a Hub repository and return its address.

        `kwargs` are `private`, `token` and `commit_message`.

        Raises:
            UsageError: a member is referenced by a local path that others do not have, and `embed` is false.
        """
        return hub.push(self, repo_id, embed=embed, **kwargs)


def _positions(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Positions that count real tokens only, so that left padding changes nothing."""
    if position_ids is not None or attention_mask is None or attention_mask.dim() != 2:
        return position_ids
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]


def _require_fusion_cache(cache: Any) -> None:
    if cache is not None and not isinstance(cache, FusionCache):
        raise UsageError(f"past_key_values must be a FusionCache (model.new_cache()), not {type(cache).__name__}")


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The positions that transformers keeps for `logits_to_keep`, as an index."""
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep, None) if logits_to_keep else slice(None)
    return logits_to_keep


# Arguments that transformers' own loaders pass along and that mean nothing here.
_IGNORED = {"_from_auto", "_commit_hash", "adapter_kwargs", "code_revision", "name_or_path"}
# Arguments that `generate` and trainers pass to any forward.
_UNUSED = {
    "inputs_embeds", "output_attentions", "output_hidden_states", "return_dict", "token_type_ids", "cache_position",
    "num_items_in_batch", "is_first_iteration",
}  # fmt: skip


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    left = sorted(name for name, value in unknown.items() if name not in _IGNORED and value is not None)
    if left:
        raise UsageError(f"from_pretrained of a collection does not take {', '.join(left)}")


AutoModelForCausalLM.register(FusionRouteConfig, FusionRouteForCausalLM, exist_ok=True)
