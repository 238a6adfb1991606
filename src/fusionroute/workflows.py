"""What `annotate`, `train` and `routing` do with a collection and a recipe: locate, tokenize, call, assemble."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute import collection as collections
from fusionroute.errors import UsageError
from fusionroute.recipe import Run, measure_heldout
from fusionroute.sections import PhaseSection, load_recipe

if TYPE_CHECKING:
    from fusionroute.members import LoadOptions


def _open(
    name: str | None,
    recipe: Path,
    data: Path | None,
    dtype: str | None,
    base: str | None,
    changes: Sequence[str] = (),
) -> "tuple[Path, Run, LoadOptions]":
    """The collection's folder, the recipe with its rows, and how members are loaded."""
    from fusionroute.configuration import absolute_source
    from fusionroute.members import LoadOptions, parse_dtype

    folder = collections.locate(name)
    run = Run(load_recipe(recipe, changes), Path(), data)
    return (
        folder,
        run,
        LoadOptions(
            dtype=parse_dtype(dtype or run.recipe.dtype), other_base=None if base is None else absolute_source(base)
        ),
    )


def _section(run: Run, phase: str) -> PhaseSection:
    """The recipe's section of a phase; in a launch, the processes wait for each other as long as it says."""
    from fusionroute.training import processes

    section = {"sft": run.recipe.sft, "cdpo": run.recipe.cdpo}.get(phase)
    if section is None:
        raise UsageError(f"the recipe has no {phase} section; phases are sft and cdpo")
    processes.join(float(section.training.get("ddp_timeout", processes.TIMEOUT)))
    return section


def annotate(
    name: str,
    recipe: Path,
    data: Path | None,
    out: Path,
    phase: str,
    members: list[str] | None,
    dtype: str | None,
    base: str | None,
    part: str | None = None,
) -> list[Path]:
    """Annotate the rows of a recipe's phase with the collection's experts, or with `members`; returns the folders.

    Args:
        part: such as `2/4`: only the second of four parts, which other processes or machines make up.

    Raises:
        UsageError: no such phase, member or part.
        FusionRouteError: as `annotation.annotate`; rows or weights cannot be had.
    """
    from fusionroute.configuration import ROUTER
    from fusionroute.training.annotation import Part
    from fusionroute.training.phases import annotate_members

    portion = Part.parse(part or "1/1")
    folder, run, options = _open(name, recipe, data, dtype, base)
    config, items = run.items(_section(run, phase).data, f"rows of {phase}", folder)
    names = members or config.expert_names
    for member in names:
        if member != ROUTER:
            config.expert_index(member)
    return annotate_members(config, folder, names, items, out, options, base, portion)


def train(
    phase: str,
    name: str,
    recipe: Path,
    data: Path | None,
    annotations: Path,
    out: Path,
    dtype: str | None,
    base: str | None,
    changes: Sequence[str] = (),
) -> Path:
    """Train the router of a collection by one phase of a recipe and write the new collection to `out`.

    Killed and called again with the same arguments it goes on; until it is done its files are in `OUT.work`.

    Args:
        changes: what differs from the recipe's file, as in `load_recipe`.

    Raises:
        UsageError: no such phase, or `out` is not an empty folder.
        FusionRouteError: as `phases.sft` and `phases.cdpo`; rows or weights cannot be had.
    """
    from fusionroute.training import phases, processes
    from fusionroute.training.annotation import sequences_of
    from fusionroute.training.data import digest_sequences

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: name another one for the new collection")
    folder, run, options = _open(name, recipe, data, dtype, base, changes)
    section = _section(run, phase)
    config, items = run.items(section.data, f"rows of {phase}", folder)
    work = out.with_name(f"{out.name}.work")
    # Checkpoints of other settings or rows must not be gone on from.
    lora = run.recipe.router.lora
    shape = None if lora is None else lora.model_dump()
    settings = [phase, config.to_json_string(), digest_sequences(sequences_of(items)), section.training, shape]
    settings += [str(options.dtype), base]
    run_folder = work / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    common: dict[str, Any] = {"arguments": section.training, "run": run_folder, "options": options, "base": base}
    if phase == "sft":
        common["lora"] = lora
    function = phases.sft if phase == "sft" else phases.cdpo
    function(config, folder, items, annotations, work / "router", **common)
    router = phases.router_spec(config.router_spec, work / "router")
    # What was measured on the router that this one comes from is not its own.
    kept = {key: value for key, value in (config.training or {}).items() if key != "scores"}
    training = {**kept, phase: section.training}
    embed = [router.name] if router.adapter is None else []

    def finish() -> None:
        collections.assemble(
            out,
            router,
            config.expert_specs,
            head=work / "router",
            embed=embed,
            alpha=config.alpha,
            training=training,
            relative_to=folder,
        )
        shutil.rmtree(work)

    processes.once(finish)
    return out


def measure(name: str | None, recipe: Path, data: Path | None, base: str | None) -> tuple[dict[str, Any], str]:
    """Routing figures of a collection on a recipe's held-out rows: the JSON and its Markdown.

    Raises:
        UsageError: the recipe has no such rows.
        FusionRouteError: rows or weights cannot be had.
    """
    run = Run(load_recipe(recipe), Path(), data)
    if not run.recipe.heldout:
        raise UsageError(f"{recipe} has no heldout rows to measure on")
    return measure_heldout(run, collections.locate(name), base)
