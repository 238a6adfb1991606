"""Merged models as baselines: one set of weights, made of a base and of what each expert changed in it.

Task arithmetic, DARE and TIES are one function, `merge_deltas`, whose parameters stand in `METHODS`. A delta is an
expert's tensor minus the base's, or an adapter's dense product B A. Tensors are merged one after another, in float32,
and rounded once, to the base's dtype: beside the mapped files, two tensors and the output are in memory, and signs and
counts of TIES. Its paper ranks magnitudes over a whole task vector; here, as in mergekit and PEFT, each tensor is
trimmed by itself. Knows nothing of routers: a merged model is an ordinary transformers model.
"""

import hashlib
import json
import math
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from torch import Tensor

from fusionroute import collection, copying, members, sources, vocabulary
from fusionroute.configuration import absolute_source
from fusionroute.errors import FusionRouteError, UsageError, first_line
from fusionroute.files import read_json, staged_folder, write_json
from fusionroute.weights import StoredTensor, check_adapter, check_model, read_header, read_tensors

Method = Literal["task-arithmetic", "dare", "ties"]
# Gives one expert's delta of one tensor: float32, and a new tensor at every call, because the merge writes into it.
Delta = Callable[[], Tensor]


class Steps(NamedTuple):
    """What a method does with the deltas of one tensor, in this order; `scale` follows."""

    sparsify: Literal["none", "random", "magnitude"]  # random: what is kept is divided by the share kept
    consensus: bool  # drop entries whose sign is not that of the experts' sum
    combine: Literal["sum", "disjoint mean"]  # disjoint: over the experts whose entry is not zero
    density: float  # the paper's share of entries kept


METHODS: dict[str, Steps] = {
    # Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089
    "task-arithmetic": Steps("none", False, "sum", 1.0),
    # Yu et al., Language Models are Super Mario, arXiv 2311.03099: drop rate 0.9, on task arithmetic
    "dare": Steps("random", False, "sum", 0.1),
    # Yadav et al., TIES-Merging, arXiv 2306.01708: trim to 20 %, elect signs, disjoint mean
    "ties": Steps("magnitude", True, "disjoint mean", 0.2),
}


@dataclass(frozen=True)
class MergeSettings:
    """How to merge; `MergeSettings.of` fills in the papers' values.

    Attributes:
        method: a key of `METHODS`.
        scale: λ, the factor of the merged delta.
        density: the share of each expert's entries that is kept, tensor by tensor; DARE's drop rate is the rest.
        seed: of DARE's masks.

    Raises:
        UsageError: the method is unknown, or a value is outside of what it can be.
    """

    method: Method
    scale: float
    density: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UsageError(f"density is the share of entries kept, above 0 and at most 1; {self.density} is not")
        if _steps(self.method).sparsify == "none" and self.density != 1:
            raise UsageError(f"{self.method} keeps every entry: density {self.density} goes with dare or ties")
        if not math.isfinite(self.scale):
            raise UsageError(f"scale is the factor of the merged delta, a finite number; {self.scale} is not")

    @classmethod
    def of(
        cls, method: str, *, scale: float | None = None, density: float | None = None, seed: int = 0
    ) -> "MergeSettings":
        """The settings of the method's paper, λ = 1 for all three, with what is given in their place."""
        kept = _steps(method).density if density is None else density
        return cls(cast(Method, method), 1.0 if scale is None else scale, kept, seed)


def _steps(method: str) -> Steps:
    if method not in METHODS:
        raise UsageError(f"no merge method {method!r}: there are {', '.join(METHODS)}")
    return METHODS[method]


def merge_deltas(deltas: Sequence[Delta | None], settings: MergeSettings, name: str) -> Tensor:
    """The merged delta of one tensor, `scale` included: float32, in the deltas' shape.

    An election of signs needs all experts before it can drop the first entry, so each delta is then asked for twice and
    none is kept. A sum of exactly zero elects no sign and leaves the base as it is (sgn 0 in the TIES paper, where
    mergekit and PEFT elect plus). Entries that tie with the last one kept are all kept.

    Args:
        deltas: in the experts' order; None where an expert is the base. At least one is not None.
        settings: the method and its values.
        name: the tensor's name. DARE's mask is a function of seed, name and the expert's place, and of nothing else.

    Raises:
        FusionRouteError: a delta is not finite.
    """
    steps = _steps(settings.method)
    present = [(place, delta) for place, delta in enumerate(deltas) if delta is not None]
    thresholds: dict[int, float] = {}

    def sparse(place: int, read: Delta) -> Tensor:
        delta = read()
        if not delta.sum().isfinite():  # isfinite of every entry would make copies
            raise FusionRouteError(f"{name} of expert {place + 1} of {len(deltas)} is not finite: check its weights")
        if settings.density == 1:
            return delta
        if steps.sparsify == "random":
            digest = hashlib.sha256(f"{settings.seed}\n{name}\n{place}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            dropped = torch.rand(delta.shape, generator=generator) >= settings.density
            return delta.masked_fill_(dropped, 0).div_(settings.density)
        if place not in thresholds:
            thresholds[place] = _least_kept(delta, settings.density)
        least = thresholds[place]
        return delta.masked_fill_((delta > -least) & (delta < least), 0)

    signs = counts = total = None
    if steps.consensus:
        for place, read in present:
            delta = sparse(place, read)
            total = delta if total is None else total.add_(delta)
            del delta  # or it would live on while the next one is read
        assert total is not None
        signs, total = total.sign_().to(torch.int8), None
    for place, read in present:
        delta = sparse(place, read)
        if signs is not None:
            delta.masked_fill_((delta > 0) != (signs > 0), 0).masked_fill_(signs == 0, 0)
        if steps.combine == "disjoint mean":
            counts = torch.zeros(delta.shape, dtype=torch.int16) if counts is None else counts
            counts += delta != 0
        total = delta if total is None else total.add_(delta)
        del delta
    assert total is not None
    if counts is not None:
        total.div_(counts.clamp_(min=1))
    return total.mul_(settings.scale)


def _least_kept(delta: Tensor, density: float) -> float:
    """The magnitude of the last entry kept when the largest are, ⌊density · entries⌋ of them; ∞ if that is none."""
    magnitudes = delta.abs().flatten().numpy()
    keep = int(density * len(magnitudes))
    if keep == 0:
        return math.inf
    magnitudes.partition(len(magnitudes) - keep)  # torch's kthvalue would make 64-bit indices for all of them
    return float(magnitudes[len(magnitudes) - keep])


class _Model:
    """The tensors of a model folder, read one at a time; of tensors that are tied there is one."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        check_model(folder)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                tied = AutoModelForCausalLM.from_config(config, trust_remote_code=False).all_tied_weights_keys
        except (OSError, ValueError, ImportError) as error:
            raise FusionRouteError(f"{folder}: transformers does not know this model: {first_line(error)}") from error
        if getattr(config, "quantization_config", None):
            raise FusionRouteError(f"{folder} is quantised: merge the weights it was made from")
        self.folder, self.kind, self.rows = folder, config.model_type, config.get_text_config().vocab_size
        # Old files hold the rotary frequencies, which no model reads any more.
        self.tensors = {n: t for n, t in read_tensors(folder).items() if not n.endswith("rotary_emb.inv_freq")}
        self.twins = tied | {source: target for target, source in tied.items()}
        for target, source in tied.items():
            if target in self.tensors and source in self.tensors:
                if not torch.equal(self.read(target), self.read(source)):
                    both = f"{target} and {source} differ, but its config.json ties them"
                    raise FusionRouteError(f"{folder}: {both}: set tie_word_embeddings to false there")
                del self.tensors[target]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, mapped from the file: not to be written into."""
        return _read(self.tensors[name].file, name)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _is_adapter(folder: Path) -> bool:
    # A trainer may leave config.json beside an adapter, so the weights decide.
    return (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors*"))


def _deltas(expert: Path, base: _Model) -> dict[str, Delta]:
    """What a model or an adapter changes, by the base's tensor names; nothing if it is the base."""
    if expert.resolve() == base.folder.resolve():
        return {}
    return _adapter_deltas(expert, base) if _is_adapter(expert) else _model_deltas(expert, base)


def _model_deltas(folder: Path, base: _Model) -> dict[str, Delta]:
    model = _Model(folder)
    refusal = f"{folder} does not fit the base {base.folder}"
    if model.kind != base.kind:
        raise FusionRouteError(f"{refusal}: it is a {model.kind}, the base a {base.kind}")
    # A file may hold either of two tied tensors.
    stored = {name: name if name in model.tensors else model.twins.get(name, name) for name in base.tensors}
    missing, unknown = set(stored.values()) - set(model.tensors), set(model.tensors) - set(stored.values())
    if missing or unknown:
        counts = f"{len(missing)} tensors of the base missing, {len(unknown)} that it lacks"
        raise FusionRouteError(f"{refusal}: {counts}, first {min(missing | unknown)}")
    for name, other in stored.items():
        shape, own = model.tensors[other].shape, base.tensors[name].shape
        is_vocabulary = [shape[:1], own[:1]] == [[model.rows], [base.rows]]
        if shape != own and not (is_vocabulary and shape[1:] == own[1:]):
            raise FusionRouteError(f"{refusal}: {other} has shape {shape}, in the base {own}")
    return {name: partial(_model_delta, model, other, base, name) for name, other in stored.items()}


def _model_delta(model: _Model, other: str, base: _Model, name: str) -> Tensor:
    theirs, own = model.read(other), base.read(name)
    if theirs.shape == own.shape:
        return theirs.to(torch.float32, copy=True).sub_(own)
    # Another number of ids: rows that the base lacks are dropped, and rows that the expert lacks do not change.
    delta, rows = torch.zeros(own.shape), min(len(theirs), len(own))
    delta[:rows] = theirs[:rows]
    delta[:rows] -= own[:rows]
    return delta


# What an adapter's config may be, where anything else makes it more than α/r · B A.
_PLAIN_LORA: dict[str, Any] = {"peft_type": "LORA", "bias": "none"} | dict.fromkeys((
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
))  # fmt: skip
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?A(?P<end>(\.weight)?)")


def _adapter_deltas(folder: Path, base: _Model) -> dict[str, Delta]:
    check_adapter(folder)
    config, file = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    for key, plain in _PLAIN_LORA.items():
        if (config.get(key, plain) or None) != plain:
            raise FusionRouteError(f"{folder} has {key} {config[key]}: only LoRA's factors A and B can be merged")
    factors = read_header(file)
    deltas: dict[str, Delta] = {}
    for match in filter(None, map(_FACTOR.fullmatch, list(factors))):
        first, name = match[0], f"{match['module']}.weight"
        second = f"{first.removesuffix('A' + match['end'])}B{match['end']}"
        if second not in factors:
            continue
        if name not in base.tensors or name in base.twins:
            why = f"ties it to {base.twins[name]}" if name in base.twins else "has no such tensor"
            raise FusionRouteError(f"{folder} adapts {name}, but the base {base.folder} {why}: it cannot be merged")
        flipped = bool(config.get("fan_in_fan_out") or match["embedding"])
        a, b = factors.pop(first), factors.pop(second)
        shape, own = [b.shape[0], a.shape[1]], base.tensors[name].shape
        if (shape[::-1] if flipped else shape) != own:
            raise FusionRouteError(f"{folder}: its change of {name} is {shape}, the tensor in {base.folder} {own}")
        scaling = _scaling(config, match["module"], a.shape[0])
        deltas[name] = partial(_adapter_delta, file, first, second, scaling, flipped)
    if factors:
        raise FusionRouteError(f"{folder} holds {min(factors)}: only pairs of LoRA factors A and B can be merged")
    return deltas


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """α/r of one module, or α/√r; the patterns are PEFT's: regular expressions for the end of a module's name."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alphas = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(alphas, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _adapter_delta(file: Path, first: str, second: str, scaling: float, flipped: bool) -> Tensor:
    delta = (_read(file, second).float() @ _read(file, first).float()).mul_(scaling)
    return delta.T.contiguous() if flipped else delta


def merge_members(
    base: Path, experts: Sequence[Path], settings: MergeSettings, out: Path, *, text: Path | None = None
) -> None:
    """Merge experts into a base and write an ordinary transformers model: dtype, shards and config.json of the base.

    Args:
        base: a model folder.
        experts: model folders of the base's architecture, LoRA adapter folders on it, or the base itself. Embeddings
            may have more or fewer rows than the base's: those that both have are merged.
        settings: the method and its values.
        out: the folder to make, whole or not at all.
        text: the folder whose tokenizer and generation_config.json the merged model gets; None is the base.

    Raises:
        UsageError: there are no experts.
        FusionRouteError: weights, adapters or tokenizers do not fit together, `out` is not empty, or the disk is full.
    """
    if not experts:
        raise UsageError("there are no experts to merge")
    text = base if text is None else text
    whole = {str(folder): folder for folder in [base, *experts] if not _is_adapter(folder)}
    report = vocabulary.check_vocabularies({"the merged model": text, **whole})
    model = _Model(base)
    if (size := report.sizes["the merged model"]) > model.rows:
        raise FusionRouteError(f"the tokenizer in {text} has {size} ids, the base {base} only {model.rows} rows")
    deltas = [_deltas(expert, model) for expert in experts]
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in sorted(model.tensors.items(), key=lambda item: (item[1].file, item[1].begin)):
        shards.setdefault(stored.file.name, {})[name] = stored
    with staged_folder(out) as scratch:
        shutil.copyfile(base / "config.json", scratch / "config.json")
        copying.copy_tokenizer(text, scratch)
        configs = [folder / "generation_config.json" for folder in (text, base)]
        if (generation := next(filter(Path.is_file, configs), None)) is not None:
            shutil.copyfile(generation, scratch / generation.name)
        for shard, tensors in shards.items():
            bar = {"console": Console(stderr=True), "disable": not sys.stderr.isatty()}
            names = track(tensors, f"{settings.method}: {shard}", **bar)  # type: ignore[arg-type]
            values = (_merged(model, name, [expert.get(name) for expert in deltas], settings) for name in names)
            _write_shard(scratch / shard, tensors, values)
        if list(shards) != ["model.safetensors"]:
            metadata = {"total_size": sum(stored.end - stored.begin for stored in model.tensors.values())}
            places = {name: shard for shard, tensors in shards.items() for name in tensors}
            write_json(scratch / "model.safetensors.index.json", {"metadata": metadata, "weight_map": places})


def _merged(base: _Model, name: str, deltas: Sequence[Delta | None], settings: MergeSettings) -> Tensor:
    """The merged tensor in the base's dtype; the base's own if no expert changes it or it holds no weights."""
    own = base.read(name)
    if not any(deltas) or not own.is_floating_point():
        return own
    merged = merge_deltas(deltas, settings, name).add_(own).to(own.dtype)
    if not merged.sum(dtype=torch.float32).isfinite():
        raise FusionRouteError(f"{name} is too large for {own.dtype} when merged: lower the scale")
    return merged


def _write_shard(path: Path, tensors: Mapping[str, StoredTensor], values: Iterable[Tensor]) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer wants all of them at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, stored in tensors.items():
        begin, at = at, at + stored.end - stored.begin
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [begin, at]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in values:
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
            del value  # or it would live on while the next one is merged


def merge_collection(folder: Path, settings: MergeSettings, out: Path, base: str | None = None) -> None:
    """Merge the experts of a collection into one model, which gets the collection's tokenizer and chat template.

    Args:
        folder: of the collection.
        settings: the method and its values.
        out: the folder to make.
        base: source of the model that the experts started from. Adapters know theirs, and `base` takes its place as
            everywhere; a whole model does not, and needs it.

    Raises:
        UsageError: experts are whole models and `base` is None, or adapters stand on different bases.
        FusionRouteError: as `merge_members`; or a member cannot be had, or is not the one the collection names.
    """
    config = collection.read_config(folder)
    specs, other = config.expert_specs, None if base is None else absolute_source(base)
    adapted = {spec.source for spec in specs if spec.adapter is not None}
    if other is None and not adapted:
        raise UsageError("whole models do not say what they were fine-tuned from: name that model with --base")
    if adapted:
        specs = config.specs_on(base)[1:]
    places = [members.resolve_member(spec, folder) for spec in specs]
    for spec, (model, adapter) in zip(specs, places, strict=True):
        members.check_digest(spec, model, override=spec.source == other)
        if adapter is not None:
            members.check_adapter_digest(spec, adapter)
    bases = {model.resolve() for model, adapter in places if adapter is not None}
    if len(bases) > 1:
        raise UsageError(f"adapters on different bases cannot be merged, and {folder} has {', '.join(sorted(adapted))}")
    started = bases.pop() if bases else sources.resolve(cast(str, other))
    text = collection.tokenizer_folder(config, folder, base)
    merge_members(started, [adapter or model for model, adapter in places], settings, out, text=text)
