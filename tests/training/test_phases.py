"""The two phases end to end on tiny collections: what one leaves is what the next starts from."""

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusionroute import collection, tiny, weights
from fusionroute.configuration import MemberSpec
from fusionroute.errors import FusionRouteError
from fusionroute.members import LoadOptions
from fusionroute.modeling import FusionRouteForCausalLM
from fusionroute.training import phases
from fusionroute.training.data import Item, tokenize_rows
from fusionroute.training.lora import LoraSettings

FLOAT32 = LoadOptions(dtype=torch.float32)
STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "route_head_learning_rate": 0.05,
    "logging_steps": 4,
    "bf16": False,
}
LORA = LoraSettings(r=4, alpha=8)
ROW = [[5, 9, 250, 17, 33, 4, 4, 90, 12, 200]]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


CHAT = [
    {"messages": user(f"What is {a} + {b}?") + assistant(f"It is {a + b}" + " cows" * (a % 3)), "domain": d}
    for a, b, d in [(1, 2, "math"), (12, 3, "math"), (7, 7, "code"), (20, 5, "code"), (9, 1, "math"), (3, 8, "code")]
]
PAIRS = [
    {"prompt": user(f"Is {a} more than 3?"), "chosen": assistant("Yes." * (a > 3) or "No."),
     "rejected": assistant("The answer is below"), "domain": "chat"}
    for a in range(1, 7)
]  # fmt: skip


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and scores of the router in training, as its own forward gives them."""
    lm = copy.deepcopy(model.lm).eval()
    with torch.no_grad():
        output = lm(input_ids=torch.tensor(ROW), output_hidden_states=True, use_cache=False)
        return output.logits[..., : model.vocab_size], output.hidden_states[-1].float() @ model.route_head.weight.T


class Phases:
    """Runs the phases on one collection and keeps what the trainer began with and ended with."""

    def __init__(self, root: Path, start: Path, lora: LoraSettings | None = LORA) -> None:
        self.root, self.start, self.lora = root, start, lora
        self.seen: dict[str, SimpleNamespace] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        train, export = phases.train_router, phases.export_router

        def train_router(model: Any, items: Any, out: Path, **rest: Any) -> Any:
            self.seen[out.name] = SimpleNamespace(begun=trainable(model), items=items)
            return train(model, items, out, **rest)

        def export_router(model: Any, out: Path, *rest: Any) -> None:
            self.seen[out.name].ended = trainable(model)
            self.seen[out.name].outputs = outputs(model)
            export(model, out, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(phases, "train_router", train_router)
            patch.setattr(phases, "export_router", export_router)
            yield

    def items(self, folder: Path, rows: list[dict]) -> list[Item]:
        return tokenize_rows(collection.load_tokenizer(folder), rows, context=512)[0]

    def sft(
        self, rows: list[dict] = CHAT, *, base: str | None = None, options: LoadOptions = FLOAT32, **more: Any
    ) -> dict[str, Any]:
        config, items = collection.read_config(self.start), self.items(self.start, rows)
        with self.watched():
            return phases.sft(
                config, self.start, items, self.root / "annotations", self.root / "sft", lora=self.lora,
                arguments=STEPS | more, run=self.root / "run-sft", options=options, base=base,
            )  # fmt: skip

    def cdpo(
        self, folder: Path, rows: list[dict], name: str = "cdpo", *, options: LoadOptions = FLOAT32, **more: Any
    ) -> dict[str, Any]:
        config, items = collection.read_config(folder), self.items(folder, rows)
        with self.watched():
            return phases.cdpo(
                config, folder, items, self.root / "annotations", self.root / name,
                arguments=STEPS | more, run=self.root / f"run-{name}", options=options,
            )  # fmt: skip

    def assemble(self, phase: str, name: str) -> Path:
        config = collection.read_config(self.start)
        router = phases.router_spec(config.router_spec, self.root / phase)
        embed = ["router"] if router.adapter is None else []
        collection.assemble(
            self.root / name, router, config.expert_specs, head=self.root / phase, embed=embed, relative_to=self.start
        )
        return self.root / name


def untrained(start: Path, out: Path) -> Path:
    """The collection `start` as it was before any phase."""
    config = collection.read_config(start)
    router = MemberSpec("router", config.router_spec.source)
    collection.assemble(out, router, config.expert_specs, relative_to=start)
    return out


@pytest.fixture(scope="module", params=["lora", "full"])
def both(
    request: pytest.FixtureRequest, make_collection: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Phases:
    """Both phases on whole-model experts, `after_sft` and `after_cdpo` assembled."""
    root = tmp_path_factory.mktemp(request.param)
    run = Phases(root, untrained(make_collection("llama"), root / "start"), LORA if request.param == "lora" else None)
    run.sft_figures = run.sft()
    with_tokenizer(run, "sft")
    run.after_sft = run.assemble("sft", "after_sft")
    run.cdpo_figures = run.cdpo(run.after_sft, CHAT + PAIRS)
    with_tokenizer(run, "cdpo")
    run.after_cdpo = run.assemble("cdpo", "after_cdpo")
    return run


def test_renormalized_runs_the_collections_experts(make_collection: Callable[[str], Path], tmp_path: Path) -> None:
    """Of the same first step it is the geometric loss less what that lacks of a distribution's."""
    found = {}
    for kind in ("geometric", "renormalized"):
        (tmp_path / kind).mkdir()
        run = Phases(tmp_path / kind, untrained(make_collection("adapters"), tmp_path / kind / "start"))
        found[kind] = run.sft(route_loss=kind, max_steps=1, learning_rate=0.0, logging_steps=1)["route_loss"]
    assert 0 < found["renormalized"] < found["geometric"] - 0.01


def with_tokenizer(run: Phases, phase: str) -> None:
    """Complete a router folder that lacks its tokenizer, so that this fails the one test of it and not all."""
    folder = run.root / phase / "model"
    run.whole = run.lora is not None or (folder / "tokenizer.json").is_file()
    if not run.whole:
        collection.load_tokenizer(run.start).save_pretrained(folder)


def test_a_router_folder_is_all_that_assemble_takes(both: Phases) -> None:
    assert both.whole, "the router's folder has no tokenizer: assemble refuses it"


@pytest.mark.parametrize("phase", ["sft", "cdpo"])
def test_the_assembled_collection_computes_what_was_trained(both: Phases, phase: str) -> None:
    model = FusionRouteForCausalLM.from_pretrained(getattr(both, f"after_{phase}"))
    with torch.no_grad():
        output = model.router(input_ids=torch.tensor(ROW))
    logits, scores = both.seen[phase].outputs
    torch.testing.assert_close(output.logits[..., : logits.shape[-1]], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.scores, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", ["sft", "cdpo"])
def test_the_assembled_collection_is_eq_1_of_its_members(both: Phases, oracle_of: Any, phase: str) -> None:
    folder = getattr(both, f"after_{phase}")
    with torch.no_grad():
        output = FusionRouteForCausalLM.from_pretrained(folder)(torch.tensor(ROW))
    expected, routes = oracle_of(folder)(ROW[0])
    torch.testing.assert_close(output.logits[0], expected, rtol=1e-4, atol=1e-4)
    assert output.routes[0].tolist() == routes


def test_the_head_is_trained_only_after_a_phase(both: Phases) -> None:
    trained = [collection.read_config(f).head_trained for f in (both.start, both.after_sft, both.after_cdpo)]
    assert trained == [False, True, True]


def test_experts_are_never_trained(both: Phases) -> None:
    before, after = (
        [(s.name, s.digest, s.adapter_digest) for s in collection.read_config(f).expert_specs]
        for f in (both.start, both.after_cdpo)
    )
    assert before == after


def test_what_trains_is_the_adapter_or_everything_and_the_head(both: Phases) -> None:
    for phase in ("sft", "cdpo"):
        names = set(both.seen[phase].begun)
        assert "route_head.weight" in names
        rest = names - {"route_head.weight"}
        assert rest
        if both.lora is None:
            source = AutoModelForCausalLM.from_pretrained(collection.read_config(both.start).router_spec.source)
            assert len(rest) == len(list(source.parameters()))
        else:
            assert all("lora_" in name for name in rest)


def test_phase_1_starts_from_the_untrained_router(both: Phases) -> None:
    begun = both.seen["sft"].begun
    assert torch.equal(begun["route_head.weight"], torch.zeros_like(begun["route_head.weight"]))
    assert all(not p.any() for name, p in begun.items() if "lora_B" in name)


def test_phase_2_starts_where_phase_1_ended(both: Phases) -> None:
    ended, begun = both.seen["sft"].ended, both.seen["cdpo"].begun
    assert ended.keys() == begun.keys()
    assert [name for name in ended if not torch.equal(ended[name], begun[name])] == []


@pytest.mark.parametrize("phase", ["sft", "cdpo"])
def test_a_phase_moves_the_lm_and_the_head(both: Phases, phase: str) -> None:
    begun, ended = both.seen[phase].begun, both.seen[phase].ended
    moved = {name for name in begun if not torch.equal(begun[name], ended[name])}
    assert "route_head.weight" in moved
    assert any("q_proj" in name for name in moved)


def test_figures_of_both_phases_are_handed_back(both: Phases) -> None:
    assert {"loss", "lm_loss", "route_loss"} <= both.sft_figures.keys()
    assert {"loss", "cdpo_loss", "cdpo_margin", "preference_accuracy"} <= both.cdpo_figures.keys()
    assert all(math.isfinite(v) for v in (both.sft_figures | both.cdpo_figures).values())


@pytest.mark.parametrize("phase", ["sft", "cdpo"])
def test_the_run_leaves_its_log(both: Phases, phase: str) -> None:
    log = json.loads((both.root / phase / "log.json").read_text())
    assert [e["step"] for e in log if "loss" in e] == [4]


@pytest.mark.parametrize("phase", ["sft", "cdpo"])
def test_provenance_tells_base_phase_and_data(both: Phases, phase: str) -> None:
    (path,) = (both.root / phase).rglob("provenance.json")
    written = json.loads(path.read_text())
    of = collection.read_config(both.start if phase == "sft" or both.lora is not None else both.after_sft)
    assert written["base_digest"] == of.router_spec.digest
    assert written["phase"] == phase
    assert (written["items"], written["pairs"]) == ((6, 0) if phase == "sft" else (12, 6))
    assert written["arguments"] == STEPS


# ---- π_ref is the router after phase 1


def test_at_the_start_of_phase_2_nothing_is_preferred(both: Phases) -> None:
    """Δ = 0, so the loss is −log σ(β·bias): written out from the annotations of the experts."""
    still = {"max_steps": 1, "learning_rate": 0.0, "route_head_learning_rate": 0.0, "logging_steps": 1, "beta": 0.2}
    figures = both.cdpo(both.after_sft, PAIRS, "still", per_device_train_batch_size=6, **still)
    assert figures["cdpo_margin"] == pytest.approx(0, abs=1e-4)
    losses = []
    for item in both.seen["still"].items:
        sides = [
            sum(float(c["logprobs"][t, int(c["routes"][t])]) for t in range(len(c["routes"]))) for c in item.annotations
        ]
        losses.append(math.log1p(math.exp(-0.2 * (sides[0] - sides[1]))))
    assert figures["cdpo_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_reference_is_the_phase_1_router_by_hand(both: Phases, oracle_of: Any) -> None:
    oracle = oracle_of(both.after_sft)
    for item in both.seen["cdpo"].items:
        for tokens, columns in zip(item.sequences, item.annotations, strict=True):
            scores, router, experts = oracle.terms(tokens.ids)
            at = torch.arange(tokens.start - 1, len(tokens.ids) - 1)
            labels = torch.tensor(tokens.completion)
            own = router[at].log_softmax(-1)[torch.arange(len(at)), labels]
            torch.testing.assert_close(columns["reference"], own, rtol=1e-4, atol=1e-4)
            assert columns["routes"].tolist() == [s.index(max(s)) for s in scores[at].tolist()]
            of_experts = experts[:, at].log_softmax(-1)[:, torch.arange(len(at)), labels].T
            torch.testing.assert_close(columns["logprobs"], of_experts, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_nothing_is_preferred_at_the_start_either(
    make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    """The recipe's dtype; what is left of Δ must be small beside the spread of the bias, tens of nats."""
    run = Phases(tmp_path, untrained(make_collection("llama"), tmp_path / "start"))
    bfloat16 = LoadOptions(dtype=torch.bfloat16)
    run.sft(options=bfloat16, bf16=True)
    still = {"max_steps": 1, "learning_rate": 0.0, "route_head_learning_rate": 0.0, "logging_steps": 1, "bf16": True}
    figures = run.cdpo(run.assemble("sft", "after"), PAIRS, options=bfloat16, per_device_train_batch_size=6, **still)
    assert abs(figures["cdpo_margin"]) < 0.05 * figures["cdpo_bias_std"]


# ---- routers that are adapters already, other bases, precision


def test_a_router_with_an_adapter_goes_on_with_it(make_collection: Callable[[str], Path], tmp_path: Path) -> None:
    run = Phases(tmp_path, make_collection("adapters"), LoraSettings(r=16))
    run.sft()
    stored = load_file(make_collection("adapters") / "router" / "adapter_model.safetensors")
    begun = {n.removeprefix("lm.").replace(".default", ""): p for n, p in run.seen["sft"].begun.items() if "lora" in n}
    assert begun.keys() == stored.keys()
    assert all(torch.equal(begun[name], tensor) for name, tensor in stored.items())
    FusionRouteForCausalLM.from_pretrained(run.assemble("sft", "after"))


def test_the_adapter_is_stored_as_its_base_is(make_collection: Callable[[str], Path], tmp_path: Path) -> None:
    run = Phases(tmp_path, untrained(make_collection("llama"), tmp_path / "start"))
    run.sft(options=LoadOptions(dtype=torch.bfloat16))
    assert {p.dtype for p in run.seen["sft"].ended.values()} == {torch.float32}
    stored = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_full_training_keeps_float32_too(make_collection: Callable[[str], Path], tmp_path: Path) -> None:
    """`dtype` is of what is written; in bfloat16 itself a step of the usual size rounds to nothing."""
    run = Phases(tmp_path, untrained(make_collection("llama"), tmp_path / "start"), None)
    run.sft(options=LoadOptions(dtype=torch.bfloat16), max_steps=1)
    assert {p.dtype for p in run.seen["sft"].begun.values()} == {torch.float32}


def test_an_adapter_trained_on_another_base_records_that_base(
    make_collection: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(collection.read_config(make_collection("adapters")).router_spec.source)
    other = tmp_path / "other"
    tiny.make_tokenizer(other)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(other)
    tensors = load_file(other / "model.safetensors")
    save_file({k: v * 1.01 for k, v in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    run = Phases(tmp_path, make_collection("adapters"), LoraSettings(r=16))
    with pytest.warns(UserWarning, match="digest"):
        run.sft(base=str(other), options=LoadOptions(dtype=torch.float32, other_base=str(other)))
    written = json.loads((tmp_path / "sft" / "adapter" / "provenance.json").read_text())
    assert written["base_digest"] == weights.digest(other)


# ---- refusals


def test_phase_2_on_an_untrained_head(make_collection: Callable[[str], Path], tmp_path: Path, refuses: Any) -> None:
    run = Phases(tmp_path, untrained(make_collection("llama"), tmp_path / "start"))
    with refuses(FusionRouteError, run.start, "train sft"):
        run.cdpo(run.start, CHAT + PAIRS)
    assert [p.name for p in tmp_path.iterdir()] == ["start"]


def test_phase_2_without_pairs(make_collection: Callable[[str], Path], tmp_path: Path, refuses: Any) -> None:
    run = Phases(tmp_path, make_collection("llama"))
    with refuses(FusionRouteError, "pairs"):
        run.cdpo(run.start, CHAT)
    assert list(tmp_path.iterdir()) == []


def test_phase_1_with_pairs(make_collection: Callable[[str], Path], tmp_path: Path, refuses: Any) -> None:
    run = Phases(tmp_path, make_collection("llama"))
    with refuses(FusionRouteError, "pairs"):
        run.sft(CHAT + PAIRS)
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_argument_is_refused_before_anything_is_annotated(
    make_collection: Callable[[str], Path], tmp_path: Path, refuses: Any
) -> None:
    run = Phases(tmp_path, make_collection("llama"))
    with refuses(FusionRouteError, "learnin_rate", "RouterArguments"):
        run.sft(learnin_rate=1.0)
    with refuses(FusionRouteError, "learnin_rate", "RouterArguments"):
        run.cdpo(run.start, CHAT + PAIRS, learnin_rate=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_router_whose_logits_are_of_an_unknown_kind_is_not_trained(
    make_collection: Callable[[str], Path], tmp_path: Path, refuses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer computes logits from the LM head alone; a model that does more to them would be trained wrongly."""
    load = phases.load_model

    def double(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits = 2 * output.logits
        return output

    def scaling(*arguments: Any) -> Any:
        model = load(*arguments)
        model.register_forward_hook(double)
        return model

    run = Phases(tmp_path, untrained(make_collection("llama"), tmp_path / "start"))
    monkeypatch.setattr(phases, "load_model", scaling)
    with refuses(FusionRouteError, "after the LM head", "report"):
        run.sft()


def test_a_weight_that_is_not_finite_is_not_exported(make_router: Any, tmp_path: Path, refuses: Any) -> None:
    router = make_router()
    next(p for p in router.parameters() if p.requires_grad).data[0] = float("inf")
    with refuses(FusionRouteError, "not finite"):
        phases.export_router(router, tmp_path / "out", torch.float32, {}, tmp_path, router.trained())
    assert list(tmp_path.iterdir()) == []
