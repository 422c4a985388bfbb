import math

import pytest
from omegaconf import OmegaConf
from scipy import stats
from sweeps import write_run, write_sweep

from msenc.report.collect import collect_runs
from msenc.report.layouts import comparison_grid, noise_grid
from msenc.report.noise import measure_floor
from msenc.report.table import summarise
from msenc.types import MsencError

CONFIG = {"seed": 1, "threads": None, "modality": "text_audio", "data": {"name": "demo"}, "paths": {}}


def write_floor(folder, known=0.9, threads=(None,), **changes):
    for seed in range(4):
        for number in threads:
            more = [] if number is None else [f"threads={number}"]
            share = known + 0.02 * seed + 0.001 * (number or 0)
            write_run(folder / f"{seed}{number}", ["modality=text_audio", *more], seed, share, **changes)
    return folder


def write_configs(folder, **changes):
    for run in folder.iterdir():
        (run / ".hydra").mkdir()
        OmegaConf.save(OmegaConf.create(CONFIG | changes), run / ".hydra" / "config.yaml")


def test_the_floor_is_the_spread_of_seeds_and_threads():
    seeds, values = [1, 1, 2, 2, 3, 3], [1.0, 1.2, 2.0, 2.2, 4.0, 4.2]
    floor = measure_floor(seeds, [{"nll": value} for value in values])
    between, within = stats.tvar([1.1, 2.1, 4.1]), 0.02
    assert (floor.seeds, floor.runs) == (3, 6)
    assert floor.of_threads["nll"] == pytest.approx(math.sqrt(within))
    assert floor.deviations["nll"] == pytest.approx(math.sqrt(between + within / 2))
    quantile = stats.t.ppf(0.975, 2)
    assert floor.smallest("nll", (3, 3)) == pytest.approx(quantile * floor.deviations["nll"] * math.sqrt(2 / 3))
    assert math.isnan(floor.smallest("rouge_l"))
    assert measure_floor([1, 1], [{"nll": 1.0}, {"nll": 2.0}]) is None


def test_a_sweep_over_chance_alone_says_how_far_it_goes(tmp_path):
    table = summarise(collect_runs(write_floor(tmp_path, threads=(1, 2))))
    assert table.is_of_noise
    head, *rows = noise_grid(table)
    assert head == [
        "metric",
        "4 seeds, 8 runs: deviation",
        "of these by threads alone",
        "between single runs",
        "between means of 4",
    ]
    assert [row[0] for row in rows] == table.metrics
    single, means = (float(cell) for cell in rows[-1][3:])
    assert single == pytest.approx(2 * means, rel=0.1)
    assert all(math.isnan(c.floor) for c in table.comparisons)


def test_a_sweep_over_anything_else_has_none(tmp_path):
    assert summarise(collect_runs(write_sweep(tmp_path))).floor is None


def test_differences_below_a_named_floor_are_marked(tmp_path):
    floor = write_floor(tmp_path / "floor")
    small = write_sweep(tmp_path / "small", [("text", 0.90), ("text_audio", 0.91)])
    large = write_sweep(tmp_path / "large", [("text", 0.0), ("text_audio", 0.9)])
    metric = "planted/audio/recovered %"
    for folder, is_noise in ((small, True), (large, False)):
        table = summarise(collect_runs(folder), noise=("floor", collect_runs(floor)))
        (found,) = [c for c in table.comparisons if c.metric == metric]
        assert found.is_noise == is_noise
        assert found.floor == table.floor.smallest(metric, (3, 3)) == found.margin
        text = dict(zip(*comparison_grid(table), strict=True))[f"{metric} ↑"]
        assert ("below the noise floor of" in text) == is_noise


def test_a_floor_of_other_settings_is_refused(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")

    def refusal(folder):
        with pytest.raises(MsencError, match="noise_floor: floor") as caught:
            summarise(collect_runs(sweep), noise=("floor", collect_runs(folder)))
        return str(caught.value)

    assert "has task_hash t2, the reported runs have t1" in refusal(write_floor(tmp_path / "a", task_hash="t2"))
    assert "has device cuda:0, the reported" in refusal(write_floor(tmp_path / "b", device="cuda:0"))
    write_configs(sweep, threads=2)
    write_configs(other := write_floor(tmp_path / "c"), data={"name": "demo", "batch_size": 4})
    assert "in data.batch_size" in refusal(other)
    write_configs(same := write_floor(tmp_path / "d"), seed=7)
    assert summarise(collect_runs(sweep), noise=("floor", collect_runs(same))).floor is not None


def test_a_floor_of_runs_that_differ_or_of_one_seed_is_refused(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    with pytest.raises(MsencError, match=r"the runs of sweep differ in modality, expected runs that differ in nothing"):
        summarise(collect_runs(sweep), noise=("sweep", collect_runs(sweep)))
    write_run(tmp_path / "one" / "0", ["modality=text"], 1, 0.0)
    with pytest.raises(MsencError, match="has one seed with an evaluation of test, expected two or more"):
        summarise(collect_runs(sweep), noise=("one", collect_runs(tmp_path / "one")))
