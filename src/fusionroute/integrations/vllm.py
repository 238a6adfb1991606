"""The vLLM plugin: what every vLLM process calls at its start, and what is checked before a collection runs there.

`pip install 'fusionroute[vllm]'`, then `fusionroute serve --engine vllm`, `vllm serve FOLDER` or `vllm.LLM(FOLDER)`.
The model is in `fusionroute.integrations.vllm_model`. Importing this module loads neither vLLM nor torch.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute.errors import FusionRouteError, UsageError, first_line

if TYPE_CHECKING:
    from fusionroute.configuration import FusionRouteConfig, MemberSpec

TESTED = ">=0.32,<0.33"  # versions of vLLM; also in pyproject.toml
ARCHITECTURE = "FusionRouteForCausalLM"
_MODEL = "fusionroute.integrations.vllm_model:FusionRouteForCausalLM"

logger = logging.getLogger(__name__)


def register() -> None:
    """The entry point of group `vllm.general_plugins`.

    A vLLM that was not tested is told so in its log and goes on without collections, so that its other models run.
    """
    try:
        check_version()
    except FusionRouteError as error:
        logger.error("%s; collections are not registered", error)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from fusionroute import configuration  # noqa: F401  registers model_type "fusionroute" with transformers

    ModelRegistry.register_model(ARCHITECTURE, _MODEL)
    MODELS_CONFIG_MAP[ARCHITECTURE] = Checks


class Checks:
    """What vLLM asks of an architecture before it starts any worker: a refusal here leaves no rank waiting."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Name the tokenizer of a collection that has none of its own; what is refused waits until ranks are known."""
        from fusionroute import collection

        if model_config.tokenizer == model_config.model:
            folder = collection.locate(model_config.model, revision=model_config.revision)
            text = collection.tokenizer_folder(model_config.hf_config, folder)
            model_config.tokenizer = model_config.model if text == folder else str(text)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Look at members, vocabularies, the route head and ranks.

        Raises:
            FusionRouteError: the collection cannot be run so.
        """
        from fusionroute import collection

        model, parallel, scheduler = vllm_config.model_config, vllm_config.parallel_config, vllm_config.scheduler_config
        folder = collection.locate(model.model, revision=model.revision)
        members = place(model.hf_config, folder)
        check_together(model.hf_config, folder)
        check_parallel(members, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        if any("sliding_attention" in (getattr(member.config, "layer_types", None) or ()) for member in members):
            # Members of different page sizes fit into one group of blocks only where every layer keeps all of its keys.
            scheduler.disable_hybrid_kv_cache_manager = True


def check_version() -> None:
    """Refuse a vLLM that collections were not tested with.

    Raises:
        FusionRouteError: vLLM is missing, or not a version that was tested.
    """
    from packaging.specifiers import SpecifierSet

    try:
        from vllm import __version__ as found
    except ImportError as error:
        missing = error.name or first_line(error)
        raise FusionRouteError(f"this needs {missing}: pip install 'fusionroute[vllm]'") from None
    if not SpecifierSet(TESTED).contains(found.partition("+")[0], prereleases=True):
        raise FusionRouteError(f"vLLM is {found}, tested is {TESTED}: pip install 'fusionroute[vllm]'")


@dataclass(frozen=True)
class Placed:
    """A member whose files are here.

    Attributes:
        folder, adapter: of the weights and, if it has one, of its adapter.
        config: the transformers configuration of the model in `folder`.
    """

    spec: "MemberSpec"
    folder: Path
    adapter: Path | None
    config: Any


def place(config: "FusionRouteConfig", folder: Path, base: str | None = None) -> list[Placed]:
    """The members of the collection in `folder`, the router first, their files and digests checked.

    Args:
        base: replaces the base of the adapters; another digest is then a warning.

    Raises:
        FusionRouteError: anything missing, half-written, or not what the collection was made with; a member whose
            weights are to be rounded.
    """
    from fusionroute.configuration import absolute_source
    from fusionroute.members import check_adapter_digest, check_digest, read_model_config, resolve_member
    from fusionroute.quantisation import FORMATS

    other = None if base is None else absolute_source(base)
    placed = []
    for spec in config.specs_on(base):
        if spec.dtype in FORMATS:
            raise UsageError(
                f"{spec.name} in {spec.dtype}: vLLM rounds no weights here, name weights that are quantised"
            )
        weights, adapter = resolve_member(spec, folder)
        check_digest(spec, weights, override=spec.source == other)
        if adapter is not None:
            check_adapter_digest(spec, adapter)
        placed.append(Placed(spec, weights, adapter, read_model_config(weights)))
    return placed


def check_together(config: "FusionRouteConfig", folder: Path, base: str | None = None) -> None:
    """Refuse members that cannot answer as one; arguments as of `place`.

    Raises:
        FusionRouteError: the members' vocabularies differ, or the route head is another collection's.
    """
    from fusionroute import collection
    from fusionroute.configuration import ROUTER
    from fusionroute.router import RouteHead

    collection.check_vocabulary_of(config, folder, base)
    RouteHead.load(folder / ROUTER, config.expert_names, config.hidden_size)


def check_parallel(members: Sequence[Placed], tensor: int, pipeline: int) -> None:
    """Refuse a split that a member does not allow; vLLM itself looks at the router only.

    Raises:
        UsageError: the message names the member and both numbers.
    """
    for member in members:
        heads = member.config.num_attention_heads
        groups = getattr(member.config, "num_key_value_heads", None) or heads
        inner = getattr(member.config, "intermediate_size", tensor)
        layers = member.config.num_hidden_layers
        # Fewer groups than ranks are repeated on them.
        of_groups = groups % tensor == 0 if groups >= tensor else tensor % groups == 0
        for what, number, fits in (
            ("attention heads", heads, heads % tensor == 0),
            ("key-value heads", groups, of_groups),
            ("columns in its MLP", inner, inner % tensor == 0),
        ):
            if not fits:
                raise UsageError(
                    f"{member.spec.name} has {number} {what}, which {tensor} tensor-parallel ranks cannot share: "
                    "take another --tensor-parallel-size"
                )
        if layers < pipeline:
            raise UsageError(
                f"{member.spec.name} has {layers} layers, fewer than {pipeline} pipeline ranks: "
                "take a smaller --pipeline-parallel-size"
            )
