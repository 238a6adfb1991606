"""Linear maps of a decoder as few large products: neighbours side by side, every member's LoRA stacked beside them.

`q`, `k`, `v` (or `gate`, `up`) read the same input, so their weights become one matrix; the A factors of all adapters
are further rows of it. One product gives the base's output and every adapter's low-rank input; a mask keeps, of each
token, the columns of its own lane; one more product with the stacked B factors adds the correction. Exact: a masked
column is a zero in the sum.

Shapes: N tokens, `in`/`out` widths, R the ranks of all adapters of all the maps together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusionroute.decoding.matrices import Matrix
from fusionroute.errors import FusionRouteError


class UnsupportedError(FusionRouteError):
    """This model has something that the packed pass does not know; run it as transformers does."""


def base_of(module: Any) -> Any:
    """The linear layer itself, under the adapters that PEFT may have put around it."""
    return getattr(module, "base_layer", module)


def factors(module: Any, adapter: str | None) -> tuple[Tensor, Tensor] | None:
    """A `[r, in]` and scaled B `[out, r]` of `adapter` on `module`; None if it has none there.

    Raises:
        UnsupportedError: a kind of LoRA that is more than `y + B A x`.
    """
    if adapter is None or adapter not in getattr(module, "lora_A", {}):
        return None
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    if getattr(module, "lora_variant", {}).get(adapter) is not None or module.use_dora.get(adapter):
        raise UnsupportedError(f"adapter {adapter}: only plain LoRA runs in the packed pass")
    if up.bias is not None or module.fan_in_fan_out:
        raise UnsupportedError(f"adapter {adapter}: LoRA with a bias or transposed weights")
    return down.weight, up.weight * module.scaling[adapter]


class Lanes:
    """The lane of each token, `[N]`, and the columns it uses of each mask seen so far."""

    def __init__(self, of: Tensor) -> None:
        self.of = of
        self.known: dict[int, Tensor] = {}

    def columns(self, mask: Tensor) -> Tensor:
        """Rows of `mask [lanes, R]` by token, `[N, R]`; products with the same mask share them."""
        if id(mask) not in self.known:
            self.known[id(mask)] = mask[self.of]
        return self.known[id(mask)]


class Product:
    """`y = W x + b`, and of each token the LoRA of its lane.

    Args:
        modules: linear layers (or PEFT's wrappers of them) with the same input; their outputs stand side by side.
        lanes: adapter names by lane; None is the base as it stands.
        merge: add the one lane's adapter into a copy of the weights instead.
        blocks: as in `Matrix`.
    """

    def __init__(
        self, modules: Sequence[Any], lanes: Sequence[str | None], *, merge: bool = False, blocks: bool = False
    ) -> None:
        bases = [base_of(module) for module in modules]
        # Quantised layers derive from Linear, or hold a weight that is more than a tensor.
        for base in bases:
            if type(base) is not torch.nn.Linear or _is_quantised(base):
                kinds = f"{type(base).__name__} of {type(base.weight).__name__}"
                raise UnsupportedError(f"{kinds} is not a plain linear layer (quantised?)")
        weights = [base.weight for base in bases]
        found = [[factors(module, lane) for module in modules] for lane in lanes]
        self.out = sum(weight.shape[0] for weight in weights)
        if merge:
            (only,) = found
            weights = [w if f is None else _merged(w, *f) for w, f in zip(weights, only, strict=True)]
            found = []
        self.mask, up = _stack_up(weights, found)
        self.up = None if up is None else Matrix(up, blocks=blocks)
        downs = [pair[0] for lane in found for pair in lane if pair is not None]
        weight = torch.cat([*weights, *(down.to(weights[0].dtype) for down in downs)])
        self.all = Matrix(weight, _biases(bases, weight), blocks=blocks)
        if not merge:
            _share(weight, bases)

    @property
    def blocks(self) -> bool:
        """Whether it multiplies with blocks; as of `Matrix`."""
        return self.all.blocks

    @property
    def matrices(self) -> list[Tensor]:
        """What a product reads."""
        return [self.all.weight] + ([] if self.up is None else [self.up.weight])

    def __call__(self, x: Tensor, lanes: Lanes | None) -> Tensor:
        """`x [N, in]` and the lane of each token (None: no token has an adapter) give `[N, out]`."""
        y = self.all(x)
        if self.up is None:
            return y
        if lanes is None:
            return y[:, : self.out]
        assert self.mask is not None
        y, low = y.tensor_split((self.out,), dim=1)
        return self.up.add_to(y, low * lanes.columns(self.mask))


class Apart:
    """As `Product`, of layers whose weights are more than tensors (quantised): one product each, no adapter."""

    mask = None
    blocks = False

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = list(modules)
        self.matrices: list[Tensor] = [module.weight for module in modules]

    def __call__(self, x: Tensor, lanes: Lanes | None) -> Tensor:
        """`[N, in] -> [N, out]`."""
        return torch.cat([module(x) for module in self.modules], dim=-1)


def product(modules: Sequence[Any], lanes: Sequence[str | None], *, merge: bool, blocks: bool) -> Product | Apart:
    """One product of the layers if their weights are plain tensors; arguments as of `Product`.

    Raises:
        UnsupportedError: layers that are not plain, or quantised ones with adapters.
    """
    if not any(lanes) and all(map(_is_quantised, modules)):
        return Apart(modules)
    return Product(modules, lanes, merge=merge, blocks=blocks)


def _is_quantised(module: Any) -> bool:
    """Whether it is a linear layer as torch's own, but its weight is not."""
    return type(module) is torch.nn.Linear and type(module.weight) is not torch.nn.Parameter


def share_masks(products: Sequence[Product | Apart]) -> None:
    """Let products with equal masks have one tensor: layers alike use the same columns."""
    masks: list[Tensor] = []
    for product in products:
        if product.mask is not None:
            same = next((mask for mask in masks if torch.equal(mask, product.mask)), product.mask)
            if same is product.mask:
                masks.append(same)
            product.mask = same


def _share(weight: Tensor, bases: Sequence[Any]) -> None:
    """Point the layers' own weights into the one matrix, so that the base is in memory once."""
    at = 0
    for base in bases:
        rows = base.weight.shape[0]
        base.weight.data = weight[at : at + rows]
        at += rows


def _merged(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return (weight.float() + up.float() @ down.float()).to(weight.dtype)


def _stack_up(
    weights: Sequence[Tensor], found: Sequence[Sequence[tuple[Tensor, Tensor] | None]]
) -> tuple[Tensor | None, Tensor | None]:
    """Which of the R columns each lane uses `[lanes, R]`, and the B factors `[out, R]`, zero outside their own map."""
    ranks = [[0 if pair is None else pair[0].shape[0] for pair in lane] for lane in found]
    total = sum(map(sum, ranks))
    if not total:
        return None, None
    out = sum(weight.shape[0] for weight in weights)
    mask = weights[0].new_zeros(len(found), total)
    up = weights[0].new_zeros(out, total)
    at = 0
    for lane, pairs in enumerate(found):
        column = 0
        for weight, pair, rank in zip(weights, pairs, ranks[lane], strict=True):
            if pair is not None:
                mask[lane, at : at + rank] = 1
                up[column : column + weight.shape[0], at : at + rank] = pair[1]
                at += rank
            column += weight.shape[0]
    return mask, up


def _biases(bases: Sequence[Any], weight: Tensor) -> Tensor | None:
    """Biases side by side, zero for layers without one and for the A factors; None if no layer has one."""
    if all(base.bias is None for base in bases):
        return None
    bias = weight.new_zeros(weight.shape[0])
    at = 0
    for base in bases:
        if base.bias is not None:
            bias[at : at + base.weight.shape[0]] = base.bias
        at += base.weight.shape[0]
    return bias
