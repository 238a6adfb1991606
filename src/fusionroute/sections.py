"""What a recipe may say: its sections as pydantic models, and reading one from YAML. Runs nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import Field

from fusionroute.configuration import MemberSpec, check_names
from fusionroute.errors import UsageError
from fusionroute.training.lora import LoraSettings
from fusionroute.training.rows import DataSpec


class _Section(pydantic.BaseModel, extra="forbid"):
    pass


def _check_revision(source: str | None, revision: str | None) -> None:
    if revision is not None and source is None:
        raise ValueError(f"revision {revision} is of no source; the base's stands beside base, at the top")


class ExpertSection(_Section):
    """One expert: with `data` a LoRA trained on the base, without it a model used as it is."""

    name: str
    description: str = ""
    source: str | None = None  # None: the recipe's base
    revision: str | None = None
    adapter: str | None = None
    data: list[DataSpec] = []
    lora: LoraSettings = LoraSettings()
    training: dict[str, Any] = {}

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> "ExpertSection":
        if self.data and (self.source or self.adapter):
            raise ValueError("an expert with data is trained on the base: drop source and adapter")
        _check_revision(self.source, self.revision)
        return self


class RouterSection(_Section):
    """The router: where it starts from, and whether an adapter or every weight trains.

    With `start` it begins as that expert is, as the paper's begins as the instruction-following one: an expert's
    adapter is trained on, in the shape that it has; a whole model is trained as `lora` says.
    """

    start: str | None = None  # an expert's name
    source: str | None = None  # None: the recipe's base
    revision: str | None = None
    lora: LoraSettings | None = LoraSettings(r=16, alpha=32)

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> "RouterSection":
        _check_revision(self.source, self.revision)
        return self


class PhaseSection(_Section):
    """One phase of router training: its rows, and fields of `RouterArguments`."""

    data: list[DataSpec]
    training: dict[str, Any] = {}


class FinetunedSection(_Section):
    """The baseline "Fine-tuned Model": the router's LoRA and data without routing and experts, SFT and then DPO.

    Rows and settings are those of the sections `sft` and `cdpo`; `training` and `dpo` override fields of trl's
    `SFTConfig` and `DPOConfig`.
    """

    training: dict[str, Any] = {}
    dpo: dict[str, Any] = {}


class RewardSection(_Section):
    """A reward model on the router's base: `selection` chooses among answers, `judge` compares systems.

    `training` are fields of trl's `RewardConfig`. No pair may be in the data of two of them, in that of `cdpo`, or in
    what is held out.
    """

    name: Literal["selection", "judge"]
    data: list[DataSpec] = Field(min_length=1)
    heldout: list[DataSpec] = Field(min_length=1)
    lora: LoraSettings = LoraSettings(r=4, alpha=8)
    training: dict[str, Any] = {}


class Recipe(_Section):
    """A whole recipe; every key is commented in `recipes/smollm2.yaml`."""

    name: str = Field(pattern=r"^[a-z][a-z0-9._-]*$")  # unanchored, pydantic looks for it anywhere
    base: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    max_length: int | None = 512
    alpha: float = 1.0
    experts: list[ExpertSection] = Field(min_length=1)
    router: RouterSection = RouterSection()
    sft: PhaseSection
    cdpo: PhaseSection | None = None
    finetuned: FinetunedSection | None = None
    rewards: list[RewardSection] = []
    heldout: list[DataSpec] = []
    benchmarks: list[str] | None = None  # files to keep out of training; None: those known under --data

    @pydantic.model_validator(mode="after")
    def _start_is_an_expert(self) -> "Recipe":
        start = self.router.start
        if start is None:
            return self
        if self.router.source is not None:
            raise ValueError(f"router: start ({start}) and source ({self.router.source}) exclude each other")
        names = [expert.name for expert in self.experts]
        if start not in names:
            raise ValueError(f"router.start: no expert {start!r} among {', '.join(names)}")
        expert = self.experts[names.index(start)]
        if (expert.data or expert.adapter) and "lora" in self.router.model_fields_set:
            raise ValueError(f"router.lora: the router goes on with the adapter of {start} in its shape: drop lora")
        return self

    @pydantic.field_validator("experts")
    @classmethod
    def _names_of_members(cls, experts: list[ExpertSection]) -> list[ExpertSection]:
        # Now, and not when the first collection is made of experts that took days to train.
        try:
            check_names([MemberSpec(expert.name, expert.source or "").name for expert in experts])
        except UsageError as error:
            raise ValueError(str(error)) from None
        return experts

    @pydantic.field_validator("rewards")
    @classmethod
    def _one_of_each_name(cls, rewards: list[RewardSection]) -> list[RewardSection]:
        names = [reward.name for reward in rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"one of each name, not {', '.join(names)}")
        return rewards


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        changes: `KEY=VALUE`, instead of what the file says: a path of keys and, in lists, places from 0, by dots, and
            a value in YAML, such as `sft.training.learning_rate=1.0e-4` or `finetuned=null`.

    Raises:
        UsageError: missing, unreadable, not YAML, or an unknown or impossible key; one line that names it.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: name a recipe file, such as recipes/smollm2.yaml") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if changes:
        data = _unshared(data)
    for change in changes:
        _change(data, change)
    try:
        return Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        problems = [": ".join(filter(None, (".".join(map(str, p["loc"])), p["msg"]))) for p in error.errors()]
        raise UsageError(f"{path}: {'; '.join(problems)}") from None


def _unshared(value: Any) -> Any:
    """The same without YAML's aliases, which stand for one object in several places."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _change(data: Any, change: str) -> None:
    """Put one `KEY=VALUE` into a recipe as it was read; sections on the way that it lacks are made.

    Raises:
        UsageError: no such form, no YAML, or a way through something that has no keys or no such place.
    """
    name, equals, text = change.partition("=")
    *way, last = name.split(".")
    if not equals or not all((*way, last)):
        raise UsageError(f"--set {change!r} must be KEY=VALUE, such as sft.training.learning_rate=1.0e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {name}: {text!r} is not YAML: {' '.join(str(error).split())}") from None
    at = data
    try:
        for key in way:
            at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
        at[int(last) if isinstance(at, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UsageError(f"--set {name}: the recipe has no such place") from None
