import calibration


def test_true_nulls_are_called_significant_as_seldom_as_said():
    shares = calibration.measure_mix("seeds differ", seeds=3, is_paired=False, sweeps=60)
    share, error = shares["called significant"]
    assert share <= calibration.ALPHA + 3 * error
    covered, error = shares["covered"]
    assert covered >= 1 - calibration.ALPHA - 3 * error
    # The simulation can tell: what ignores that seeds differ is wrong most of the time.
    assert shares["t on items"][0] > 0.5
    assert shares["bootstrap"][0] > shares["called significant"][0]
