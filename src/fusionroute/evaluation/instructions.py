"""Requests with instructions that IFEval's checkers can check, made from training rows: the kinds are IFEval's; the
words are ours, and thresholds are drawn, not read from its test file. What a model follows of them it can be trained
on. Knows no model and no file.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MOST_REPEATED = 300  # characters of a request that is to be repeated
MOST_WORDS = 3  # that one instruction names

_WORD = re.compile(r"[a-z]{4,12}")
_ENDS = ("That is all for now.", "What do you think?", "Thank you for reading.", "I hope this helps.")
_LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese"}
_AMOUNTS = {"at least": "at least", "less than": "fewer than"}

# Beside lm-eval's conflicts: section heads begin with a capital whatever the rest is, and a request may hold commas.
_EXCLUSIVE = (
    {"change_case:english_lowercase", "detectable_format:multiple_sections"},
    {"change_case:english_capital", "detectable_format:multiple_sections"},
    {"punctuation:no_comma", "combination:repeat_prompt"},
)

Draw = Callable[[random.Random, Sequence[str]], dict[str, Any]]


def _nothing(chance: random.Random, words: Sequence[str]) -> dict[str, Any]:
    return {}


def _one(name: str, choices: Sequence[Any]) -> Draw:
    return lambda chance, words: {name: chance.choice(choices)}


def _amount(name: str, relation: str, choices: Sequence[int]) -> Draw:
    return lambda chance, words: {name: chance.choice(choices), relation: chance.choice(tuple(_AMOUNTS))}


def _words(name: str) -> Draw:
    return lambda chance, words: {name: sorted(chance.sample(words, chance.randint(1, MOST_WORDS)))}


def _frequent(chance: random.Random, words: Sequence[str]) -> dict[str, Any]:
    return {"keyword": chance.choice(words), **_amount("frequency", "relation", (2, 3, 4))(chance, words)}


def _letters(chance: random.Random, words: Sequence[str]) -> dict[str, Any]:
    letter = chance.choice("abcdefghilmnoprstuw")
    return {"letter": letter, **_amount("let_frequency", "let_relation", (4, 8, 12, 20))(chance, words)}


def _first_word(chance: random.Random, words: Sequence[str]) -> dict[str, Any]:
    count = chance.randint(2, 4)
    return {"num_paragraphs": count, "nth_paragraph": chance.randint(1, count), "first_word": chance.choice(words)}


# By lm-eval's name of the kind: the arguments of its checker, and ways to ask for it. `amount` is how many, in words.
KINDS: Mapping[str, tuple[Draw, tuple[str, ...]]] = {
    "punctuation:no_comma": (_nothing, ("Write without a single comma.", "Commas are not allowed here.")),
    "change_case:english_lowercase": (
        _nothing,
        ("Answer in English and in small letters throughout.", "No capitals, please: English in lower case only."),
    ),
    "change_case:english_capital": (
        _nothing,
        ("Answer in English with every letter a capital.", "Write all of it in English capitals."),
    ),
    "change_case:capital_word_frequency": (
        _amount("capital_frequency", "capital_relation", (2, 3, 5, 8)),
        ("Put {amount} words into capitals.", "Let {amount} words stand in ALL CAPITALS."),
    ),
    "length_constraints:number_words": (
        _amount("num_words", "relation", (40, 60, 100, 150)),
        ("Keep to {amount} words.", "The length is to be {amount} words."),
    ),
    "length_constraints:number_sentences": (
        _amount("num_sentences", "relation", (3, 4, 6, 8)),
        ("Use {amount} sentences.", "The text should count {amount} sentences."),
    ),
    "length_constraints:number_paragraphs": (
        _one("num_paragraphs", (2, 3, 4)),
        (
            "Write {num_paragraphs} paragraphs with a line of three asterisks, ***, between one and the next.",
            "Divide it into {num_paragraphs} paragraphs; *** goes between them.",
        ),
    ),
    "length_constraints:nth_paragraph_first_word": (
        _first_word,
        ("Write {num_paragraphs} paragraphs, an empty line between them; number {nth_paragraph} begins with the word "
         "{first_word}.",),
    ),
    "detectable_content:number_placeholders": (
        _one("num_placeholders", (1, 2, 3, 4)),
        (
            "Leave {num_placeholders} or more blanks to fill in, in square brackets like [date].",
            "It is a template: have {num_placeholders} or more fields such as [city] in it.",
        ),
    ),
    "detectable_content:postscript": (
        _one("postscript_marker", ("P.S.", "P.P.S")),
        ("Add a postscript that begins with {postscript_marker} at the end.", "Close with a {postscript_marker} note."),
    ),
    "detectable_format:number_bullet_lists": (
        _one("num_bullets", (2, 3, 4, 5)),
        (
            "Have a list of exactly {num_bullets} points in it, each on a line that begins with an asterisk: * point",
            "Give exactly {num_bullets} bullet points, no more and no fewer, written in markdown as * point",
        ),
    ),
    "detectable_format:number_highlighted_sections": (
        _one("num_highlights", (1, 2, 3)),
        (
            "Set {num_highlights} or more phrases in markdown italics, *like this*.",
            "Emphasise {num_highlights} or more parts with asterisks around them: *part*.",
        ),
    ),
    "detectable_format:multiple_sections": (
        lambda chance, words: {
            "section_spliter": chance.choice(("SECTION", "Section", "Part")), "num_sections": chance.choice((2, 3))
        },
        ("Split it into {num_sections} sections and head each one with {section_spliter} and its number, as in "
         "{section_spliter} 1.",),
    ),
    "detectable_format:json_format": (
        _nothing,
        ("Give the whole answer as JSON.", "Reply with nothing but one valid JSON object."),
    ),
    "detectable_format:title": (
        _nothing,
        ("Give it a title and write that between double angle brackets, <<so>>.", "Start with a <<title>> like that."),
    ),
    "combination:two_responses": (
        _nothing,
        ("Answer twice in different ways and put six asterisks, ******, between the two answers.",),
    ),
    "combination:repeat_prompt": (
        lambda chance, words: {"prompt_to_repeat": ""},
        ("Begin by repeating what stands above exactly as it is, and give your answer after that.",),
    ),
    "startend:end_checker": (
        _one("end_phrase", _ENDS),
        ('Let "{end_phrase}" be the very last words.', 'End on the sentence "{end_phrase}" and add nothing to it.'),
    ),
    "startend:quotation": (
        _nothing,
        ('Put all of your answer between double quotes, "…".', "Open and close the answer with a double quote."),
    ),
    "keywords:existence": (_words("keywords"), ("Use these words: {keywords}.", "Work in: {keywords}.")),
    "keywords:forbidden_words": (
        _words("forbidden_words"),
        ("Do not use: {forbidden_words}.", "Avoid these words altogether: {forbidden_words}."),
    ),
    "keywords:frequency": (
        _frequent,
        ('Say "{keyword}" {amount} times.', "The word {keyword} has to come {amount} times."),
    ),
    "keywords:letter_frequency": (_letters, ("Use the letter {letter} {amount} times.",)),
    "language:response_language": (
        _one("language", tuple(_LANGUAGES)),
        ("Answer in {language_name}.", "I want to read this in {language_name} only."),
    ),
}  # fmt: skip


def instructed(
    request: str, answer: str, chance: random.Random, conflicts: Mapping[str, Any], *, most: int = 2
) -> dict[str, Any] | None:
    """A request with one to `most` instructions after it, as a row of IFEval.

    Args:
        request: what is asked.
        answer: a reference answer; words to use or avoid are taken from it.
        chance: decides what is asked for.
        conflicts: of a kind, the kinds that cannot stand beside it (lm-eval's `INSTRUCTION_CONFLICTS`).

    Returns:
        `{"prompt", "instruction_id_list", "kwargs"}`, or None for an answer without enough words.
    """
    words = sorted(set(_WORD.findall(answer.lower())))
    if len(words) < MOST_WORDS * most:
        return None
    kinds = [kind for kind in KINDS if kind != "combination:repeat_prompt" or len(request) <= MOST_REPEATED]
    chosen: list[str] = []
    for _ in range(chance.randint(1, most)):
        if free := [kind for kind in kinds if not any(_exclude(kind, one, conflicts) for one in chosen)]:
            chosen.append(chance.choice(free))
    texts, given = [], []
    for kind in chosen:
        draw, ways = KINDS[kind]
        arguments = draw(chance, words)
        # A word that one instruction forbids is nothing that another may want.
        used = {word for value in arguments.values() for word in (value if isinstance(value, list) else [value])}
        words = [word for word in words if word not in used]
        texts.append(chance.choice(ways).format(**_shown(arguments)))
        if "prompt_to_repeat" in arguments:
            arguments["prompt_to_repeat"] = request
        given.append(arguments)
    return {"prompt": f"{request}\n\n{' '.join(texts)}", "instruction_id_list": chosen, "kwargs": given}


def _exclude(kind: str, other: str, conflicts: Mapping[str, Any]) -> bool:
    known = kind in conflicts[other] or other in conflicts[kind]
    return kind == other or known or {kind, other} in _EXCLUSIVE


def _shown(arguments: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in arguments.items()}
    for name, relation in arguments.items():
        if name.endswith("relation"):
            (count,) = (value for value in arguments.values() if isinstance(value, int))
            shown["amount"] = f"{_AMOUNTS[relation]} {count}"
    if "language" in arguments:
        shown["language_name"] = _LANGUAGES[arguments["language"]]
    return shown
