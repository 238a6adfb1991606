"""Do the members of a collection map text to the same ids? Decided from tokenizer files, before any weight is loaded.

Adding the logits of two models means something only where one id is one string in both. `check_vocabularies` refuses
members for which it is not, and says how many leading ids all of them share. It reads `tokenizer.json`,
`tokenizer_config.json` and `chat_template.jinja`, and knows nothing of models: not how many rows an embedding has.

The rule for vocabularies, in full. The first member, the router, is the reference: it alone turns text into ids, so two
experts need to agree only where the router has an id.
  1. A string known to the router and to an expert has the same id in both.
  2. Shared ids are the longest run from 0 on which strings are equal; an id unused in both is equal.
  3. What lies beyond the run is cropped if every string there is an added token. A string of the model itself
     (text that merges or pieces can produce) is refused.
  4. A slot whose name says that it is reserved, unused or padding has no meaning: it equals whatever a relative made of
     it (`<|reserved_special_token_2|>` and `<|python_tag|>`), and may be cropped.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fusionroute.errors import FusionRouteError
from fusionroute.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Marker-shaped names only: the word "unused" is text. `[PAD151650]` is how GGUF files fill up a vocabulary.
_BLANK = re.compile(r"[<\[]\S*(reserved|unused)\S*[>\]]|\[PAD\d+\]", re.IGNORECASE)

# What decides how text around an added token is cut. `special` is left out: it only decides what decoding hides.
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

# Each line holds what one normalizer or pre-tokenizer is known to treat in its own way.
_PROBES = (
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    " leading space, trailing space ",
    "several  spaces   in    a     row",
    "\ttabs\tand \t mixed",
    "one\ntwo\n\nthree\r\nfour\r\n\r\nfive \n six\n",
    "I'm, you're, he'll, we'd, they've; DON'T, it\u2019s, rock 'n' roll",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u1e69",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m s\u0323\u0307",
    "0 12 345 6789 1234567 3.14159 1,000,000 1e-9 0x1F \u00bd \u0664\u0662",
    "2+2=4; x**2 != y // 3 && a<=b || !c",
    "def f(x: int) -> str:\n    if x >= 10:\n\t\treturn f'{x!r}'  # no\n",
    "https://example.org/a-b_c?d=1&e=%20#f user@example.org C:\\temp\\new",
    "CamelCase snake_case kebab-case ALLCAPS mIxEd",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155 \uff21\uff22\uff23\uff11\uff12",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "non\u00a0breaking \u2003em \u200bzero\ufeff width\u0000nul",
    "\u201cquotes\u201d \u2014 dashes\u2026 \ufb01ligature \u2122 \u2468",
    "a\u2581b \u0120c ##d </w> \ufffd",
    "<s>[INST] hi [/INST]</s><|im_start|>user\nhi<|im_end|><|endoftext|><|eot_id|> <unk> <pad> [CLS] [SEP] [MASK]",
)


@dataclass(frozen=True)
class VocabularyReport:
    """What the members of a collection have in common.

    Attributes:
        common: Ids 0..common-1 mean the same in every member; logits are cropped to this. The router's tokenizer may
            still write ids from `common` on (a control token only it has): no expert can be given those.
        sizes: Member -> number of ids its `tokenizer.json` really has (1 + highest id).
        notes: What was tolerated, one line each: cropped ids by member, rules spelled differently that behave alike,
            differing chat templates.
    """

    common: int
    sizes: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Tokenizer:
    """A parsed `tokenizer.json`; `added` holds the added tokens by their text, `rules` what is not vocabulary."""

    file: Path
    raw: dict[str, Any]
    kind: str
    ids: dict[str, int]
    strings: dict[int, str]
    added: dict[str, dict[str, Any]]
    rules: dict[str, Any]
    size: int


def check_vocabularies(folders: Mapping[str, Path]) -> VocabularyReport:
    """Check that all members map text to the same ids.

    The post-processor (BOS, EOS) is not compared: a prompt is rendered once by the router's chat template and tokenized
    once by the router's tokenizer, so what an expert's would put around it never happens.

    Args:
        folders: Member -> folder with `tokenizer.json`. The first is the reference, the router; the others are experts.

    Raises:
        FusionRouteError: two members disagree (the message names both, the first string and both ids), the router's
            end token is not shared by all, or a file is missing, half-written or contradicts itself.
    """
    reference = next(iter(folders))
    # A saved collection is checked against its own tokenizer: then the router is one of the others.
    names = {name: name if name in (reference, "router") else f"expert {name}" for name in folders}
    parsed: dict[bytes, _Tokenizer] = {}
    members = {name: _load(Path(folder), parsed) for name, folder in folders.items()}
    router = members[reference]
    experts = {name: member for name, member in members.items() if member is not router}

    shared = {name: _shared_ids(reference, router, names[name], member) for name, member in experts.items()}
    common = min([router.size, *shared.values()])
    end = _end_token(Path(folders[reference]))
    for name, count in shared.items():
        if end is not None and router.ids.get(end, -1) >= count:
            raise FusionRouteError(
                f"{reference} ends its answers with {end!r} (id {router.ids[end]}) but {names[name]} shares only the "
                f"ids below {count}: fused answers could not end; choose members of one model family"
            )

    notes = []
    for name, member in experts.items():
        if spelling := _same_behaviour(reference, router, names[name], member, common):
            notes.append(spelling)
    for name, member in members.items():
        if member.size > common:
            notes.append(_cropped(names[name], member, common, _end_token(Path(folders[name]))))
    templates = {names[name]: template_of(Path(folder)) for name, folder in folders.items()}
    notes += _template_notes(templates, router, common)
    return VocabularyReport(common, {name: member.size for name, member in members.items()}, tuple(notes))


def template_of(folder: Path) -> str | None:
    """The chat template in a tokenizer's folder, or None; `chat_template.jinja` goes before `tokenizer_config.json`.

    Of several named templates it is the one called "default".

    Raises:
        FusionRouteError: `tokenizer_config.json` is half-written.
    """
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text(encoding="utf-8")
    template = _config(folder).get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _load(folder: Path, parsed: dict[bytes, _Tokenizer]) -> _Tokenizer:
    """Parse `tokenizer.json`; files with equal bytes become one object, so that `is` tells trivial equality."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FusionRouteError(
            f"{file} is missing: a slow tokenizer is converted by "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    digest = hashlib.sha256(file.read_bytes()).digest()
    if digest not in parsed:
        try:
            parsed[digest] = _parse(file, read_json(file))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FusionRouteError(f"{file} is not a tokenizer file ({error!r}): fetch it again") from None
    return parsed[digest]


def _parse(file: Path, raw: dict[str, Any]) -> _Tokenizer:
    model = raw["model"]
    vocab = model["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: position for position, (piece, _) in enumerate(vocab)}
    added = {token["content"]: token for token in raw.get("added_tokens") or []}
    # Loaders ignore the id an added token declares: it gets the model's id for its text, or else the next free one.
    following = len(ids)
    for text, token in added.items():
        if text not in ids:
            ids[text] = following
            following += 1
        if ids[text] != token["id"]:
            raise FusionRouteError(
                f"{file} declares the added token {text!r} as id {token['id']}, but loading it gives id {ids[text]}: "
                "put its id right"
            )
    # What is absent in an old file is written as null, false or "" by a new one. Dropout is noise for training.
    options = {k: v for k, v in model.items() if k not in ("type", "vocab", "merges", "dropout")}
    rules = {
        "normalizer": _canonical(raw.get("normalizer")),
        "pre_tokenizer": _canonical(raw.get("pre_tokenizer")),
        "model": {k: v for k, v in options.items() if v is not None and v is not False and v != ""},
    }
    strings = {position: text for text, position in ids.items()}
    return _Tokenizer(file, raw, _kind(model), ids, strings, added, rules, 1 + max(strings, default=-1))


def _kind(model: dict[str, Any]) -> str:
    """BPE, Unigram, WordPiece or WordLevel; old files leave it to be guessed from the fields."""
    if "type" in model:
        return model["type"]
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _canonical(step: Any) -> Any:
    """A normalizer or pre-tokenizer as today's library writes it, without what concerns offsets only."""
    if isinstance(step, list):
        return [_canonical(item) for item in step]
    if not isinstance(step, dict):
        return step
    if step.get("type") == "ByteLevel":
        return {"use_regex": True} | {key: value for key, value in step.items() if key != "trim_offsets"}
    if step.get("type") == "Metaspace":
        current = {key: value for key, value in step.items() if key not in ("add_prefix_space", "str_rep")}
        return {"prepend_scheme": "always", "split": True} | current
    return {key: _canonical(value) for key, value in step.items()}


def _is_blank(text: str) -> bool:
    return _BLANK.fullmatch(text) is not None


def _flags(token: dict[str, Any] | None) -> list[bool] | None:
    return None if token is None else [bool(token.get(flag)) for flag in _ADDED_FLAGS]


def _merges(tokenizer: _Tokenizer) -> list[tuple[str, ...]]:
    # Old files join a pair by a space, new ones do not because a token may hold one.
    merges = tokenizer.raw["model"].get("merges") or []
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _disagree(what: str) -> NoReturn:
    raise FusionRouteError(f"tokenizers disagree: {what}; members of a collection must share one vocabulary")


def _shared_ids(router_name: str, router: _Tokenizer, name: str, member: _Tokenizer) -> int:
    """Number of leading ids that mean the same in both, by the rule at the top of this file."""
    if router.kind != member.kind:
        _disagree(f"{router_name} is a {router.kind} tokenizer but {name} is {member.kind}")
    shared = router.size
    if router.ids != member.ids:
        shared = _shared_run(router_name, router, name, member)

    if router.raw["model"].get("merges") != member.raw["model"].get("merges"):
        pairs = _merges(router), _merges(member)
        for rank in range(max(map(len, pairs))):
            ours, theirs = (repr(" ".join(merges[rank])) if rank < len(merges) else "missing" for merges in pairs)
            if ours != theirs:
                _disagree(f"merge {rank} is {ours} in {router_name} but {theirs} in {name}")
    if router.kind == "Unigram":
        scores = zip(router.raw["model"]["vocab"][:shared], member.raw["model"]["vocab"][:shared], strict=False)
        for position, ((piece, ours), (_, theirs)) in enumerate(scores):
            # Scores are float32 written in decimal, by some converters with fewer digits.
            if not math.isclose(ours, theirs, rel_tol=1e-6):
                _disagree(f"the score of {piece!r} (id {position}) is {ours} in {router_name} but {theirs} in {name}")
    return shared


def _shared_run(router_name: str, router: _Tokenizer, name: str, member: _Tokenizer) -> int:
    def at(tokenizer: _Tokenizer, position: int) -> str:
        return repr(tokenizer.strings[position]) if position in tokenizer.strings else "unused"

    def equal(position: int) -> bool:
        ours, theirs = router.strings.get(position), member.strings.get(position)
        return ours == theirs or (ours is not None and theirs is not None and (_is_blank(ours) or _is_blank(theirs)))

    moved = [(i, text) for text, i in router.ids.items() if member.ids.get(text, i) != i and not _is_blank(text)]
    if moved:
        position, text = min(moved)
        _disagree(f"{text!r} is id {position} in {router_name} but {member.ids[text]} in {name}")
    both = min(router.size, member.size)
    shared = next((i for i in range(both) if not equal(i)), both)
    for position in range(shared, max(router.size, member.size)):
        for here, there, owner, other in ((router, member, router_name, name), (member, router, name, router_name)):
            known = here.strings.get(position)
            if known is None or known in here.added or _is_blank(known):
                continue
            if shared < both:
                _disagree(f"id {shared} is {at(router, shared)} in {router_name} but {at(member, shared)} in {name}")
            _disagree(f"{known!r} is id {position} in {owner} but unknown to {other}, which has {there.size} ids")
    return shared


def _same_behaviour(router_name: str, router: _Tokenizer, name: str, member: _Tokenizer, common: int) -> str | None:
    """A note if rules are spelled differently but probe texts tokenize alike; refuses if one does not."""
    differing = [key for key, rule in router.rules.items() if rule != member.rules[key]]
    both = [text for text, i in router.ids.items() if i < common and text in member.ids]
    markers = [text for text in both if _flags(router.added.get(text)) != _flags(member.added.get(text))]
    if markers:
        differing.append("added_tokens")
    if not differing:
        return None
    ours, theirs = _without_tail(router, common), _without_tail(member, common)
    probes = (*_PROBES, *(f"a {text} b{text}c" for text in markers))
    for text in probes:
        left = ours.encode(text, add_special_tokens=False).ids
        right = theirs.encode(text, add_special_tokens=False).ids
        if left != right:
            shorter = min(len(left), len(right))
            first = next((i for i in range(shorter) if left[i] != right[i]), shorter)
            quoted = repr(text if len(text) <= 60 else text[:59] + "…")
            raise FusionRouteError(
                f"tokenizers disagree: {quoted} becomes {_excerpt(left, first)} in {router_name} but "
                f"{_excerpt(right, first)} in {name} (differing: {', '.join(differing)}); members of a collection must "
                "tokenize alike"
            )
    parts = " and ".join(differing)
    return f"{name} spells {parts} differently from {router_name}; all {len(probes)} probe texts tokenize alike"


def _without_tail(tokenizer: _Tokenizer, common: int) -> "Tokenizer":
    """The tokenizer without its cropped added tokens: text that spells one of them is no disagreement."""
    from tokenizers import Tokenizer

    kept = [token for token in tokenizer.added.values() if token["id"] < common]
    raw = tokenizer.raw | {"added_tokens": kept, "truncation": None, "padding": None}
    try:
        return Tokenizer.from_str(json.dumps(raw))
    except Exception as error:  # the library raises nothing narrower
        raise FusionRouteError(f"{tokenizer.file} cannot be loaded ({error}): fetch it again") from error


def _excerpt(ids: list[int], first: int) -> str:
    start = max(0, first - 1)
    shown = [str(i) for i in ids[start : start + 6]]
    return f"[{', '.join(['…'] * (start > 0) + shown + ['…'] * (len(ids) > start + 6))}]"


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    if not isinstance(config, dict):
        raise FusionRouteError(f"{file} is not a tokenizer configuration: fetch it again")
    return config


def _end_token(folder: Path) -> str | None:
    token = _config(folder).get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def _cropped(name: str, member: _Tokenizer, common: int, end: str | None) -> str:
    tail = [member.strings[i] for i in range(common, member.size) if i in member.strings]
    listed = ", ".join(map(repr, tail[:3])) + (", …" if len(tail) > 3 else "")
    ending = f"; its end token {end!r} is among them" if end in tail else ""
    return f"{name}: ids from {common} on are cropped ({listed}){ending}"


def _template_notes(templates: dict[str, str | None], router: _Tokenizer, common: int) -> list[str]:
    (router_name, ours), *others = templates.items()
    notes = []
    for name, theirs in others:
        # A file saved by an editor ends in a newline that the same template in JSON lacks.
        if theirs is not None and theirs.strip() != (ours or "").strip():
            notes.append(f"{name} was trained on another chat template than {router_name}'s")
    for text, i in router.ids.items():
        if i >= common and ours is not None and text in ours:
            notes.append(f"the chat template of {router_name} writes {text!r} (id {i}), which not all experts know")
    return notes
