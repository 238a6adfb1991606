"""The trainer against Eq. 2 and Eq. 3 written out on full logits, one sequence at a time; and against being killed."""

import inspect
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

from fusionroute.errors import FusionRouteError
from fusionroute.router import RouteHead
from fusionroute.training.data import Item
from fusionroute.training.running import last_checkpoint, make_arguments, train_to_the_end
from fusionroute.training.trainer import RouterArguments, RouterForTraining, RouterTrainer

VOCAB = 300  # fewer than the model has, so that cropping matters
Gradients = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------------- the reference


def reference_terms(
    model: RouterForTraining, items: Sequence[Item], *, route_loss: str, bias: str, beta: float, routing: str
) -> dict[str, Any]:
    """Every term of Eq. 2 and Eq. 3 from transformers' own logits and hidden states, unpadded."""
    terms: dict[str, Any] = {k: [] for k in ("lm", "route", "hard", "right", "informative", "pairs", "routes")}
    for item in items:
        sides = []
        for tokens, columns in zip(item.sequences, item.annotations, strict=True):
            output = model.lm(input_ids=torch.tensor([tokens.ids]), output_hidden_states=True, use_cache=False)
            logprobs = output.logits[0, :, :VOCAB].float().log_softmax(-1)
            hidden = output.hidden_states[-1][0].float()
            own, expert = [], []
            for t in range(tokens.start, len(tokens.ids)):
                at = t - tokens.start
                own.append(logprobs[t - 1, tokens.ids[t]])
                scores = model.route_head.weight @ hidden[t - 1]
                frozen = item.is_pair and routing == "frozen"
                chosen = int(columns["routes"][at] if frozen else scores.argmax())
                terms["routes"].append((item.domain, chosen))
                labels = columns["logprobs"][at]
                expert.append(float(labels[chosen]))
                if item.is_pair:
                    continue
                terms["lm"].append(-own[-1])
                terms["informative"].append(len(set(columns["greedy"][at].tolist())) > 1)
                if terms["informative"][-1]:
                    weights = torch.softmax(scores, 0)
                    mixed = (
                        -(weights * labels).sum()
                        if route_loss == "geometric"
                        else -(weights * labels.exp()).sum().log()
                    )
                    terms["route"].append(mixed)
                    terms["hard"].append(-expert[-1])
                    terms["right"].append(float(chosen == int(labels.argmax())))
            sides.append((sum(own), float(columns["reference"].sum()) if item.is_pair else 0.0, expert))
        if item.is_pair:
            (chosen_own, chosen_ref, chosen_expert), (other_own, other_ref, other_expert) = sides
            delta = (chosen_own - chosen_ref) - (other_own - other_ref)
            total = {"sum": sum, "mean": statistics.fmean, "none": lambda _: 0.0}[bias]
            shift = total(chosen_expert) - total(other_expert)
            terms["pairs"].append((-functional.logsigmoid(beta * delta + beta * shift), float(delta.detach()), shift))
    return terms


def terms_of(model: RouterForTraining, items: Sequence[Item], args: RouterArguments) -> dict[str, Any]:
    return reference_terms(
        model, items, route_loss=args.route_loss, bias=args.bias, beta=args.beta, routing=args.routing
    )


def reference_loss(model: RouterForTraining, items: Sequence[Item], args: RouterArguments) -> torch.Tensor:
    terms = terms_of(model, items, args)
    loss = torch.zeros(())
    if terms["lm"]:
        loss = loss + args.sft_weight * sum(terms["lm"]) / len(terms["lm"])
    if terms["route"]:
        loss = loss + args.sft_weight * args.route_weight * sum(terms["route"]) / len(terms["route"])
    if terms["pairs"]:
        loss = loss + sum(pair[0] for pair in terms["pairs"]) / len(terms["pairs"])
    return loss


# ---------------------------------------------------------------------------------------------------- the set-up


class Watch(TrainerCallback):
    """Copies of the gradients before, and of the head and its optimizer state after, each step."""

    def __init__(self) -> None:
        self.gradients: list[Gradients] = []
        self.heads: list[torch.Tensor] = []
        self.states: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        self.heads.append(model.route_head.weight.detach().clone())
        self.states.append({k: v.clone() for k, v in optimizer.state.get(model.route_head.weight, {}).items()})


@pytest.fixture
def make_router(make_lm: Callable[..., Any], make_head: Callable[..., RouteHead]) -> Callable[..., RouterForTraining]:
    def make(family: str = "llama", *, lora: bool = True, **options: Any) -> RouterForTraining:
        lm = make_lm(family, lora=lora, **options)
        return RouterForTraining(lm if lora else lm.requires_grad_(True), make_head(), VOCAB)

    return make


@pytest.fixture
def items(make_items: Callable[..., list[Item]]) -> Callable[..., list[Item]]:
    return lambda sft, pairs, **options: make_items(sft, pairs, vocab=VOCAB, **options)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., RouterTrainer]:
    """A trainer of one step on everything with a learning rate of zero, unless told otherwise."""

    def make(model: RouterForTraining, data: Sequence[Item], **given: Any) -> RouterTrainer:
        arguments = {
            "per_device_train_batch_size": len(data),
            "max_steps": 1,
            "learning_rate": 0.0,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_steps": 1,
            "max_grad_norm": 0.0,
            "logit_chunk": 5,
        }
        args = make_arguments(RouterArguments, tmp_path / "run", arguments | given)
        trainer = RouterTrainer(model, args, data, callbacks=[Watch()])
        trainer.watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))
        return trainer

    return make


def gradients_of(model: RouterForTraining, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(got: Gradients, expected: Gradients) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


MODELS = [("llama", True), ("llama", False), ("qwen2", False), ("gemma2", True)]
IDS = [f"{family}-{'lora' if lora else 'full'}" for family, lora in MODELS]


# ---------------------------------------------------------------------------------------------- Eq. 2 and Eq. 3


@pytest.mark.parametrize("route_loss", ["geometric", "arithmetic"])
@pytest.mark.parametrize(("family", "lora"), MODELS, ids=IDS)
def test_sft_step_is_eq_2(
    make_router: Any, make_trainer: Any, items: Any, family: str, lora: bool, route_loss: str
) -> None:
    data, model = items(5, 0), make_router(family, lora=lora)
    trainer = make_trainer(model, data, route_loss=route_loss, route_weight=0.7)
    expected = gradients_of(model, loss := reference_loss(model, data, trainer.args))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(trainer.watch.gradients[0], expected)
    assert "route_head.weight" in expected


@pytest.mark.parametrize("routing", ["current", "frozen"])
@pytest.mark.parametrize("bias", ["sum", "mean", "none"])
@pytest.mark.parametrize(("family", "lora"), MODELS[:2], ids=IDS[:2])
def test_cdpo_step_is_eq_3(
    make_router: Any, make_trainer: Any, items: Any, family: str, lora: bool, bias: str, routing: str
) -> None:
    data, model = items(0, 4), make_router(family, lora=lora)
    trainer = make_trainer(model, data, bias=bias, routing=routing, beta=0.3)
    expected = gradients_of(model, loss := reference_loss(model, data, trainer.args))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(trainer.watch.gradients[0], expected)
    assert "route_head.weight" not in trainer.watch.gradients[0]


def test_mixed_step_is_algorithm_1(make_router: Any, make_trainer: Any, items: Any) -> None:
    data, model = items(4, 3), make_router()
    trainer = make_trainer(model, data, sft_weight=1 / 3)
    expected = gradients_of(model, loss := reference_loss(model, data, trainer.args))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(trainer.watch.gradients[0], expected)


def test_sft_without_an_informative_position(make_router: Any, make_trainer: Any, items: Any) -> None:
    data, model = items(3, 0), make_router()
    for item in data:
        item.annotations[0]["greedy"].fill_(5)
    trainer = make_trainer(model, data)
    loss = reference_loss(model, data, trainer.args)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert all(bool(torch.isfinite(g).all()) for g in trainer.watch.gradients[0].values())


@pytest.mark.parametrize("moved", ["head", "lm"])
def test_frozen_routing_keeps_the_routes_of_phase_1(
    make_router: Any, make_trainer: Any, items: Any, moved: str
) -> None:
    data, model = items(0, 4), make_router()
    trainer = make_trainer(model, data, routing="frozen")
    start = [terms_of(model, data, trainer.args)["pairs"][i][2] for i in range(4)]
    # What steps with SFT items do in time, all at once.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("lora_B" if moved == "lm" else "route_head") in name:
                parameter.neg_()
    trainer.train()
    assert trainer.state.log_history[0]["cdpo_bias"] == pytest.approx(statistics.fmean(start), rel=1e-5)


# ------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize(("sft", "pairs"), [(24, 0), (0, 24), (14, 10)], ids=["sft", "pairs", "mix"])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_one_batch_of_eight_is_eight_batches_of_one(
    make_router: Any, make_trainer: Any, items: Any, sft: int, pairs: int, strategy: str
) -> None:
    data, runs = items(sft, pairs), []
    for batch, steps in ((8, 1), (2, 4), (1, 8)):
        model = make_router()
        trainer = make_trainer(
            model,
            data,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=5,
            learning_rate=0.02,
            optim="sgd",
            train_sampling_strategy=strategy,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}))
    for losses, parameters in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-4)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, runs[0][1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_short_last_accumulation_has_its_own_denominators(make_router: Any, make_trainer: Any, items: Any) -> None:
    # 5 items in accumulated batches of 2 × 2: the second step has a single item.
    data, model = items(5, 0), make_router()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = make_trainer(model, data, train_sampling_strategy="sequential", **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [reference_loss(model, piece, trainer.args).item() for piece in (data[:4], data[4:])]
    assert losses == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------- what moves the route head


@pytest.mark.parametrize("rate", [None, 0.05])
def test_a_preference_step_leaves_the_head_alone(make_router: Any, make_trainer: Any, items: Any, rate: Any) -> None:
    data, model = items(0, 8), make_router()
    start = model.route_head.weight.detach().clone()
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.01, "weight_decay": 0.1}
    trainer = make_trainer(model, data, route_head_learning_rate=rate, max_grad_norm=1.0, **options)
    trainer.train()
    assert all(torch.equal(head, start) for head in trainer.watch.heads)
    assert trainer.watch.states == [{}, {}]


@pytest.mark.parametrize("rate", [None, 0.05])
def test_momentum_does_not_move_the_head_in_a_preference_step(
    make_router: Any, make_trainer: Any, items: Any, rate: Any
) -> None:
    data, model = [*items(8, 0), *items(0, 4), *items(4, 0, seed=1)], make_router()
    trainer = make_trainer(
        model,
        data,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=1.0,
        route_head_learning_rate=rate,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    (_, second, third, fourth), states = trainer.watch.heads, trainer.watch.states
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(states[1])
    assert states[1]["exp_avg"].abs().max() > 0
    assert torch.equal(second, third)
    assert all(torch.equal(states[1][k], states[2][k]) for k in states[1])
    assert not torch.equal(third, fourth)


def test_head_rate_applies_to_the_head_alone(make_router: Any, make_trainer: Any, items: Any) -> None:
    data, model = items(4, 2), make_router()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = make_trainer(model, data, learning_rate=0.01, route_head_learning_rate=0.5, optim="sgd")
    trainer.train()
    for name, gradient in trainer.watch.gradients[0].items():
        rate = 0.5 if name == "route_head.weight" else 0.01
        moved = dict(model.named_parameters())[name].detach() - before[name]
        torch.testing.assert_close(moved, -rate * gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_head_rate_follows_the_schedule(make_router: Any, make_trainer: Any, items: Any) -> None:
    trainer = make_trainer(
        make_router(),
        items(8, 0),
        learning_rate=0.01,
        route_head_learning_rate=0.5,
        lr_scheduler_type="linear",
        max_steps=4,
    )
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups if group["params"]] == [0.0, 0.0]


@pytest.mark.parametrize("rate", [None, 0.05])
@pytest.mark.parametrize("lora", [True, False])
def test_every_trainable_parameter_is_in_one_group(
    make_router: Any, make_trainer: Any, items: Any, lora: bool, rate: Any
) -> None:
    model = make_router(lora=lora)
    trainer = make_trainer(model, items(2, 0), weight_decay=0.1, route_head_learning_rate=rate)
    groups = trainer.create_optimizer().param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name != "route_head.weight":
            assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name


def test_head_rate_equal_to_the_common_rate_changes_nothing(make_router: Any, make_trainer: Any, items: Any) -> None:
    # "None takes learning_rate": naming that very rate must be the same run, weight decay included.
    heads = []
    for rate in (None, 0.01):
        options = {"learning_rate": 0.01, "weight_decay": 0.5, "max_steps": 3}
        trainer = make_trainer(make_router(), items(4, 0), route_head_learning_rate=rate, **options)
        trainer.train()
        heads.append(trainer.watch.heads[-1])
    assert torch.equal(*heads)


# --------------------------------------------------------------------------------- precision, memory, clipping


def test_bf16_keeps_the_head_and_its_scores_in_float32(make_router: Any, make_trainer: Any, items: Any) -> None:
    model, seen = make_router(), []

    def look(module: RouteHead, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.append((output.dtype, torch.equal(output, inputs[0].float() @ module.weight.float().T)))

    model.route_head.register_forward_hook(look)
    trainer = make_trainer(model, items(3, 2), bf16=True, learning_rate=0.01)
    trainer.train()
    assert seen == [(torch.float32, True)] * 2
    assert model.route_head.weight.dtype == torch.float32
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_bf16_is_close_to_float32(make_router: Any, make_trainer: Any, items: Any) -> None:
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(make_router(), items(3, 2), bf16=bf16)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("lora", [True, False])
def test_checkpointing_gives_the_same_gradients(
    make_router: Any, make_trainer: Any, items: Any, lora: bool, name: str
) -> None:
    if name not in inspect.signature(RouterArguments).parameters:
        pytest.skip("this transformers has only the old name")
    data, found = items(3, 2), []
    for given in ({}, {name: True}):
        trainer = make_trainer(model := make_router(lora=lora), data, **given)
        trainer.train()
        found.append(trainer.watch.gradients[0])
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert_same_gradients(found[1], found[0])


def test_max_grad_norm(make_router: Any, make_trainer: Any, items: Any) -> None:
    data, found = items(3, 2), []
    for limit in (0.0, 0.25):
        trainer = make_trainer(make_router(), data, max_grad_norm=limit)
        trainer.train()
        found.append(math.sqrt(sum(float(g.square().sum()) for g in trainer.watch.gradients[0].values())))
        assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(found[0], rel=1e-4)
    assert found[0] > 0.25
    assert found[1] == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("routing", ["current", "frozen"])
def test_only_the_router_is_in_memory(
    make_router: Any, make_trainer: Any, make_items: Any, make_lm: Any, routing: str
) -> None:
    lm = make_lm(lora=True)
    own = sum(p.numel() for p in lm.parameters())
    for n in (2, 7):
        names = [f"expert{i}" for i in range(n)]
        model = RouterForTraining(make_lm(lora=True), RouteHead(32, names), VOCAB)
        trainer = make_trainer(model, make_items(2, 1, n=n, vocab=VOCAB), routing=routing)
        trainer.train()
        assert sum(p.numel() for p in trainer.model.parameters()) == own + 32 * n


# ------------------------------------------------------------------------------------------------------ figures


def naive_figures(model: RouterForTraining, data: Sequence[Item], args: RouterArguments) -> dict[str, float]:
    terms = terms_of(model, data, args)
    figures: dict[str, float] = {}
    if terms["lm"]:
        figures |= {
            "lm_loss": float(sum(terms["lm"])) / len(terms["lm"]),
            "route_loss": float(sum(terms["route"])) / len(terms["route"]),
            "route_loss_hard": statistics.fmean(terms["hard"]),
            "route_accuracy": statistics.fmean(terms["right"]),
            "informative": statistics.fmean(terms["informative"]),
        }
    if terms["pairs"]:
        biases = [p[2] for p in terms["pairs"]]
        odds = [args.beta * (p[1] + p[2]) for p in terms["pairs"]]
        sigma = [1 / (1 + math.exp(-x)) for x in odds]
        figures |= {
            "cdpo_loss": statistics.fmean(-math.log(s) for s in sigma),
            "cdpo_margin": statistics.fmean(p[1] for p in terms["pairs"]),
            "cdpo_bias": statistics.fmean(biases),
            "cdpo_bias_std": statistics.pstdev(biases),
            "cdpo_slope": statistics.fmean(s * (1 - s) for s in sigma),
            "preference_accuracy": statistics.fmean(float(p[1] > 0) for p in terms["pairs"]),
        }
    domains = {domain for domain, _ in terms["routes"]}
    for domain, (index, expert) in itertools.product(domains, enumerate(model.route_head.experts)):
        here = [route for d, route in terms["routes"] if d == domain]
        figures[f"share_{domain}/{expert}"] = here.count(index) / len(here)
    return figures


OTHER_KEYS = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_input_tokens_seen", "train_runtime"}


def assert_figures(entry: dict[str, float], expected: dict[str, float]) -> None:
    assert set(expected) <= set(entry)
    for name, value in expected.items():
        assert entry[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    extra = set(entry) - set(expected) - OTHER_KEYS
    assert not {k for k in extra if k.startswith(("cdpo", "route", "share", "lm_", "informative", "preference"))}


@pytest.mark.parametrize(("sft", "pairs"), [(6, 0), (0, 6), (6, 4)], ids=["sft", "pairs", "mix"])
def test_logged_figures(make_router: Any, make_trainer: Any, items: Any, sft: int, pairs: int) -> None:
    data, model = items(sft, pairs, seed=2), make_router()
    trainer = make_trainer(model, data)
    trainer.train()
    assert_figures(trainer.state.log_history[0], naive_figures(model, data, trainer.args))


def test_figures_are_means_over_the_interval_not_of_batches(make_router: Any, make_trainer: Any, items: Any) -> None:
    data, model = items(8, 4, seed=2), make_router()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 3}
    trainer = make_trainer(model, data, **options)
    trainer.train()
    assert_figures(trainer.state.log_history[0], naive_figures(model, data, trainer.args))


def test_figures_start_anew_after_each_line(make_router: Any, make_trainer: Any, items: Any) -> None:
    data, model = items(8, 0, seed=2), make_router()
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(model, data, **options)
    trainer.train()
    for entry, piece in zip(trainer.state.log_history, (data[:4], data[4:]), strict=False):
        assert_figures(entry, naive_figures(model, piece, trainer.args))


def test_no_items(make_router: Any, make_trainer: Any) -> None:
    with pytest.raises(FusionRouteError, match="no item"):
        make_trainer(make_router(), [], per_device_train_batch_size=1)


# ---------------------------------------------------------------------------------------------------------- NaN


def tensors_in(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()]


@pytest.mark.parametrize("logging_steps", [1, 3, 500])
@pytest.mark.parametrize("poison", ["annotation", "parameter"])
def test_nan_stops_the_run_and_is_in_no_checkpoint(
    make_router: Any, make_trainer: Any, items: Any, tmp_path: Path, poison: str, logging_steps: int
) -> None:
    data, model = items(16, 0), make_router()

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3 and poison == "parameter":
                next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")

    if poison == "annotation":
        data[13].annotations[0]["logprobs"].fill_(float("nan"))
        data[13].annotations[0]["greedy"][:] = torch.tensor([5, 6, 6])
    trainer = make_trainer(
        model,
        data,
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        logging_steps=logging_steps,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=None,
        train_sampling_strategy="sequential",
    )
    trainer.add_callback(Poison())
    try:
        with pytest.raises(FusionRouteError, match="stopped at step") as error:
            trainer.train()
        assert "\n" not in str(error.value)
    finally:
        checkpoints = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
        bad = [c for c in checkpoints if not all(t.isfinite().all() for t in tensors_in(tmp_path / "run" / c))]
    assert bad == []
    assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("logging_steps", [1, 500])
def test_nan_in_the_gradient_alone_stops_the_run(
    make_router: Any, make_trainer: Any, items: Any, tmp_path: Path, logging_steps: int
) -> None:
    # A finite loss can have an infinite gradient; the step that uses it must not be saved, least of all as the last.
    data, model = items(4, 0), make_router()
    parameter = next(p for n, p in model.named_parameters() if "lora_A" in n)
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    options = {"max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 1.0, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(model, data, logging_steps=logging_steps, **options)
    with pytest.raises(FusionRouteError, match="grad_norm is nan"):
        trainer.train()
    assert last_checkpoint(tmp_path / "run") is None


# ------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("lora", [True, False])
def test_a_router_is_loaded_as_it_was_saved(make_router: Any, tmp_path: Path, lora: bool) -> None:
    model, other = make_router(lora=lora), make_router(lora=lora)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    other.save(tmp_path)
    model.load(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_without_some_weights_is_refused(make_router: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_router()
    model.save(tmp_path)
    path = tmp_path / "lm" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with pytest.raises(FusionRouteError):
        model.load(tmp_path)


def test_a_finished_run_is_trained_no_further(make_router: Any, make_trainer: Any, items: Any, tmp_path: Path) -> None:
    data, run = items(4, 0), tmp_path / "run"
    options = {"max_steps": 3, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    first, second = make_router(), make_router()
    train_to_the_end(make_trainer(first, data, **options), run)
    trainer = make_trainer(second, data, **options)
    train_to_the_end(trainer, run)
    assert trainer.state.global_step == 3
    assert trainer.watch.gradients == []
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_a_finished_run_goes_on_when_more_steps_are_asked(
    make_router: Any, make_trainer: Any, items: Any, tmp_path: Path
) -> None:
    data, model = items(4, 0), make_router()
    options = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    train_to_the_end(make_trainer(make_router(), data, max_steps=2, **options), tmp_path / "run")
    trainer = make_trainer(model, data, max_steps=5, **options)
    train_to_the_end(trainer, tmp_path / "run")
    assert trainer.state.global_step == 5


RESUMED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # imported by the first step; here once for all children
from peft import LoraConfig, get_peft_model
from transformers import Gemma2ForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM, TrainerCallback
from fusionroute import tiny
from fusionroute.router import RouteHead
from fusionroute.training.data import Item, Tokens
from fusionroute.training.running import last_checkpoint, make_arguments, train_to_the_end
from fusionroute.training.trainer import RouterArguments, RouterForTraining, RouterTrainer

top = Path(sys.argv[1])

def make_items():
    g = torch.Generator().manual_seed(0)
    items = []
    for number in range(23):  # 12 batches of 2 (the last is short), 6 steps an epoch
        sides = []
        for _ in range(1 + number % 2):
            prompt, length = torch.randint(1, 12, (2,), generator=g).tolist()
            columns = {"logprobs": -4 * torch.rand(length, 3, generator=g),
                       "greedy": torch.randint(5, 7, (length, 3), generator=g),
                       "reference": -4 * torch.rand(length, generator=g),
                       "routes": torch.zeros(length, dtype=torch.int32)}
            ids = torch.randint(0, 320, (prompt + length,), generator=g).tolist()
            sides.append((Tokens(tuple(ids), prompt), columns))
        items.append(Item(tuple(s for s, _ in sides), "ab"[number % 2], tuple(c for _, c in sides)))
    return items

class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

class Trainer(RouterTrainer):
    kill_in_save = None
    def _save_rng_state(self, folder):
        if self.state.global_step == self.kill_in_save:
            os.kill(os.getpid(), signal.SIGKILL)  # weights and optimizer are written, trainer_state.json is not
        super()._save_rng_state(folder)

def train(run, kill_at=None, kill_in_save=None):
    torch.manual_seed(os.getpid())  # a resumed process starts from other noise
    model = tiny.make_model(root / f"model{os.getpid()}")
    torch.manual_seed(7)
    if lora:
        shape = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.3)
        model = get_peft_model(model, shape)
    else:
        model.requires_grad_(True)
        model.config.attention_dropout = 0.2
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_steps": 3,
             "learning_rate": 1e-2, "route_head_learning_rate": 5e-2, "weight_decay": 0.01, "logging_steps": 2,
             "train_sampling_strategy": strategy}
    args = make_arguments(RouterArguments, run, given)
    router = RouterForTraining(model, RouteHead(32, ["a", "b", "c"]), 320)
    trainer = Trainer(router, args, make_items(), callbacks=[KillAt(kill_at)])
    trainer.kill_in_save = kill_in_save
    checkpoint = last_checkpoint(run)
    print("from", checkpoint and checkpoint.name, flush=True)
    train_to_the_end(trainer, run)
    assert trainer.state.global_step == 12
    router.save(run / "final")

def child(*args, patience=None, **kwargs):
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            train(*args, **kwargs)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if patience is not None:
        time.sleep(patience)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

for mode in sys.argv[2:]:
    strategy, lora, root = mode.split("-")[0], mode.endswith("lora"), top / mode
    print("mode", mode)
    assert child(root / "whole") == 0
    run = root / "planned"
    assert child(run, kill_at=4) == -signal.SIGKILL  # in epoch 1
    assert child(run, kill_in_save=9) == -signal.SIGKILL  # from the end of epoch 1, while saving in epoch 2
    assert (run / "checkpoint-9").is_dir() and not (run / "checkpoint-9" / "trainer_state.json").exists()
    assert child(run, kill_at=11) == -signal.SIGKILL  # in epoch 2
    state = run / "checkpoint-9" / "trainer_state.json"
    if strategy == "random":
        state.write_text(state.read_text()[:100])
    assert child(run) == 0
    last = run / "checkpoint-12" / "trainer_state.json"
    written = last.stat().st_mtime_ns
    assert child(run) == 0  # killed after the last checkpoint, before the router was exported
    assert last.stat().st_mtime_ns == written
    run, patience = root / "chance", random.uniform(0.5, 1.5)
    while not any(run.glob("checkpoint-*")) and child(run, patience=patience) != 0:
        patience *= 1.5
    assert child(run) == 0
"""


MODES = ("random-lora", "group_by_length-lora", "random-full")


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory, run_script: Any) -> tuple[Path, str]:
    """Runs of every mode: `whole`, and `planned` and `chance`, which were killed and resumed; and what they printed."""
    folder = tmp_path_factory.mktemp("killed")
    done = run_script(RESUMED, folder, *MODES)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize("run", ["planned", "chance"])
@pytest.mark.parametrize("mode", MODES)
def test_killed_training_ends_as_the_uninterrupted(killed_runs: tuple[Path, str], mode: str, run: str) -> None:
    from safetensors.torch import load_file

    whole = killed_runs[0] / mode / "whole"
    for path in (whole / "final").rglob("*.safetensors"):
        expected, got = load_file(path), load_file(whole.parent / run / path.relative_to(whole))
        assert expected.keys() == got.keys()
        different = [name for name in expected if not torch.equal(expected[name], got[name])]
        assert not different, different[:3]


@pytest.mark.parametrize("mode", MODES)
def test_resumed_from_the_newest_whole_checkpoint(killed_runs: tuple[Path, str], mode: str) -> None:
    printed = killed_runs[1].split(f"mode {mode}\n")[1].splitlines()
    # Of random sampling, the trainer_state.json of checkpoint 9 was truncated before the last resume.
    last = "checkpoint-6" if mode.startswith("random") else "checkpoint-9"
    assert printed[:6] == [f"from {c}" for c in (None, None, "checkpoint-3", "checkpoint-6", last, "checkpoint-12")]
