"""The command line's `merge`, `evaluate`, `report` and `lm-eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusionroute.cli_options import Base, Collection, Dtype, Json
from fusionroute.errors import UsageError


def merge(
    out: Annotated[Path, typer.Argument(help="Folder for the merged model.")],
    collection: Collection = None,
    method: Annotated[str, typer.Option(help="task-arithmetic, dare or ties.")] = "task-arithmetic",
    scale: Annotated[float | None, typer.Option(help="λ; the method's paper's if not given.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries kept; the method's paper's if not.")] = None,
    seed: Annotated[int, typer.Option(help="Of DARE's drops.")] = 0,
    base: Base = None,
) -> None:
    """Merge a collection's experts into one ordinary model."""
    from fusionroute import collection as collections
    from fusionroute.baselines.merging import MergeSettings, merge_collection

    settings = MergeSettings.of(method, scale=scale, density=density, seed=seed)
    merge_collection(collections.locate(collection), settings, out, base=base)
    print(f"{out}: an ordinary model, {settings}")


def evaluate(
    out: Annotated[Path, typer.Option(help="Results folder; what is in it is not computed again.")] = Path(
        "evaluation"
    ),
    tasks: Annotated[list[str] | None, typer.Option("--tasks", help="Benchmarks, by commas; all if none.")] = None,
    system: Annotated[list[str] | None, typer.Option("--system", help="Systems, by commas; all if none.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many items of each benchmark.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder with the benchmarks; else the Hub.")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Rows held out of training, to choose settings by: gsm8k, mbpp, ifeval.")
    ] = False,
    collection: Collection = None,
    sft: Annotated[Path | None, typer.Option(help="The collection after phase 1, for sft-only, no-complement.")] = None,
    finetuned: Annotated[str | None, typer.Option(help="The fine-tuned model: SOURCE or SOURCE+ADAPTER.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COLLECTION: the same experts, the router trained otherwise; runs as variant:NAME."),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="The reward model of sequence-selection and collab: SOURCE or SOURCE+ADAPTER.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Who compares general answers: a reward model, SOURCE[+ADAPTER] (the collection's own if none), or "
            "an OpenAI-compatible endpoint, URL#MODEL, with its key in FUSIONROUTE_JUDGE_KEY or OPENAI_API_KEY."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The system that win rates are against; finetuned, else fusionroute, if none.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 32,
    dtype: Dtype = None,
    base: Base = None,
    candidates: Annotated[int, typer.Option("--collab-candidates", min=1, help="Of each expert, per token.")] = 3,
    collab_top_p: Annotated[float, typer.Option(help="Candidates that reach this probability together.")] = 0.9,
    rollout: Annotated[int, typer.Option("--collab-rollout", min=0, help="Tokens written after a candidate.")] = 8,
    collab_alpha: Annotated[float, typer.Option(help="Weight of the distance to a reference expert.")] = 0.0,
    collab_reference: Annotated[
        str | None, typer.Option(help="The expert it is measured to; the first if none.")
    ] = None,
    collab_limit: Annotated[int, typer.Option(min=1, help="Collab's items of each benchmark.")] = 5,
    unsafe_code_execution: Annotated[
        bool, typer.Option("--unsafe-code-execution", help="Run model-written code even where nothing isolates it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Every system on every benchmark, resumable; prints the report. Exit code 3 if an item has no score."""
    from fusionroute import collection as collections
    from fusionroute.baselines.collab import CollabSettings
    from fusionroute.evaluation import report as reports
    from fusionroute.evaluation.benchmarks import HELD_OUT
    from fusionroute.evaluation.evaluate import TASKS, Evaluation
    from fusionroute.evaluation.evaluate import evaluate as run_evaluation

    every = HELD_OUT if held_out else TASKS
    names = [name for entry in tasks or ["all"] for name in entry.split(",") if name]
    wanted = Evaluation(
        collection=collections.locate(collection),
        out=out,
        tasks=list(dict.fromkeys(n for name in names for n in (every if name == "all" else [name]))),
        systems=system or ["all"],
        data=data,
        limit=limit,
        held_out=held_out,
        dtype=dtype,
        base=base,
        batch=batch,
        sft=sft,
        finetuned=finetuned,
        variants=_variants(variant or []),
        reward=reward,
        judge=judge,
        against=against,
        collab=CollabSettings(candidates, collab_top_p, rollout, alpha=collab_alpha, reference=collab_reference),
        collab_limit=collab_limit,
        unsafe=unsafe_code_execution,
    )
    run_evaluation(wanted)
    _show(reports.read(out), as_json)


def report(
    folder: Annotated[Path, typer.Argument(help="Results folder of an evaluation.")] = Path("evaluation"),
    html: Annotated[Path | None, typer.Option(help="Also write one page with plots and coloured answers.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Compare with this report's JSON instead; exit code 1 if a figure is not in its interval."),
    ] = None,
    as_json: Json = False,
) -> None:
    """The table of an evaluation: accuracies, differences to FusionRoute, costs, routing."""
    from fusionroute.evaluation import comparison
    from fusionroute.evaluation import report as reports

    if against is not None and html is not None:
        raise UsageError("--against compares and --html writes a page: one of them at a time")
    found = reports.read(folder)
    if against is not None:
        compared = comparison.compare(comparison.read(against), found)
        print(comparison.as_json(compared) if as_json else comparison.as_markdown(compared))
        if comparison.outside(compared):
            raise typer.Exit(1)
        return
    if html is not None:
        from fusionroute.evaluation import page
        from fusionroute.files import staged_file

        text = page.render(found, folder)
        with staged_file(html) as scratch:
            scratch.write_text(text, encoding="utf-8")
    _show(found, as_json)


def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line with `--model fusionroute`; every argument is handed on."""
    from fusionroute.evaluation import harness

    harness.main(context.args)


def _variants(entries: list[str]) -> dict[str, Path]:
    from fusionroute.collection import locate

    found: dict[str, Path] = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not (name and folder) or "," in name:
            raise UsageError(f"--variant {entry!r} must be NAME=COLLECTION, such as plain-dpo=runs/plain/collection")
        if name in found:
            raise UsageError(f"--variant names {name} twice")
        found[name] = locate(folder)
    return found


def _show(found: dict[str, Any], as_json: bool) -> None:
    from fusionroute.evaluation import report as reports

    print(reports.as_json(found) if as_json else reports.as_markdown(found))
    if reports.unscored(found):
        raise typer.Exit(3)
