"""The two phases as functions: a collection and rows in, a trained router folder out.

What `fusionroute annotate`, `train sft`, `train cdpo` and `fusionroute run` share. A router folder holds what
`collection.assemble` takes: an adapter (or whole weights) and `route_head.safetensors`.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionroute import sources, weights
from fusionroute.configuration import ROUTER, FusionRouteConfig, MemberSpec
from fusionroute.copying import PROVENANCE, copy_tokenizer
from fusionroute.errors import FusionRouteError
from fusionroute.files import read_json, staged_folder, write_json
from fusionroute.lm_head import Head
from fusionroute.members import LoadOptions, load_members, load_model
from fusionroute.progress import quiet
from fusionroute.router import RouteHead, head_width
from fusionroute.training import processes
from fusionroute.training.annotation import WHOLE, Part, annotate, sequences_of, with_annotations
from fusionroute.training.data import Item
from fusionroute.training.lora import LoraSettings, lora_config, save_adapter
from fusionroute.training.model import RouterForTraining, of_lm
from fusionroute.training.pool import Pool
from fusionroute.training.running import check_arguments, make_arguments, train_to_the_end
from fusionroute.training.trainer import RouterArguments, RouterTrainer


def annotate_members(
    config: FusionRouteConfig,
    collection: Path,
    names: Sequence[str],
    items: Sequence[Item],
    out: Path,
    options: LoadOptions,
    base: str | None = None,
    part: Part = WHOLE,
) -> list[Path]:
    """Annotate `items` with the members `names`, one in memory at a time; returns their folders in that order.

    The router writes its routes beside its log-probabilities. `part` as in `annotation.annotate`.
    """
    processes.join()
    options = replace(options, device=options.device or processes.device())
    sequences = sequences_of(items)
    specs = {spec.name: spec for spec in config.specs_on(base)}
    folders = []
    for name in names:
        with quiet(data=True):
            (member,) = load_members([specs[name]], collection, options)
        head = None
        if name == ROUTER:
            device = member.model.device
            head = RouteHead.load(collection / ROUTER, config.expert_names, head_width(member.model), device)
        folders.append(annotate(member, sequences, out, config.vocab_size, route_head=head, part=part))
        del member
        gc.collect()
    return folders


def load_trainable(
    spec: MemberSpec,
    config: FusionRouteConfig,
    collection: Path,
    *,
    lora: LoraSettings | None,
    options: LoadOptions,
    seed: int,
) -> RouterForTraining:
    """The router of `collection`, ready to train: an adapter in float32 on a base in `options.dtype`, or all float32.

    Args:
        spec: the router's.
        lora: shape of a new adapter, if the router has none yet; None trains every weight. A router that has an adapter
            goes on with it.
        seed: of a new adapter.

    Raises:
        FusionRouteError: weights cannot be had or loaded, the logits are of an unknown kind (`Head.check`), the head is
            another router's.
    """
    from peft import PeftModel, get_peft_model

    folder = sources.resolve(spec.source, revision=spec.revision, relative_to=collection)
    with quiet(data=True):
        whole = lora is None and spec.adapter is None
        dtype = torch.float32 if whole else options.dtype
        lm: Any = load_model(folder, LoadOptions(dtype, options.device, options.attn_implementation))
        Head(lm, config.vocab_size).check(lm)  # before the adapter, whose dropout would tell the two apart
        if spec.adapter is not None:
            adapter = sources.resolve(
                spec.adapter, revision=spec.adapter_revision, relative_to=collection, what="adapter"
            )
            lm = PeftModel.from_pretrained(lm, str(adapter), is_trainable=True)
        elif lora is not None:
            torch.manual_seed(seed)
            lm = get_peft_model(lm, lora_config(lora))
        else:
            lm.requires_grad_(True)
    model = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    device = next(model.parameters()).device
    head = RouteHead.load(collection / ROUTER, config.expert_names, head_width(model), device)
    return RouterForTraining(lm, head, config.vocab_size)


def train_router(
    model: RouterForTraining,
    items: Sequence[Item],
    out: Path,
    *,
    arguments: dict[str, Any],
    run: Path,
    title: str,
    provenance: dict[str, Any],
    dtype: torch.dtype,
    tokenizer: Path,
    pool: Pool | None = None,
) -> dict[str, Any]:
    """Train on annotated items and write the router folder `out`, its log included; returns the last logged figures.

    Args:
        arguments: fields of `RouterArguments`.
        run: folder for checkpoints; a killed run goes on from the newest whole one.
        provenance: what to record beside the weights.
        dtype: of the weights as written; training keeps float32.
        tokenizer: folder whose tokenizer files go beside whole weights.
        pool: as in `RouterTrainer`.

    Raises:
        FusionRouteError: a NaN, no items, an unknown argument, a full disk.
    """
    args = make_arguments(RouterArguments, run, arguments)
    with quiet(data=True):
        trainer = RouterTrainer(model, args, items, pool=pool, title=title)
        train_to_the_end(trainer, run)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    router, trained = trainer.accelerator.unwrap_model(trainer.model), trainer.trained()

    def export() -> None:
        export_router(router, out, dtype, provenance, tokenizer, trained)
        write_json(out / "log.json", trainer.state.log_history)

    processes.once(export)
    return history[-1] if history else {}


def export_router(
    model: RouterForTraining,
    out: Path,
    dtype: torch.dtype,
    provenance: dict[str, Any],
    tokenizer: Path,
    trained: dict[str, Tensor],
) -> None:
    """Write the trained router as `assemble` takes it; `trained` is what `RouterForTraining.trained` gave."""
    for name, parameter in trained.items():
        if not torch.isfinite(parameter).all():
            raise FusionRouteError(f"{name} is not finite after training: lower the learning rate")
    state = of_lm(trained)
    with staged_folder(out, replace=True) as scratch:
        if model.is_adapter:
            save_adapter(model.lm, scratch / "adapter", dtype, provenance, state)
        else:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
            model.causal_lm.save_pretrained(scratch / "model", state_dict=state)
            config = scratch / "model" / "config.json"
            write_json(config, read_json(config) | {"dtype": str(dtype).removeprefix("torch.")})
            copy_tokenizer(tokenizer, scratch / "model")
            write_json(scratch / "model" / PROVENANCE, provenance)
        model.route_head.trained = True
        model.head(trained).save(scratch)


def sft(
    config: FusionRouteConfig,
    collection: Path,
    items: Sequence[Item],
    annotations: Path,
    out: Path,
    *,
    lora: LoraSettings | None,
    arguments: dict[str, Any],
    run: Path,
    options: LoadOptions,
    base: str | None = None,
) -> dict[str, Any]:
    """Phase 1 (Eq. 2) on SFT items: annotate what is not annotated yet, train, write the router folder `out`.

    Args:
        collection: folder of the collection whose router is trained.
        annotations: folder of annotations, kept for other runs.
        lora, options: as in `load_trainable`.
        arguments, run: as in `train_router`.
        base: in place of the base that adapters stand on.

    Returns:
        The last logged figures.

    Raises:
        FusionRouteError: there are pairs among the items; as `annotate`, `load_trainable` and `train_router`.
    """
    pairs = sum(item.is_pair for item in items)
    if pairs:
        raise FusionRouteError(f"phase 1 takes chat rows, and sft.data has {pairs} preference pairs: move them to cdpo")
    check_arguments(RouterArguments, arguments)
    folders = annotate_members(config, collection, config.expert_names, items, annotations, options, base)
    seed = int(arguments.get("seed", 42))
    model = load_trainable(config.specs_on(base)[0], config, collection, lora=lora, options=options, seed=seed)
    return train_router(
        model,
        with_annotations(items, folders),
        out,
        arguments=arguments,
        run=run,
        title="router, phase 1 (SFT)",
        provenance=_provenance(config.specs_on(base)[0], collection, "sft", items, arguments),
        dtype=_export_dtype(model, options),
        tokenizer=collection,
        pool=_pool(config, collection, arguments, options, base),
    )


def cdpo(
    config: FusionRouteConfig,
    collection: Path,
    items: Sequence[Item],
    annotations: Path,
    out: Path,
    *,
    arguments: dict[str, Any],
    run: Path,
    options: LoadOptions,
    base: str | None = None,
) -> dict[str, Any]:
    """Phase 2 (Eq. 3, Algorithm 1) on pairs and SFT items; the router of `collection` is π_ref.

    Arguments and what is returned are as of `sft`; a router that is an adapter goes on with it, any other trains whole.

    Raises:
        FusionRouteError: the route head is untrained, there are no pairs; as `annotate`, `load_trainable` and
            `train_router`.
    """
    if not config.head_trained:
        raise FusionRouteError(
            f"{collection}: the route head is untrained; run phase 1 (`fusionroute train sft`) first"
        )
    if not any(item.is_pair for item in items):
        raise FusionRouteError("phase 2 needs preference pairs, and the data has none")
    check_arguments(RouterArguments, arguments)
    names = [*config.expert_names, ROUTER]
    *folders, reference = annotate_members(config, collection, names, items, annotations, options, base)
    model = load_trainable(config.specs_on(base)[0], config, collection, lora=None, options=options, seed=0)
    return train_router(
        model,
        with_annotations(items, folders, reference),
        out,
        arguments=arguments,
        run=run,
        title="router, phase 2 (CDPO)",
        provenance=_provenance(config.specs_on(base)[0], collection, "cdpo", items, arguments),
        dtype=_export_dtype(model, options),
        tokenizer=collection,
        pool=_pool(config, collection, arguments, options, base),
    )


def _pool(
    config: FusionRouteConfig, collection: Path, arguments: dict[str, Any], options: LoadOptions, base: str | None
) -> Pool | None:
    """The experts, where the route loss needs them."""
    if arguments.get("route_loss") != "renormalized":
        return None
    options = replace(options, device=options.device or processes.device())
    with quiet(data=True):
        return Pool(load_members(config.specs_on(base)[1:], collection, options), config.vocab_size)


def router_spec(source: MemberSpec, folder: Path) -> MemberSpec:
    """The spec of a router trained into `folder` from the router `source`."""
    folder = folder.resolve()  # a relative path would be read from wherever the collection is
    if (folder / "adapter").is_dir():
        return MemberSpec(ROUTER, source.source, source.revision, str(folder / "adapter"), license=source.license)
    return MemberSpec(ROUTER, str(folder / "model"), license=source.license)


def _export_dtype(model: RouterForTraining, options: LoadOptions) -> torch.dtype:
    """An adapter is stored as its base is: more digits would be rounded away when it is loaded."""
    if not model.is_adapter and options.dtype is not None:
        return options.dtype
    return next(p.dtype for n, p in model.causal_lm.named_parameters() if "lora_" not in n)


def _provenance(
    spec: MemberSpec, collection: Path, phase: str, items: Sequence[Item], arguments: dict[str, Any]
) -> dict[str, Any]:
    folder = sources.resolve(spec.source, revision=spec.revision, relative_to=collection)
    return {
        "base": spec.source,
        "base_digest": weights.digest(folder),  # of what was loaded, which another base may have replaced
        "phase": phase,
        "items": len(items),
        "pairs": sum(item.is_pair for item in items),
        "arguments": arguments,
    }
