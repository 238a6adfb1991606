"""A collection on disk: where it is, what its files say, how it is put together and saved.

Layout (every member's folder is what transformers or PEFT would write, so each can be loaded on its own):

    config.json                FusionRouteConfig: the router, the experts in route order
    router/                    route_head.safetensors, and the router's adapter or weights unless referenced
    expert_<name>/             adapter or weights of an embedded expert
    tokenizer.json, …          the router's tokenizer and chat template; where there is none, those of the router's base
    generation_config.json     the router's, with the union of the members' end ids
    README.md                  the model card, generated

Loads no weights; `fusionroute.modeling` does.
"""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fusionroute import sources, vocabulary, weights
from fusionroute.configuration import ROUTER, FusionRouteConfig, MemberSpec, check_names
from fusionroute.copying import PROVENANCE, copy_adapter, copy_model, copy_tokenizer
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.files import read_json, staged_folder, write_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from fusionroute.members import Member
    from fusionroute.modeling import FusionRouteForCausalLM

PACKAGED = Path(__file__).parent / "collections"
DEFAULT = "smollm2"


def locate(name: str | Path | None, *, revision: str | None = None) -> Path:
    """The folder of a collection: a path, the name of a packaged one, a Hub id; None is the default collection.

    Raises:
        FusionRouteError: there is no such collection.
    """
    if name is None:
        name = DEFAULT
    text = str(name)
    path = Path(text).expanduser()
    if path.is_dir():
        folder = path.resolve()
    elif (PACKAGED / text).is_dir() and "/" not in text:
        folder = PACKAGED / text
    elif text.count("/") == 1 and not text.startswith((".", "/", "~")):
        folder = sources.snapshot(text, revision=revision)
    else:
        packaged = sorted(p.name for p in PACKAGED.glob("*") if p.is_dir())
        raise UsageError(
            f"no collection {text!r}: it is no folder, no Hub id (org/name), and the packaged ones are {packaged}"
        )
    if not (folder / "config.json").is_file():
        raise FusionRouteError(f"{folder / 'config.json'} is missing: {folder} is not a collection")
    return folder


def read_config(folder: Path) -> FusionRouteConfig:
    """The collection's configuration.

    Raises:
        FusionRouteError: `config.json` is half-written, another kind of model's, or lists no experts.
    """
    path = folder / "config.json"
    data = read_json(path)
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind != FusionRouteConfig.model_type:
        raise FusionRouteError(
            f"{path} has model_type {kind!r}, not 'fusionroute': make a collection of it with `fusionroute init`"
        )
    try:
        config = FusionRouteConfig.from_dict(data)
    except FusionRouteError:
        raise
    except Exception as error:  # a value of another type makes transformers stumble in many ways
        raise FusionRouteError(f"{path} has a value that cannot be: {' '.join(str(error).split())}") from error
    if not config.experts:
        raise FusionRouteError(f"{path} lists no experts: a collection needs at least one")
    return config


def read_generation_config(folder: Path) -> "GenerationConfig":
    """The collection's generation config: the router's, but ending at any member's end id.

    Raises:
        FusionRouteError: `generation_config.json` is missing or half-written.
    """
    from transformers import GenerationConfig

    read_json(folder / "generation_config.json")  # transformers' own refusal fills a screen
    return GenerationConfig.from_pretrained(folder)


def load_tokenizer(folder: str | Path | None = None, *, base: str | None = None) -> "PreTrainedTokenizerBase":
    """The collection's tokenizer: the router's, with its chat template. Pads on the left, for `generate`.

    A padding token that not all members share, as many a fine-tune has added one, is replaced by the end token.

    Args:
        folder: as in `locate`.
        base: replaces the base of the adapters; read only if the collection has no tokenizer files of its own.

    Raises:
        FusionRouteError: there is no such collection, or the base that has its tokenizer cannot be had.
    """
    from transformers import AutoTokenizer

    found = locate(folder)
    config = read_config(found)
    # By the collection's configuration also where the files are the base's: by the base's own, transformers may pick a
    # class that rewrites the rules.
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(config, found, base), config=config)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= config.vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_folder(config: FusionRouteConfig, folder: Path, base: str | None = None) -> Path:
    """Where the tokenizer and the chat template of the collection in `folder` are: there, or with its router's base.

    Args:
        base: replaces the base of the adapters.

    Raises:
        FusionRouteError: they are with the base, and it cannot be had.
    """
    if (folder / "tokenizer.json").is_file():
        return folder
    return _tokenizer_folders(config.specs_on(base)[:1], folder)[ROUTER]


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Ids of a conversation up to where the assistant answers: the one rendering that every member sees.

    Without a chat template the last message's content is taken as it is, with the tokenizer's own special tokens.
    `tools` are functions that the model may call, as JSON schemas.

    Raises:
        UsageError: there are no messages, or tools and no chat template to write them.
    """
    if not messages:
        raise UsageError("a conversation needs at least one message")
    if tokenizer.chat_template is None:
        if tools:
            raise UsageError(
                "this tokenizer has no chat template, so nothing says how tools are written: leave them out"
            )
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    rendered = tokenizer.apply_chat_template(
        list(messages),
        tools=None if tools is None else list(tools),
        add_generation_prompt=True,
        return_dict=True,
    )
    return list(rendered["input_ids"])


def check_vocabulary_of(
    config: FusionRouteConfig, folder: Path, base: str | None = None, *, leave_out: Container[str] = ()
) -> vocabulary.VocabularyReport:
    """The joint check of the members' tokenizers against the collection's own. No weight is loaded.

    Args:
        folder: the collection's.
        base: replaces the base of the adapters.
        leave_out: names of members that are not checked.

    Raises:
        FusionRouteError: two of them map one string to different ids, or share fewer ids than `config.vocab_size`.
    """
    specs = [spec for spec in config.specs_on(base) if spec.name not in leave_out]
    own = tokenizer_folder(config, folder, base)
    report = vocabulary.check_vocabularies({"the collection": own, **_tokenizer_folders(specs, folder)})
    if report.common < config.vocab_size:
        raise FusionRouteError(
            f"{folder}: the members share {report.common} ids but the collection was made with {config.vocab_size}: "
            "a member's tokenizer is not the one it was made with"
        )
    return report


def _tokenizer_folders(specs: Iterable[MemberSpec], relative_to: Path | None) -> dict[str, Path]:
    """Member name to a folder with its tokenizer files; an adapter uses its base's."""
    return {
        spec.name: sources.resolve(spec.source, revision=spec.revision, relative_to=relative_to, what="tokenizer")
        for spec in specs
    }


def assemble(
    out: Path,
    router: MemberSpec,
    experts: Sequence[MemberSpec],
    *,
    head: Path | None = None,
    embed: Iterable[str] = (),
    alpha: float = 1.0,
    training: dict[str, Any] | None = None,
    relative_to: Path | None = None,
    published: Mapping[str, tuple[str, str | None]] | None = None,
) -> FusionRouteConfig:
    """Make a collection folder from members.

    Adapters are copied into it, since they are small and belong to it; whole models stay references unless named in
    `embed`. Digests are taken of what is there now.

    Args:
        head: folder with a trained `route_head.safetensors`; None writes an untrained one.
        embed: names of the whole-model members to copy in.
        training: free-form account of how the router was trained, for the card.
        relative_to: what `./` in a source means.
        published: by source, the source and revision to write in its place: where others have the same model from.

    Raises:
        UsageError: no experts, two of one name, or `embed` names no member.
        FusionRouteError: a member cannot be had, tokenizers disagree (before any weight is loaded), an adapter was
            trained on another base, the head with other experts, or `out` is not empty.
    """
    from transformers import AutoTokenizer, GenerationConfig

    from fusionroute.card import write_card
    from fusionroute.members import read_model_config
    from fusionroute.router import RouteHead

    specs = [router, *experts]
    if not experts:
        raise UsageError("a collection needs at least one expert")
    check_names([expert.name for expert in experts])
    embedded = set(embed)
    strangers = sorted(embedded - {spec.name for spec in specs})
    if strangers:
        raise UsageError(f"cannot embed {', '.join(strangers)}: the members are {', '.join(s.name for s in specs)}")
    tokenizers = _tokenizer_folders(specs, relative_to)
    report = vocabulary.check_vocabularies(tokenizers)
    with staged_folder(out) as scratch:
        kept: list[MemberSpec] = []
        ends: list[int] = []
        configs = {}
        for spec in specs:
            folder = sources.resolve(spec.source, revision=spec.revision, relative_to=relative_to)
            configs[spec.name] = read_model_config(folder)
            ends += _end_ids(folder, configs[spec.name])
            spec = replace(spec, digest=weights.digest(folder), license=spec.license or weights.license_of(folder))
            if published and spec.source in published:
                source, revision = published[spec.source]
                spec = replace(spec, source=source, revision=revision)
            else:
                spec = replace(spec, source=_absolute(spec.source, relative_to))
            if spec.adapter is not None:
                adapter = sources.resolve(
                    spec.adapter, revision=spec.adapter_revision, relative_to=relative_to, what="adapter"
                )
                _check_base_of(spec, adapter)
                copied = scratch / spec.module
                copy_adapter(adapter, copied, spec.source)
                # Of the copy, which holds nothing else: a folder with a model too has the model's digest.
                digest = weights.digest(copied)
                spec = replace(spec, adapter=f"./{spec.module}", adapter_revision=None, adapter_digest=digest)
            elif spec.name in embedded:
                copy_model(folder, scratch / spec.module)
                spec = replace(spec, source=f"./{spec.module}", revision=None)
            kept.append(spec)
        own = configs[ROUTER]
        names, width = [expert.name for expert in experts], own.hidden_size
        route_head = RouteHead(width, names) if head is None else RouteHead.load(head, names, width)
        config = FusionRouteConfig(
            vocab_size=min([report.common, *(c.vocab_size for c in configs.values())]),
            alpha=alpha,
            head_trained=route_head.trained,
            training=training,
            hidden_size=width,
            num_hidden_layers=own.num_hidden_layers,
            num_attention_heads=own.num_attention_heads,
            max_position_embeddings=min(getattr(c, "max_position_embeddings", 1 << 30) for c in configs.values()),
            bos_token_id=getattr(own, "bos_token_id", None),
            eos_token_id=sorted(set(ends)) or None,
            architectures=["FusionRouteForCausalLM"],
        )
        config.set_members(kept[0], kept[1:])
        # Copied, not loaded and saved: transformers picks a tokenizer class by model type and may rewrite the rules.
        copy_tokenizer(tokenizers[ROUTER], scratch)
        pad = AutoTokenizer.from_pretrained(scratch).pad_token_id
        config.pad_token_id = pad if pad is not None and pad < config.vocab_size else None
        config.save_pretrained(scratch)
        has_own = (tokenizers[ROUTER] / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(tokenizers[ROUTER]) if has_own else GenerationConfig()
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(generation, key, getattr(config, key))
        write_generation_config(generation, scratch)
        (scratch / ROUTER).mkdir(exist_ok=True)
        route_head.save(scratch / ROUTER)
        write_card(scratch, config)
    return config


def _absolute(source: str, relative_to: Path | None) -> str:
    """A reference to this machine is a whole path, whatever folder the collection is later read from."""
    return str(sources.Source.parse(source, relative_to=relative_to).absolute(relative_to))


def write_generation_config(generation: "GenerationConfig", out: Path) -> None:
    """Write `generation_config.json`, settings that exclude each other included.

    transformers would not save those, and published models have such.
    """
    write_json(out / "generation_config.json", json.loads(generation.to_json_string()))


def _end_ids(folder: Path, config: Any) -> list[int]:
    """End ids of one member, from its generation config if it has one."""
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    ends = getattr(config, "eos_token_id", None) if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _check_base_of(spec: MemberSpec, adapter: Path) -> None:
    """Refuse an adapter whose provenance names another base than `spec` does."""
    provenance = adapter / PROVENANCE
    trained_on = read_json(provenance).get("base_digest") if provenance.is_file() else None
    if trained_on not in (None, spec.digest):
        raise FusionRouteError(
            f"{spec.name}: adapter {adapter} was trained on a base with digest {trained_on}, but {spec.source} has "
            f"{spec.digest}: name the base it was trained on"
        )


def record_scores(folder: Path, scores: dict[str, Any]) -> None:
    """Put measured figures, `{name: {"value", "low", "high", "n"}}`, into the configuration and the card."""
    from fusionroute.card import write_card

    config = read_config(folder)
    config.training = {**(config.training or {}), "scores": scores}
    write_json(folder / "config.json", json.loads(config.to_json_string()))
    write_card(folder, config, tokenizer=tokenizer_folder(config, folder))


def save(model: "FusionRouteForCausalLM", out: Path, *, embed: bool = False) -> None:
    """Write a loaded collection to `out`.

    Experts are copied from their files, bit for bit: they are never altered. The router's adapter, or its weights if
    they are embedded, and the route head are written from memory. Referenced models stay references unless `embed`.

    Raises:
        UsageError: a whole router was changed in memory, and is a reference or shares its weights with an expert.
        FusionRouteError: `out` is not empty, or the disk is full.
    """
    from fusionroute.card import write_card
    from fusionroute.members import holds
    from fusionroute.router import save_router_adapter

    assert model.folder is not None
    config = FusionRouteConfig.from_dict(model.config.to_dict())
    config.architectures = ["FusionRouteForCausalLM"]
    config.head_trained = model.router.route_head.trained
    with staged_folder(out) as scratch:
        kept = []
        copies: dict[tuple[str, str | None], str] = {}
        for spec, member in zip(config.member_specs, model.members, strict=True):
            folder = scratch / spec.module
            embedded = embed or spec.source.startswith("./")
            changed = spec.is_router and spec.adapter is None and not holds(member.model, member.folder)
            if changed and not embedded:
                raise UsageError(
                    f"the router was changed in memory, but the collection refers to {spec.source}: pass embed=True"
                )
            if spec.adapter is not None:
                assert member.adapter_folder is not None
                copy_adapter(member.adapter_folder, folder, spec.source)
                if spec.is_router:
                    save_router_adapter(member, folder)
                    spec = replace(spec, adapter_digest=weights.digest(folder))
                spec = replace(spec, adapter=f"./{spec.module}", adapter_revision=None)
            if embedded:
                key = (spec.source, spec.revision)
                if key not in copies:
                    copies[key] = _embed(member, spec, scratch, config, changed)
                name = copies[key]
                spec = replace(spec, source=f"./{name}", revision=None, digest=weights.digest(scratch / name))
            else:
                spec = replace(spec, source=_absolute(spec.source, model.folder))
            kept.append(spec)
        config.set_members(kept[0], kept[1:])
        config.save_pretrained(scratch)
        write_generation_config(model.generation_config, scratch)
        (scratch / ROUTER).mkdir(exist_ok=True)
        model.router.route_head.save(scratch / ROUTER)
        own = (model.folder / "tokenizer.json").is_file()
        copy_tokenizer(model.folder if own else cast(Path, model.members[0].folder), scratch)
        write_card(scratch, config)


def _embed(member: "Member", spec: MemberSpec, out: Path, config: FusionRouteConfig, changed: bool) -> str:
    """Put a member's weights into the collection and return their folder's name.

    Files are copied; only a whole router that has `changed` in memory is written from there.
    """
    assert member.folder is not None
    users = [s for s in config.member_specs if (s.source, s.revision) == (spec.source, spec.revision)]
    if changed and len(users) > 1:
        others = ", ".join(s.name for s in users if s.name != spec.name)
        raise UsageError(
            f"the router was changed in memory, but {spec.source} is the weights of {others} too, which are never "
            "altered: load the router from a copy of its own"
        )
    name = spec.module
    if any(s.adapter for s in users):
        name = next(n for n in ("base", *(f"base_{i}" for i in range(2, 100))) if not (out / n).exists())
    if changed:
        member.model.save_pretrained(out / name)
        copy_tokenizer(member.folder, out / name)
    else:
        copy_model(member.folder, out / name)
    return name
