"""The command line's `pairs`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fusionroute.cli_options import Base, Collection, Dtype, Json, NewTokens, Seed, TopP


def pairs(
    data: Annotated[Path, typer.Option("--data", help="Folder with the training files and the benchmarks'.")],
    out: Annotated[Path, typer.Option(help="File of the pairs; answers are kept beside it.")] = Path("pairs.jsonl"),
    solutions: Annotated[
        Path | None, typer.Option(help="Also write right answers here, as chat rows to train an expert on.")
    ] = None,
    collection: Collection = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Whose problems, by commas: gsm8k, mbpp, ifeval.")
    ] = "gsm8k,mbpp",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows of each task.")] = None,
    start: Annotated[
        int | None, typer.Option(min=0, help="First row; 500 of gsm8k's, 0 of mbpp's, 150 of ifeval's if none.")
    ] = None,
    stop: Annotated[int | None, typer.Option(help="One past the last row.")] = None,
    shuffle_seed: Annotated[
        int | None, typer.Option(help="Shuffle rows with this seed; 0, and the file's order for mbpp, if none.")
    ] = None,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Also problems that the recipes hold out of training.")
    ] = False,
    samples: Annotated[
        int, typer.Option(min=0, help="Answers to each problem; 0 takes the --reference alone, for --solutions.")
    ] = 4,
    most: Annotated[int, typer.Option(min=1, help="Pairs of one problem, and solutions, at most.")] = 1,
    reference: Annotated[
        bool, typer.Option("--reference", help="Where no answer is right, a reference that is right is.")
    ] = False,
    expert: Annotated[str | None, typer.Option(help="This expert alone answers; the whole collection if none.")] = None,
    hint: Annotated[
        bool, typer.Option("--hint", help="Show the reference solution to who answers, and not in what is written.")
    ] = False,
    draws: Annotated[int, typer.Option(min=1, help="Of ifeval, so many draws of instructions for each request.")] = 1,
    edit: Annotated[
        bool,
        typer.Option("--edit", help="Of ifeval, ask without instructions and edit the answers to follow them."),
    ] = False,
    temperature: Annotated[float, typer.Option(help="Above 0.")] = 0.8,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    max_new_tokens: NewTokens = 400,
    batch: Annotated[int, typer.Option(min=1, help="Answers written together.")] = 32,
    dtype: Dtype = None,
    base: Base = None,
    unsafe_code_execution: Annotated[
        bool, typer.Option("--unsafe-code-execution", help="Run model-written code even where nothing isolates it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Preference pairs from training problems: sample, check, keep right and wrong; resumes."""
    from fusionroute import collection as collections
    from fusionroute.evaluation.pair_settings import PairSettings
    from fusionroute.evaluation.pairs import describe, make_pairs

    rows = {"start": start, "stop": stop, "shuffle_seed": shuffle_seed}
    wanted = PairSettings(
        collection=collections.locate(collection),
        out=out,
        solutions=solutions,
        data=data,
        tasks=list(dict.fromkeys(name for name in tasks.split(",") if name)),
        rows={name: value for name, value in rows.items() if value is not None},
        limit=limit,
        samples=samples,
        most=most,
        all_rows=all_rows,
        reference=reference,
        expert=expert,
        hint=hint,
        draws=draws,
        edit=edit,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch=batch,
        dtype=dtype,
        base=base,
        unsafe=unsafe_code_execution,
    )
    summary = make_pairs(wanted)
    print("\n".join(describe(summary)), file=sys.stderr)
    count = summary["pairs"]
    print(json.dumps(summary) if as_json else f"{out}: {count} pairs" if count else f"no pairs, and no {out}")
    if solutions is not None and not as_json:
        print(f"{solutions}: {sum(found['solutions'] for found in summary['tasks'].values())} solutions")
