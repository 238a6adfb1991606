"""Model names as policies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.serving import policies
from fusionroute.serving.errors import ApiError
from fusionroute.serving.policies import Policy

EXPERTS = ["math", "code"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (None, Policy()),
        ("tiny", Policy()),
        ("tiny@expert=math", Policy(expert="math")),
        ("tiny@expert=router", Policy(expert="router")),
        ("tiny@alpha=0.5", Policy(alpha=0.5)),
        ("tiny@alpha=-1", Policy(alpha=-1.0)),
        ("tiny@routing=query,alpha=0", Policy(alpha=0.0, routing="query")),
        ("tiny@expert=code,alpha=0", Policy(expert="code", alpha=0.0)),
    ],
)
def test_names(model: str | None, expected: Policy) -> None:
    assert policies.parse(model, "tiny", EXPERTS) == expected


@pytest.mark.parametrize(
    "model",
    ["other", "", "tiny@", "tiny@expert=law", "tiny@alpha=much", "tiny@alpha=nan", "tiny@alpha=inf", "tiny@alpha=1e9",
     "tiny@routing=no", "tiny@seed=1", "tiny@alpha=1,alpha=2", "../tiny", "/etc/passwd", "tiny@expert=../math"],
)  # fmt: skip
def test_names_that_there_are_not(model: str) -> None:
    with pytest.raises(ApiError) as refusal:
        policies.parse(model, "tiny", EXPERTS)
    assert (refusal.value.status, refusal.value.code, refusal.value.param) == (404, "model_not_found", "model")


@given(st.text())
def test_any_other_text_is_refused(model: str) -> None:
    if model.partition("@")[0] != "tiny":
        with pytest.raises(ApiError):
            policies.parse(model, "tiny", EXPERTS)


def test_every_listed_name_is_one() -> None:
    found = [policies.parse(name, "tiny", EXPERTS) for name in policies.names("tiny", EXPERTS)]
    assert len(set(found)) == len(found)
    assert {policy.expert for policy in found} == {None, "math", "code", "router"}


def test_the_body_goes_before_the_name() -> None:
    policy = policies.parse("tiny@expert=math,alpha=0.5", "tiny", EXPERTS)
    assert policies.merge(policy, "code", None, None, EXPERTS) == Policy("code", 0.5)
    assert policies.merge(policy, None, 0.0, "query", EXPERTS) == Policy("math", 0.0, "query")
