"""Tiny collections on disk, built once a session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest

# Kinds of collection the reference must be exact for; (family, width, layers, padded vocabulary, adapter) per member.
SHAPES = {
    "llama": [("llama", 32, 2, 0, False), ("llama", 48, 3, 0, False), ("llama", 32, 2, 0, False)],
    "gemma2": [("gemma2", 32, 2, 0, False), ("gemma2", 32, 4, 0, False), ("gemma2", 48, 2, 0, False)],
    "qwen2": [("qwen2", 32, 2, 8, False), ("qwen2", 48, 2, 16, False), ("qwen2", 32, 2, 0, False)],
    "adapters": [("llama", 32, 2, 0, True), ("llama", 32, 2, 0, True), ("llama", 32, 2, 0, True)],
    "mixed": [("llama", 32, 2, 0, True), ("gemma2", 48, 2, 16, False), ("llama", 32, 2, 0, True), ("qwen2", 32, 2, 8, False)],
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
            key = (family, width, layers, pad, adapted) if adapted else (number,)
            if key not in bases:
                folder = root / f"model{len(bases)}"
                vocab = len(tokenizer) + pad
                model = tiny.make_model(folder, family=family, seed=number, width=width, layers=layers, vocab_size=vocab)
                tokenizer.save_pretrained(folder)
                bases[key] = (folder, model)
            folder, model = bases[key]
            adapter = None
            if adapted:
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
