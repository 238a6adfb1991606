"""The processes of one launch (torchrun, accelerate): which one am I, wait for the others, let one do it.

A launcher sets RANK and WORLD_SIZE; without them there is one process, and nothing here waits or imports. Every wait
has an end: past the timeout of the process group, or when a process dies, the others end with an error.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from fusionroute.errors import FusionRouteError

TIMEOUT = 1800  # seconds that a process waits for another; `ddp_timeout` of transformers has the same default

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def device() -> Any:
    """This process's accelerator, by its number on the machine; None where there is none."""
    import torch

    # torch names the accelerator that it was built for, also on a machine that has none.
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if kind is None else torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


def join(seconds: float = TIMEOUT) -> None:
    """Meet the other processes of the launch; from then on none waits longer than `seconds` for another.

    Raises:
        FusionRouteError: not all of them came in time.
    """
    if world() == 1:
        return
    import torch
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        with lost_peers():
            # The first collective builds the connections, so that who is missing is missed here.
            PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(seconds=seconds))
            torch.distributed.barrier()


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        import torch

        join()
        with lost_peers():
            torch.distributed.barrier()


def agree(value: T) -> T:
    """The main process's `value`, in every process."""
    if world() == 1:
        return value
    import torch

    join()
    box = [value]
    with lost_peers():
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def once(work: Callable[[], Any]) -> None:
    """`work()` in the main process alone, while the others wait; an error of it is everybody's."""
    error: FusionRouteError | None = None
    if is_main():
        try:
            work()
        except FusionRouteError as found:
            error = found
    text = agree(None if error is None else str(error))
    if text is not None:
        raise error or FusionRouteError(text)


@contextlib.contextmanager
def lost_peers() -> Iterator[None]:
    """Turn what gloo, NCCL or the store says of a dead or silent process into one line."""
    try:
        yield
    except FusionRouteError:
        raise
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if world() == 1 or not _is_about_peers(error, text):
            raise
        raise FusionRouteError(
            f"process {rank()} of {world()}: another process of this launch has ended or does not answer "
            f"({text[:200]}); see its own error, then start the launch again: it goes on where it stopped"
        ) from error


def _is_about_peers(error: RuntimeError, text: str) -> bool:
    import torch

    words = ("gloo", "NCCL", "Connection", "Socket", "Timed out", "timed out", "store")
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in words)
