"""Text in pieces against the decoding of all ids at once, and stop strings against `str.find` on the whole text."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fusionroute import tiny
from fusionroute.decoding.text import TextPieces

SETTINGS = settings(deadline=None, max_examples=80)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bytes and merges of bytes, as GPT-2, Llama 3 and Qwen: a character may span tokens."""
    return tiny.make_tokenizer(tmp_path_factory.mktemp("bytewise"))


@pytest.fixture(scope="module")
def fallback() -> Any:
    """Words with a mark for the space, bytes for what is unknown, as Llama 2, Mistral and Gemma."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc", "▁a", "▁b", "ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def whole(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def pieces(tokenizer: Any, ids: Sequence[int], stops: Sequence[str] = ()) -> list[str]:
    """What comes out token by token, up to a stop; the last token is said to be the last."""
    text, parts = TextPieces(tokenizer, stops), []
    for number, token in enumerate(ids):
        parts.append(text.push(token, last=number == len(ids) - 1))
        if text.stopped:
            break
    return parts


words = st.text(alphabet="abc é€😀\n\ufffd", max_size=14) | st.text(max_size=14)


@SETTINGS
@given(text=words)
def test_pieces_make_up_the_text(text: str, bytewise: Any) -> None:
    ids = encode(bytewise, text)
    assert "".join(pieces(bytewise, ids)) == whole(bytewise, ids)


@SETTINGS
@given(ids=st.lists(st.integers(3, 319), max_size=12))
def test_pieces_of_any_ids_make_up_their_text(ids: list[int], bytewise: Any) -> None:
    assert "".join(pieces(bytewise, ids)) == whole(bytewise, ids)


@SETTINGS
@given(text=st.text(alphabet="abc ", max_size=14))
def test_spaces_that_are_marks_are_kept(text: str, fallback: Any) -> None:
    ids = encode(fallback, text)
    assert "".join(pieces(fallback, ids)) == whole(fallback, ids)


@SETTINGS
@given(text=words)
def test_characters_of_fallback_bytes_are_kept(text: str, fallback: Any) -> None:
    # Such a decoder takes neighbouring byte tokens together: all are valid or each becomes U+FFFD.
    ids = encode(fallback, text)
    assert "".join(pieces(fallback, ids)) == whole(fallback, ids)


@SETTINGS
@given(text=st.text(alphabet="ab é€😀", max_size=14))
def test_no_piece_shows_half_a_character(text: str, bytewise: Any) -> None:
    assert "\ufffd" not in "".join(pieces(bytewise, encode(bytewise, text)))


def test_a_piece_comes_as_soon_as_its_character_is_whole(bytewise: Any) -> None:
    assert pieces(bytewise, [*encode(bytewise, "é"), *encode(bytewise, "€")]) == ["", "é", "", "", "€"]


def test_the_last_token_gives_even_half_a_character(bytewise: Any) -> None:
    assert pieces(bytewise, encode(bytewise, "€")[:2]) == ["", "\ufffd"]


def test_flush_gives_half_a_character_that_was_held_back(bytewise: Any) -> None:
    # A row may end by an end id, which is not pushed, so that no token was the last.
    text = TextPieces(bytewise)
    ids = encode(bytewise, "a€")[:2]
    assert "".join([*map(text.push, ids), text.flush()]) == whole(bytewise, ids)


def test_special_tokens_have_no_text(bytewise: Any) -> None:
    assert "".join(pieces(bytewise, [2, *encode(bytewise, "ab"), 1, *encode(bytewise, " c")])) == "ab c"


# --------------------------------------------------------------------------------------------------------- stops

letters = st.text(alphabet="ab\né", min_size=1, max_size=4)
cut = st.lists(st.text(alphabet="ab\né", max_size=4), max_size=6)


def expected(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def actual(tokenizer: Any, parts: Sequence[str], stops: Sequence[str], *, last: bool) -> tuple[str, bool]:
    """The text, and whether it was stopped, of parts that are encoded each on its own."""
    ids = [token for part in parts for token in encode(tokenizer, part)]
    text, out = TextPieces(tokenizer, stops), []
    for number, token in enumerate(ids):
        out.append(text.push(token, last=last and number == len(ids) - 1))
        if text.stopped:
            break
    return "".join([*out, text.flush()]), text.stopped


@SETTINGS
@given(parts=cut, stop=letters, last=st.booleans())
def test_one_stop_is_found_where_find_finds_it(parts: list[str], stop: str, last: bool, bytewise: Any) -> None:
    assert actual(bytewise, parts, [stop], last=last) == expected("".join(parts), [stop])


@SETTINGS
@given(parts=cut, stops=st.lists(letters, min_size=2, max_size=3, unique=True), last=st.booleans())
def test_the_first_of_several_stops_counts(parts: list[str], stops: list[str], last: bool, bytewise: Any) -> None:
    assume(not any(a != b and a in b for a in stops for b in stops))
    assert actual(bytewise, parts, stops, last=last) == expected("".join(parts), stops)


def test_a_stop_within_another_gives_the_same_text_however_it_is_cut() -> None:
    # "c" is whole before "ac\n" is, unless they come as one token: whichever wins, it must not be the cut's choice.
    tokenizer = _of_tokens(["ac\nb", "ac\n", "ac", "\nb", "\n", "a", "b", "c"])
    cuts = [["ac\nb"], ["ac", "\n", "b"], ["ac\n", "b"], ["a", "c", "\nb"]]
    stops = ["ac\n", "c"]
    assert len({"".join(pieces(tokenizer, tokenizer.convert_tokens_to_ids(cut), stops)) for cut in cuts}) == 1


def _of_tokens(tokens: list[str]) -> Any:
    """A tokenizer whose tokens are these strings."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@SETTINGS
@given(parts=st.lists(st.sampled_from(["a", "b", "ab", "ba", "aab", "\n", "b\na"]), max_size=9), stop=letters)
def test_tokens_of_several_letters_hide_no_stop(parts: list[str], stop: str) -> None:
    tokenizer = _of_tokens(["a", "b", "ab", "ba", "aab", "\n", "b\na"])
    text, out = TextPieces(tokenizer, [stop]), []
    for part in parts:
        out.append(text.push(tokenizer.convert_tokens_to_ids(part)))
        if text.stopped:
            break
    assert ("".join([*out, text.flush()]), text.stopped) == expected("".join(parts), [stop])


@SETTINGS
@given(parts=cut, stops=st.lists(letters, min_size=1, max_size=3))
def test_what_came_out_is_never_taken_back(parts: list[str], stops: list[str], bytewise: Any) -> None:
    ids = [token for part in parts for token in encode(bytewise, part)]
    shown = "".join(pieces(bytewise, ids, stops))
    assert not any(stop in shown for stop in stops)


@SETTINGS
@given(parts=cut, stop=letters)
def test_no_more_is_held_back_than_may_begin_the_stop(parts: list[str], stop: str, bytewise: Any) -> None:
    text, shown, seen = TextPieces(bytewise, [stop]), "", []
    for part in parts:
        for token in encode(bytewise, part):
            seen.append(token)
            shown += text.push(token)
            written = whole(bytewise, seen)
            if text.stopped or written.endswith("\ufffd"):
                continue
            begun = [n for n in range(len(stop)) if written.endswith(stop[:n])]
            assert shown == written[: len(written) - max(begun)]
        if text.stopped:
            break


def test_text_after_a_stop_within_one_token_is_dropped() -> None:
    text = TextPieces(_of_tokens(["xx", "b.c"]), ["."])
    assert [text.push(0), text.push(1), text.flush()] == ["xx", "b", ""]


def test_nothing_is_left_to_flush_after_the_last_token(bytewise: Any) -> None:
    text = TextPieces(bytewise, ["ab"])
    assert (text.push(encode(bytewise, "a")[0], last=True), text.flush()) == ("a", "")


def test_flush_gives_once_what_was_held(bytewise: Any) -> None:
    text = TextPieces(bytewise, ["ab"])
    assert (text.push(encode(bytewise, "a")[0]), text.flush(), text.flush()) == ("", "a", "")


def test_an_empty_stop_never_stops(bytewise: Any) -> None:
    assert actual(bytewise, ["ab"], [""], last=True) == ("ab", False)


def test_text_that_may_go_on_is_withheld(bytewise: Any) -> None:
    half, (a,), (c,) = encode(bytewise, "€")[0], encode(bytewise, "a"), encode(bytewise, "c")
    character, stop = TextPieces(bytewise), TextPieces(bytewise, ["ab"])
    assert (character.push(half), character.withholds) == ("", True)
    assert (stop.push(a), stop.withholds) == ("", True)
    assert (stop.push(c), stop.withholds) == ("ac", False)
