"""What a table compares: the systems of the paper's tables and ours, each as weights and a policy of its rows.

Every system that writes token by token runs on the engine, so they differ in nothing but what is named here. Knows no
task.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fusionroute import collection as collections
from fusionroute import copying, weights
from fusionroute.baselines.carried import carried, split_adapter
from fusionroute.configuration import ROUTER, FusionRouteConfig, MemberSpec
from fusionroute.errors import UsageError
from fusionroute.evaluation.names import ALPHA, COLLAB, FINETUNED, MERGES, OURS, SELECTION, VARIANT
from fusionroute.files import staged_folder
from fusionroute.sources import resolve

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class NotGivenError(UsageError):
    """A system's weights are neither given nor carried by the collection: `all` leaves it out and says so."""


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        name: as in `--system`.
        folder: the collection whose weights it runs.
        policy: fields of `Request`.
        routed: whether its traces say who wrote what.
    """

    name: str
    folder: Path
    policy: Mapping[str, Any] = field(default_factory=dict)
    routed: bool = False

    def identity(self, config: FusionRouteConfig, base: str | None) -> dict[str, Any]:
        """What its answers depend on: the weights that take part and the policy."""
        expert, alpha = self.policy.get("expert"), self.policy.get("alpha", config.alpha)
        taking_part = [
            spec
            for spec in members_on(config, base)
            if spec.name == expert or expert is None or (spec.name == ROUTER and alpha != 0)
        ]
        made_of: dict[str, Any] = {
            s.name: [
                s.digest,
                s.adapter_digest,
                s.source if s.digest is None else None,
                *([s.dtype] if s.dtype else []),
            ]
            for s in taking_part
        }
        if expert is None:
            made_of["route_head"] = _digest(self.folder / ROUTER / "route_head.safetensors")
        return {
            "weights": made_of,
            "policy": {**self.policy, "alpha": alpha},
            "vocab_size": config.vocab_size,
            "text": _text_digest(config, self.folder, base),
        }


def members_on(config: FusionRouteConfig, base: str | None) -> list[MemberSpec]:
    """The collection's members with `base` under its adapters, if it has any, and with the digest of that base."""
    if base is None or not any(spec.adapter for spec in config.member_specs):
        return config.member_specs
    digest = weights.digest(resolve(base))
    pairs = zip(config.member_specs, config.specs_on(base), strict=True)
    return [after if after == before else replace(after, digest=digest) for before, after in pairs]


def _text_digest(config: FusionRouteConfig, folder: Path, base: str | None) -> str:
    """Of what turns messages into ids and says where an answer ends: tokenizer, chat template, end ids."""
    text = collections.tokenizer_folder(config, folder, base)
    files = [path for name in TOKENIZER_FILES if (path := text / name).is_file()]
    files = sorted([*files, folder / "generation_config.json"], key=lambda path: path.name)
    return hashlib.sha256(json.dumps([[path.name, _digest(path)] for path in files]).encode()).hexdigest()


@dataclass(frozen=True)
class Sources:
    """Where systems beside the collection's own come from; what is not given is what the collection carries.

    Attributes:
        collection: the one that is evaluated.
        work: folder for merged models, made when first wanted.
        sft: the collection after phase 1.
        finetuned: the fine-tuned model, as SOURCE or SOURCE+ADAPTER.
        base: replaces the base that adapters stand on; a merge of whole models is made around it.
        variants: collections with the same experts, by name: the same router trained otherwise.
    """

    collection: Path
    work: Path
    sft: Path | None = None
    finetuned: str | None = None
    base: str | None = None
    variants: Mapping[str, Path] = field(default_factory=dict)


def every_name(config: FusionRouteConfig, variants: Iterable[str] = ()) -> list[str]:
    """The systems that `--system all` means, `variants` among them."""
    experts = config.expert_names
    return [
        OURS,
        *(f"expert:{name}" for name in experts),
        "router",
        "query-level",
        "query-level-no-complement",
        "uniform",
        *(f"fixed:{name}" for name in experts),
        "no-complement",
        "sft-only",
        SELECTION,
        COLLAB,
        *(f"merge:{method}" for method in MERGES),
        FINETUNED,
        *(f"{VARIANT}{name}" for name in variants),
    ]


def find(name: str, sources: Sources) -> System:
    """The system of that name.

    Raises:
        UsageError: there is none, or what it is made of was not given; the message says what to give.
    """
    config = collections.read_config(sources.collection)
    kind, _, which = name.partition(":")
    if which and kind in ("expert", "fixed"):
        config.expert_index(which)
        return System(name, sources.collection, {"expert": which, "alpha": 0.0 if kind == "expert" else config.alpha})
    if f"{kind}:" == ALPHA:
        return System(name, sources.collection, {"alpha": _alpha(name, which)}, routed=True)
    if f"{kind}:" == VARIANT:
        return System(name, _variant(name, which, sources), routed=True)
    if kind == "merge" and which.partition(":")[0] in MERGES:
        return System(name, _merged(name, which, sources), {"expert": ROUTER})
    policies: dict[str, dict[str, Any]] = {
        OURS: {},
        "router": {"expert": ROUTER},
        "query-level": {"routing": "query"},
        "query-level-no-complement": {"routing": "query", "alpha": 0.0},
        "uniform": {"routing": "uniform", "alpha": 0.0},
    }
    if name in policies:
        return System(name, sources.collection, policies[name], routed=name not in ("router", "uniform"))
    if name in ("sft-only", "no-complement"):
        folder = sources.sft or _carried(sources, "sft")
        if folder is None:
            raise NotGivenError(f"{name} needs the collection after phase 1: give --sft")
        return System(name, folder, {} if name == "sft-only" else {"alpha": 0.0}, routed=True)
    if name == FINETUNED:
        if sources.finetuned is not None:
            source, adapter = split_adapter(sources.finetuned)
            digests = [weights.digest(resolve(source))]
            digests += [] if adapter is None else [weights.digest(resolve(adapter, what="adapter"))]
            spec = MemberSpec(ROUTER, source, adapter=adapter)
            folder = _alone(spec, sources.work / f"{FINETUNED}-{_key(digests)}")
        else:
            folder = _carried(sources, "finetuned")
        if folder is None:
            raise NotGivenError(
                "finetuned needs a model trained on the router's data: give --finetuned SOURCE[+ADAPTER]"
            )
        return System(name, folder, {"expert": ROUTER})
    raise UsageError(
        f"no system {name!r}: there are {', '.join(every_name(config, sources.variants))}, {ALPHA}VALUE, "
        "merge:METHOD:SCALE[:DENSITY]"
    )


def _alpha(name: str, value: str) -> float:
    try:
        alpha = float(value)
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha >= 0):
        raise UsageError(f"system {name!r}: {value!r} is no α; give a number from 0, as in {ALPHA}0.5")
    return alpha


def _variant(name: str, which: str, sources: Sources) -> Path:
    if which not in sources.variants:
        raise UsageError(f"system {name!r}: which collection is that? Give --variant {which or 'NAME'}=COLLECTION")
    folder = sources.variants[which]
    theirs, ours = (collections.read_config(place).expert_names for place in (folder, sources.collection))
    if theirs != ours:
        raise UsageError(
            f"--variant {which}: its experts are {', '.join(theirs)}, the collection's are {', '.join(ours)}; name one "
            "with the same experts"
        )
    return folder


def _merged(name: str, which: str, sources: Sources) -> Path:
    from fusionroute.baselines.merging import MergeSettings, merge_collection

    method, *given = which.split(":")
    try:
        values = [float(value) for value in given]
        if len(values) > 2:
            raise ValueError
    except ValueError:
        raise UsageError(f"system {name!r}: write merge:{method}, merge:{method}:SCALE or with :DENSITY too") from None
    settings = MergeSettings.of(
        method, scale=values[0] if values else None, density=values[1] if len(values) > 1 else None
    )
    config = collections.read_config(sources.collection)
    made_of = [[spec.source, spec.digest, spec.adapter_digest] for spec in members_on(config, sources.base)]
    made_of.append([_text_digest(config, sources.collection, sources.base)])
    model = sources.work / f"merge-{method}-{_key([made_of, sources.base, vars(settings)])}"
    if not model.exists():
        merge_collection(sources.collection, settings, model, base=sources.base)
    return _alone(MemberSpec(ROUTER, str(model)), sources.work / f"{model.name}-alone")


def _alone(spec: MemberSpec, out: Path) -> Path:
    """A collection of one ordinary model, as its own only expert, for the engine to run."""
    if not out.exists():
        collections.assemble(out, spec, [MemberSpec("itself", spec.source, adapter=spec.adapter)])
    return out


def _carried(sources: Sources, name: str) -> Path | None:
    """A collection around the router's base with the adapter `name` that the collection carries, or None.

    `sft` has the collection's experts, `finetuned` is its own only one. Members stay where they are, and the digests
    are those the collection was made with: another base is a matter of loading.
    """
    from fusionroute.router import HEAD_FILE, RouteHead

    adapter = carried(sources.collection, name)
    if adapter is None:
        return None
    config = collections.read_config(sources.collection)
    specs = [_absolute(spec, sources.collection) for spec in config.member_specs]
    router = replace(
        specs[0], adapter=str(adapter.resolve()), adapter_revision=None, adapter_digest=weights.digest(adapter)
    )
    whole = name == "sft"
    experts = specs[1:] if whole else [replace(router, name="itself")]
    head = adapter / HEAD_FILE
    made_of = [config.to_dict(), [asdict(s) for s in (router, *experts)], _digest(head) if whole else None]
    text = _text_digest(config, sources.collection, sources.base)
    out = sources.work / f"{name}-{_key([made_of, text])}"
    if not out.exists():
        config.set_members(router, experts)
        with staged_folder(out) as scratch:
            copying.copy_tokenizer(sources.collection, scratch)
            collections.write_generation_config(collections.read_generation_config(sources.collection), scratch)
            config.save_pretrained(scratch)
            (scratch / ROUTER).mkdir()
            names, width = config.expert_names, config.hidden_size
            (RouteHead.load(adapter, names, width) if whole else RouteHead(width, names)).save(scratch / ROUTER)
    return out


def _absolute(spec: MemberSpec, collection: Path) -> MemberSpec:
    """`spec` with what is in the collection named by its path."""
    places = {
        key: str((collection / place).resolve())
        for key in ("source", "adapter")
        if (place := getattr(spec, key)) is not None and place.startswith("./")
    }
    return replace(spec, **places)


def _key(made_of: Any) -> str:
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse(wanted: Sequence[str], config: FusionRouteConfig, variants: Iterable[str] = ()) -> list[str]:
    """Names from `--system`, which may hold several between commas; `all` stands for every one, in their order."""
    names = [name for entry in wanted for name in entry.split(",") if name]
    expanded = [each for name in names for each in (every_name(config, variants) if name == "all" else [name])]
    return list(dict.fromkeys(expanded))
