"""A text edited until it follows the instructions that its request was given (`instructions`).

Most of IFEval's instructions are about the form of an answer, and form can be given to a text by rule; what sounds
forced in it is what an instruction forces. Whether the outcome follows is for the checker to say, not for these rules:
two instructions may get in each other's way. Counts are the checker's, odd ones included. Knows no model and no file.
"""

import json
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from string import capwords
from typing import Any

Edit = Callable[[str, Mapping[str, Any]], str | None]

# A sentence ends there, but not after "1." at the head of a point or after a title.
_SENTENCE = re.compile(r"(?<=[.!?])(?<!\d\.)(?<!\bDr\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bMrs\.)(?<!\bSt\.)(?<!\bvs\.)\s+")
_POINT = re.compile(r"^\s*[*-]\s+", re.MULTILINE)
_TITLE_WORDS = 6
_LONG = 5  # letters of a word worth standing out

_POSTSCRIPT, _TITLE = "detectable_content:postscript", "detectable_format:title"


def edited(answer: str, row: Mapping[str, Any]) -> str | None:
    """The answer with the form that the instructions of `row` want.

    Args:
        row: of IFEval, as `instructed` makes it.

    Returns:
        The new answer, which most often but not always follows; None where no rule makes one that does.
    """
    wanted = dict(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    if not set(wanted) <= EDITED:
        return None
    # In the tables' order, whatever order the instructions stand in: what wraps a text must not be cut up after.
    text = _all(CONTENT, wanted, answer)
    if text is None:
        return None
    title, last = _title(text), ""
    if _POSTSCRIPT in wanted:  # the last sentence is what is added
        ends = list(_SENTENCE.finditer(text.rstrip()))
        if not ends:
            return None
        last = f"\n\n{wanted[_POSTSCRIPT]['postscript_marker']} {text[ends[-1].end() :]}"
        text = text[: ends[-1].start()]
    text = _all(STRUCTURE, wanted, text)
    if text is None:
        return None
    return _all(WRAPPING, wanted, f"<<{title}>>\n\n{text}{last}" if _TITLE in wanted else text + last)


def _all(edits: Mapping[str, Edit], wanted: Mapping[str, Mapping[str, Any]], text: str | None) -> str | None:
    for kind, edit in edits.items():
        if kind in wanted and text is not None:
            text = edit(text, wanted[kind])
    return text


# ---- content


def _sentences(text: str) -> list[str]:
    return _SENTENCE.split(text.strip())


def _kept(text: str, keep: Callable[[str], bool], *, most: bool = True) -> str | None:
    """The sentences that are to be kept; None if these are none, or with `most` half of them at most."""
    sentences = _sentences(text)
    kept = [sentence for sentence in sentences if keep(sentence)]
    if len(kept) == len(sentences):
        return text
    return " ".join(kept) if kept and (2 * len(kept) > len(sentences) or not most) else None


def _as_it_is(text: str, wanted: Mapping[str, Any]) -> str:
    """Nothing to do: the checker tells the answers that follow already."""
    return text


def _no_forbidden(text: str, wanted: Mapping[str, Any]) -> str | None:
    words = re.compile(rf"\b(?:{'|'.join(map(re.escape, wanted['forbidden_words']))})\b", re.IGNORECASE)
    return _kept(text, lambda sentence: words.search(sentence) is None)


def _first(text: str, most: int, count: Callable[[str], int]) -> str | None:
    """The first sentences, as many as together count `most` at most."""
    left = most

    def keep(sentence: str) -> bool:
        nonlocal left
        left -= count(sentence)
        return left >= 0

    return _kept(text, keep, most=False)


def _seldom(text: str, wanted: Mapping[str, Any]) -> str | None:
    if wanted["relation"] == "at least":
        return text
    word, left = wanted["keyword"].lower(), wanted["frequency"] - 1

    def keep(sentence: str) -> bool:
        nonlocal left
        found = sentence.lower().count(word)  # within other words too: "ship" comes in "shipping"
        fits = found <= left
        left -= found if fits else 0
        return fits

    return _kept(text, keep)


def _fewer_words(text: str, wanted: Mapping[str, Any]) -> str | None:
    if wanted["relation"] == "at least":
        return text
    return _first(text, wanted["num_words"] - 1, lambda sentence: len(re.findall(r"\w+", sentence)))


def _fewer_sentences(text: str, wanted: Mapping[str, Any]) -> str | None:
    if wanted["relation"] == "at least":
        return text
    return _first(text, wanted["num_sentences"] - 1, lambda sentence: 1)


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


def _capitals(text: str, wanted: Mapping[str, Any]) -> str | None:
    if wanted["capital_relation"] != "at least":
        return text
    return _marked(text, wanted["capital_frequency"], str.upper)


def _placeholders(text: str, wanted: Mapping[str, Any]) -> str | None:
    return _marked(text, wanted["num_placeholders"], lambda word: f"[{word.lower()}]")


def _highlights(text: str, wanted: Mapping[str, Any]) -> str | None:
    return _marked(text, wanted["num_highlights"], lambda word: f"*{word}*")


# ---- structure


def _parts(text: str, count: int) -> list[str] | None:
    """The sentences in so many parts of about the same length; None if there are fewer."""
    sentences = _sentences(text)
    if len(sentences) < count:
        return None
    ends = [round(len(sentences) * part / count) for part in range(count + 1)]
    return [" ".join(sentences[start:end]) for start, end in pairwise(ends)]


def _bullets(text: str, wanted: Mapping[str, Any]) -> str | None:
    """The last sentences as points, those before them as what introduces them."""
    sentences = _sentences(_POINT.sub("", text))
    count = wanted["num_bullets"]
    if len(sentences) < count:
        return None
    points = "\n".join(f"* {sentence}" for sentence in sentences[-count:])
    before = " ".join(sentences[:-count])
    return f"{before}\n\n{points}" if before else points


def _paragraphs(text: str, wanted: Mapping[str, Any]) -> str | None:
    parts = _parts(text, wanted["num_paragraphs"])
    return None if parts is None else "\n***\n".join(parts)


def _sections(text: str, wanted: Mapping[str, Any]) -> str | None:
    parts = _parts(text, wanted["num_sections"])
    if parts is None:
        return None
    return "\n\n".join(f"{wanted['section_spliter']} {number}\n{part}" for number, part in enumerate(parts, 1))


def _title(text: str) -> str:
    return capwords(" ".join(re.findall(r"[A-Za-z']+", _sentences(text)[0])[:_TITLE_WORDS]))


# ---- what wraps it all


def _ended(text: str, wanted: Mapping[str, Any]) -> str:
    return f"{text.rstrip()} {wanted['end_phrase']}"


def _without_commas(text: str, wanted: Mapping[str, Any]) -> str:
    return text.replace(",", "")


def _lower(text: str, wanted: Mapping[str, Any]) -> str:
    return text.lower()


def _upper(text: str, wanted: Mapping[str, Any]) -> str:
    return text.upper()


def _json(text: str, wanted: Mapping[str, Any]) -> str:
    return json.dumps({"answer": text}, ensure_ascii=False, indent=2)


def _repeated(text: str, wanted: Mapping[str, Any]) -> str:
    return f"{wanted['prompt_to_repeat']}\n\n{text}"


def _quoted(text: str, wanted: Mapping[str, Any]) -> str:
    return '"' + text.replace('"', "'") + '"'


# Another language, two answers and a paragraph's first word are beyond rules.
CONTENT: Mapping[str, Edit] = {
    "keywords:existence": _as_it_is,
    "keywords:letter_frequency": _as_it_is,
    "keywords:forbidden_words": _no_forbidden,
    "keywords:frequency": _seldom,
    "length_constraints:number_words": _fewer_words,
    "length_constraints:number_sentences": _fewer_sentences,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_format:number_highlighted_sections": _highlights,
    "change_case:capital_word_frequency": _capitals,
}
STRUCTURE: Mapping[str, Edit] = {
    "detectable_format:number_bullet_lists": _bullets,
    "length_constraints:number_paragraphs": _paragraphs,
    "detectable_format:multiple_sections": _sections,
}
WRAPPING: Mapping[str, Edit] = {
    "startend:end_checker": _ended,
    "punctuation:no_comma": _without_commas,
    "change_case:english_lowercase": _lower,
    "change_case:english_capital": _upper,
    "detectable_format:json_format": _json,
    "combination:repeat_prompt": _repeated,
    "startend:quotation": _quoted,
}
EDITED = {*CONTENT, _POSTSCRIPT, *STRUCTURE, _TITLE, *WRAPPING}
