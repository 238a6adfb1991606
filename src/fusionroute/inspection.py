"""What a collection is made of and needs: members, digests, vocabulary, memory.

Loads no model: it reads configs and the headers of weight files, whose digests are computed once and remembered.
Members that are not on this machine yet are fetched; with HF_HUB_OFFLINE=1 they are reported as missing instead.
Knows nothing of speed; memory for activations is not counted.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fusionroute import vocabulary, weights
from fusionroute.card import short_digest, short_source
from fusionroute.errors import FusionRouteError

if TYPE_CHECKING:
    from fusionroute.configuration import FusionRouteConfig, MemberSpec

EXAMPLE_TOKENS = 2048
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FROM_FILES = (
    "parameters", "adapter_parameters", "bytes", "dtype", "digest_matches", "adapter_digest_matches", "architecture",
    "layers", "width", "template",
)  # fmt: skip
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass
class _Found:
    """What the files of one member say, beside its entry in the report.

    Attributes:
        entry: its part of the report.
        folder: where its weights are; None if they cannot be had.
        placement: device, dtype and attention that the collection asks for.
        loaded_bytes, adapter_bytes: of base and adapter once loaded.
        layer_bytes: KV bytes of one layer and token.
        windows: per layer that has a KV cache, the number of tokens it keeps; None for all.
        warnings: for people.
    """

    entry: dict[str, Any]
    folder: Path | None = None
    placement: tuple[str | None, ...] = ()
    loaded_bytes: int = 0
    adapter_bytes: int = 0
    layer_bytes: int = 0
    windows: list[int | None] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of this member's KV cache for one row of `tokens`."""
        return self.layer_bytes * sum(tokens if kept is None else min(tokens, kept) for kept in self.windows)


def inspect_collection(folder: Path, base: str | None = None) -> dict[str, Any]:
    """All there is to say about the collection in `folder`, as a dict that `json.dumps` takes.

    A member, head or vocabulary that is not as it should be does not end the report: its entry has `error`, and
    `errors(report)` lists them. Memory is in bytes: what loading takes in the dtypes that the collection asks for, else
    the files have, KV caches likewise.

    Args:
        folder: the collection.
        base: replaces the base of the adapters, as when loading.

    Raises:
        FusionRouteError: `config.json` is missing, half-written or another kind of model's.
        UsageError: `base` is given and there is no adapter.
    """
    from fusionroute import collection

    config = collection.read_config(folder)
    specs = config.specs_on(base)
    try:
        template = _template(collection.tokenizer_folder(config, folder, base))
    except FusionRouteError:
        template = None  # the vocabulary's entry says why
    found = []
    for number, spec in enumerate(specs):
        found.append(_inspect_member(spec, None if spec.is_router else number - 1, folder, base is not None, template))
    _mark_shared(found)
    head, warnings = _inspect_head(folder, config)
    words = _inspect_vocabulary(folder, config, base, [m.entry["name"] for m in found if "error" in m.entry])
    for member in found:
        warnings += member.warnings
    warnings += [note for note in words.get("notes", []) if "chat template" in note]
    if unlicensed := [spec.name for spec in specs if spec.license is None]:
        warnings.append(f"no licence is stated for {', '.join(unlicensed)}: look it up before publishing")
    return {
        "collection": str(folder),
        "alpha": config.alpha,
        "vocab_size": config.vocab_size,
        "head": head,
        "members": [member.entry for member in found],
        "vocabulary": words,
        "memory": _memory(found, config),
        "warnings": warnings,
    }


def errors(report: dict[str, Any]) -> list[str]:
    """Every error in `report`, one line each. A digest that differs is among the warnings: `base` may excuse it."""
    parts = [(member["name"], member) for member in report["members"]]
    parts += [("route head", report["head"]), ("vocabulary", report["vocabulary"])]
    return [f"{name}: {part['error']}" for name, part in parts if "error" in part]


def has_errors(report: dict[str, Any]) -> bool:
    """Whether anything in `report` is an error; a warning is none."""
    return bool(errors(report))


# ---- members


def _inspect_member(
    spec: "MemberSpec", index: int | None, collection: Path, other_base: bool, template: str | None
) -> _Found:
    from fusionroute.members import resolve_member

    entry = {"index": index, **asdict(spec), **dict.fromkeys(_FROM_FILES), "shares_base_with": []}
    member = _Found(entry, placement=(spec.device, spec.dtype, spec.attention))
    try:
        member.folder, adapter = resolve_member(spec, collection)
    except FusionRouteError as error:
        entry["error"] = str(error)
        return member
    try:
        _read_weights(member, member.folder, adapter, spec.dtype)
        found = weights.digest(member.folder)
        entry["digest_matches"] = _compare(member, "model", spec.digest, found, other_base)
        if adapter is not None:
            found = weights.digest(adapter)
            entry["adapter_digest_matches"] = _compare(member, "adapter", spec.adapter_digest, found)
        own = _template(member.folder)
        entry["template"] = "none" if own is None else "same" if own == template else "differs"
    except FusionRouteError as error:
        entry["error"] = str(error)
    return member


def _read_weights(member: _Found, folder: Path, adapter: Path | None, asked: str | None) -> None:
    """Fill in what the model's config and the files' headers say; `asked` is the collection's dtype for the member."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    from fusionroute.members import parse_dtype, read_model_config
    from fusionroute.quantisation import FORMATS

    entry = member.entry
    stored_tensors = weights.read_tensors(folder)
    entry["parameters"], stored, entry["dtype"] = _measure(stored_tensors.values())
    entry["bytes"] = stored
    if adapter is not None:
        tensors = weights.read_header(adapter / "adapter_model.safetensors").values()
        entry["adapter_parameters"], more, _ = _measure(tensors)
        entry["bytes"] += more
    config = read_model_config(folder)
    try:
        text = config.get_text_config(decoder=True)
        cache = DynamicCache(config=config)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        entry["layers"], entry["width"] = text.num_hidden_layers, text.hidden_size
    except Exception as error:  # a config of an architecture without attention, or with odd values
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FusionRouteError(f"{folder / 'config.json'} does not say what a KV cache takes: {reason}") from error
    entry["architecture"] = (config.architectures or [type(config).__name__])[0]

    # Else transformers loads in the dtype of the config, where it has one; PEFT gives an adapter its base's.
    wanted = parse_dtype(asked, *FORMATS) or getattr(config, "dtype", None) or entry["dtype"]
    dtype = str(wanted).removeprefix("torch.")
    size = _BYTES.get(dtype, 2)
    member.loaded_bytes = stored if dtype == entry["dtype"] else entry["parameters"] * size
    if asked in FORMATS:
        blocks = [t for name, t in stored_tensors.items() if len(t.shape) == 2 and "layers." in name]
        member.loaded_bytes -= (size - 1) * sum(prod(tensor.shape) for tensor in blocks)
    member.adapter_bytes = (entry["adapter_parameters"] or 0) * size
    member.layer_bytes = 2 * heads * head_dim * size
    # A sliding layer keeps what the next token still sees: its window less that token.
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers if isinstance(layer, DynamicLayer)]
    member.windows = [None if window is None else window - 1 for window in windows]


def _measure(tensors: Iterable[Any]) -> tuple[int, int, str]:
    """Numbers, bytes, and the dtype that most of the bytes are in."""
    numbers, by_dtype = 0, dict[str, int]()
    for tensor in tensors:
        numbers += prod(tensor.shape)
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.end - tensor.begin
    dtype = max(by_dtype, key=lambda name: by_dtype[name], default="F32")
    return numbers, sum(by_dtype.values()), _DTYPES.get(dtype, dtype.lower())


def _compare(member: _Found, what: str, expected: str | None, found: str, excused: bool = False) -> bool | None:
    if expected is None:
        return None
    if found != expected:
        so = "the result may differ from the published one" if excused else "loading refuses it, fetch the right files"
        name = member.entry["name"]
        member.warnings.append(f"{name}: the {what} has digest {found}, the collection expects {expected}: {so}")
    return found == expected


def _mark_shared(found: list[_Found]) -> None:
    def key(member: _Found) -> Any:
        return member.folder or (member.entry["source"], member.entry["revision"])

    for member in found:
        others = [other.entry["name"] for other in found if other is not member and key(other) == key(member)]
        member.entry["shares_base_with"] = others


def _template(folder: Path) -> str | None:
    template = vocabulary.template_of(folder)
    return None if template is None else template.strip()


# ---- what belongs to all of them


def _inspect_head(folder: Path, config: "FusionRouteConfig") -> tuple[dict[str, Any], list[str]]:
    import torch

    from fusionroute.configuration import ROUTER
    from fusionroute.router import RouteHead

    head: dict[str, Any] = {"trained": config.head_trained, "experts": config.expert_names}
    warnings = []
    try:
        loaded = RouteHead.load(folder / ROUTER, config.expert_names, config.hidden_size, torch.device("cpu"))
        head["trained"] = loaded.trained
        if loaded.trained != config.head_trained:
            warnings.append(
                f"config.json says head_trained {config.head_trained}, the route head's file says {loaded.trained}: "
                "make the collection again from the head that is meant"
            )
    except FusionRouteError as error:
        head["error"] = str(error)
    if not head["trained"]:
        warnings.append(f"the route head is untrained: every prompt goes to expert {config.expert_names[0]}")
    return head, warnings


def _inspect_vocabulary(
    folder: Path, config: "FusionRouteConfig", base: str | None, broken: list[str]
) -> dict[str, Any]:
    """The joint check, without the `broken` members, which cannot be read."""
    from fusionroute import collection

    if len(broken) == len(config.member_specs):
        return {"error": "no member can be read"}
    try:
        report = collection.check_vocabulary_of(config, folder, base, leave_out=broken)
    except FusionRouteError as error:
        return {"error": str(error)}
    notes = [f"{name} cannot be read and was not checked" for name in sorted(broken)]
    return {"common": report.common, "sizes": report.sizes, "notes": [*report.notes, *notes]}


def _memory(found: list[_Found], config: "FusionRouteConfig") -> dict[str, Any]:
    # As `members.load_members` shares them: one copy for those on one base that are placed alike.
    bases = {(member.folder, member.placement): member.loaded_bytes for member in found}
    head = 4 * len(config.expert_names) * config.hidden_size
    per_token = {member.entry["name"]: member.kv_bytes(1) for member in found if member.windows}
    notes = []
    for member in found:
        kept = {window for window in member.windows if window is not None}
        if kept:
            layers = sum(window is not None for window in member.windows)
            last = ", ".join(map(str, sorted(kept)))
            name, of = member.entry["name"], len(member.windows)
            notes.append(f"{name}: {layers} of {of} layers slide and keep only the last {last} tokens")
    example = sum(member.kv_bytes(EXAMPLE_TOKENS) for member in found)
    return {
        "weights_bytes": sum(bases.values()) + sum(member.adapter_bytes for member in found) + head,
        "kv_bytes_per_token": {"members": per_token, "total": sum(per_token.values())},
        "example": {"rows": 1, "tokens": EXAMPLE_TOKENS, "bytes": example},
        "notes": notes,
    }


# ---- for a terminal


def render(report: dict[str, Any]) -> RenderableType:
    """The report for a terminal of 80 columns or more."""
    head, memory, words = report["head"], report["memory"], report["vocabulary"]
    state = "trained" if head["trained"] else "untrained"
    lines: list[RenderableType] = [
        Text(report["collection"], style="bold"),
        Text(
            f"α = {report['alpha']:g} · {report['vocab_size']} ids · route head {state} · {', '.join(head['experts'])}"
        ),
        _origins(report["members"]),
        _numbers(report),
    ]
    least = "at least " if any("error" in member for member in report["members"]) else ""
    total, example = memory["kv_bytes_per_token"]["total"], memory["example"]
    lines.append(
        Text(
            f"Memory: {least}{_size(memory['weights_bytes'])} of weights, {_size(total)} of KV cache a token; "
            f"{_size(example['bytes'])} of KV cache for a row of {example['tokens']} tokens."
        )
    )
    lines += _marked(memory["notes"], "dim")
    if "error" not in words:
        lines.append(Text(f"Vocabulary: {words['common']} ids mean the same to all."))
        lines += _marked([note for note in words["notes"] if note not in report["warnings"]], "dim")
    lines += _marked([f"warning: {text}" for text in report["warnings"]], "yellow")
    lines += _marked([f"error: {text}" for text in errors(report)], "red")
    return Group(*lines)


def _origins(members: list[dict[str, Any]]) -> Table:
    table = _table("", "member", "weights and adapter", ">digest", "template", "licence")
    seen: set[str] = set()
    for member in members:
        twin = next((name for name in member["shares_base_with"] if name in seen), None)
        seen.add(member["name"])
        revision = "" if member["revision"] is None else f"@{member['revision']}"
        table.add_row(
            "–" if member["index"] is None else str(member["index"]),
            Text(member["name"], style="red" if "error" in member else "bold"),
            Text(short_source(member["source"]) + revision if twin is None else f"as {twin}"),
            _digest(member, "digest"),
            member["template"] or "?",
            Text(member["license"] or "?"),
        )
        if member["adapter"] is not None:
            table.add_row("", "", Text(f"+ {member['adapter']}"), _digest(member, "adapter_digest"))
        if member["description"]:
            table.add_row("", "", Text(member["description"], style="dim"))
    return table


def _digest(member: dict[str, Any], key: str) -> Text:
    if member[key] is None:
        return Text("none", style="dim")
    mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("?", "dim")}[member[f"{key}_matches"]]
    return Text.assemble(short_digest(member[key]), " ", (mark, style))


def _numbers(report: dict[str, Any]) -> Table:
    table = _table("member", "architecture", ">layers", ">params", ">adapter", ">files", ">KV/token", "dtype")
    per_token = report["memory"]["kv_bytes_per_token"]["members"]
    for member in report["members"]:
        if member["layers"] is None:
            table.add_row(member["name"], *["?"] * 7)
            continue
        table.add_row(
            member["name"],
            member["architecture"].removesuffix("ForCausalLM"),
            f"{member['layers']}×{member['width']}",
            _count(member["parameters"]),
            "–" if member["adapter_parameters"] is None else _count(member["adapter_parameters"]),
            _size(member["bytes"]),
            _size(per_token.get(member["name"], 0)),
            member["dtype"],
        )
    return table


def _table(*headers: str) -> Table:
    """An empty table; columns whose header starts with `>` hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        right = header.startswith(">")
        table.add_column(header.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _marked(texts: Iterable[str], style: str) -> list[RenderableType]:
    return [Padding(Text(text, style=style, overflow="fold"), (0, 0, 0, 2)) for text in texts]


def _scaled(value: float, units: list[str]) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {units[power]}".strip()


def _size(count: int) -> str:
    return _scaled(count, ["B", "kB", "MB", "GB", "TB"])


def _count(count: int) -> str:
    return _scaled(count, ["", "k", "M", "B"])
