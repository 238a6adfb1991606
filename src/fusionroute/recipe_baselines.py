"""The stages of a recipe beside the collection itself: what its evaluation compares it with and scores answers by.

The fine-tuned baseline, the reward models with their held-out accuracy, and `baselines/` in the collection's folder.
"""

import hashlib
import json
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from fusionroute import sources, weights
from fusionroute.baselines.carried import BASELINES, REWARD_FILE, carry
from fusionroute.errors import UsageError
from fusionroute.files import write_json
from fusionroute.recipe import Run, digest_rows, say
from fusionroute.router import HEAD_FILE
from fusionroute.sections import Recipe, RewardSection
from fusionroute.training.rows import DataSpec

# Reward models by what they are for: the folders in `baselines/` are named by what `evaluate` calls them.
_CARRIED_AS = {"selection": "reward", "judge": "judge"}


def check_baselines(run: Run) -> None:
    """Refuse what cannot be trained, and a pair in two of: CDPO's data, the reward models', what is held out for these.

    A reward model that knows the pairs a router or another reward model was trained on does not judge independently;
    nor does one that prefers the very answers which experts or the router were taught (`chosen_only`). Held-out pairs
    may be shared among themselves.

    Raises:
        UsageError: names both places and the first pair; or what is missing.
    """
    if run.recipe.finetuned is not None and run.recipe.router.lora is None and run.start.adapter is None:
        raise UsageError("finetuned trains a LoRA of the router's shape, and the router has none: set router.lora")
    for section in run.recipe.rewards:
        for spec in (*section.data, *section.heldout):
            strangers = sum("chosen" not in row for row in run.rows([spec], f"pairs of {section.name}"))
            if strangers:
                raise UsageError(f"reward model {section.name}: {strangers} rows of {spec.path} are no pairs")
    trained: dict[str, dict[str, dict]] = {}
    held: dict[str, dict[str, dict]] = {}
    if run.recipe.rewards and run.recipe.cdpo is not None:
        trained["cdpo.data"] = _by_content(run.rows(run.recipe.cdpo.data, "router cdpo"))
    if run.recipe.rewards and (taught := _taught(run.recipe)):
        trained["rows with chosen_only"] = _by_content(run.rows(taught, "pairs whose better answer is taught"))
    for section in run.recipe.rewards:
        what = f"reward model {section.name}"
        trained[f"data of {what}"] = _by_content(run.rows(section.data, what))
        held[f"heldout of {what}"] = _by_content([row for _, rows in _heldout(run, section) for row in rows])
    places = {**trained, **held}
    for one, other in combinations(places, 2):
        shared = [row for key, row in places[one].items() if key in places[other]]
        if shared and not (one in held and other in held):
            raise UsageError(
                f"{one} and {other} share {len(shared)} pairs, such as {shared[0]['prompt'][-1]['content'][:60]!r}: "
                "move start or stop in the recipe"
            )


def _taught(recipe: Recipe) -> list[DataSpec]:
    """The pairs whose better answers are trained on as chat rows."""
    phases = [phase.data for phase in (recipe.sft, recipe.cdpo) if phase is not None]
    specs = [spec for data in (*(expert.data for expert in recipe.experts), *phases) for spec in data]
    return [spec.model_copy(update={"chosen_only": False}) for spec in specs if spec.chosen_only]


def _heldout(run: Run, section: RewardSection) -> list[tuple[DataSpec, list[dict]]]:
    return [(spec, run.rows([spec], f"held-out pairs of {section.name}")) for spec in section.heldout]


def _by_content(rows: list[dict]) -> dict[str, dict]:
    """The pairs among `rows`, by prompt and the two answers in any order."""
    return {
        json.dumps(
            [row["prompt"], sorted(json.dumps(row[side], sort_keys=True) for side in ("chosen", "rejected"))],
            sort_keys=True,
        ): row
        for row in rows
        if "chosen" in row
    }


def run_baselines(run: Run, collection: Path, sft: Path) -> None:
    """Train what the recipe asks for and put it beside the collection's members.

    Args:
        sft: the folder of the stage `sft`.
    """
    base = _Base.of(run)
    adapters = {}
    if (sft / "router" / "adapter").is_dir():  # a whole router is too large to be carried twice
        adapters["sft"] = sft / "router" / "adapter"
    if run.recipe.finetuned is not None:
        adapters["finetuned"] = _finetuned(run, base) / "adapter"
    for section in run.recipe.rewards:
        adapters[_CARRIED_AS[section.name]] = _reward(run, section, base)
    if not adapters and not (collection / BASELINES).exists():
        return
    head = sft / "router" / HEAD_FILE
    told = {name: folder / REWARD_FILE for name, folder in adapters.items()}
    inputs = [
        {name: weights.digest(folder) for name, folder in adapters.items()},
        {name: file.read_text(encoding="utf-8") for name, file in told.items() if file.is_file()},
        hashlib.sha256(head.read_bytes()).hexdigest(),
    ]
    named = run.recipe.base if base.source == run.base[0] else base.source
    run.stage(f"{collection.name}/{BASELINES}", inputs, lambda _: carry(collection, adapters, named, head))


class _Base(NamedTuple):
    """The router's base, which all of this stands on; `adapter` is what the router's own starts from, if anything."""

    source: str
    revision: str | None
    folder: Path
    digest: str
    adapter: Path | None

    @classmethod
    def of(cls, run: Run) -> "_Base":
        start = run.start
        folder = sources.resolve(start.source, revision=start.revision)
        adapter = None if start.adapter is None else sources.resolve(start.adapter, what="adapter")
        return cls(start.source, start.revision, folder, weights.digest(folder), adapter)


def _finetuned(run: Run, base: _Base) -> Path:
    recipe, section = run.recipe, run.recipe.finetuned
    assert section is not None
    phases = [phase for phase in (recipe.sft, recipe.cdpo) if phase is not None]
    names = ("router sft", "router cdpo")
    rows = [row for phase, name in zip(phases, names, strict=False) for row in run.rows(phase.data, name)]
    lora = base.adapter or recipe.router.lora
    assert lora is not None
    inputs = [
        base.digest,
        digest_rows(rows),
        [phase.training for phase in phases],
        section.model_dump(),
        weights.digest(lora) if isinstance(lora, Path) else lora.model_dump(),
        recipe.dtype,
        recipe.max_length,
    ]

    def work(checkpoints: Path) -> None:
        import torch

        from fusionroute.training.finetuned import train_finetuned, trl_settings

        train_finetuned(
            base.source,
            rows,
            run.out / "finetuned" / "adapter",
            lora=lora,
            sft=trl_settings(recipe.sft.training) | section.training,
            dpo={} if recipe.cdpo is None else trl_settings(recipe.cdpo.training, keep=["beta"]) | section.dpo,
            run=checkpoints,
            max_length=recipe.max_length,
            dtype=getattr(torch, recipe.dtype),
            revision=base.revision,
        )

    return run.stage("finetuned", inputs, work)


def _reward(run: Run, section: RewardSection, base: _Base) -> Path:
    recipe = run.recipe
    name = f"rewards/{section.name}"
    rows = run.rows(section.data, f"reward model {section.name}")
    groups = _heldout(run, section)
    inputs = [
        base.digest,
        digest_rows(rows),
        [digest_rows(held) for _, held in groups],
        section.model_dump(),
        recipe.dtype,
        recipe.max_length,
    ]

    def work(checkpoints: Path) -> dict[str, Any]:
        import torch

        from fusionroute.evaluation.reward import RewardModel, describe, pair_accuracy
        from fusionroute.training.rewards import train_reward

        out = run.out / name
        train_reward(
            base.source,
            rows,
            out,
            name=section.name,
            lora=section.lora,
            arguments={"max_length": recipe.max_length, **section.training},
            run=checkpoints,
            dtype=getattr(torch, recipe.dtype),
            revision=base.revision,
        )
        model = RewardModel(f"{base.folder}+{out}")
        found = pair_accuracy(model, [(spec.model_dump(exclude_defaults=True), held) for spec, held in groups])
        found["trained_on"] = [spec.model_dump(exclude_defaults=True) for spec in section.data]
        write_json(out / REWARD_FILE, found)
        say(f"reward model {section.name}: {describe(found)}")
        return found

    return run.stage(name, inputs, work)
