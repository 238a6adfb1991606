"""The documentation site builds without a warning; what its pages name exists."""

import ast
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COLLECTIONS = sorted(path for path in (ROOT / "src" / "fusionroute" / "collections").iterdir() if path.is_dir())


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder


def test_every_command_is_in_the_reference(site: Path) -> None:
    from typer.main import get_command

    from fusionroute.cli import app

    text = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    names = [name for name, command in get_command(app).commands.items() if not hasattr(command, "commands")]  # type: ignore[attr-defined]
    assert [name for name in names if f'id="{name}"' not in text] == []


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    import fusionroute

    text = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    names = [name for name in fusionroute.__all__ if name != "__version__"]
    assert [name for name in names if not re.search(rf'id="fusionroute\.[\w.]*\b{name}"', text)] == []


@pytest.mark.parametrize("path", sorted((DOCS / "reference").glob("*.md")), ids=lambda path: path.stem)
def test_nothing_that_a_reference_page_asks_for_is_left_out(path: Path, site: Path) -> None:
    """A name that has moved would go missing without a word."""
    html = (site / "reference" / f"{path.stem}.html").read_text(encoding="utf-8")
    wanted = []
    for block in re.split(r"^::: ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        home, members = block.split()[0], re.search(r"members: \[(.*?)\]", block)
        wanted += [f"{home}.{name}" for name in members[1].split(", ")] if members else [home]
    assert [name for name in wanted if f'id="{name}"' not in html] == []


def test_the_notebook_is_a_page_with_its_pictures(site: Path) -> None:
    text = (site / "notebook.html").read_text(encoding="utf-8")
    assert all((site / name).is_file() for name in re.findall(r'src="(images/notebook-\d+\.png)"', text))
    assert 'src="images/notebook-0.png"' in text


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    sys.path.insert(0, str(DOCS))
    try:
        from check_links import broken
    finally:
        sys.path.remove(str(DOCS))
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html">x</a><a href="#here">x</a><a href="#gone">x</a>')
    assert broken(tmp_path) == ["a.html: b.html leads nowhere", "a.html: #gone: no such anchor"]


@pytest.mark.parametrize("found", re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/.]+)\)", page("paper.md")))
def test_tests_of_the_papers_index_exist(found: tuple[str, str]) -> None:
    name, path = found
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_figures_are_what_the_script_draws(tmp_path: Path) -> None:
    import matplotlib

    pinned = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    assert matplotlib.__version__ == pinned[1], "another version draws other bytes: install by constraints.txt"
    subprocess.run([sys.executable, str(DOCS / "figures.py"), str(tmp_path)], check=True)
    drawn = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.svg")}
    kept = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (DOCS / "images").glob("*.svg")}
    assert drawn == kept


# ---- licences


@pytest.mark.parametrize("folder", COLLECTIONS, ids=lambda path: path.name)
def test_every_bundled_artefact_of_a_collection_has_its_licence(folder: Path) -> None:
    adapters = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("adapter_model.safetensors")}
    tokenizer = {path.name for path in folder.glob("*") if path.name.startswith(("tokenizer", "chat_template"))}
    text = page("licences.md").split("## What they were trained on")[0]
    beside = text.split("## In the repository, not in the wheel")[1]
    own = text.split(f"### {folder.name}\n")[1].split("\n##")[0]
    assert [name for name in sorted(adapters | tokenizer) if f"`{name}`" not in own + beside] == []


def test_every_bundled_fixture_has_its_licence() -> None:
    fixtures = {path.name for path in (ROOT / "tests/evaluation/fixtures").iterdir() if path.is_dir()}
    rows = page("licences.md").split("## Test fixtures")[1]
    assert [name for name in sorted(fixtures) if f"`{name}`" not in rows] == []


@pytest.mark.parametrize("folder", COLLECTIONS, ids=lambda path: path.name)
def test_every_data_set_that_was_trained_on_has_its_licence(folder: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / f"{folder.name}.yaml").read_text())
    sections = [*recipe["experts"], recipe["sft"], recipe["cdpo"], *recipe["rewards"]]
    paths = {entry["path"] for section in sections for entry in section.get("data", [])}
    sets = {path if path.startswith("solutions/reference") else path.split("/")[0] for path in paths}
    known = {
        "gsm8k": "GSM8K",
        "mbpp": "MBPP",
        "gpteacher": "GPTeacher",
        "llms_from_scratch": "LLMs-from-scratch",
        "self_instruct": "Self-Instruct",
        "hh_rlhf": "HH-RLHF",
        "ultrafeedback": "UltraFeedback",
        "solutions": "answers of Qwen2.5-Coder",
        "solutions/reference.jsonl": "answers of GPTeacher, edited by rule",
        "solutions/reference-router.jsonl": "answers of GPTeacher, edited by rule",
    }
    rows = page("licences.md").split("## What they were trained on")[1].split("## Test fixtures")[0]
    assert [name for name in sorted(sets) if f"| {known[name]}" not in rows] == []


# ---- what a release needs


def test_versions_agree() -> None:
    import fusionroute

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert project is not None
    assert {citation["version"], changes[0], project[1], fusionroute.__version__} == {fusionroute.__version__}


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2601.05106"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.name)
def test_issue_forms_have_what_a_form_needs(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    assert all(part["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown") for part in form["body"])
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids))


def test_the_hooks_before_a_commit_are_those_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [re.sub(r"\.venv/bin/| --force-exclude", "", hook["entry"]) for hook in hooks]
    lint = re.search(r"^lint: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert lint is not None
    made = [line.strip().replace("$(BIN)/", "") for line in lint[1].splitlines()]
    assert entries == [words.removesuffix(" .") for words in made]
