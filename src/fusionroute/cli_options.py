"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Collection = Annotated[
    str | None,
    typer.Option("--collection", "-c", help="Folder, Hub id or packaged name; the default collection if none."),
]
Base = Annotated[str | None, typer.Option(help="Use these base weights under the adapters.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored if not given.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; the first GPU, else the CPU, if none.")]
Place = Annotated[
    list[str] | None,
    typer.Option(help="A member elsewhere or otherwise than the rest: NAME=DEVICE[,DTYPE[,ATTENTION]]; repeatable."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="torch.compile what stands between products: for GPUs, and rounds otherwise.")
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder that the recipe's data paths start from.")]
RecipeFile = Annotated[Path, typer.Option("--recipe", help="The recipe whose rows and settings are used.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE in place of the recipe's, such as cdpo.training.bias=none; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Alpha = Annotated[float | None, typer.Option(help="Weight of the router's logits; 0 leaves them out.")]
Expert = Annotated[str | None, typer.Option(help="Always this expert; router is the router alone.")]
NewTokens = Annotated[int, typer.Option(min=1)]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Only the so many likeliest tokens; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Only the likeliest tokens whose probabilities reach this.")]
MinP = Annotated[float, typer.Option(help="Only tokens at least so likely, relative to the likeliest.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: tokens that were there count less.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")]
