"""A collection on the Hub: what may be pushed, and pushing it. Knows no weights."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fusionroute import sources
from fusionroute.collection import read_config, save
from fusionroute.configuration import FusionRouteConfig
from fusionroute.errors import UsageError

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM

_MESSAGE = "Upload collection"


def local_references(config: FusionRouteConfig) -> list[str]:
    """Members whose weights are named by a path that leads out of the collection, as `name (path)`."""
    places = [(s.name, place) for s in config.member_specs for place in (s.source, s.adapter) if place is not None]
    paths = [(name, place) for name, place in places if place.startswith(("/", "~", "."))]
    return [f"{name} ({place})" for name, place in paths if not sources.is_inside(place)]


def push(
    model: "FusionRouteForCausalLM",
    repo_id: str,
    *,
    embed: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = _MESSAGE,
) -> str:
    """Save to a scratch folder and upload it; refuses before writing anything if a member is local.

    Args:
        embed: put whole models in too, in place of references.
        token, private, commit_message: as in `upload`.
    """
    if not embed:
        refuse_local(model.config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "collection"
        save(model, folder, embed=embed)
        return upload(folder, repo_id, token=token, private=private, commit_message=commit_message)


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = _MESSAGE,
) -> str:
    """Upload a collection folder to the main branch of a Hub repository, made if need be; returns its address.

    Args:
        token: of the Hub; None takes the one that is logged in.
        private: whether a repository made here is; None is the account's default.

    Raises:
        UsageError: a member is named by a path of this machine.
    """
    from huggingface_hub import HfApi

    refuse_local(read_config(folder))
    api = HfApi(token=token)
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=address.repo_id, commit_message=commit_message)
    return str(address)


def refuse_local(config: FusionRouteConfig) -> None:
    """Raise a `UsageError` if a member is named by a path of this machine."""
    local = local_references(config)
    if local:
        raise UsageError(
            f"cannot push: {', '.join(local)} is a path of this machine; pass embed=True, or make the collection from "
            "a Hub id"
        )
