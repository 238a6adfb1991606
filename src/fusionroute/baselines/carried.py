"""What a collection carries beside itself for its evaluation: `baselines/` in its folder, small adapters only.

    sft/         the router after phase 1: adapter and route head; the experts are the collection's
    finetuned/   the fine-tuned baseline's adapter
    reward/      the reward model that selects among answers, with `reward.json`
    judge/       another reward model, which compares systems

All of them stand on the router's base. No member of the collection depends on this folder.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from fusionroute import sources
from fusionroute.collection import read_config
from fusionroute.copying import PROVENANCE, copy_adapter
from fusionroute.errors import UsageError
from fusionroute.files import read_json, staged_folder

BASELINES = "baselines"
REWARD_FILE = "reward.json"


def carry(collection: Path, adapters: Mapping[str, Path], source: str, head: Path | None = None) -> None:
    """Copy adapter folders into the collection's `baselines/`, in place of what is there.

    Args:
        adapters: name in `baselines/` to folder; its `reward.json` is copied too.
        source: of the base they stand on.
        head: the route head's file after phase 1.
    """
    with staged_folder(collection / BASELINES, replace=True) as scratch:
        for name, folder in adapters.items():
            copy_adapter(folder, scratch / name, source)
            if (folder / REWARD_FILE).is_file():
                shutil.copyfile(folder / REWARD_FILE, scratch / name / REWARD_FILE)
            if name == "sft" and head is not None:
                shutil.copyfile(head, scratch / name / head.name)


def carried(collection: Path, name: str) -> Path | None:
    """The folder of the adapter `name` in the collection's `baselines/`, or None."""
    folder = collection / BASELINES / name
    return folder if (folder / "adapter_config.json").is_file() else None


def shown(source: str, collection: Path) -> str:
    """A source as a reader is told it: what the collection carries by its place there, on whatever machine it lies."""
    _, own, name = source.rpartition(f"+{collection / BASELINES}/")
    return f"the collection's {BASELINES}/{name}" if own else source


def split_adapter(source: str) -> tuple[str, str | None]:
    """SOURCE+ADAPTER in two; the adapter is None where none is named. Paths may hold plus signs too."""
    parts = source.split("+")
    ways = [("+".join(parts[:at]), "+".join(parts[at:])) for at in range(1, len(parts))]
    folders = [way for way in ways if (Path(way[1]) / "adapter_config.json").is_file()]
    if folders or not ways or Path(source).exists():
        return folders[0] if folders else (source, None)
    return next((way for way in ways if Path(way[0]).exists()), ways[0])


def reward_source(collection: Path, base: str | None, given: str | None, name: str = "reward") -> str | None:
    """The reward model to load: the given one, else what the collection carries as SOURCE+ADAPTER, else None.

    Args:
        base: replaces the base that the collection's adapters stand on.
        name: `reward`, which selects among answers, or `judge`.

    Raises:
        UsageError: it stands on a base that no member has.
    """
    folder = carried(collection, name)
    if given is not None or folder is None:
        return given
    trained_on = read_json(folder / PROVENANCE)
    config = read_config(collection)
    adapted = any(spec.adapter for spec in config.member_specs)
    for before, spec in zip(config.member_specs, config.specs_on(base if adapted else None), strict=True):
        if before.digest is not None and before.digest == trained_on.get("base_digest"):
            if spec.revision is None and not spec.source.startswith("./"):
                return f"{spec.source}+{folder}"
            return f"{sources.resolve(spec.source, revision=spec.revision, relative_to=collection)}+{folder}"
    raise UsageError(
        f"{folder} stands on a base with digest {trained_on.get('base_digest')}, which is no member's: "
        f"give --{name} SOURCE+{folder}"
    )
