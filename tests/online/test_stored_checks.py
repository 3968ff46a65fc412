"""What is refused among the tensors of a stored weight, wherever the tensors lie."""

from __future__ import annotations

import pytest
import torch
from quantload.errors import CheckpointError
from quantload.online.stored_checks import check_order


def test_the_order_of_columns_is_checked_where_the_tensor_lies() -> None:
    groups = torch.arange(8, dtype=torch.int32) // 4
    with torch.device("meta"):  # whatever is made without a device of its own cannot be compared
        check_order("q.g_idx", groups.expand(2, 8), 4)
        with pytest.raises(CheckpointError, match=r"q\.g_idx does not count groups of 4 columns"):
            check_order("q.g_idx", groups.flip(0), 4)
