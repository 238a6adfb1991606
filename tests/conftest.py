"""Tiny collections on disk, built once a session, and an oracle that computes Eq. 1 without fusionroute's code."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

# A busy machine is not a failure.
hypothesis.settings.register_profile("fusionroute", deadline=None)
hypothesis.settings.load_profile("fusionroute")

if TYPE_CHECKING:
    from torch import Tensor

    from fusionroute.modeling import FusionRouteForCausalLM

# Kinds of collection the reference must be exact for; (family, width, layers, padded vocabulary, adapter) per member.
# BARE is a shared base as it stands, with none of its adapters on.
BARE = "bare"
SHAPES = {
    "llama": [("llama", 32, 2, 0, False), ("llama", 48, 3, 0, False), ("llama", 32, 2, 0, False)],
    "gemma2": [("gemma2", 32, 2, 0, False), ("gemma2", 32, 4, 0, False), ("gemma2", 48, 2, 0, False)],
    "qwen2": [("qwen2", 32, 2, 8, False), ("qwen2", 48, 2, 16, False), ("qwen2", 32, 2, 0, False)],
    "adapters": [("llama", 32, 2, 0, True), ("llama", 32, 2, 0, True), ("llama", 32, 2, 0, True)],
    "mixed": [
        ("llama", 32, 2, 0, True),
        ("gemma2", 48, 2, 16, False),
        ("llama", 32, 2, 0, True),
        ("qwen2", 32, 2, 8, False),
    ],
    "bare": [("llama", 32, 2, 0, True), ("llama", 32, 2, 0, BARE), ("llama", 32, 2, 0, True)],
    "two_bases": [
        ("llama", 32, 2, 0, True),
        ("llama", 32, 2, 0, True),
        ("qwen2", 48, 2, 0, True),
        ("qwen2", 48, 2, 0, BARE),
    ],
}


@pytest.fixture(scope="session")
def make_collection(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from the name of a shape to the folder of a tiny collection with a random route head."""
    made: dict[str, Path] = {}

    def make(shape: str) -> Path:
        if shape in made:
            return made[shape]
        import torch

        from fusionroute import collection, tiny
        from fusionroute.configuration import MemberSpec
        from fusionroute.router import RouteHead

        root = tmp_path_factory.mktemp(shape)
        tokenizer = tiny.make_tokenizer(root / "tokenizer")
        bases: dict[tuple, tuple[Path, object]] = {}
        specs = []
        for number, (family, width, layers, pad, adapted) in enumerate(SHAPES[shape]):
            name = "router" if number == 0 else ("math", "code", "general")[number - 1]
            key = (family, width, layers, pad) if adapted else (number,)
            if key not in bases:
                folder = root / f"model{len(bases)}"
                vocab = len(tokenizer) + pad
                model = tiny.make_model(
                    folder, family=family, seed=number, width=width, layers=layers, vocab_size=vocab
                )
                tokenizer.save_pretrained(folder)
                bases[key] = (folder, model)
            folder, model = bases[key]
            adapter = None
            if adapted is True:
                adapter = root / f"adapter_{name}"
                tiny.make_adapter(adapter, model, seed=10 + number)
            specs.append(MemberSpec(name, str(folder), adapter=None if adapter is None else str(adapter)))
        width = SHAPES[shape][0][1]
        torch.manual_seed(99)
        head = RouteHead(width, [spec.name for spec in specs[1:]])
        torch.nn.init.normal_(head.weight)
        head.trained = True
        (root / "head").mkdir()
        head.save(root / "head")
        collection.assemble(root / "collection", specs[0], specs[1:], head=root / "head")
        made[shape] = root / "collection"
        return made[shape]

    return make


@pytest.fixture(scope="session", params=sorted(SHAPES))
def any_collection(request: pytest.FixtureRequest, make_collection: Callable[[str], Path]) -> Path:
    """Each shape of tiny collection in turn."""
    return make_collection(request.param)


@pytest.fixture(scope="session")
def load(make_collection: Callable[[str], Path]) -> "Callable[[str], FusionRouteForCausalLM]":
    """A function from the name of a shape to its loaded collection; shared, so a test must leave it as it was."""
    loaded: dict[str, FusionRouteForCausalLM] = {}

    def get(shape: str) -> "FusionRouteForCausalLM":
        from fusionroute.modeling import FusionRouteForCausalLM

        if shape not in loaded:
            loaded[shape] = FusionRouteForCausalLM.from_pretrained(make_collection(shape))
        return loaded[shape]

    return get


@pytest.fixture(scope="session", params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    """The name of each shape in turn."""
    return request.param


@pytest.fixture(scope="session")
def padded() -> "Callable[[Sequence[Sequence[int]], str], tuple[Tensor, Tensor]]":
    """A function from rows and a side to ids and mask `[B, T]`; the padding is id 0, which is also a token."""

    def pad(rows: Sequence[Sequence[int]], side: str) -> "tuple[Tensor, Tensor]":
        import torch

        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            where = slice(width - len(row), None) if side == "left" else slice(len(row))
            ids[number, where], mask[number, where] = torch.tensor(row), 1
        return ids, mask

    return pad


class Oracle:
    """Eq. 1 by hand: each member loaded on its own through transformers and PEFT, one row, no padding, no cache.

    Of fusionroute it uses nothing; `config.json` is read as JSON.

    Args:
        folder: of the collection.
        base: replaces the source of every member with the first member's.
    """

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        from peft import PeftModel
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        config = json.loads((folder / "config.json").read_text())
        specs = [config["router"], *config["experts"]]
        self.names = [spec["name"] for spec in config["experts"]]
        self.models = []
        for spec in specs:
            source = base if base is not None and spec["source"] == specs[0]["source"] else folder / spec["source"]
            model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
            if spec["adapter"] is not None:
                model = PeftModel.from_pretrained(model, str(folder / spec["adapter"])).eval()
            self.models.append(model)
        self.head = load_file(folder / "router" / "route_head.safetensors")["weight"]
        self.vocab = len(AutoTokenizer.from_pretrained(folder))
        # Rows recur from test to test.
        self.known: dict[tuple[int, ...], Any] = {}

    def terms(self, row: Sequence[int]) -> "tuple[Tensor, Tensor, Tensor]":
        """Scores `[T, n]`, the router's logits `[T, V]` and the experts' `[n, T, V]`."""
        if tuple(row) not in self.known:
            self.known[tuple(row)] = self._terms(row)
        return self.known[tuple(row)]

    def _terms(self, row: Sequence[int]) -> "tuple[Tensor, Tensor, Tensor]":
        import torch

        ids = torch.tensor([list(row)])
        with torch.no_grad():
            outputs = [model(input_ids=ids, output_hidden_states=True, use_cache=False) for model in self.models]
        logits = torch.cat([output.logits[..., : self.vocab].float() for output in outputs])
        return outputs[0].hidden_states[-1][0].float() @ self.head.T, logits[0], logits[1:]

    def __call__(
        self,
        row: Sequence[int],
        *,
        alpha: float = 1.0,
        expert: str | None = None,
        routing: str = "token",
        prompt: int | None = None,
    ) -> "tuple[Tensor, list[int]]":
        """Fused logits `[T, V]` and routes `[T]` of one row; `prompt` is the length of its prompt (default: all)."""
        import torch

        scores, router, experts = self.terms(row)
        # The first of equal maxima, said in plain Python.
        routes = [values.index(max(values)) for values in scores.tolist()]
        if routing == "query":
            routes = [routes[(prompt or len(row)) - 1]] * len(row)
        if expert is not None:
            routes = [self.names.index(expert)] * len(row)
        if routing == "uniform":
            return alpha * router + sum(experts) / len(experts), [-1] * len(row)
        chosen = torch.stack([experts[index, position] for position, index in enumerate(routes)])
        return alpha * router + chosen, routes

    def greedy(
        self,
        row: Sequence[int],
        count: int,
        *,
        adjust: "Callable[[list[int], Tensor], Tensor] | None" = None,
        end: int = 2,
        **policy: Any,
    ) -> list[int]:
        """The new tokens, at most `count`, `end` included; `adjust` changes the logits before the arg-max."""
        ids = list(row)
        while len(ids) < len(row) + count and (len(ids) == len(row) or ids[-1] != end):
            logits = self(ids, prompt=len(row), **policy)[0][-1]
            ids.append(int((logits if adjust is None else adjust(ids, logits)).argmax()))
        return ids[len(row) :]


@pytest.fixture(scope="session")
def oracle(make_collection: Callable[[str], Path]) -> Callable[[str], Oracle]:
    """A function from the name of a shape to its oracle."""
    made: dict[str, Oracle] = {}

    def get(shape: str) -> Oracle:
        if shape not in made:
            made[shape] = Oracle(make_collection(shape))
        return made[shape]

    return get


@pytest.fixture(scope="session")
def oracle_of() -> type[Oracle]:
    """The class, for a collection that a test made itself."""
    return Oracle


@pytest.fixture(scope="session")
def refuses() -> "Callable[..., contextlib.AbstractContextManager[None]]":
    """`with refuses(UsageError, "math"):` an error of exactly this class, of one line that holds these words."""

    @contextlib.contextmanager
    def check(kind: type[Exception], *words: object) -> Iterator[None]:
        with pytest.raises(kind) as caught:
            yield
        message = str(caught.value)
        assert type(caught.value) is kind, f"{type(caught.value).__name__}: {message}"
        assert "\n" not in message
        assert [str(word) for word in words if str(word) not in message] == [], message

    return check


@pytest.fixture
def copy(make_collection: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of a collection, to be damaged; its references still point at the shared members."""

    def make(shape: str) -> Path:
        return Path(shutil.copytree(make_collection(shape), tmp_path / f"copy_{shape}"))

    return make


@pytest.fixture
def embedded(load: "Callable[[str], FusionRouteForCausalLM]", tmp_path: Path) -> Callable[[str], Path]:
    """A private collection with all its members inside, to be damaged."""

    def make(shape: str) -> Path:
        load(shape).save_pretrained(tmp_path / f"embedded_{shape}", embed=True)
        return tmp_path / f"embedded_{shape}"

    return make


@pytest.fixture
def models(tmp_path: Path) -> Callable[..., Path]:
    """Makes a tiny model folder with its tokenizer."""
    from fusionroute import tiny

    def make(name: str, *, vocab_size: int = 320, eos: str = "<|im_end|>", **settings: Any) -> Path:
        tokenizer = tiny.make_tokenizer(tmp_path / name, vocab_size=vocab_size, eos=eos)
        tiny.make_model(tmp_path / name, vocab_size=len(tokenizer), width=16, **settings)
        return tmp_path / name

    return make


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty, offline HF_HOME."""
    from huggingface_hub import constants

    home = tmp_path / "hf-home"
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A whole tiny model."""
    from weight_files import tiny_model

    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """A LoRA adapter, of no model in particular."""
    import safetensors.torch
    import torch

    folder = tmp_path / "adapter"
    folder.mkdir()
    safetensors.torch.save_file({"a.lora_A.weight": torch.ones(2, 4)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["v_proj", "q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; gives exit code, stdout and stderr."""

    from fusionroute import cli

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fusionroute", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
