"""`fusionroute serve`: options to settings, nothing else."""

import os
from enum import Enum
from typing import Annotated, Any

import typer

from fusionroute import placement
from fusionroute.cli_options import Base, Collection, Compile, Device, Dtype, Place
from fusionroute.errors import FusionRouteError, UsageError, first_line

KEY = "FUSIONROUTE_API_KEY"
# Options that vLLM has nothing like, or has under another name with another meaning.
_NOT_VLLM = (
    "waiting",
    "prompt_tokens",
    "new_tokens",
    "default_tokens",
    "timeout",
    "kv_gigabytes",
    "device",
    "place",
    "compile",
)


class EngineName(str, Enum):
    own = "own"
    vllm = "vllm"


def serve(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM-OPTIONS]", help="vLLM's own options, after --.")
    ] = None,
    collection: Collection = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others reach the machine only at 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The collection's name for clients; its folder's if none.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help=f"Clients must send it; {KEY} in the environment does too.")
    ] = None,
    cors: Annotated[list[str] | None, typer.Option(help="A site whose pages may use the server; repeatable.")] = None,
    rows: Annotated[int, typer.Option(help="Answers that are written at once.")] = 64,
    waiting: Annotated[int, typer.Option(help="Answers beyond these that may wait; more get a 429.")] = 256,
    prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt; what the context allows if none.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Longest answer; what the context allows if none.")] = None,
    default_tokens: Annotated[int, typer.Option(help="New tokens where a request does not say how many.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds for an answer, waiting included.")] = 600.0,
    kv_gigabytes: Annotated[
        float | None, typer.Option(help="For keys and values; half of what is free if none.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option(help="Write what is asked to the log.")] = False,
    access_log: Annotated[bool, typer.Option(help="A line for each request, without what it says.")] = True,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = None,
    place: Place = None,
    compile: Compile = False,
    engine: Annotated[EngineName, typer.Option(help="vllm starts vLLM's server, without the page.")] = EngineName.own,
) -> None:
    """Serve a collection: the OpenAI protocol at /v1, a page at / that shows who wrote what."""
    key = api_key or os.environ.get(KEY) or None
    if engine is EngineName.vllm:
        for option in _NOT_VLLM:
            # Not what its value is: a default that is named has been asked for.
            if context.get_parameter_source(option).name != "DEFAULT":  # type: ignore[union-attr]
                raise UsageError(f"--{option.replace('_', '-')} is not for vLLM: give vLLM's own options after --")
        _serve_vllm(
            collection,
            name=name,
            host=host,
            port=port,
            key=key,
            origins=tuple(cors or ()),
            rows=rows,
            access_log=access_log,
            log_prompts=log_prompts,
            dtype=dtype,
            base=base,
            arguments=tuple(arguments or ()),
        )
        return
    if arguments:
        raise UsageError(f"{arguments[0]}: only --engine vllm takes more arguments")
    try:
        from fusionroute.serving import server
    except ImportError as error:
        missing = error.name or first_line(error)
        raise FusionRouteError(f"serving needs {missing}: pip install 'fusionroute[serve]'") from None
    from fusionroute.serving.settings import Limits

    if kv_gigabytes is not None and kv_gigabytes <= 0:
        raise UsageError(f"--kv-gigabytes must be above 0, not {kv_gigabytes}")
    limits = Limits(rows, waiting, prompt_tokens, new_tokens, default_tokens, seconds=timeout)
    budget = None if kv_gigabytes is None else int(kv_gigabytes * 1e9)
    how = placement.loading(dtype=dtype, base=base, device=device, place=place) | {"compile": compile}
    service = server.make_service(collection, limits, name=name, kv_budget=budget, log_prompts=log_prompts, **how)
    server.serve(service, host, port, key=key, origins=tuple(cors or ()), access_log=access_log)


def _serve_vllm(collection: str | None, **settings: Any) -> None:
    from fusionroute.integrations import vllm_server

    vllm_server.serve(collection, vllm_server.Settings(**settings))
