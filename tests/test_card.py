import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusionroute import collection, tiny
from fusionroute.card import write_card
from fusionroute.configuration import FusionRouteConfig, MemberSpec

Make = Callable[[str], Path]


def card_of(
    folder: Path, *, experts: int = 2, edit: Callable[[list[MemberSpec]], None] = lambda s: None, **kw: Any
) -> str:
    """The card of a configuration made by hand; `edit` changes the members, the router first."""
    specs = [
        MemberSpec(name, f"org/{name}", digest="sha256:" + "ab" * 32, license="mit") for name in _NAMES[: experts + 1]
    ]
    edit(specs)
    config = FusionRouteConfig(vocab_size=320, **kw)
    config.set_members(specs[0], specs[1:])
    folder.mkdir(exist_ok=True)
    write_card(folder, config)
    return (folder / "README.md").read_text(encoding="utf-8")


_NAMES = ["router", "math", "code", "general"]


def front_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def rows_of(text: str, first: str) -> list[list[str]]:
    """The body of the table whose first header is `first`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |")) + 2
    rows = []
    while start < len(lines) and lines[start].startswith("|"):
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", lines[start])[1:-1]])
        start += 1
    return rows


def code_of(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


# ---- front matter


def test_front_matter_is_what_the_hub_reads(any_collection: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard((any_collection / "README.md").read_text(encoding="utf-8")).data
    assert (data.library_name, data.pipeline_tag) == ("fusionroute", "text-generation")
    assert data.tags == ["fusionroute", "token-level-routing", "model-collaboration"]


def test_base_models_are_the_hub_ids_once_each(tmp_path: Path) -> None:
    def edit(specs: list[MemberSpec]) -> None:
        specs[0].source = "org/base"
        specs[1].source = "org/base"
        specs[2].source = "other/base-gguf/q4.gguf"

    assert front_of(card_of(tmp_path, edit=edit))["base_model"] == ["org/base", "other/base-gguf"]


def test_local_members_are_no_base_models(make_collection: Make) -> None:
    assert "base_model" not in front_of((make_collection("llama") / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["apache-2.0", "Apache-2.0", "apache-2.0"], {"license": "apache-2.0"}),
        (["mit", "apache-2.0", "mit"], {"license": "other"}),
        (["mit", None, "mit"], {"license": "other"}),
        ([None, None, None], {"license": "other"}),
        (["other", "other", "other"], {"license": "other"}),
        (["lab-research"] * 3, {"license": "other", "license_name": "lab-research"}),
        (["Lab terms, 2"] * 3, {"license": "other"}),
    ],
)
def test_licence_is_named_only_if_all_agree(
    licences: list[str | None], expected: dict[str, str], tmp_path: Path
) -> None:
    def edit(specs: list[MemberSpec]) -> None:
        for spec, licence in zip(specs, licences, strict=True):
            spec.license = licence

    front = front_of(card_of(tmp_path, edit=edit))
    assert {key: front[key] for key in front if key.startswith("license")} == expected


def test_differing_licences_are_listed_by_member(tmp_path: Path) -> None:
    def edit(specs: list[MemberSpec]) -> None:
        specs[1].license, specs[2].license = "gemma", None

    text = card_of(tmp_path, edit=edit)
    assert "- router: mit\n- math: gemma\n- code: not stated\n" in text


def test_one_known_licence_needs_no_list(tmp_path: Path) -> None:
    assert "Licences, as" not in card_of(tmp_path)


# ---- members


def test_members_are_in_route_order(make_collection: Make) -> None:
    rows = rows_of((make_collection("mixed") / "README.md").read_text(encoding="utf-8"), "Route")
    assert [row[:2] for row in rows] == [
        ["router", "`router`"],
        ["0", "`math`"],
        ["1", "`code`"],
        ["2", "`general`"],
    ]


def test_a_row_says_source_revision_adapter_and_digests(tmp_path: Path) -> None:
    def edit(specs: list[MemberSpec]) -> None:
        specs[1] = MemberSpec(
            "math",
            "org/base",
            revision="v1.2",
            adapter="org/lora",
            adapter_revision="abc",
            digest="sha256:0123456789abcdef",
            adapter_digest="sha256:fedcba9876543210",
            description="sums",
            license="mit",
        )

    assert rows_of(card_of(tmp_path, edit=edit), "Route")[1] == [
        "0",
        "`math`",
        "`org/base@v1.2`",
        "`org/lora@abc`, digest `fedcba987654`",
        "`0123456789ab`",
        "mit",
        "sums",
    ]


def test_a_wheel_is_shown_with_a_short_sha256(tmp_path: Path) -> None:
    def edit(specs: list[MemberSpec]) -> None:
        specs[0].source = "wheel:pack==1.0/pack/m.gguf#sha256=" + "cd" * 32

    text = card_of(tmp_path, edit=edit)
    assert rows_of(text, "Route")[0][2] == "`wheel:pack==1.0/pack/m.gguf (sha256 cdcdcdcdcdcd)`"
    assert "with its extra `gguf`" in text


@pytest.mark.parametrize("description", ["a | b", "two\nlines", "ünïcode 数学"])
def test_no_description_breaks_the_table(description: str, tmp_path: Path) -> None:
    def edit(specs: list[MemberSpec]) -> None:
        specs[1].description = description

    rows = rows_of(card_of(tmp_path, edit=edit), "Route")
    assert [len(row) for row in rows] == [7, 7, 7]
    assert rows[1][6].replace("\\|", "|") == " ".join(description.split())


# ---- nothing of this machine


def test_no_local_path_is_in_the_card(any_collection: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = (any_collection / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path_factory.getbasetemp()) not in text
    assert "local folder `model" in text


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/me/secret/llama", "local folder `llama`"),
        ("~/secret/llama", "local folder `llama`"),
        ("../secret/llama", "local folder `llama`"),
        ("./../secret/llama", "local folder `llama`"),
        ("home/me/secret/llama", "local folder `llama`"),
        ("/home/me/secret/q4.gguf#sha256=" + "a" * 64, "local folder `q4.gguf`"),
        ("./base", "`./base` of this collection"),
    ],
)
def test_local_sources_show_their_last_component(source: str, shown: str, tmp_path: Path) -> None:
    def edit(specs: list[MemberSpec]) -> None:
        specs[1].source = source

    text = card_of(tmp_path, edit=edit)
    assert rows_of(text, "Route")[1][2] == shown
    assert "secret" not in text


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("/home/me/data.jsonl", "data.jsonl"),
        ("~/data.jsonl", "data.jsonl"),
        ("file:///home/me/data.jsonl", "data.jsonl"),
        ("rows of /home/me/data.jsonl, cut", "rows of data.jsonl, cut"),
        ("path=/home/me/data.jsonl", "path=data.jsonl"),
        ("https://hf.co/home/me/data", "https://hf.co/home/me/data"),
        ("org/name and/or 3 / 4 // 5", "org/name and/or 3 / 4 // 5"),
    ],
)
def test_paths_in_the_training_record_are_cut(written: str, shown: str, tmp_path: Path) -> None:
    text = card_of(tmp_path, head_trained=True, training={"data": {"train": [written]}})
    assert f"  - train: {shown}\n" in text


# ---- use


@pytest.mark.parametrize("template", [True, False])
def test_the_python_block_runs(template: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.make_tokenizer(tmp_path / "base")
    tiny.make_model(tmp_path / "base")
    if not template:
        (tmp_path / "base" / "chat_template.jinja").unlink()
    source = str(tmp_path / "base")
    collection.assemble(tmp_path / "made", MemberSpec("router", source), [MemberSpec("math", source)])
    code = code_of((tmp_path / "made" / "README.md").read_text(encoding="utf-8"))
    ast.parse(code)
    assert ("messages" in code) is template
    monkeypatch.chdir(tmp_path / "made")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["output"].routes.shape[1] == names["output"].sequences.shape[1] - names["inputs"]["input_ids"].shape[1]


def test_alpha_and_vocabulary_are_in_the_formula(tmp_path: Path) -> None:
    text = card_of(tmp_path, alpha=0.5)
    assert "log π(y) = log π_i*(y) + α · log π_router(y) + const" in text
    assert "over the 320 ids that all members share, with α = 0.5" in text


def test_the_paper_is_cited(tmp_path: Path) -> None:
    assert "eprint = {2601.05106}" in card_of(tmp_path)


# ---- training


TRAINING = {
    "sft": {"learning_rate": 5e-5, "epochs": 2, "adapter": {"rank": 16, "targets": ["q", "v"]}},
    "cdpo": {"beta": 0.1, "reference": None},
    "data": [{"name": "gsm", "rows": 7000}, {"name": "code", "rows": 100}],
    "seed": 42,
    "paper": {"same_as": True},
    "extra": "by hand",
    "scores": {
        "math": {"value": 0.51234, "low": 0.49, "high": 0.53, "n": 1319},
        "code": {"value": 12},
        "plain": 3,
    },
}


def test_training_is_a_list_in_a_fixed_order(tmp_path: Path) -> None:
    text = card_of(tmp_path, head_trained=True, training=TRAINING)
    expected = """\
- Data:
  - 1:
    - name: gsm
    - rows: 7000
  - 2:
    - name: code
    - rows: 100
- Phase 1, supervised fine-tuning of router and route head:
  - adapter:
    - rank: 16
    - targets: q, v
  - epochs: 2
  - learning_rate: 5e-05
- Phase 2, preference optimisation of the complement (CDPO):
  - beta: 0.1
  - reference: none
- Seed: 42
- Paper:
  - same_as: yes
- extra: by hand
"""
    assert expected in text


def test_scores_are_a_table(tmp_path: Path) -> None:
    text = card_of(tmp_path, head_trained=True, training=TRAINING)
    assert rows_of(text, "Score") == [
        ["code", "12", "", "none"],
        ["math", "0.5123", "0.49 to 0.53", "1319"],
        ["plain", "3", "", "none"],
    ]


@pytest.mark.parametrize("training", [None, {}, {"scores": {}}, {"scores": None}, {"sft": {}}, {"data": []}])
def test_a_sparse_record_is_no_trouble(training: dict[str, Any] | None, tmp_path: Path) -> None:
    text = card_of(tmp_path, head_trained=True, training=training)
    assert "untrained" not in text
    assert "### Scores" not in text


def test_an_untrained_head_is_said_to_be(tmp_path: Path) -> None:
    assert "The route head is untrained: expert 0 (`math`) is always chosen." in card_of(tmp_path)


# ---- the same every time


def test_the_card_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    first = card_of(tmp_path, head_trained=True, training=TRAINING)
    again = card_of(tmp_path, head_trained=True, training=json.loads(json.dumps(TRAINING, sort_keys=True)))
    assert first == again


def test_the_card_does_not_depend_on_where_it_is_written(tmp_path: Path) -> None:
    assert card_of(tmp_path / "a") == card_of(tmp_path / "b")


def test_a_written_collection_gets_the_same_card_again(any_collection: Path) -> None:
    before = (any_collection / "README.md").read_bytes()
    write_card(any_collection, collection.read_config(any_collection))
    assert (any_collection / "README.md").read_bytes() == before
