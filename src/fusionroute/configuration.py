"""What a collection is: its members, in order, and how their logits are combined.

`config.json` holds it, as every transformers model's does. Experts are a list because their order is the order of the
route head's rows, and JSON objects come back sorted. Knows no weights; loads no member.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fusionroute.errors import FusionRouteError, UsageError

# vLLM wants one integer at most in a layer's dotted name, and `expert_<name>` becomes a module's name.
_NAME = re.compile(r"[a-z][a-z0-9_]*")
ROUTER = "router"


@dataclass
class MemberSpec:
    """One member: where its weights come from, and which they were when the collection was made.

    Attributes:
        name: `router`, or an expert's name.
        source: the model's weights (grammar in `fusionroute.sources`); `./folder` is inside the collection.
        revision: the Hub revision of `source`.
        adapter: a LoRA adapter on `source`, likewise; None for a whole model.
        adapter_revision: the Hub revision of `adapter`.
        digest: digest of the weights of `source`; for an adapter, of the base it was trained on.
        adapter_digest: digest of the adapter.
        description: one line for people.
        license: SPDX name, as the member's card says.
        device, dtype, attention: where and how it runs if nothing else is asked for; None is as it comes. `int8` and
            `int4` as dtype quantise an expert.
    """

    name: str
    source: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    digest: str | None = None
    adapter_digest: str | None = None
    description: str = ""
    license: str | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"member name {self.name!r} must match {_NAME.pattern}")

    @property
    def is_router(self) -> bool:
        return self.name == ROUTER

    @property
    def module(self) -> str:
        """Name of the sub-module and of the folder: `router`, `expert_<name>`."""
        return ROUTER if self.is_router else f"expert_{self.name}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MemberSpec":
        """A member as `config.json` has it.

        Raises:
            FusionRouteError: it is no object, has unknown keys, or lacks its name or source.
            UsageError: its name is none for a module.
        """
        if not isinstance(data, dict):
            raise FusionRouteError(
                f"config.json: member {data!r} must be an object with name and source; experts are a list of them"
            )
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        missing = sorted({"name", "source"} - set(data))
        if unknown or missing:
            raise FusionRouteError(
                f"config.json: member {data.get('name', '?')!r} has unknown keys {unknown} and lacks {missing}: "
                "was it written by another version of fusionroute?"
            )
        return cls(**data)


def check_names(names: list[str]) -> None:
    """Refuse experts of one name, or one called like the router.

    Raises:
        UsageError: the message lists the names.
    """
    if len(set(names)) != len(names) or ROUTER in names:
        raise UsageError(f"expert names must be distinct and none may be 'router': {', '.join(names)}")


def absolute_source(source: str) -> str:
    """A source written as a path, or that is one, as an absolute path; any other as it is."""
    written, marker, sha256 = source.partition("#sha256=")
    if not written:
        return source  # no source at all, and not the working folder either
    path = Path(written).expanduser()
    is_path = path.exists() or written.startswith((".", "/", "~"))
    return str(path.resolve()) + marker + sha256 if is_path else source


class FusionRouteConfig(PreTrainedConfig):
    """Configuration of a collection.

    Args:
        router (`dict`): the router, as a `MemberSpec` dict.
        experts (`list[dict]`): the experts, as `MemberSpec` dicts; their order is that of the route indices.
        vocab_size (`int`): ids that mean the same to every member; logits are cropped to them.
        alpha (`float`): weight α of the router's logits in Eq. 1.
        head_trained (`bool`): whether the route head has been trained (an untrained one always picks expert 0).
        training (`dict`): how router and head came about; free form, for cards and reports.

    The remaining arguments mirror the router's own configuration where transformers asks a model for them.
    """

    model_type = "fusionroute"
    keys_to_ignore_at_inference = ("past_key_values",)

    router: dict[str, Any] | None = None
    experts: list[dict[str, Any]] | None = None
    vocab_size: int = 0
    alpha: float = 1.0
    head_trained: bool = False
    training: dict[str, Any] | None = None
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    max_position_embeddings: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_names(self.expert_names)

    @property
    def router_spec(self) -> MemberSpec:
        if self.router is None:
            raise FusionRouteError("config.json names no router")
        return MemberSpec.from_dict(self.router)

    @property
    def expert_specs(self) -> list[MemberSpec]:
        return [MemberSpec.from_dict(expert) for expert in self.experts or []]

    @property
    def member_specs(self) -> list[MemberSpec]:
        """The router, then the experts in route order."""
        return [self.router_spec, *self.expert_specs]

    @property
    def expert_names(self) -> list[str]:
        return [spec.name for spec in self.expert_specs]

    def specs_on(self, base: str | None) -> list[MemberSpec]:
        """`member_specs` with `base` in place of every source that adapters stand on; None changes nothing.

        Raises:
            UsageError: no member is an adapter, or adapters stand on different bases.
        """
        specs = self.member_specs
        if base is None:
            return specs
        # An expert may be the bare base that others adapt, and moves with them.
        adapted = {(spec.source, spec.revision) for spec in specs if spec.adapter is not None}
        if len(adapted) != 1:
            found = ", ".join(sorted(source for source, _ in adapted)) or "none"
            raise UsageError(f"--base replaces the one base that adapters stand on; this collection has {found}")
        source = absolute_source(base)
        return [
            replace(spec, source=source, revision=None) if (spec.source, spec.revision) in adapted else spec
            for spec in specs
        ]

    def set_members(self, router: MemberSpec, experts: list[MemberSpec]) -> None:
        """Replace the members; copies are kept.

        Raises:
            UsageError: two experts have one name, or one is called like the router.
        """
        check_names([expert.name for expert in experts])
        self.router = asdict(router)
        self.experts = [asdict(expert) for expert in experts]

    def expert_index(self, name: str) -> int:
        """Route index of expert `name`.

        Raises:
            UsageError: there is no such expert; the message lists those there are.
        """
        if name not in self.expert_names:
            raise UsageError(f"no expert named {name!r} in this collection: it has {', '.join(self.expert_names)}")
        return self.expert_names.index(name)


AutoConfig.register("fusionroute", FusionRouteConfig, exist_ok=True)
