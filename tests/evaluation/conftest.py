"""What several tests of evaluation need."""

from collections.abc import Iterator

import nltk
import pytest


@pytest.fixture(scope="module")
def punkt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As much of nltk's punkt_tab as plain sentences need; two kinds of instruction count with it."""
    data = tmp_path_factory.mktemp("nltk_data")
    english = data / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "sent_starters.txt"):
        (english / name).write_text("")
    (english / "ortho_context.tab").write_text("the\t46\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(data), *nltk.data.path])
        yield
