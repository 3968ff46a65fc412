"""`bench/startup.py`: what its goals are made of."""

from __future__ import annotations

import pytest
import startup


@pytest.mark.parametrize(("imported", "read", "cold"), [(2.0, 1.0, 2.5), (2.0, 4.0, 4.5)])
def test_a_cold_load_may_take_the_longer_of_import_and_reading(imported: float, read: float, cold: float) -> None:
    measured = {
        startup.IMPORT: imported,
        "read the files, cold": read,
        "plan": 9.0,
        "load, warm": 8.0,
        "load, cold": 7.0,
    }
    assert startup.goals(measured) == [
        {"row": "load, warm", "goal": imported + 0.3, "wall": 8.0},
        {"row": "load, cold", "goal": cold, "wall": 7.0},
        {"row": "plan", "goal": 1.5, "wall": 9.0},
    ]
