"""FusionRoute: several frozen, specialised language models answer as one, token by token.

Importing the package is light: torch and transformers load when a name below is first touched, and touching
`FusionRouteForCausalLM` or `FusionRouteConfig` registers both with transformers' Auto classes.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fusionroute.collection import encode_chat as encode_chat
    from fusionroute.collection import load_tokenizer as load_tokenizer
    from fusionroute.configuration import FusionRouteConfig as FusionRouteConfig
    from fusionroute.configuration import MemberSpec as MemberSpec
    from fusionroute.decoding.engine import Engine as Engine
    from fusionroute.decoding.rows import Request as Request
    from fusionroute.decoding.sampling import Sampling as Sampling
    from fusionroute.errors import FusionRouteError as FusionRouteError
    from fusionroute.fusion import TokenTrace as TokenTrace
    from fusionroute.modeling import FusionRouteForCausalLM as FusionRouteForCausalLM

_HOMES = {
    "Engine": "decoding.engine",
    "FusionRouteConfig": "configuration",
    "FusionRouteError": "errors",
    "FusionRouteForCausalLM": "modeling",
    "MemberSpec": "configuration",
    "Request": "decoding.rows",
    "Sampling": "decoding.sampling",
    "TokenTrace": "fusion",
    "encode_chat": "collection",
    "load_tokenizer": "collection",
}
__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusionroute' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fusionroute.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """With the names that are not loaded yet, for completion in shells and notebooks."""
    return sorted({*globals(), *__all__})
