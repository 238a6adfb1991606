"""RouterTrainer: both phases are one loop with different items (Algorithm 1). It loads the router alone.

Phase 1 is a data set of SFT items, phase 2 a mix of SFT items and preference pairs; a batch is whatever the sampler
draws. Experts are present as annotation columns only.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fusionroute import fusion
from fusionroute.errors import FusionRouteError
from fusionroute.training import losses, sharding
from fusionroute.training.arguments import RouterArguments
from fusionroute.training.data import Collator, Item, Items, LengthGroups, sequence_count
from fusionroute.training.model import RouterForTraining, Scored, check_packing, lm_inputs
from fusionroute.training.pool import Pool
from fusionroute.training.running import Progress, StopOnNan
from fusionroute.training.tally import Tally

__all__ = ["RouterArguments", "RouterForTraining", "RouterTrainer"]

FORWARD = ("input_ids", "attention_mask", "position_ids", "positions", "labels", "sft_positions")


class RouterTrainer(Trainer):
    """Trains a `RouterForTraining` on annotated items.

    Args:
        model: the router.
        args: the arguments of both phases.
        items: annotated items; pairs need the columns of the router after phase 1 too.
        pool: the experts, which the route loss `renormalized` needs.
        title: of the progress shown.

    Raises:
        FusionRouteError: no items, pairs without the columns of phase 2, no pool where the route loss needs one, or
            packing with a model that lets packed sequences see each other.
    """

    def __init__(
        self,
        model: RouterForTraining,
        args: RouterArguments,
        items: Sequence[Item],
        *,
        pool: Pool | None = None,
        title: str = "router",
        callbacks: Sequence[Any] = (),
    ) -> None:
        if not items:
            raise FusionRouteError("there is no item to train the router on")
        if any("reference" not in side or "routes" not in side for i in items if i.is_pair for side in i.annotations):
            raise FusionRouteError("preference pairs lack the annotation of the router after phase 1: annotate with it")
        if args.route_loss == "renormalized" and pool is None:
            raise FusionRouteError("route_loss renormalized needs the experts' distributions: pass the pool of experts")
        self.sharded = args.sharded and args.world_size > 1
        self.pool = pool
        self.domains = tuple(sorted({item.domain for item in items}))
        self.experts = model.route_head.experts
        self.tally = Tally()
        model.route_head.trained = True
        super().__init__(
            model=model,
            args=args,
            train_dataset=Items(items),
            data_collator=Collator(self.domains, 0, args.packing),  # padding is masked: any id will do
            callbacks=[Progress(title), StopOnNan(), *callbacks],
        )
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)
        if args.packing:
            for lm in [model.causal_lm, *(expert.model for expert in (pool.experts if pool else []))]:
                check_packing(lm)
        if self.sharded:
            # accelerate would wrap it for data parallelism; autocast is all that it is to add.
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, device_placement=False, evaluation_mode=True)
        # The loss is normalised over the whole accumulated batch below; transformers must not divide it again.
        self.model_accepts_loss_kwargs = True

    # ---------------------------------------------------------------------------------------------------- loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Tensor]:
        """The micro-batches of one optimizer step, and its three denominators: LM tokens, |S|, pairs."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(3, device=device)
        for batch in batches:
            sft = int(batch["sft_positions"])
            counts[0] += sft
            counts[1] += losses.informative(batch["greedy"][:sft]).sum()
            counts[2] += (sequence_count(batch) - int(batch["sft_sequences"])) // 2
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.unsqueeze(0)).sum(dim=0)
        return batches, counts

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """`μ·L_SFT + L_CDPO` of one micro-batch, each over its denominator of the whole step."""
        args = self.args
        assert isinstance(args, RouterArguments)
        counts = num_items_in_batch if num_items_in_batch is not None else self._count(inputs)
        scored = model(
            **{k: inputs[k] for k in FORWARD if k in inputs},
            chunk=args.logit_chunk,
            with_head=self.sharded and bool(counts[0]),
        )
        tokens, informative, pairs = counts.clamp(min=1)
        sft = int(inputs["sft_positions"])
        loss = scored.logprobs.new_zeros(())
        if sft:
            lm = -scored.logprobs[:sft].sum() / tokens
            route = self._route_loss(scored, inputs, sft).sum() / informative
            loss = loss + args.sft_weight * (lm + args.route_weight * route)
        if sft < len(scored.logprobs):
            loss = loss + self._cdpo(scored, inputs, sft).sum() / pairs
        # Data parallelism averages gradients over processes; ours are already parts of one global sum.
        loss = loss * args.world_size
        return (loss, scored) if return_outputs else loss

    def _count(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.get_batch_samples(iter([inputs]), 1, inputs["labels"].device)[1]

    def _route_loss(self, scored: Scored, inputs: dict[str, Tensor], sft: int) -> Tensor:
        """L_route at each informative position."""
        args = self.args
        assert isinstance(args, RouterArguments)
        logprobs, greedy = inputs["logprobs"][:sft], inputs["greedy"][:sft]
        where = losses.informative(greedy)
        scores = scored.scores[:sft]
        normaliser = None
        if args.route_loss == "renormalized":
            assert self.pool is not None
            positions = inputs["positions"][:sft]
            rows = 1 + int(positions.max()) // inputs["input_ids"].shape[1]  # SFT items are in the first ones
            batch = lm_inputs(inputs["input_ids"], inputs["attention_mask"], inputs.get("position_ids"))
            own = {key: tensor[:rows] for key, tensor in batch.items()}
            normaliser = self.pool.log_normaliser(scores[where], positions[where], own)
        loss = losses.route_loss(scores[where], logprobs[where], args.route_loss, normaliser)  # type: ignore[arg-type]
        with torch.no_grad():
            routes = fusion.route(scores)
            hard = -losses.routed_logprobs(logprobs, routes)
            best = logprobs.argmax(dim=-1)
            self.tally.add("lm_loss", -scored.logprobs[:sft].sum(), sft)
            self.tally.add("route_loss", loss.sum(), where.sum())
            self.tally.add("route_loss_hard", hard[where].sum(), where.sum())
            self.tally.add("route_accuracy", (routes == best)[where].sum(), where.sum())
            self.tally.add("informative", where.sum(), sft)
            self._shares(routes, inputs["domain"][:sft])
        return loss

    def _shares(self, routes: Tensor, domain: Tensor) -> None:
        for d, name in enumerate(self.domains):
            here = routes[domain == d]
            for e, expert in enumerate(self.experts):
                self.tally.add(f"share_{name}/{expert}", (here == e).sum(), here.numel())

    def _cdpo(self, scored: Scored, inputs: dict[str, Tensor], sft: int) -> Tensor:
        """Eq. 3 per pair."""
        args = self.args
        assert isinstance(args, RouterArguments)
        first = int(inputs["sft_sequences"])
        segments = losses.Segments(inputs["sequence"][sft:] - first, sequence_count(inputs) - first)
        routes = inputs["routes"][sft:] if args.routing == "frozen" else fusion.route(scored.scores[sft:])
        bias = losses.expert_bias(
            losses.routed_logprobs(inputs["logprobs"][sft:], routes),
            segments,
            args.bias,  # type: ignore[arg-type]
        )
        result = losses.cdpo_loss(
            segments.sum(scored.logprobs[sft:]), segments.sum(inputs["reference"][sft:]), bias, args.beta
        )
        with torch.no_grad():
            pairs = len(bias)
            self.tally.add("cdpo_loss", result.loss.sum(), pairs)
            self.tally.add("cdpo_margin", result.margin.sum(), pairs)
            self.tally.add("cdpo_bias", bias.sum(), pairs)
            self.tally.add("cdpo_bias_square", bias.square().sum(), pairs)
            self.tally.add("cdpo_slope", result.slope.sum(), pairs)
            self.tally.add("preference_accuracy", (result.margin > 0).sum(), pairs)
            self._shares(routes, inputs["domain"][sft:])
        return result.loss

    # ------------------------------------------------------------------------------------------------- logging

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            means = self.tally.read(self.accelerator)
            square = means.pop("cdpo_bias_square", None)
            if square is not None:
                means["cdpo_bias_std"] = max(square - means["cdpo_bias"] ** 2, 0.0) ** 0.5
            logs |= means
        super().log(logs, *args, **kwargs)

    # ----------------------------------------------------------------------------- optimizer, order, checkpoints

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.sharded:  # whole, it need not fit there
            super()._move_model_to_device(model, device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # The last moment before something holds the parameters; a checkpoint has been read into the whole model.
        if self.sharded and not sharding.is_sharded(self.model):
            sharding.shard(self.model, self.args.device, torch.bfloat16 if self.args.bf16 else None)
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.route_head_learning_rate
        if rate is not None:
            heads = {id(p) for p in self.model.route_head.parameters()}
            head = [p for group in optimizer.param_groups for p in group["params"] if id(p) in heads]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in heads]
            optimizer.add_param_group({"params": head, "lr": rate, "weight_decay": self.args.weight_decay})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy == "group_by_length":
            # transformers' sampler draws from the global generator, whose state a resumed run does not share.
            items = self.train_dataset.items
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return LengthGroups([item.length for item in items], batch, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        return sharding.gathered(norm) if isinstance(norm, Tensor) else norm

    def trained(self) -> dict[str, Tensor]:
        """As `RouterForTraining.trained`: every process must call it."""
        if self.is_deepspeed_enabled:
            names = {name for name, p in self.model.named_parameters() if p.requires_grad}
            state = self.accelerator.get_state_dict(self.model_wrapped) or {}
            return {name: tensor for name, tensor in state.items() if name in names}
        return self.accelerator.unwrap_model(self.model).trained()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trained = self.trained()
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save(Path(output_dir or self.args.output_dir), trained)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.save_optimizer(self.model, self.optimizer, Path(output_dir) / "optimizer")
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        parts = Path(checkpoint) / "optimizer"
        if not parts.is_dir():
            if self.sharded:
                raise FusionRouteError(
                    f"{checkpoint} is of a run that was not sharded, and this one is: go on as it began, or remove it"
                )
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharding.load_optimizer(self.model, self.optimizer, parts)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # After this comes the file that makes a checkpoint whole, and every process has files in it.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.accelerator.unwrap_model(self.model).load(Path(resume_from_checkpoint))
