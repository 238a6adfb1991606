"""The command line as a user meets it: output, exit codes, and errors of one line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fusionroute import __version__


@pytest.fixture
def folder(make_collection: Callable[[str], Path]) -> Path:
    return make_collection("adapters")


def one_line(error: str) -> str:
    """The error's last line, after making sure that nothing but notes on loading stands before it."""
    lines = [line for line in error.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(("option", "told"), [("--help", "Usage"), ("--version", f"fusionroute {__version__}")])
def test_help_and_version_load_nothing_heavy(option: str, told: str) -> None:
    code = (
        f"import sys; sys.argv = ['fusionroute', {option!r}]\n"
        "from fusionroute import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_json_is_one_object_with_the_trace(run: Callable, folder: Path) -> None:
    code, out, _ = run("generate", "What is 3 + 4?", "-c", folder, "--max-new-tokens", 6, "--json")
    answer = json.loads(out)
    assert code == 0
    assert set(answer) == {"text", "tokens", "shares", "switch_rate", "overruled_rate", "tokens_per_second"}
    assert answer["text"] == "".join(token["text"] for token in answer["tokens"])
    assert sum(answer["shares"].values()) == pytest.approx(1)
    experts = [token["expert"] for token in answer["tokens"]]
    switches = sum(a != b for a, b in pairwise(experts))
    assert answer["switch_rate"] == pytest.approx(switches / (len(experts) - 1))
    names = "id text expert weights expert_choice router_choice fused_choice overruled gap drafted"
    assert set(answer["tokens"][0]) == set(names.split())


def test_output_is_plain_without_a_terminal_and_ends_with_the_figures(run: Callable, folder: Path) -> None:
    code, out, _ = run("generate", "What is 3 + 4?", "-c", folder, "--max-new-tokens", 6)
    assert code == 0
    assert "\x1b" not in out
    assert "switches" in out.splitlines()[-1]
    assert "overruled" in out.splitlines()[-1]
    assert out.rstrip().endswith("tokens/s")


def test_seed_and_temperature(run: Callable, folder: Path) -> None:
    def text(*more: object) -> str:
        return json.loads(run("generate", "Hi", "-c", folder, "--json", "--max-new-tokens", 8, *more)[1])["text"]

    assert text("--temperature", 2, "--seed", 1) == text("--temperature", 2, "--seed", 1)
    assert text("--temperature", 2, "--seed", 1) != text("--temperature", 2, "--seed", 2)


@pytest.mark.parametrize(
    "option", [("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1.0), ("--repetition-penalty", 1.0, "--temperature", 0)]
)
def test_options_that_leave_one_token_are_greedy(run: Callable, folder: Path, option: tuple) -> None:
    def text(*more: object) -> str:
        return json.loads(run("generate", "Hi", "-c", folder, "--json", "--max-new-tokens", 8, *more)[1])["text"]

    assert text("--temperature", 2, "--seed", 1, *option) == text()
    assert text("--temperature", 2, "--seed", 1) != text()


def test_a_stop_string_ends_the_answer(run: Callable, folder: Path) -> None:
    def text(*more: object) -> str:
        return json.loads(run("generate", "Hi", "-c", folder, "--json", "--max-new-tokens", 8, *more)[1])["text"]

    whole = text()
    end = whole[len(whole) // 2 :][:2]
    assert text("--stop", end) == whole[: whole.index(end)]


def test_forced_expert(run: Callable, folder: Path) -> None:
    _, out, _ = run("generate", "Hi", "-c", folder, "--json", "--max-new-tokens", 4, "--expert", "code", "--alpha", 0)
    answer = json.loads(out)
    assert answer["shares"]["code"] == 1
    assert answer["overruled_rate"] == 0


def test_the_router_alone(run: Callable, folder: Path) -> None:
    code, out, err = run("generate", "Hi", "-c", folder, "--max-new-tokens", 4, "--expert", "router")
    assert code == 0, err
    assert out.rstrip().endswith("tokens/s")


def test_unknown_expert(run: Callable, folder: Path) -> None:
    code, _, err = run("generate", "Hi", "-c", folder, "--expert", "law")
    assert code == 2
    assert "'law'" in one_line(err)
    assert "math, code" in err


def test_unknown_collection(run: Callable) -> None:
    code, _, err = run("generate", "Hi", "-c", "nowhere")
    assert code == 2
    assert "no collection 'nowhere'" in one_line(err)


def test_unknown_dtype(run: Callable, folder: Path) -> None:
    code, _, err = run("generate", "Hi", "-c", folder, "--dtype", "float7")
    assert code == 2
    assert "'float7'" in one_line(err)


def test_prompt_with_no_room_left(run: Callable, folder: Path) -> None:
    code, _, err = run("generate", "what " * 600, "-c", folder)
    assert code == 2
    assert "context 512" in one_line(err)


def test_half_written_config(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    code, _, err = run("generate", "Hi", "-c", tmp_path)
    assert code == 1
    assert "config.json is not whole JSON" in one_line(err)


def test_unknown_option_is_usage(run: Callable) -> None:
    assert run("generate", "Hi", "--colour")[0] == 2


def test_chat_answers_until_an_empty_line(run: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hi", "And now?", ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    code, out, _ = run("chat", "-c", folder, "--max-new-tokens", 3)
    assert code == 0
    assert out.count("tokens/s") == 2


def test_init_makes_an_untrained_collection(run: Callable, folder: Path, tmp_path: Path) -> None:
    from fusionroute.collection import read_config

    base = read_config(folder).router_spec.source
    adapter = folder / "expert_math"
    code, out, err = run(
        "init", tmp_path / "new", "--router", base, "--expert", f"plain={base}", "--expert", f"math={base}+{adapter}"
    )
    assert code == 0, err
    assert "untrained" in out
    answer = json.loads(run("generate", "Hi", "-c", tmp_path / "new", "--json", "--max-new-tokens", 4)[1])
    assert answer["shares"] == {"plain": 1.0, "math": 0.0}
    report = json.loads(run("inspect", tmp_path / "new", "--json")[1])
    assert report["head"]["trained"] is False


def test_init_takes_a_path_with_a_plus_sign(run: Callable, folder: Path, tmp_path: Path) -> None:
    from fusionroute.collection import read_config

    base = read_config(folder).router_spec.source
    copied = shutil.copytree(base, tmp_path / "c++")
    code, _, err = run("init", tmp_path / "new", "--router", base, "--expert", f"plain={copied}")
    assert code == 0, err
    (expert,) = read_config(tmp_path / "new").expert_specs
    assert (expert.source, expert.adapter) == (str(copied.resolve()), None)


def test_init_refuses_a_bad_expert(run: Callable, tmp_path: Path) -> None:
    code, _, err = run("init", tmp_path / "new", "--router", "x/y", "--expert", "math")
    assert code == 2
    assert "NAME=SOURCE" in one_line(err)
    assert not (tmp_path / "new").exists()


def test_inspect_prints_every_member(run: Callable, folder: Path) -> None:
    code, out, _ = run("inspect", folder)
    assert code == 0
    for name in ("router", "math", "code"):
        assert name in out
