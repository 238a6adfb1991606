"""Means of what was counted since the last line."""

from types import SimpleNamespace

import torch

from fusionroute.training.tally import Tally

ALONE = SimpleNamespace(num_processes=1)


def test_a_mean_is_of_all_values_not_of_batches() -> None:
    tally = Tally()
    tally.add("loss", torch.tensor(6.0), 2)
    tally.add("loss", torch.tensor(1.0), torch.tensor(8))
    tally.add("share", (torch.tensor([1, 0, 1]) == 1).sum(), 3)
    assert tally.read(ALONE) == {"loss": 0.7, "share": 2 / 3}
    assert tally.read(ALONE) == {}


def test_what_was_never_counted_has_no_mean() -> None:
    tally = Tally()
    tally.add("loss", 0.0, 0)
    assert tally.read(ALONE) == {}


def test_no_number_is_doubled_on_its_device() -> None:
    """MPS has no float64."""

    class NoDouble(torch.Tensor):
        def double(self, *_: object, **__: object) -> torch.Tensor:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    tally = Tally()
    tally.add("loss", torch.tensor(3.0).as_subclass(NoDouble), torch.tensor(2).as_subclass(NoDouble))
    assert tally.read(ALONE) == {"loss": 1.5}
