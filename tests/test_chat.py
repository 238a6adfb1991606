"""A session on its own, where the command line cannot say what to write."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fusionroute.chat import Session
from fusionroute.decoding.sampling import Sampling

ASK = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("show", [False, True])
def test_text_held_back_for_a_stop_string_that_does_not_come(
    make_collection: Callable[[str], Path], capsys: pytest.CaptureFixture, show: bool
) -> None:
    session = Session(str(make_collection("llama")), quiet=True)
    (letter,) = session.engine.tokenizer("A", add_special_tokens=False)["input_ids"]

    def letter_then_end(ids: Sequence[int]) -> list[int]:
        return sorted(session.engine.ends) if ids[-1] == letter else [letter]

    settings = {"max_new_tokens": 4, "sampling": Sampling(mask=letter_then_end), "stop": ["AB"]}
    answer = session.answer(ASK, settings, show=show)
    assert [token.id for token in answer.tokens] == [letter]
    assert answer.text == answer.to_dict()["text"] == "A"
    assert capsys.readouterr().out.startswith("A" if show else "")
