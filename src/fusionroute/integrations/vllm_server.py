"""`fusionroute serve --engine vllm`: vLLM's own OpenAI server on a collection, as a process that is watched.

Everything that can be refused is refused before vLLM starts. A server that ends without having been told to has failed,
whatever vLLM's exit code says: when a rank dies it shuts down in good order.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from fusionroute import collection as collections
from fusionroute.configuration import FusionRouteConfig, absolute_source
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.integrations import vllm_trace
from fusionroute.integrations.vllm import Placed, check_parallel, check_together, check_version, place

_SERVER = "vllm.entrypoints.launchers.api_server.entry"
# Of vLLM's, what the collection decides or `fusionroute serve` has an option for.
_OURS = ("--model", "--served-model-name", "--host", "--port", "--dtype", "--api-key")
_OVERRIDES = "--hf-overrides"


@dataclass(frozen=True)
class Settings:
    """What `fusionroute serve` was told, as far as vLLM has the like.

    Attributes:
        name: as clients see the collection; None takes its folder's.
        rows: answers that are written at once.
        arguments: vLLM's own, as they are.
    """

    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    origins: tuple[str, ...] = ()
    rows: int = 64
    access_log: bool = True
    log_prompts: bool = False
    dtype: str | None = None
    base: str | None = None
    arguments: tuple[str, ...] = ()


def serve(collection: str | None, settings: Settings) -> None:
    """Serve until told to stop.

    Raises:
        FusionRouteError: the collection cannot be run so, or the server ended by itself.
    """
    command, environment = prepare(collection, settings)
    # A group of its own: a terminal's Ctrl-C would reach it twice, and the second time means at once.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    told = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True
        server.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = server.wait()
    if not told:
        raise FusionRouteError(f"vLLM's server ended by itself (exit code {code}): its log above says why")


def prepare(collection: str | None, settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The command that starts vLLM's server, and its environment.

    Raises:
        FusionRouteError: arguments that are not for vLLM, a vLLM that was not tested, members that do not fit together,
            or ranks that they do not allow.
    """
    check_arguments(settings)
    check_version()
    folder = collections.locate(collection)
    config = collections.read_config(folder)
    members = place(config, folder, settings.base)
    check_together(config, folder, settings.base)
    check_parallel(members, *_ranks(settings.arguments))
    name = settings.name or (collections.DEFAULT if collection is None else Path(collection).resolve().name)
    command = [sys.executable, "-m", _SERVER, "--model", str(folder)]
    command += ["--served-model-name", name, "--host", settings.host, "--port", str(settings.port)]
    command += ["--max-num-seqs", str(settings.rows), "--dtype", settings.dtype or stored_dtype(members)]
    command += ["--middleware", f"{vllm_trace.__name__}.{vllm_trace.Trace.__name__}"]
    if settings.base is not None:
        command += [_OVERRIDES, json.dumps(on_base(config, settings.base))]
    if settings.origins:
        command += ["--allowed-origins", json.dumps(settings.origins)]
    command += [] if settings.access_log else ["--disable-uvicorn-access-log"]
    command += ["--enable-log-requests"] if settings.log_prompts else []
    environment = {**os.environ, vllm_trace.COLLECTION: json.dumps({"folder": str(folder), "base": settings.base})}
    if settings.key:
        environment["VLLM_API_KEY"] = settings.key  # a command line is everybody's to read
    return [*command, *settings.arguments], environment


def check_arguments(settings: Settings) -> None:
    """Refuse what vLLM's arguments may not say: the last to say it would win, without a word.

    Raises:
        UsageError: the message names the option.
    """
    options = [_hyphens(argument).partition("=")[0].partition(".")[0] for argument in settings.arguments]
    for option in options:
        if option in _OURS:
            raise UsageError(f"{option} is not for vLLM's arguments: see `fusionroute serve --help`")
    if settings.base is not None and _OVERRIDES in options:
        raise UsageError(f"--base and vLLM's {_OVERRIDES} exclude each other: both change what the collection is")


def stored_dtype(members: Sequence[Placed]) -> str:
    """The dtype that all members are stored in: vLLM runs them in one.

    Raises:
        UsageError: there are several.
    """
    found = {member.spec.name: str(member.config.dtype or "float32").removeprefix("torch.") for member in members}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name} is {dtype}" for name, dtype in found.items())
        raise UsageError(f"vLLM runs all members in one dtype, and {told}: name one with --dtype")
    return next(iter(found.values()))


def on_base(config: FusionRouteConfig, base: str) -> dict[str, Any]:
    """What another base changes in the configuration; its digest was compared, and warned of, by `place`."""
    source = absolute_source(base)
    router, *experts = (
        asdict(replace(spec, digest=None) if spec.source == source else spec) for spec in config.specs_on(base)
    )
    return {"router": router, "experts": experts}


def _hyphens(argument: str) -> str:
    """An argument with its option spelt with hyphens; vLLM takes underscores as well."""
    option, equals, value = argument.partition("=")
    return (option.replace("_", "-") if option.startswith("--") else option) + equals + value


def _ranks(arguments: Sequence[str]) -> tuple[int, int]:
    """Tensor-parallel and pipeline ranks among vLLM's arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1)
    try:
        found, _ = parser.parse_known_args([_hyphens(argument) for argument in arguments])
    except argparse.ArgumentError as error:
        raise UsageError(f"vLLM's arguments: {error}") from None
    return found.tensor_parallel_size, found.pipeline_parallel_size
