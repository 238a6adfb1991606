"""Products with weights laid out for speed, against those of PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.decoding.matrices import FEWEST, Matrix, filled

sizes = st.integers(1, 40)


@given(rows=sizes, out=st.integers(1, 70), width=st.integers(1, 70), biased=st.booleans())
def test_blocks_give_what_rows_give(rows: int, out: int, width: int, biased: bool) -> None:
    weight, bias = torch.randn(out, width), torch.randn(out) if biased else None
    x, y = torch.randn(rows, width), torch.randn(rows, out)
    fast, plain = Matrix(weight, bias, blocks=True), Matrix(weight, bias, blocks=False)
    torch.testing.assert_close(fast(x), plain(x), atol=1e-4, rtol=1e-4)
    if not biased:
        torch.testing.assert_close(fast.add_to(y, x), plain.add_to(y, x), atol=1e-4, rtol=1e-4)


@given(st.integers(1, 100_000))
def test_a_product_is_filled_up_by_little(count: int) -> None:
    assert max(count, FEWEST) <= filled(count) <= max(count * 9 / 8, FEWEST)
    assert filled(filled(count)) == filled(count)


def test_there_are_few_sizes() -> None:
    assert len({filled(count) for count in range(1, 8193)}) < 100


@given(rows=sizes)
def test_a_token_s_product_does_not_depend_on_how_few_stand_beside_it(rows: int) -> None:
    torch.manual_seed(rows)
    matrix, x = Matrix(torch.randn(24, 40), blocks=True), torch.randn(rows, 40)
    torch.testing.assert_close(matrix(x)[:1], matrix(x[:1]), atol=1e-5, rtol=1e-5)


def test_a_column_of_a_wider_matrix_can_be_multiplied() -> None:
    weight, x = torch.randn(24, 8), torch.randn(5, 20)
    torch.testing.assert_close(Matrix(weight, blocks=True)(x[:, 12:]), x[:, 12:] @ weight.T, atol=1e-5, rtol=1e-5)


def test_a_type_without_blocks_is_multiplied_as_it_is() -> None:
    weight, x = torch.randn(6, 4).double(), torch.randn(2, 4).double()
    matrix = Matrix(weight, blocks=True)
    assert not matrix.blocks
    assert torch.equal(matrix(x), x @ weight.T)


@pytest.mark.parametrize("blocks", [True, False])
def test_it_runs_in_inference_mode(blocks: bool) -> None:
    weight = torch.nn.Linear(8, 8).weight
    with torch.inference_mode():
        assert Matrix(weight, blocks=blocks)(torch.randn(1, 8)).shape == (1, 8)
