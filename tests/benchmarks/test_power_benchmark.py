import power
import pytest


@pytest.mark.parametrize("condition", ["few dialogues", "five seeds", "seeds differ more"])
def test_power_is_as_predicted_and_equivalence_as_seldom_wrong_as_said(condition):
    sweeps = 400
    shares = power.measure(condition, sweeps, first=(100, 300))
    found = shares["significant"]
    error = (found * (1 - found) / sweeps) ** 0.5
    assert abs(found - shares["predicted"]) <= 0.05 + error
    assert shares["false equivalence"] <= power.ALPHA + 3 * (0.05 * 0.95 / sweeps) ** 0.5
    # The simulation can tell: no difference is called smaller far more often than one of that size.
    assert shares["equivalent"] > 3 * shares["false equivalence"]
    # Few seeds know their own spread badly, but the middle of what they predict is right.
    middle, low, high = shares["from first runs"]
    assert low < shares["predicted"] < high
    assert abs(middle - shares["predicted"]) < 0.15
