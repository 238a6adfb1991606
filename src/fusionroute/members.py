"""One causal LM of a collection, as the rest of the code sees it: ids in, logits out, whoever holds the weights.

A member is a whole model, a shared base as it stands, or a LoRA adapter on a shared base. Members on one base hold
one copy of its weights; running one of them switches its adapter on first. Knows nothing of routing.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusionroute import quantisation, sources, weights
from fusionroute.configuration import MemberSpec
from fusionroute.errors import FusionRouteError, UsageError, first_line
from fusionroute.files import read_json
from fusionroute.placement import Placement

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Member(nn.Module):
    """A causal LM and, if it is an adapter, the name under which its base knows it.

    Args:
        name: `router` or an expert's name.
        model: the transformers model; shared by all members on one base.
        peft: the wrapper that owns the adapters of `model`, if any member adapts it.
        adapter: this member's adapter in `peft`; None runs the base with every adapter off.
        folder, adapter_folder: where the weights were read from.
        quantised: `int8` or `int4` if the weights were rounded to it, else None.
    """

    def __init__(
        self,
        name: str,
        model: "PreTrainedModel",
        peft: "PeftModel | None" = None,
        adapter: str | None = None,
        folder: Path | None = None,
        adapter_folder: Path | None = None,
        quantised: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.adapter = adapter
        self.folder = folder
        self.adapter_folder = adapter_folder
        self.quantised = quantised
        # In a tuple so that the base is not registered a second time as a sub-module of its own wrapper.
        self._peft = (peft,)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def peft(self) -> "PeftModel | None":
        return self._peft[0]

    def activate(self) -> None:
        """Switch this member's adapter on, or every adapter of its base off."""
        if self.peft is None:
            return
        tuner = self.peft.base_model
        if self.adapter is None:
            tuner.disable_adapter_layers()
            return
        tuner.enable_adapter_layers()
        self.peft.set_adapter(self.adapter, inference_mode=True)

    def forward(self, **inputs: Any) -> Any:
        """The member's own `forward`: its logits are used as it returns them, soft-capped or scaled.

        Inputs may be on another device, outputs are on the member's.
        """
        self.activate()
        device = self.model.device
        return self.model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})

    def forward_with_hidden(self, **inputs: Any) -> tuple[Any, Tensor]:
        """`forward`, and what its LM head read: hidden states `[B, K, d]` at the K positions it gives logits for."""
        read: list[Tensor] = []
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
        try:
            output = self(**inputs)
        finally:
            hook.remove()
        return output, read[0]


@dataclass(frozen=True)
class LoadOptions:
    """How to load members.

    Attributes:
        dtype: of the weights; None takes what the files hold.
        device: where to put them.
        attn_implementation: as in transformers; a member that lacks it runs eager (Gemma-2 has no sdpa).
        other_base: a source that the user named in place of the adapters' base: its weights may have another digest,
            with a warning.
        trust_remote_code: passed to transformers; off.
        placement: of members, by name, in place of the first three.
        quantised: `int8` or `int4`, which weights are rounded to once they are there; None leaves them.
    """

    dtype: torch.dtype | None = None
    device: str | torch.device | None = None
    attn_implementation: str | None = None
    other_base: str | None = None
    trust_remote_code: bool = False
    placement: Mapping[str, Placement] = field(default_factory=dict)
    quantised: str | None = None

    def of(self, spec: MemberSpec) -> "LoadOptions":
        """These options for one member: what was asked for it, else for all, else what the collection says.

        `int8` and `int4` are no dtypes to compute in: with them, that is what was asked for all, else what files hold.

        Raises:
            UsageError: an unknown device or dtype; a member that cannot be quantised.
        """
        asked = self.placement.get(spec.name, Placement())
        device = asked.device or self.device or spec.device
        try:
            device = None if device is None else torch.device(device)
        except RuntimeError:
            raise UsageError(f"{spec.name}: unknown device {device!r}: cpu, cuda, cuda:1, …") from None
        form = asked.dtype or spec.dtype
        quantised = form if form in quantisation.FORMATS else None
        if quantised and (spec.is_router or spec.adapter is not None):
            what = "the router" if spec.is_router else "an adapter"
            raise UsageError(f"{spec.name} in {quantised}: it is {what}, only experts that are whole models can be")
        dtype = parse_dtype(asked.dtype, quantised) or self.dtype or parse_dtype(spec.dtype, quantised)
        attention = asked.attention or self.attn_implementation or spec.attention
        return replace(
            self, device=device, dtype=dtype, attn_implementation=attention, placement={}, quantised=quantised
        )


def parse_dtype(name: torch.dtype | str | None, *none: str | None) -> torch.dtype | None:
    """A torch dtype from its name; None, `auto` and what is in `none` give None, which takes what the files hold.

    Raises:
        UsageError: there is no such dtype to compute in.
    """
    if name is None or name == "auto" or name in none:
        return None
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        forms = " and ".join(quantisation.FORMATS)
        raise UsageError(
            f"unknown dtype {name!r}: float32, bfloat16 or float16; {forms} are of one expert, as --place NAME=,int8"
        )
    return dtype


def read_model_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of the model in `folder`.

    Raises:
        FusionRouteError: transformers does not know the architecture, or cannot read a value.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # an odd config.json makes transformers stumble in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FusionRouteError(f"{folder / 'config.json'} cannot be read by transformers: {reason}") from error


def load_model(folder: Path, options: LoadOptions) -> "PreTrainedModel":
    """A transformers causal LM from `folder`, every weight of it from a file.

    Raises:
        FusionRouteError: weights are missing, half-written, of another shape or unknown to the architecture; or the
            device is not there, or has no room.
    """
    from transformers import AutoModelForCausalLM

    weights.check_model(folder)
    config = read_model_config(folder, options.trust_remote_code)
    attention = options.attn_implementation
    # sdpa leaves attention's soft-capping out (Gemma-2); transformers 5.16 takes it by default all the same.
    if getattr(config, "attn_logit_softcapping", None) is not None and attention in (None, "sdpa"):
        attention = "eager"
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=options.dtype or "auto",
            output_loading_info=True,
            trust_remote_code=options.trust_remote_code,
            **({} if attention is None else {"attn_implementation": attention}),
        )
    # ImportError: of an attention implementation that is not installed.
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FusionRouteError(f"{folder}: transformers cannot load it: {first_line(error)}") from error
    # transformers would fill what is missing with random numbers and go on.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            first = sorted(map(str, loading[problem]))[0]
            raise FusionRouteError(
                f"{folder}: {len(loading[problem])} {problem.replace('_', ' ')}, first {first}: "
                "these are not the weights its config.json describes; fetch them again"
            )
    if options.device is not None:
        try:
            model = model.to(options.device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
            raise FusionRouteError(f"{folder} cannot be put on {options.device}: {first_line(error)}") from error
    model = model.eval().requires_grad_(False)
    return model if options.quantised is None else quantisation.quantise(model, options.quantised)


def check_digest(spec: MemberSpec, folder: Path, *, override: bool) -> None:
    """Compare the base weights in `folder` with the digest in `spec`.

    With `override` (the user named another base) a difference is a warning, else an error.

    Raises:
        FusionRouteError: they differ; the message has both.
    """
    if spec.digest is None:
        return
    found = weights.digest(folder)
    if found == spec.digest:
        return
    if override:
        warnings.warn(
            f"{spec.name}: {folder} has digest {found}, the adapter was trained on {spec.digest}; "
            "the result may differ from the published one",
            stacklevel=3,
        )
    else:
        raise FusionRouteError(
            f"{spec.name}: {folder} has digest {found}, the collection expects {spec.digest}: fetch the right weights, "
            "or pass --base to use these on purpose"
        )


def check_adapter_digest(spec: MemberSpec, folder: Path) -> None:
    """Compare the adapter in `folder` with the digest in `spec`, if it has one.

    Raises:
        FusionRouteError: they differ; the message has both.
    """
    found = weights.digest(folder)
    if spec.adapter_digest not in (None, found):
        raise FusionRouteError(
            f"{spec.name}: adapter {folder} has digest {found}, the collection expects {spec.adapter_digest}: "
            "fetch the collection again"
        )


def attach_adapter(model: "PreTrainedModel", peft: "PeftModel | None", folder: Path, name: str) -> "PeftModel":
    """Add the LoRA adapter in `folder` to `model` under `name`; every tensor of it must find its place.

    Raises:
        FusionRouteError: not a LoRA adapter, an activated one (aLoRA), or one of another architecture or width.
    """
    from peft import PeftConfig, PeftModel

    weights.check_adapter(folder)
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise FusionRouteError(f"{folder}: adapters of type {kind} are not supported, only LORA")
    config = PeftConfig.from_pretrained(str(folder))
    # PEFT looks for these tokens in a forward of its own, which members do not go through: it would never be on.
    if tokens := getattr(config, "alora_invocation_tokens", None):
        raise FusionRouteError(
            f"{folder} has alora_invocation_tokens {tokens}: adapters that are off until their tokens come are not "
            "supported"
        )
    config.inference_mode = True
    try:
        if peft is None:
            peft = PeftModel(model, config, adapter_name=name, autocast_adapter_dtype=False)
        result = peft.load_adapter(str(folder), name, autocast_adapter_dtype=False, torch_device=str(model.device))
    except (ValueError, RuntimeError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), first_line(error))
        raise FusionRouteError(
            f"{folder}: does not fit {model.config.architectures or type(model).__name__} of width "
            f"{model.config.hidden_size}: {reason}"
        ) from error
    missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
    if missing or unexpected:
        raise FusionRouteError(
            f"{folder}: {len(missing)} adapter tensors missing, {len(unexpected)} unexpected, first "
            f"{(missing + unexpected)[0]}: it belongs to another base than {model.config.architectures}"
        )
    peft.requires_grad_(False)
    return peft


def holds(model: "PreTrainedModel", folder: Path | None) -> bool:
    """Whether `model` is what the files in `folder` hold, rounded to its dtype: not changed since it was loaded.

    Layers that an adapter of another member wraps are not compared.
    """
    from safetensors.torch import load_file

    assert folder is not None
    state = model.state_dict()
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    known = [name for name in state if name in stored]
    return bool(known) and all(torch.equal(state[n].cpu(), stored[n].to(state[n].dtype)) for n in known)


def resolve_member(spec: MemberSpec, collection: Path | None) -> tuple[Path, Path | None]:
    """Folders of the member's weights and, if it has one, of its adapter; fetched and converted if need be.

    Members on one base get one path, however their sources write it.
    """
    folder = sources.resolve(spec.source, revision=spec.revision, relative_to=collection).resolve()
    if spec.adapter is None:
        return folder, None
    adapter = sources.resolve(spec.adapter, revision=spec.adapter_revision, relative_to=collection, what="adapter")
    return folder, adapter


def quantised(members: Sequence[Member]) -> dict[str, str]:
    """By name, the members whose weights were rounded, and to what: they are not quite what was published."""
    return {member.name: member.quantised for member in members if member.quantised is not None}


def load_members(specs: Sequence[MemberSpec], collection: Path | None, options: LoadOptions) -> list[Member]:
    """Load every member, in order; members with the same source, placed alike, share one copy of its weights.

    Raises:
        UsageError: `options.placement` names no member, or what cannot be.
        FusionRouteError: a source cannot be had, a digest differs, weights or adapters do not fit.
    """
    places = [resolve_member(spec, collection) for spec in specs]
    for spec, (folder, adapter) in zip(specs, places, strict=True):
        check_digest(spec, folder, override=spec.source == options.other_base)
        if adapter is not None:
            check_adapter_digest(spec, adapter)
    strangers = sorted(set(options.placement) - {spec.name for spec in specs})
    if strangers:
        raise UsageError(f"no member {', '.join(strangers)} to place: there are {', '.join(s.name for s in specs)}")
    models: dict[tuple, PreTrainedModel] = {}
    wrappers: dict[tuple, PeftModel] = {}
    members = []
    for spec, (folder, adapter) in zip(specs, places, strict=True):
        own = options.of(spec)
        # No device is the CPU, where transformers loads.
        key = (folder, own.device or torch.device("cpu"), own.dtype, own.attn_implementation, own.quantised)
        if key not in models:
            models[key] = load_model(folder, own)
        if adapter is not None:
            wrappers[key] = attach_adapter(models[key], wrappers.get(key), adapter, spec.name)
        members.append((spec, key, adapter))
    return [
        Member(
            spec.name,
            models[key],
            wrappers.get(key),
            spec.name if adapter is not None else None,
            key[0],
            adapter,
            key[-1],
        )
        for spec, key, adapter in members
    ]
