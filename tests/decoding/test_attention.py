"""Attention of many sequences against its formula in float64, one head at a time."""

import pytest
import torch

from fusionroute.decoding.attention import HEADS, QUERIES, attend


def inputs(rows: int, heads: int, queries: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, queries, 16, generator=generator).to(dtype)
    keys, values = (torch.randn(rows + 1, heads, length + 5, 16, generator=generator).to(dtype) for _ in range(2))
    ends = torch.randint(1, length + 1, (rows,), generator=generator)
    mask = torch.zeros(rows, 1, queries, length, dtype=dtype)
    mask.masked_fill_((torch.arange(length) >= ends[:, None])[:, None, None], float("-inf"))
    # As a cache gives them: some of its slots, and of these the first entries.
    return q, keys[1:, :, :length], values[1:, :, :length], mask


def formula(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=torch.float64)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            scores = 0.3 * q[row, head].double() @ keys[row, head].double().T
            if mask is not None:
                scores = scores + mask[row, 0].double()
            out[row, head] = scores.exp() / scores.exp().sum(-1, keepdim=True) @ values[row, head].double()
    return out


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("queries", [1, QUERIES, QUERIES + 1])
@pytest.mark.parametrize("rows", [1, HEADS // 3 - 1, HEADS // 3 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_formula(dtype: torch.dtype, rows: int, queries: int, masked: bool) -> None:
    q, keys, values, mask = inputs(rows, 3, queries, 37, dtype)
    found = attend(q, keys, values, mask if masked else None, 0.3)
    assert found.shape == q.shape
    assert found.dtype == dtype
    within = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found.double(), formula(q, keys, values, mask if masked else None), atol=within, rtol=0)
