"""What a process of a launch knows without asking the others."""

import pytest
import torch

from fusionroute.training import processes


@pytest.mark.parametrize(("available", "expected"), [(False, None), (True, torch.device("cuda", 1))])
def test_the_device_is_one_that_is_there(
    available: bool, expected: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch built for CUDA names it on a machine without a GPU too."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.device() == expected
