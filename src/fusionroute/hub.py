"""A collection on the Hub: what may be pushed, and pushing it. Knows no weights."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute.collection import read_config, save
from fusionroute.configuration import FusionRouteConfig
from fusionroute.errors import UsageError

if TYPE_CHECKING:
    from fusionroute.modeling import FusionRouteForCausalLM


def local_references(config: FusionRouteConfig) -> list[str]:
    """Members whose weights are named by a path of this machine, as `name (path)`."""
    places = [(s.name, place) for s in config.member_specs for place in (s.source, s.adapter) if place is not None]
    # A member's folder inside the collection is written with ./ in front.
    return [f"{name} ({place})" for name, place in places if place.startswith(("/", "~", ".."))]


def push(model: "FusionRouteForCausalLM", repo_id: str, *, embed: bool = False, **kwargs: Any) -> str:
    """Save to a scratch folder and upload it; refuses before writing anything if a member is local."""
    if not embed:
        refuse_local(model.config)
    with tempfile.TemporaryDirectory() as scratch:
        save(model, Path(scratch) / "collection", embed=embed)
        return upload(Path(scratch) / "collection", repo_id, **kwargs)


def upload(folder: Path, repo_id: str, **kwargs: Any) -> str:
    """Upload a collection folder to the Hub and return its address."""
    from huggingface_hub import HfApi

    refuse_local(read_config(folder))
    api = HfApi(token=kwargs.pop("token", None))
    address = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
    api.upload_folder(
        folder_path=folder, repo_id=address.repo_id, commit_message=kwargs.pop("commit_message", "Upload collection")
    )
    return str(address)


def refuse_local(config: FusionRouteConfig) -> None:
    """Raise a `UsageError` if a member is named by a path of this machine."""
    local = local_references(config)
    if local:
        raise UsageError(
            f"cannot push: {', '.join(local)} is a path of this machine; pass embed=True, or make the collection from "
            "a Hub id"
        )
