"""The model card of a collection: README.md with the front matter that the Hub reads.

Written from the configuration alone, the same text for the same configuration. Knows no weights and no network, and
repeats no path of the machine it runs on: cards are published.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fusionroute import sources, vocabulary
from fusionroute.errors import UsageError
from fusionroute.files import staged_file

if TYPE_CHECKING:
    from fusionroute.configuration import FusionRouteConfig, MemberSpec

# Those a language model is likely to have of the ids that the Hub knows (hf.co/docs/hub/repositories-licenses): it
# refuses a card with another one, which then goes into `license_name`.
_LICENSES = [
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail",
    "bigscience-openrail-m", "bigcode-openrail-m", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
    "llama4",
]  # fmt: skip
# Whole words that start at / or ~; not the tail of a URL, of `org/name` or of `and/or`.
_PATH = re.compile(r"(?<![\w:/.~-])(?:file://)?(?:~|/[^\s\"'`,;:()\[\]{}<>|/]+)(?:/[^\s\"'`,;:()\[\]{}<>|/]*)+")
_KNOWN = {
    "data": "Data",
    "sft": "Phase 1, supervised fine-tuning of router and route head",
    "cdpo": "Phase 2, preference optimisation of the complement (CDPO)",
    "seed": "Seed",
    "paper": "Paper",
}
_PROMPT = "A farmer has 12 cows and buys 30 more. How many has he now?"
_CITATION = """\
```bibtex
@misc{xiong2026fusionroute,
  title = {Token-Level LLM Collaboration via FusionRoute},
  author = {Nuoya Xiong and Yuhang Zhou and Hanqing Zeng and Zhaorun Chen and Furong Huang and Shuchao Bi and
            Lizhu Zhang and Zhuokai Zhao},
  year = {2026},
  eprint = {2601.05106},
  archivePrefix = {arXiv},
}
```"""


def write_card(folder: Path, config: "FusionRouteConfig", *, tokenizer: Path | None = None) -> None:
    """Write `README.md` of the collection in `folder`.

    Args:
        tokenizer: the folder with its tokenizer files, which are there already; None is `folder`.

    Raises:
        FusionRouteError: the tokenizer's configuration is half-written, or the disk is full.
    """
    specs = config.member_specs
    experts = config.expert_names
    parts = [
        _front_matter(specs, folder),
        f"# FusionRoute collection: {', '.join(experts)}",
        _what_it_is(config),
        "## Use",
        _usage(tokenizer or folder, config),
        "## Members",
        _members(specs, folder),
        _licences(specs),
        "## How the router was trained",
        *_training(config),
        "## Sampling",
        "Log-probabilities are added, not averaged, so where expert and router agree the fused distribution is "
        "sharper than either: temperature and reported log-probabilities refer to the normalised sum, and the same "
        "temperature gives less varied text than with a single model.",
        "## Citation",
        _CITATION,
    ]
    with staged_file(folder / "README.md") as scratch:
        scratch.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _front_matter(specs: "list[MemberSpec]", folder: Path) -> str:
    front: dict[str, Any] = {
        "library_name": "fusionroute",
        "pipeline_tag": "text-generation",
        "tags": ["fusionroute", "token-level-routing", "model-collaboration"],
    }
    parsed = [_parse(spec.source, folder) for spec in specs]
    if models := list(dict.fromkeys(source.location for source in parsed if source and source.kind == "hub")):
        front["base_model"] = models
    only = _agreed_license(specs)
    front["license"] = only if only in _LICENSES else "other"
    if only not in _LICENSES and re.fullmatch(r"[a-z0-9.-]+", only) and only != "other":
        front["license_name"] = only
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _agreed_license(specs: "list[MemberSpec]") -> str:
    """The one licence that all members state, in the Hub's lower case; empty if they differ or one states none."""
    stated = {(spec.license or "").lower() for spec in specs}
    return stated.pop() if len(stated) == 1 else ""


def _what_it_is(config: "FusionRouteConfig") -> str:
    count = len(config.expert_names)
    experts = "One frozen expert and a router answer" if count == 1 else f"{count} frozen experts and a router answer"
    return (
        f"{experts} as one language model. At every token the router picks one expert, `i* = argmax_i (W h)_i` of its "
        "last hidden state h, and adds its own logits to that expert's: `log π(y) = log π_i*(y) + α · log π_router(y) "
        f"+ const` over the {config.vocab_size} ids that all members share, with α = {config.alpha:g} (Eq. 1 of "
        "[arXiv 2601.05106](https://arxiv.org/abs/2601.05106))."
    )


def _usage(tokenizer: Path, config: "FusionRouteConfig") -> str:
    if vocabulary.template_of(tokenizer) is None:
        encode = [f'inputs = tokenizer("{_PROMPT}", return_tensors="pt")']
    else:
        encode = [
            f'messages = [{{"role": "user", "content": "{_PROMPT}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    code = [
        "from fusionroute import FusionRouteForCausalLM, load_tokenizer",
        "",
        'collection = "."  # this folder, or this repository\'s id on the Hub',
        "model = FusionRouteForCausalLM.from_pretrained(collection)",
        "tokenizer = load_tokenizer(collection)",
        *encode,
        "output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)",
        'print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "print([model.config.expert_names[route] for route in output.routes[0].tolist()])  # who wrote which token",
    ]
    gguf = any(".gguf" in spec.source.lower() for spec in config.member_specs)
    needs = "`fusionroute` with its extra `gguf`" if gguf else "the package `fusionroute`"
    return "\n".join(
        [
            f"It needs {needs}. In Python:",
            "",
            "```python",
            *code,
            "```",
            "",
            "On the command line:",
            "",
            "```sh",
            f'fusionroute generate --collection . "{_PROMPT}"',
            "```",
        ]
    )


def _members(specs: "list[MemberSpec]", folder: Path) -> str:
    rows = []
    for number, spec in enumerate(specs):
        adapter = "none"
        if spec.adapter is not None:
            adapter = _shown(spec.adapter, spec.adapter_revision, folder)
            if spec.adapter_digest:
                adapter += f", digest `{short_digest(spec.adapter_digest)}`"
        rows.append(
            [
                "router" if spec.is_router else str(number - 1),
                f"`{spec.name}`",
                _shown(spec.source, spec.revision, folder),
                adapter,
                f"`{short_digest(spec.digest)}`" if spec.digest else "none",
                spec.license or "not stated",
                _without_paths(spec.description),
            ]
        )
    return _table(["Route", "Member", "Weights", "Adapter", "Digest", "Licence", "Description"], rows)


def _licences(specs: "list[MemberSpec]") -> str:
    """Who has which licence, where the front matter can only say `other`."""
    if _agreed_license(specs) in _LICENSES:
        return ""
    by_licence: dict[str, list[str]] = {}
    for spec in specs:
        by_licence.setdefault(spec.license or "not stated", []).append(spec.name)
    lines = [f"- {', '.join(names)}: {_inline(licence)}" for licence, names in by_licence.items()]
    return "\n".join(["Licences, as the members' own cards state them:", "", *lines])


# ---- training


def _training(config: "FusionRouteConfig") -> Iterable[str]:
    if not config.head_trained:
        yield f"The route head is untrained: expert 0 (`{config.expert_names[0]}`) is always chosen."
    training = dict(config.training or {})
    scores = training.pop("scores", None)
    known = {_KNOWN[key]: training.pop(key) for key in _KNOWN if key in training}
    # config.json comes back with its keys sorted: sorting here gives the same card before and after.
    rest = {str(key): training[key] for key in sorted(training, key=str)}
    if known or rest:
        yield "\n".join([*_bullets(known, 0, keep_order=True), *_bullets(rest, 0)])
    elif config.head_trained:
        yield "The route head is trained; how is not recorded."
    if isinstance(scores, Mapping) and scores:
        yield "### Scores"
        yield _scores(scores)


def _scores(scores: Mapping[Any, Any]) -> str:
    rows = []
    for name in sorted(scores, key=str):
        entry = scores[name] if isinstance(scores[name], Mapping) else {"value": scores[name]}
        low, high = entry.get("low"), entry.get("high")
        interval = "" if low is None or high is None else f"{_scalar(low)} to {_scalar(high)}"
        rows.append([_without_paths(str(name)), _scalar(entry.get("value")), interval, _scalar(entry.get("n"))])
    return _table(["Score", "Value", "Interval", "n"], rows)


def _bullets(values: Mapping[Any, Any], depth: int, *, keep_order: bool = False) -> list[str]:
    lines = []
    for key in values if keep_order else sorted(values, key=str):
        lines += _bullet(_inline(_without_paths(str(key))), values[key], depth)
    return lines


def _bullet(label: str, value: Any, depth: int) -> list[str]:
    start = f"{'  ' * depth}- {label}:"
    if isinstance(value, Mapping) and value:
        return [start, *_bullets(value, depth + 1)]
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        return [start, *(line for n, item in enumerate(value, 1) for line in _bullet(str(n), item, depth + 1))]
    if isinstance(value, (list, tuple)):
        return [f"{start} {', '.join(map(_scalar, value)) or 'none'}"]
    return [f"{start} {_scalar(value)}"]


def _scalar(value: Any) -> str:
    if value is None or value in ({}, ""):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _inline(_without_paths(str(value)))


# ---- sources and text


def short_digest(digest: str) -> str:
    """The first 12 hexadecimal digits of `sha256:…`: enough to tell two apart by eye."""
    return digest.removeprefix("sha256:")[:12]


def short_source(source: str) -> str:
    """A source with its sha256 shortened like a digest."""
    path, marker, sha256 = source.partition("#sha256=")
    return path + (f" (sha256 {short_digest(sha256)})" if marker else "")


def _parse(source: str, folder: Path) -> sources.Source | None:
    try:
        return sources.Source.parse(source, relative_to=folder)
    except UsageError:
        return None  # a path relative to some other folder


def _shown(source: str, revision: str | None, folder: Path) -> str:
    """A source as others may see it: a path only where it leads into the collection itself."""
    parsed = _parse(source, folder)
    location = source if parsed is None else parsed.location
    if parsed is None or parsed.kind == "local":
        if sources.is_inside(location):
            return f"`{location}` of this collection"
        return f"local folder `{Path(location).name}`"
    return f"`{short_source(source)}{'' if revision is None else '@' + revision}`"


def _without_paths(text: str) -> str:
    """`text` with every absolute path in it cut to its last component."""
    return _PATH.sub(lambda match: Path(match[0]).name or "local folder", text)


def _inline(text: str) -> str:
    return " ".join(text.split())


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_inline(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
