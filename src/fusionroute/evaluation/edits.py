"""A training row's answer, edited until it follows the instructions that its request was given (`instructions`).

Most of IFEval's instructions are about the form of an answer, and form can be given to a text by rule; what sounds
forced in it is what an instruction forces. Whether the outcome follows is for the checker to say, not for these rules:
two instructions may get in each other's way. Knows no model and no file.
"""

import json
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

Edit = Callable[[str, Mapping[str, Any], str], str | None]

_SENTENCE = re.compile(r"(?<=[.!?])(?<!\d\.)\s+")  # "1. " begins a point
_TITLE_WORDS = 6
_LONG = 5  # letters of a word worth standing out


def edited(request: str, answer: str, row: Mapping[str, Any]) -> str | None:
    """The answer with the form that the instructions want.

    Args:
        request: what was asked before instructions were added.
        answer: to that request.
        row: of IFEval, as `instructed` makes it.

    Returns:
        The new answer, which most often but not always follows; None where no rule makes one that does.
    """
    wanted = dict(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    if not set(wanted) <= set(EDITS):
        return None
    text: str | None = answer
    # In the table's order, whatever order the instructions stand in: content, then structure, then what wraps it all.
    for kind in EDITS:
        if kind in wanted and text is not None:
            text = EDITS[kind](text, wanted[kind], request)
    return text


def _sentences(text: str) -> list[str]:
    return _SENTENCE.split(text.strip())


def _says(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _without(text: str, unwanted: Callable[[str], bool]) -> str | None:
    """The sentences that are not unwanted, if those are most of them."""
    sentences = _sentences(text)
    kept = [sentence for sentence in sentences if not unwanted(sentence)]
    return " ".join(kept) if 2 * len(kept) > len(sentences) else None


def _as_it_is(text: str, wanted: Mapping[str, Any], request: str) -> str:
    """Nothing to do: the checker tells the answers that follow already."""
    return text


def _no_forbidden(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    return _without(text, lambda sentence: any(_says(sentence, word) for word in wanted["forbidden_words"]))


def _seldom(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    if wanted["relation"] == "at least":
        return text
    left = wanted["frequency"] - 1
    kept = []
    for sentence in _sentences(text):
        found = len(re.findall(rf"\b{re.escape(wanted['keyword'])}\b", sentence, re.IGNORECASE))
        if found <= left:
            kept.append(sentence)
            left -= found
    return " ".join(kept) or None


def _fewer_words(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    if wanted["relation"] == "at least":
        return text
    kept: list[str] = []
    for sentence in _sentences(text):
        if len(" ".join([*kept, sentence]).split()) >= wanted["num_words"]:
            break
        kept.append(sentence)
    return " ".join(kept) or None


def _fewer_sentences(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    if wanted["relation"] == "at least":
        return text
    return " ".join(_sentences(text)[: wanted["num_sentences"] - 1])


def _parts(text: str, count: int) -> list[str] | None:
    """The sentences in so many parts of about the same length; None if there are fewer."""
    sentences = _sentences(text)
    if len(sentences) < count:
        return None
    ends = [round(len(sentences) * part / count) for part in range(count + 1)]
    return [" ".join(sentences[start:end]) for start, end in pairwise(ends)]


def _paragraphs(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    parts = _parts(text, wanted["num_paragraphs"])
    return None if parts is None else "\n***\n".join(parts)


def _sections(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    parts = _parts(text, wanted["num_sections"])
    if parts is None:
        return None
    return "\n\n".join(f"{wanted['section_spliter']} {number}\n{part}" for number, part in enumerate(parts, 1))


def _bullets(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    """The last sentences as points, those before them as what introduces them."""
    sentences = _sentences(text.replace("*", ""))
    count = wanted["num_bullets"]
    if len(sentences) < count:
        return None
    points = "\n".join(f"* {sentence}" for sentence in sentences[-count:])
    before = " ".join(sentences[:-count])
    return f"{before}\n\n{points}" if before else points


def _postscript(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    """The last sentence is what is added."""
    *before, last = _sentences(text)
    return f"{' '.join(before)}\n\n{wanted['postscript_marker']} {last}" if before else None


def _marked(text: str, count: int, mark: Callable[[str], str]) -> str | None:
    """The longest words, each another, with a mark; None if there are fewer."""
    chosen: dict[str, re.Match[str]] = {}
    for word in re.finditer(rf"(?<!\w)[A-Za-z]{{{_LONG},}}(?!\w)", text):
        chosen.setdefault(word[0].lower(), word)
    if len(chosen) < count:
        return None
    for word in sorted(chosen.values(), key=lambda word: len(word[0]), reverse=True)[:count]:
        text = re.sub(rf"(?<!\w){word[0]}(?!\w)", lambda found: mark(found[0]), text, count=1)
    return text


def _capitals(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    if wanted["capital_relation"] != "at least":
        return text
    return _marked(text, wanted["capital_frequency"], str.upper)


def _placeholders(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    return _marked(text, wanted["num_placeholders"], lambda word: f"[{word.lower()}]")


def _highlights(text: str, wanted: Mapping[str, Any], request: str) -> str | None:
    return _marked(text, wanted["num_highlights"], lambda word: f"*{word}*")


def _title(text: str, wanted: Mapping[str, Any], request: str) -> str:
    words = re.findall(r"[A-Za-z']+", _sentences(text)[0])[:_TITLE_WORDS]
    return f"<<{' '.join(words).title()}>>\n\n{text}"


def _ended(text: str, wanted: Mapping[str, Any], request: str) -> str:
    return f"{text.rstrip()} {wanted['end_phrase']}"


def _without_commas(text: str, wanted: Mapping[str, Any], request: str) -> str:
    return text.replace(",", "")


def _lower(text: str, wanted: Mapping[str, Any], request: str) -> str:
    return text.lower()


def _upper(text: str, wanted: Mapping[str, Any], request: str) -> str:
    return text.upper()


def _json(text: str, wanted: Mapping[str, Any], request: str) -> str:
    return json.dumps({"answer": text}, ensure_ascii=False, indent=2)


def _quoted(text: str, wanted: Mapping[str, Any], request: str) -> str:
    return '"' + text.replace('"', "'") + '"'


def _repeated(text: str, wanted: Mapping[str, Any], request: str) -> str:
    return f"{wanted['prompt_to_repeat']}\n\n{text}"


# Another language, two answers and a paragraph's first word are beyond rules.
EDITS: Mapping[str, Edit] = {
    "keywords:existence": _as_it_is,
    "keywords:letter_frequency": _as_it_is,
    "keywords:forbidden_words": _no_forbidden,
    "keywords:frequency": _seldom,
    "length_constraints:number_words": _fewer_words,
    "length_constraints:number_sentences": _fewer_sentences,
    "detectable_format:number_bullet_lists": _bullets,
    "length_constraints:number_paragraphs": _paragraphs,
    "detectable_format:multiple_sections": _sections,
    "detectable_content:postscript": _postscript,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_format:number_highlighted_sections": _highlights,
    "change_case:capital_word_frequency": _capitals,
    "detectable_format:title": _title,
    "startend:end_checker": _ended,
    "punctuation:no_comma": _without_commas,
    "change_case:english_lowercase": _lower,
    "change_case:english_capital": _upper,
    "detectable_format:json_format": _json,
    "combination:repeat_prompt": _repeated,
    "startend:quotation": _quoted,
}
