"""The command line: verb -> function, nothing else. Imports nothing heavy until a verb runs."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from fusionroute import __version__, cli_evaluation, cli_serving, placement, progress
from fusionroute.cli_options import (
    Alpha,
    Base,
    Changes,
    Collection,
    Compile,
    Data,
    Device,
    Dtype,
    Expert,
    Json,
    MinP,
    NewTokens,
    Penalty,
    Place,
    RecipeFile,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from fusionroute.cli_pairs import pairs
from fusionroute.errors import FusionRouteError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Several frozen, specialised language models answer as one, token by token.",
)

benches = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
app.add_typer(benches, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fusionroute {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    collection: Collection = None,
    alpha: Alpha = None,
    expert: Expert = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = None,
    place: Place = None,
    compile: Compile = False,
    as_json: Json = False,
) -> None:
    """Answer one prompt, coloured by the expert that wrote each token."""
    from fusionroute import chat
    from fusionroute.decoding.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
    settings = _settings(alpha, expert, max_new_tokens, sampling, stop)
    how = placement.loading(dtype=dtype, base=base, device=device, place=place)
    session = chat.Session(collection, quiet=as_json, compile=compile, **how)
    answer = session.answer([{"role": "user", "content": prompt}], settings, show=not as_json)
    if as_json:
        print(json.dumps(answer.to_dict(), ensure_ascii=False))


@app.command(name="chat")
def chat_(
    collection: Collection = None,
    alpha: Alpha = None,
    expert: Expert = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = None,
    place: Place = None,
    compile: Compile = False,
) -> None:
    """Talk to a collection; an empty line or Ctrl-D ends."""
    from fusionroute import chat
    from fusionroute.decoding.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
    settings = _settings(alpha, expert, max_new_tokens, sampling, stop)
    how = placement.loading(dtype=dtype, base=base, device=device, place=place)
    chat.Session(collection, compile=compile, **how).talk(settings)


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    router: Annotated[str, typer.Option(help="Model the router starts from: path, Hub id or GGUF.")],
    expert: Annotated[
        list[str], typer.Option(help="NAME=SOURCE, or NAME=SOURCE+ADAPTER for a LoRA; in route order, repeatable.")
    ],
    embed: Annotated[bool, typer.Option(help="Copy whole models into the collection.")] = False,
    alpha: Annotated[float, typer.Option(help="Weight of the router's logits.")] = 1.0,
) -> None:
    """Make a collection from experts and a router base; its route head is untrained."""
    from fusionroute import collection as collections
    from fusionroute.baselines.carried import split_adapter
    from fusionroute.configuration import ROUTER, MemberSpec

    experts = []
    for entry in expert:
        name, equals, source = entry.partition("=")
        if not equals or not source:
            raise UsageError(f"--expert {entry!r} must be NAME=SOURCE or NAME=SOURCE+ADAPTER")
        source, adapter = split_adapter(source)
        experts.append(MemberSpec(name, source, adapter=adapter))
    names = [ROUTER, *(spec.name for spec in experts)] if embed else []
    config = collections.assemble(out, MemberSpec(ROUTER, router), experts, embed=names, alpha=alpha)
    print(f"{out}: {len(experts)} experts ({', '.join(config.expert_names)}), {config.vocab_size} shared ids")
    print(
        f"The route head is untrained: every token goes to {config.expert_names[0]}. Next: fusionroute train sft {out}"
    )


@app.command()
def inspect(
    collection: Annotated[str | None, typer.Argument(help="Folder, Hub id or packaged name.")] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Print members, sizes, digests, licences, templates, the vocabulary check and the memory needed."""
    from fusionroute import inspection
    from fusionroute.collection import locate

    report = inspection.inspect_collection(locate(collection), base)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        from rich.console import Console

        Console().print(inspection.render(report))
    if inspection.has_errors(report):
        raise typer.Exit(1)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME if not given.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Have the recipe's base from here; the collection names the recipe's.")
    ] = None,
    changes: Changes = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Every stage on random models, in a minute.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Run nothing: print stages, GPU-hours, memory, disk and downloads.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="With --plan: GPUs that share a router's training.")] = 8,
    as_json: Json = False,
) -> None:
    """Run a recipe: base, experts, annotation, SFT, CDPO, collection, held-out figures. Resumes; skips what is done."""
    if plan:
        if tiny:
            raise UsageError("--plan and --tiny exclude each other: a tiny run takes a minute")
        from fusionroute import planning

        document = planning.plan(recipe, out, data, base=base, gpus=gpus, changes=changes or ())
        if as_json:
            print(json.dumps(document, ensure_ascii=False))
        else:
            from rich.console import Console

            from fusionroute.planning_report import render

            Console().print(render(document))
        if document["problems"]:
            raise FusionRouteError("; ".join(document["problems"]))
        return
    if as_json:
        raise UsageError("--json goes with --plan")
    from fusionroute.recipe import execute

    print(execute(recipe, out, data, tiny=tiny, base=base, changes=changes or ()))


@app.command()
def annotate(
    collection: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    recipe: RecipeFile,
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Folder of the annotations.")] = Path("annotations"),
    phase: Annotated[str, typer.Option(help="Whose rows: sft or cdpo.")] = "sft",
    member: Annotated[list[str] | None, typer.Option(help="Only these members; all experts if none.")] = None,
    part: Annotated[str | None, typer.Option(help="Only this part of the rows, such as 2/4.")] = None,
    dtype: Dtype = None,
    base: Base = None,
) -> None:
    """Write each expert's label log-probabilities and greedy ids beside the recipe's rows; resumes."""
    from fusionroute import workflows

    for folder in workflows.annotate(collection, recipe, data, out, phase, member, dtype, base, part):
        _say(folder)


@app.command()
def train(
    phase: Annotated[str, typer.Argument(help="sft (phase 1, Eq. 2) or cdpo (phase 2, Eq. 3 and Algorithm 1).")],
    collection: Annotated[str, typer.Argument(help="A collection; for cdpo, one after phase 1.")],
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="Folder of the new collection.")],
    data: Data = None,
    annotations: Annotated[Path, typer.Option(help="Folder of the annotations.")] = Path("annotations"),
    changes: Changes = None,
    dtype: Dtype = None,
    base: Base = None,
) -> None:
    """Train the router of a collection on the rows of the recipe's phase."""
    from fusionroute import workflows

    _say(workflows.train(phase, collection, recipe, data, annotations, out, dtype, base, changes or ()))


@app.command()
def routing(
    recipe: RecipeFile,
    collection: Collection = None,
    data: Data = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Measure routing and fusion on the recipe's held-out rows, teacher-forced."""
    from fusionroute import workflows

    result, text = workflows.measure(collection, recipe, data, base)
    print(json.dumps(result) if as_json else text)


@app.command()
def theory(
    plot: Annotated[Path | None, typer.Option(help="Also draw value against length into this file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random instances.")] = 0,
    as_json: Json = False,
) -> None:
    """Check the claims of the paper on MDPs small enough to solve exactly; exit code 1 if one fails."""
    from fusionroute.theory import report
    from fusionroute.theory.claims import check

    document = check(seed)
    print(json.dumps(document, ensure_ascii=False) if as_json else report.render(document))
    if plot is not None:
        report.plot(document, plot)
    if not document["holds"]:
        raise typer.Exit(1)


app.command()(cli_serving.serve)
app.command()(pairs)
app.command()(cli_evaluation.merge)
app.command()(cli_evaluation.evaluate)
app.command()(cli_evaluation.report)
app.command(
    name="lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)(cli_evaluation.lm_eval)


@benches.command()
def decode(
    collection: Collection = None,
    quick: Annotated[bool, typer.Option("--quick", help="Batch 1 and two rounds, in about two minutes.")] = False,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows together; repeatable; 1, 8, 16 if none.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the ratios into this file.")] = None,
    dtype: Dtype = "bfloat16",
    base: Base = None,
    device: Device = None,
    place: Place = None,
    as_json: Json = False,
) -> None:
    """Decoding in every mode with every drafter, against transformers' `generate` of one expert; last line JSON."""
    from fusionroute.decoding import bench_report
    from fusionroute.decoding.bench import measure_collection

    how = placement.loading(dtype=dtype, base=base, device=device, place=place)
    document = measure_collection(collection, quick=quick, batches=batch or (), **how)
    if not as_json:
        print(bench_report.render(document))
    if plot is not None:
        bench_report.plot(document, plot)
    print(json.dumps(document))


def _settings(
    alpha: float | None, expert: str | None, max_new_tokens: int, sampling: Any, stop: list[str] | None
) -> dict[str, Any]:
    """What `generate` and `chat` ask of each row, as `Request` has it."""
    return {
        "alpha": alpha,
        "expert": expert,
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "stop": stop or (),
    }


def _say(folder: Path) -> None:
    from fusionroute.training import processes

    if processes.is_main():
        print(folder)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Entry point: our own errors become one line and an exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.showwarning = _warn
    progress.hush()
    try:
        app()
    except FusionRouteError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
