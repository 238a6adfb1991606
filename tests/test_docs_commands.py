"""The commands of docs/: own-experts.md in order and as it stands on tiny models, the other pages' beside it.

Hub ids are those of the page; a little hub on this machine serves tiny random models under them and takes the push.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from little_hub import LittleHub, little_hub

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "evaluation" / "fixtures"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    joined = [re.sub(r" *\\\n *", " ", block) for block in blocks(page, "bash")]
    lines = [line.strip() for block in joined for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("pip install")]


KEYS = (["messages"], ["prompt", "chosen", "rejected"])  # of a chat row, of a pair


class Place:
    """A folder, the hub, and what a command runs with."""

    def __init__(self, folder: Path, hub: LittleHub) -> None:
        self.folder, self.hub = folder, hub
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.plain = os.environ | {"PATH": path}
        self.environment = self.plain | hub.environment(folder / "home")
        self.servers: list[subprocess.Popen] = []

    def run(self, command: list[str], *, hub: bool = True) -> subprocess.CompletedProcess:
        environment = self.environment if hub else self.plain
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, input="", timeout=600
        )

    def serve(self, command: list[str]) -> None:
        """Start a server that runs on until the last test, and wait until it answers."""
        server = subprocess.Popen(command, cwd=self.folder, env=self.environment, start_new_session=True)
        self.servers.append(server)
        port = command[command.index("--port") + 1]
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready"):
                return
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)


def sums(count: int) -> Iterator[dict]:
    for number in range(count):
        prompt = [{"role": "user", "content": f"What is {number} + {number % 7}?"}]
        sides = {"chosen": number + number % 7, "rejected": number - number % 7 - 1}
        answers = {side: [{"role": "assistant", "content": f"It is {value}."}] for side, value in sides.items()}
        yield {"prompt": prompt, **answers, "messages": prompt + answers["chosen"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The page's recipe and models of its names on the hub."""
    import yaml

    from fusionroute import tiny

    folder = tmp_path_factory.mktemp("own-experts")
    (recipe,) = blocks("own-experts.md", "yaml")
    (folder / "mine.yaml").write_text(recipe)
    found = yaml.safe_load(recipe)
    names = dict.fromkeys([found["base"], *(expert.get("source", found["base"]) for expert in found["experts"])])
    for seed, name in enumerate(names):
        repository = folder / "hub" / name
        tokenizer = tiny.make_tokenizer(repository)
        tiny.make_model(repository, family="gemma2", seed=seed, vocab_size=len(tokenizer), scale=0.1)
    (folder / "data").mkdir()
    rows = list(sums(24))
    chats, pairs = ([{key: row[key] for key in keys} for row in rows] for keys in KEYS)
    for name, lines in (("chat", chats), ("pairs", pairs)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "benchmarks").symlink_to(FIXTURES)
    for name in ("recipes", "examples"):
        (folder / name).symlink_to(ROOT / name)
    with little_hub(folder / "hub") as hub:
        place = Place(folder, hub)
        try:
            yield place
        finally:
            for server in place.servers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGTERM)
                server.wait(60)


@pytest.mark.parametrize("line", commands("own-experts.md"))
def test_own_experts(line: str, place: Place) -> None:
    words = shlex.split(line)
    if words[:2] == ["fusionroute", "serve"]:
        place.serve(words)
        return
    done = place.run(words)
    assert done.returncode == 0, done.stderr[-2000:]
    if words[0] == "curl":
        assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_own_experts_are_pushed_and_loaded_again(place: Place) -> None:
    """After the commands above: the page's Python, then a stranger who has only the Hub."""
    (program,) = blocks("own-experts.md", "python")
    done = place.run([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"{place.hub.address}/you/mine"
    assert place.hub.created["you/mine"]["visibility"] == "private"
    config = json.loads((place.folder / "hub/you/mine/config.json").read_text())
    assert [expert["source"] for expert in config["experts"]] == [
        "MergeBench/gemma-2-2b-it_instruction", "MergeBench/gemma-2-2b-it_math", "MergeBench/gemma-2-2b-it_coding",
    ]  # fmt: skip
    again = place.run(
        ["fusionroute", "generate", "What is 3 + 4?", "-c", "you/mine", "--max-new-tokens", "4", "--json"]
    )
    assert again.returncode == 0, again.stderr[-2000:]


def test_rows_of_the_page_are_rows_of_the_formats(tmp_path: Path) -> None:
    from fusionroute.training.rows import load_rows, parse_spec

    for kind, block in zip(("messages", "preference"), blocks("own-experts.md", "json"), strict=True):
        (tmp_path / "rows.jsonl").write_text(block)
        assert load_rows(parse_spec({"format": kind, "path": "rows.jsonl", "domain": "x"}), tmp_path)


# ---- the other pages

LAUNCHES = "tests/training/test_launched_commands.py"
IN_VLLM = "tests/integrations/with_vllm/test_vllm_server.py"
# Where the commands are run that are not run here.
ELSEWHERE = {
    'fusionroute generate "What is 17 + 25?"': "Makefile",
    "fusionroute serve": "Makefile",
    "python examples/library.py mine-cdpo": "tests/test_examples.py",
    "python examples/custom_drafter.py mine-cdpo": "tests/test_examples.py",
    "python examples/existing_pipeline.py mine-cdpo": "tests/test_examples.py",
    "fusionroute bench decode": "tests/test_readme.py",
    "fusionroute bench decode > bench.txt": "tests/test_readme.py",
    "python benchmarks/capacity.py --bench bench.txt": "tests/benchmarks/test_capacity.py",
    "fusionroute evaluate --tasks all --system all --limit 50 --data DIR --out results": "tests/test_readme.py",
    "fusionroute evaluate --held-out --data DIR --system fusionroute,alpha:0.5,merge:ties:0.7:0.3 --out tuning": (
        "tests/evaluation/test_evaluate.py"
    ),
    "fusionroute report results --against docs/results/smollm2.json": "tests/evaluation/test_comparison.py",
    "fusionroute lm-eval --model fusionroute --model_args system=query-level --tasks hellaswag --limit 100": (
        "tests/evaluation/test_harness.py"  # with a task that is not on the Hub
    ),
    "fusionroute pairs --data DIR --out pairs.jsonl --tasks gsm8k,mbpp --samples 4 --reference": (
        "tests/evaluation/test_pairs.py"
    ),
    "fusionroute annotate COLLECTION --recipe recipe.yaml --out annotations --part 1/4": LAUNCHES,
    "accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 8 -m fusionroute "
    "train sft COLLECTION --recipe recipe.yaml --out after-sft": LAUNCHES,
    "torchrun --standalone --nproc-per-node 8 -m fusionroute "
    "train sft COLLECTION --recipe recipe.yaml --out after-sft": LAUNCHES,
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id sft "
    "-m fusionroute train sft COLLECTION --recipe recipe.yaml --out after-sft": LAUNCHES,  # on one machine
    "fusionroute serve --engine vllm": IN_VLLM,
    "fusionroute serve --engine vllm -c ./mine -- --tensor-parallel-size 2": IN_VLLM,
    "vllm serve ./mine --dtype bfloat16": IN_VLLM,
}
PAGES = [
    "index.md", "decoding.md", "evaluation.md", "serving.md", "scale.md", "theory.md", "examples.md", "training.md",
    "vllm.md",
]  # fmt: skip
OTHERS = [words for page in PAGES for line in commands(page) if (words := line.partition("  #")[0].strip())]


@pytest.mark.parametrize("line", dict.fromkeys(line for line in OTHERS if line not in ELSEWHERE))
def test_command_of_another_page(line: str, place: Place) -> None:
    """In the folder where the commands above have left their files; models are this machine's, or theirs."""
    done = place.run(shlex.split(line), hub="mine-cdpo" in line)
    # A plan ends with 1 where the disk is too small for the run, which is as it should be.
    small = "--plan" in line and re.search(r"take \d+ GB and .* has .* GB free", done.stderr)
    assert done.returncode == (1 if small else 0), done.stderr[-2000:]


@pytest.mark.parametrize(("line", "where"), ELSEWHERE.items())
def test_what_is_run_elsewhere_is_on_a_page(line: str, where: str) -> None:
    assert line in OTHERS
    words = line.replace("> bench.txt", "").split()
    named = {"fusionroute": words[1], "python": Path(words[1]).stem}.get(words[0], words[0])
    assert named in (ROOT / where).read_text(encoding="utf-8")
