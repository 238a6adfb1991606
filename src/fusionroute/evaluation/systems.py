"""What a table compares: the systems of the paper's tables and ours, each as weights and a policy of its rows.

Every system that writes token by token runs on the engine, so they differ in nothing but what is named here. Knows no
task.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusionroute import collection as collections
from fusionroute.configuration import ROUTER, FusionRouteConfig, MemberSpec
from fusionroute.errors import UsageError

SELECTION = "sequence-selection"  # runs no model of its own: it picks among the experts' answers
MERGES = ("task-arithmetic", "dare", "ties")


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
            for spec in config.specs_on(base)
            if spec.name == expert or expert is None or (spec.name == ROUTER and alpha != 0)
        ]
        weights: dict[str, Any] = {
            s.name: [s.digest, s.adapter_digest, s.source if s.digest is None else None] for s in taking_part
        }
        if expert is None:
            weights["route_head"] = _digest(self.folder / ROUTER / "route_head.safetensors")
        return {"weights": weights, "policy": {**self.policy, "alpha": alpha}, "vocab_size": config.vocab_size}


@dataclass(frozen=True)
class Sources:
    """Where systems beside the collection's own come from.

    Attributes:
        collection: the one that is evaluated.
        work: folder for merged models, made when first wanted.
        sft: the collection after phase 1.
        finetuned: the fine-tuned model, as SOURCE or SOURCE+ADAPTER.
        base: replaces the base that adapters stand on; a merge of whole models is made around it.
    """

    collection: Path
    work: Path
    sft: Path | None = None
    finetuned: str | None = None
    base: str | None = None


def every_name(config: FusionRouteConfig) -> list[str]:
    """The systems that `--system all` means."""
    experts = config.expert_names
    return [
        "fusionroute",
        *(f"expert:{name}" for name in experts),
        "router",
        "query-level",
        "query-level-no-complement",
        "uniform",
        *(f"fixed:{name}" for name in experts),
        "no-complement",
        "sft-only",
        SELECTION,
        *(f"merge:{method}" for method in MERGES),
        "finetuned",
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
    if kind == "merge" and which in MERGES:
        return System(name, _merged(which, sources), {"expert": ROUTER})
    policies: dict[str, dict[str, Any]] = {
        "fusionroute": {},
        "router": {"expert": ROUTER},
        "query-level": {"routing": "query"},
        "query-level-no-complement": {"routing": "query", "alpha": 0.0},
        "uniform": {"routing": "uniform", "alpha": 0.0},
    }
    if name in policies:
        return System(name, sources.collection, policies[name], routed=name not in ("router", "uniform"))
    if name in ("sft-only", "no-complement"):
        if sources.sft is None:
            raise UsageError(f"{name} needs the collection after phase 1: give --sft")
        return System(name, sources.sft, {} if name == "sft-only" else {"alpha": 0.0}, routed=True)
    if name == "finetuned":
        if sources.finetuned is None:
            raise UsageError("finetuned needs a model trained on the router's data: give --finetuned SOURCE[+ADAPTER]")
        source, _, adapter = sources.finetuned.partition("+")
        spec = MemberSpec(ROUTER, source, adapter=adapter or None)
        return System(name, _alone(spec, sources.work / "finetuned"), {"expert": ROUTER})
    raise UsageError(f"no system {name!r}: there are {', '.join(every_name(config))}")


def _merged(method: str, sources: Sources) -> Path:
    from fusionroute.baselines.merging import MergeSettings, merge_collection

    settings = MergeSettings.of(method)
    config = collections.read_config(sources.collection)
    made_of = [[spec.source, spec.digest, spec.adapter_digest] for spec in config.specs_on(sources.base)]
    key = hashlib.sha256(json.dumps([made_of, vars(settings)]).encode()).hexdigest()[:12]
    model = sources.work / f"merge-{method}-{key}"
    if not model.exists():
        merge_collection(sources.collection, settings, model, base=sources.base)
    return _alone(MemberSpec(ROUTER, str(model)), sources.work / f"{model.name}-alone")


def _alone(spec: MemberSpec, out: Path) -> Path:
    """A collection of one ordinary model, as its own only expert, for the engine to run."""
    if not out.exists():
        collections.assemble(out, spec, [MemberSpec("itself", spec.source, adapter=spec.adapter)])
    return out


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse(wanted: Sequence[str], config: FusionRouteConfig) -> list[str]:
    """Names from `--system`, which may hold several between commas; `all` stands for every one, in their order."""
    names = [name for entry in wanted for name in entry.split(",") if name]
    expanded = [each for name in names for each in (every_name(config) if name == "all" else [name])]
    return list(dict.fromkeys(expanded))
