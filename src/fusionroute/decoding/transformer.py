"""A decoder as one packed pass: sequences of any length, any number of new tokens each, any of its adapters each.

All new tokens stand in one `[N, d]` matrix without padding; only attention looks at sequences apart. Written for the
Llama family (Llama, Mistral, Qwen2, Gemma-2), whose differences are fields of `Shape`. At small batch a pass costs what
reading the weights costs; transformers' own forward spends as much again between its kernels. Knows no router.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fusionroute.decoding.cache import KVCache
from fusionroute.decoding.matrices import filled
from fusionroute.decoding.products import Apart, Lanes, Product, UnsupportedError, product, share_masks

# New tokens that a pass has between two of its products on a CPU. malloc asks the system for every tensor of more than
# 32 MB anew, and each of its pages is cleared first; parts of these stay below that and nearer to the caches.
MOST_TOKENS = 1536


class Span(NamedTuple):
    """New tokens of one sequence: `ids` at positions `start`, `start + 1`, … of cache slot `slot`, run as `lane`."""

    slot: int
    lane: int
    start: int
    ids: Sequence[int]


@dataclass(frozen=True)
class Shape:
    """What distinguishes one architecture of the family from another.

    Attributes:
        windows: of each layer, how many tokens back it sees, itself included; None is all.
        softcap: of attention scores (Gemma-2).
        centred: norm weights are stored minus one and applied in float32 (Gemma-2).
        embed_scale: factor of the embeddings (Gemma-2).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    eps: float
    windows: tuple[int | None, ...]
    softcap: float | None = None
    centred: bool = False
    embed_scale: float = 1.0

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The shape of a transformers config.

        Raises:
            UnsupportedError: an architecture that this pass does not know.
        """
        if config.model_type not in ("llama", "mistral", "qwen2", "gemma2"):
            raise UnsupportedError(f"the packed pass does not know {config.model_type}")
        if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
            raise UnsupportedError("rotary embeddings that depend on the length of the text")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        gemma = config.model_type == "gemma2"
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if types is None:
            windows = (window if config.model_type == "mistral" else None,) * config.num_hidden_layers
        else:
            windows = tuple(window if kind == "sliding_attention" else None for kind in types)
        return cls(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            scaling=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
            eps=config.rms_norm_eps,
            windows=windows,
            softcap=config.attn_logit_softcapping if gemma else None,
            centred=gemma,
            embed_scale=config.hidden_size**0.5 if gemma else 1.0,
        )


class Layer(NamedTuple):
    """One block: four products, an activation, and norms (weights; None where the architecture has none)."""

    qkv: Product | Apart
    output: Product | Apart
    gate_up: Product | Apart
    down: Product | Apart
    activation: Any
    norm_in: Tensor
    norm_attention: Tensor | None
    norm_mlp: Tensor
    norm_out: Tensor | None


class Group(NamedTuple):
    """Spans of neighbouring slots with as many new tokens each: one attention call.

    `tokens` is their range in the packed matrix, `new` their new tokens each, `end` the longest length, `masks` by
    window `[R, 1, G·T, end]` to add (None: every entry is seen).
    """

    slots: slice
    tokens: slice
    new: int
    end: int
    masks: dict[int | None, Tensor | None]


class Transformer:
    """The blocks of `model` between its embedding and its LM head.

    Args:
        model: a transformers causal LM, with PEFT adapters in it or not. Its weights are moved into this pass's larger
            matrices and it goes on working with them, unless they are merged.
        lanes: adapter names; a span's lane says which one applies to it. None is the base as it stands.
        merge: fold the adapter of the only lane into a copy of the weights.
        blocks: multiply with copies of the weights, laid out for speed; as in `Matrix`.
        compile: let torch.compile join what stands between the products into fewer kernels; of other roundings.
    """

    def __init__(
        self,
        model: Any,
        lanes: Sequence[str | None] = (None,),
        *,
        merge: bool = False,
        blocks: bool = False,
        compile: bool = False,
    ) -> None:
        from peft.utils.other import AuxiliaryTrainingWrapper

        if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
            raise UnsupportedError("an adapter with modules of its own (modules_to_save)")
        self.model = model.get_decoder()
        self.shape = Shape.of(model.config)
        embedding = self.model.embed_tokens
        if hasattr(embedding, "lora_embedding_A") or not isinstance(embedding, torch.nn.Embedding):
            raise UnsupportedError("an adapter on the embedding")
        self.embedding = embedding.weight
        self.norm = self._norm_weight(self.model.norm)
        self.layers = [self._layer(layer, lanes, merge=merge, blocks=blocks) for layer in self.model.layers]
        share_masks([product for layer in self.layers for product in layer[:4]])
        # Their sizes change with every step: one kernel for all of them.
        self._turn: Callable[..., Tensor] = torch.compile(_turned, dynamic=True) if compile else _turned
        self._gate: Callable[..., Tensor] = torch.compile(_gated, dynamic=True) if compile else _gated
        self.adapted = [lane is not None and not merge for lane in lanes]
        self.blocks = self.layers[0].qkv.blocks
        self.dtype, self.device = self.embedding.dtype, self.embedding.device

    @property
    def matrices(self) -> list[Tensor]:
        """Of the blocks: what a pass reads, whatever its size."""
        return [matrix for layer in self.layers for product in layer[:4] for matrix in product.matrices]

    def _norm_weight(self, module: Any) -> Tensor:
        return 1.0 + module.weight.float() if self.shape.centred else module.weight

    def _layer(self, layer: Any, lanes: Sequence[str | None], **how: bool) -> Layer:
        attention, mlp, centred = layer.self_attn, layer.mlp, self.shape.centred
        after = layer.post_attention_layernorm
        return Layer(
            product([attention.q_proj, attention.k_proj, attention.v_proj], lanes, **how),
            product([attention.o_proj], lanes, **how),
            product([mlp.gate_proj, mlp.up_proj], lanes, **how),
            product([mlp.down_proj], lanes, **how),
            mlp.act_fn,
            self._norm_weight(layer.input_layernorm),
            self._norm_weight(after) if centred else None,
            self._norm_weight(layer.pre_feedforward_layernorm if centred else after),
            self._norm_weight(layer.post_feedforward_layernorm) if centred else None,
        )

    def new_cache(self) -> KVCache:
        shape = (self.shape.kv_heads, self.shape.head_dim)
        return KVCache([shape] * len(self.layers), self.dtype, self.device)

    def __call__(self, spans: Sequence[Span], keep: Sequence[int], cache: KVCache) -> Tensor:
        """Run the spans and write their keys and values.

        Args:
            keep: of each span, how many of its last positions are wanted.

        Returns:
            What the LM head reads, `[sum(keep), d]`, in the order of the spans.
        """
        hidden, first, count = [], 0, 0
        most = MOST_TOKENS if self.device.type == "cpu" else math.inf
        for i, span in enumerate(spans):
            if i > first and count + len(span.ids) > most:
                hidden.append(self._part(spans[first:i], keep[first:i], cache))
                first, count = i, 0
            count += len(span.ids)
        hidden.append(self._part(spans[first:], keep[first:], cache))
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def _part(self, spans: Sequence[Span], keep: Sequence[int], cache: KVCache) -> Tensor:
        """As `__call__`, all in one."""
        order = sorted(range(len(spans)), key=lambda i: (len(spans[i].ids), spans[i].slot))
        packed = [spans[i] for i in order]
        groups = self._groups(packed)
        ids, positions, lanes = self._index(packed)
        places = cache.places([span.slot for span in packed for _ in span.ids], _positions(packed))
        x = functional.embedding(ids, self.embedding)
        if self.shape.embed_scale != 1.0:
            x = x * torch.tensor(self.shape.embed_scale, dtype=self.dtype)
        cos, sin = self._rotation(x, positions)
        for index, layer in enumerate(self.layers):
            attended = self._attend(
                index, self._normed(x, layer.norm_in), layer, groups, cos, sin, places, lanes, cache
            )
            x = x + self._normed(layer.output(attended, lanes), layer.norm_attention)
            gated = self._gate(layer.gate_up(self._normed(x, layer.norm_mlp), lanes), layer.activation)
            x = x + self._normed(layer.down(gated, lanes), layer.norm_out)
        return self._normed(x[self._kept(packed, order, keep)], self.norm)

    def _index(self, packed: Sequence[Span]) -> tuple[Tensor, Tensor, Lanes | None]:
        """Of every token: its id, its position, and its lane if any lane has an adapter.

        Filled up to as many tokens as a product in blocks takes gladly.
        """
        ids = [token for span in packed for token in span.ids]
        spare = [0] * (filled(len(ids)) - len(ids) if self.blocks else 0)
        lanes = None
        if any(self.adapted[span.lane] for span in packed):
            of = [span.lane for span in packed for _ in span.ids] + spare
            lanes = Lanes(torch.tensor(of, device=self.device))
        index = torch.tensor([ids + spare, _positions(packed) + spare], device=self.device)
        return index[0], index[1], lanes

    def _rotation(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[N, 1, head_dim]`, the first half of the sines negated: what halves swapped are times."""
        cos, sin = self.model.rotary_emb(x, positions.unsqueeze(0))
        cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1).clone()
        sin[..., : self.shape.head_dim // 2].neg_()
        return cos, sin

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        if self.shape.centred:
            return functional.rms_norm(x.float(), weight.shape, weight, self.shape.eps).to(x.dtype)
        return functional.rms_norm(x, weight.shape, weight, self.shape.eps)

    def _attend(
        self,
        index: int,
        x: Tensor,
        layer: Layer,
        groups: Sequence[Group],
        cos: Tensor,
        sin: Tensor,
        places: Tensor,
        lanes: Lanes | None,
        cache: KVCache,
    ) -> Tensor:
        """Attention of every token over its own sequence, `[N, d] -> [N, heads · head_dim]`."""
        shape, count = self.shape, groups[-1].tokens.stop
        both = shape.heads + shape.kv_heads
        projected = layer.qkv(x, lanes).unflatten(-1, (both + shape.kv_heads, shape.head_dim))
        turned = self._turn(projected[:, :both], cos, sin)
        cache.write(index, places, turned[:count, shape.heads :], projected[:count, both:])
        window = shape.windows[index]
        parts = [
            self._attend_group(
                turned[group.tokens, : shape.heads], group, *cache.read(index, group.slots, group.end), window
            )
            for group in groups
        ]
        if count < x.shape[0]:
            parts.append(parts[0].new_zeros(x.shape[0] - count, parts[0].shape[1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_group(self, queries: Tensor, group: Group, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Attention of one group; heads that share keys are further queries, so nothing is repeated."""
        shape, rows = self.shape, keys.shape[0]
        ratio = shape.heads // shape.kv_heads
        # [R·T, H, D] -> [R, kv, G·T, D]
        q = queries.view(rows, group.new, shape.kv_heads, ratio, shape.head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(rows, shape.kv_heads, ratio * group.new, shape.head_dim)
        mask = group.masks[window]
        if shape.softcap is None:
            out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=shape.scaling)
        else:
            scores = torch.tanh(q @ keys.transpose(-1, -2) * (shape.scaling / shape.softcap)) * shape.softcap
            weights = (scores if mask is None else scores + mask).softmax(dim=-1, dtype=torch.float32)
            out = weights.to(q.dtype) @ values
        out = out.view(rows, shape.kv_heads, ratio, group.new, shape.head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(rows * group.new, shape.heads * shape.head_dim)

    def _groups(self, packed: Sequence[Span]) -> list[Group]:
        groups, first, token = [], 0, 0
        for i in range(1, len(packed) + 1):
            count = len(packed[first].ids)
            if i < len(packed) and len(packed[i].ids) == count and packed[i].slot == packed[first].slot + i - first:
                continue
            spans = packed[first:i]
            end = max(span.start for span in spans) + count
            masks = {w: self._mask([s.start for s in spans], count, end, w) for w in set(self.shape.windows)}
            slots = slice(spans[0].slot, spans[0].slot + len(spans))
            groups.append(Group(slots, slice(token, token + count * len(spans)), count, end, masks))
            token += count * len(spans)
            first = i
        return groups

    def _mask(self, starts: Sequence[int], count: int, end: int, window: int | None) -> Tensor | None:
        """0 where a query sees an entry, −inf elsewhere, `[R, 1, G·T, end]`."""
        if count == 1 and len(set(starts)) == 1 and (window is None or end <= window):
            return None
        at = torch.tensor(starts, device=self.device).unsqueeze(1) + torch.arange(count, device=self.device)
        entry = torch.arange(end, device=self.device)
        hidden = entry > at.unsqueeze(-1)
        if window is not None:
            hidden |= entry <= at.unsqueeze(-1) - window
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return mask.repeat(1, self.shape.heads // self.shape.kv_heads, 1).unsqueeze(1)

    def _kept(self, packed: Sequence[Span], order: Sequence[int], keep: Sequence[int]) -> Tensor:
        """Packed places of the wanted positions, in the order of the spans as they were given."""
        ends, at = [0] * len(packed), 0
        for span, original in zip(packed, order, strict=True):
            at += len(span.ids)
            ends[original] = at
        places = [place for end, count in zip(ends, keep, strict=True) for place in range(end - count, end)]
        return torch.tensor(places, dtype=torch.long, device=self.device)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys `[N, H, D]` turned by their positions; `cos` and `sin` as `_rotation` gives them."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _gated(both: Tensor, activation: Any) -> Tensor:
    """`[N, 2 i]`, gates beside what they let through, to `[N, i]`."""
    gate, up = both.chunk(2, dim=-1)
    gated: Tensor = activation(gate) * up
    return gated


def _positions(packed: Sequence[Span]) -> list[int]:
    return [position for span in packed for position in range(span.start, span.start + len(span.ids))]
