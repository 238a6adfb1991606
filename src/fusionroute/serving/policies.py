"""Model names: `NAME`, `NAME@expert=math`, `NAME@alpha=0.5`, `NAME@routing=query`, in any mixture.

Each is a policy of one loaded collection; no name reaches the file system.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fusionroute.configuration import ROUTER
from fusionroute.modeling import Routing
from fusionroute.serving.errors import ApiError


@dataclass(frozen=True)
class Policy:
    """How a request is answered; None leaves it to the collection."""

    expert: str | None = None
    alpha: float | None = None
    routing: Routing | None = None

    def settings(self) -> dict[str, Any]:
        """As fields of the engine's `Request`."""
        return {"expert": self.expert, "alpha": self.alpha, "routing": self.routing or "token"}


def names(collection: str, experts: Sequence[str]) -> list[str]:
    """The names that are listed: the collection fused, every member alone, and the router's decision per prompt.

    An expert alone is `expert=NAME,alpha=0`; with the complement it is `expert=NAME`.
    """
    alone = [f"{collection}@expert={expert},alpha=0" for expert in experts]
    return [collection, *alone, f"{collection}@expert={ROUTER}", f"{collection}@routing=query"]


def parse(model: str | None, collection: str, experts: Sequence[str]) -> Policy:
    """The policy of a model name; None is the collection as it is.

    Raises:
        ApiError: another collection, or a policy that there is not.
    """
    if model is None:
        return Policy()
    name, at, text = model.partition("@")
    if name != collection:
        raise _not_found(f"there is no model {name[:80]!r}; this server has {collection!r}")
    found: dict[str, Any] = {}
    for part in text.split(",") if at else []:
        key, _, value = part.partition("=")
        if key in found:
            raise _not_found(f"the model name gives {key} twice")
        if key == "expert":
            found[key] = check_expert(value, experts)
        elif key == "alpha":
            found[key] = _number(value)
        elif key == "routing" and value in get_args(Routing):
            found[key] = value
        else:
            raise _not_found(
                f"the model name has {part[:80]!r}; after {collection}@ there may be expert=NAME, alpha=NUMBER and "
                f"routing={'|'.join(get_args(Routing))}"
            )
    return Policy(**found)


def merge(
    policy: Policy, expert: str | None, alpha: float | None, routing: Routing | None, experts: Sequence[str]
) -> Policy:
    """The policy of a name with what the body says, which goes before it.

    Raises:
        ApiError: an expert that there is not.
    """
    return Policy(
        policy.expert if expert is None else check_expert(expert, experts, "expert"),
        policy.alpha if alpha is None else alpha,
        policy.routing if routing is None else routing,
    )


def check_expert(name: str, experts: Sequence[str], param: str = "model") -> str:
    """The name, if there is such a member; `param` is the body's field that has it.

    Raises:
        ApiError: there is not.
    """
    if name != ROUTER and name not in experts:
        known = ", ".join([*experts, ROUTER])
        raise _not_found(f"there is no expert {name[:80]!r}; there are {known}", param)
    return name


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -100 <= value <= 100:
        raise _not_found(f"alpha is {text[:80]!r}; it must be a number from -100 to 100")
    return value


def _not_found(message: str, param: str = "model") -> ApiError:
    return ApiError(404, message, param, "model_not_found")
