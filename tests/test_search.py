"""Searches: Optuna chooses jobs by results; the same command goes on, and everything else about sweeps holds."""

import json

import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException

from msenc.config.messages import refusal
from msenc.files import read_json
from msenc.pipelines import cluster, search, sweep, train
from msenc.pipelines.search import known_jobs, queue, space_of
from msenc.report.panels.trials import best_line, read_trials, trial_grid
from msenc.runs.sweep import note_run, read_sweep, write_sweep
from msenc.work.signals import INTERRUPTED

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="extra search is absent")

FAST = ["sweep=search", "modality=text", "data.batch_size=4", "trainer.max_epochs=1"]


def test_a_search_that_is_stopped_goes_on(call_script, tmp_path, monkeypatch, capsys):
    command = [*FAST, f"paths.runs_dir={tmp_path}", "hydra.sweeper.n_trials=3"]
    real, begun = train._learn, []

    def interrupted(job, record, *rest):
        begun.append(record.folder)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(job, record, *rest)

    monkeypatch.setattr(train, "_learn", interrupted)
    with pytest.raises(SystemExit) as end:
        call_script("train.py", *command)
    assert end.value.code == INTERRUPTED
    sweep._let_go()  # as the end of its process does
    (folder,) = (tmp_path / "sweeps").iterdir()
    before = [job.overrides for job in read_sweep(folder)]
    assert len(before) == 2
    capsys.readouterr()

    call_script("train.py", *command)
    said = " ".join(capsys.readouterr().out.split())
    jobs = read_sweep(folder)
    assert [job.overrides for job in jobs[:2]] == before
    assert [job.run_dir for job in jobs[:2]] == begun[:2]
    facts = [read_json(job.run_dir / "run.json") for job in jobs]
    assert [(f["status"], f["resumed"]) for f in facts] == [("finished", 0), ("finished", 1), ("finished", 0)]
    assert said.count("Already finished") == 1
    assert len({job.overrides for job in jobs}) == 3  # none is drawn twice
    rates = [float(dict(o.split("=", 1) for o in job.overrides)["optimizer.lr"]) for job in jobs]
    assert [f["parameter_groups"][0]["lr"] for f in facts] == pytest.approx(rates)
    best = min(facts, key=lambda f: f["best_loss"])
    assert f"Best: job {facts.index(best)}, best val/loss {best['best_loss']:.4f}: optimizer.lr=" in said
    table = pd.read_csv(folder / "report" / "trials.csv")
    assert table["best val/loss"].tolist() == pytest.approx(sorted(f["best_loss"] for f in facts))
    assert {"optimizer.lr", "optimizer.groups.connectors.lr", "model.llm.lora.r"} < set(table)

    call_script("train.py", *command)
    assert capsys.readouterr().out.count("Already finished") == 3
    assert len(begun) == 2 + 2  # the second one again, and the third
    assert len(list(folder.glob("*/?/run.json"))) == 3

    with pytest.raises(SystemExit) as end:
        call_script("train.py", *command, "dry_run=true")
    assert not end.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "A search of 3 jobs over optimizer.lr, optimizer.groups.connectors.lr, model.llm.lora.r" in said
    assert "3 are known" in said
    assert said.count("finished") == 3


def test_what_a_search_would_take_is_said_without_one(call_script, tmp_path, capsys):
    command = [*FAST, f"paths.runs_dir={tmp_path}"]
    with pytest.raises(SystemExit) as end:
        call_script("train.py", *command, "dry_run=true")
    assert not end.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "A search of 20 jobs" in said
    assert "At the ends of its ranges" in said
    assert said.count("new") == 4
    with pytest.raises(SystemExit) as end:
        call_script("train.py", *command, "plan=true")
    assert not end.value.code
    assert capsys.readouterr().out.count("Plan: text on demo") == 1
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "detach=true": "a search chooses its next job when earlier ones have ended",
    "data.val=null": "A search compares the best val/loss of its runs",
    "stage=align": "A search compares the best val/loss of its runs",
    "hydra.sweeper.storage=sqlite:///x.db": "hydra.sweeper.storage: found a value, expected none",
    "hydra.sweeper.direction=[minimize,maximize]": "hydra.sweeper.direction: found several",
    "hydra.sweeper.n_trials=0": "hydra.sweeper.n_trials: found 0, expected 1 or more",
    "hydra.sweeper.custom_search_space=os.system": "hydra.sweeper.custom_search_space: found a value, expected none",
    "model.llm.lora.r=choice(0,4)": "model.llm.lora.r: found 0",
    "optimizer.lr=interval(-1,1)": "optimizer.lr: found -1",
    "optimiser.lr=interval(0,1)": "optimiser",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_no_search_can_be_is_refused(call_script, tmp_path, argument):
    with pytest.raises(SystemExit, match=REFUSED[argument].replace("(", r"\(")):
        call_script("train.py", *FAST, argument, f"paths.runs_dir={tmp_path}")
    assert not list(tmp_path.rglob("run.json"))
    sweep._let_go()


def test_a_plugin_that_is_absent_is_named_by_its_extra():
    said = refusal(MissingConfigException("absent", "hydra/sweeper/optuna", ["basic"]))
    assert (
        said
        == "config error: hydra/sweeper=optuna: its package is not installed. Install it: pip install -e '.[search]'"
    )


def space(*overrides):
    return space_of(OverridesParser.create().parse_overrides(list(overrides)))


def test_known_jobs_are_those_of_this_search(tmp_path):
    write_sweep(tmp_path, ["seed=1"], [["a=1.5", "seed=1"], ["a=2.5", "seed=2"], ["seed=1"]])
    note_run(tmp_path, 3, tmp_path / "r", ["a=3.5", "seed=1", "paths.runs_dir=x"])
    searched = space("a=interval(0,2)", "seed=1", "dry_run=true", "b=1,2", "b=3")
    assert searched.fixed == ["seed=1", "dry_run=True", "b=3"]
    assert known_jobs(tmp_path, searched) == []
    assert known_jobs(tmp_path, space("a=interval(0,2)", "seed=1")) == [
        ["a=1.5", "seed=1"],
        ["a=3.5", "seed=1", "paths.runs_dir=x"],
    ]
    assert known_jobs(tmp_path / "none", searched) == []
    assert space("a=interval(0,2)", "b=x,y,z").examples() == [["a=0.0", "b=x"], ["a=2.0", "b=y"], ["a=0.0", "b=z"]]


def test_values_that_a_search_no_longer_has_are_left_out():
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override

    def value(override, text):
        (parsed,) = OverridesParser.create().parse_overrides([override])
        return search._value(create_optuna_distribution_from_override(parsed), text)

    assert value("a=interval(0.5,2)", "1.25") == 1.25
    assert value("a=interval(0.5,2)", "2.5") is None
    assert value("a=interval(1,8)", "4") == 4
    assert value("a=interval(1,8)", "x") is None
    assert value("a=choice(4,8)", "8") == 8
    assert value("a=choice(4,8)", "16") is None


def test_a_study_begins_with_what_is_known():
    storage = queue([(["a"], [1.5]), (["a"], [0.5])], "minimize")
    import optuna

    study = optuna.create_study(study_name="search", storage=storage, load_if_exists=True)
    distribution = optuna.distributions.UniformDistribution(0, 2)
    assert [study.ask()._suggest("a", distribution) for _ in range(3)][:2] == [1.5, 0.5]
    assert study.best_trial.value is None  # where no job has a result, the sweep's end says so


def finish(folder, number, overrides, **facts):
    run = folder / "runs" / str(number)
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"status": "finished", **facts}))
    note_run(folder, number, run, overrides)


def test_trials_are_listed_the_best_first(tmp_path):
    known = [[f"optimizer.lr={0.1 * n:.17g}", "seed=1"] for n in range(5)]
    write_sweep(tmp_path, [], known, {"axes": ["optimizer.lr"], "direction": "minimize"})
    assert read_trials(tmp_path).best is None
    assert best_line(read_trials(tmp_path)) == "No job has a result yet."
    for number, facts in enumerate(
        [{"best_loss": 2.0}, {"best_loss": 1.5}, {"best_loss": None}, {"status": "failed", "best_loss": 1.0}]
    ):
        finish(tmp_path, number, known[number], **facts)
    trials = read_trials(tmp_path)
    assert [t.number for t in trials.trials] == [1, 0, 2, 3, 4]
    assert [t.status for t in trials.trials] == ["finished"] * 3 + ["failed", "not started"]
    assert trial_grid(trials)[1] == ["1", "0.1", "1.5000", "finished", "runs/1"]
    assert best_line(trials).startswith("Best: job 1, best val/loss 1.5000: optimizer.lr=0.1")
    write_sweep(tmp_path, [], known, {"axes": ["optimizer.lr"], "direction": "maximize"})
    for number in (0, 1):
        note_run(tmp_path, number, tmp_path / "runs" / str(number), known[number])
    assert read_trials(tmp_path).best.result == 2.0
    write_sweep(tmp_path, [], known)
    assert read_trials(tmp_path) is None


def test_jobs_elsewhere_tell_their_results(tmp_path):
    write_sweep(tmp_path, [], [["a=1"], ["a=2"], ["a=3"]])
    finish(tmp_path, 0, ["a=1"], best_loss=1.5)
    finish(tmp_path, 1, ["a=2"], status="failed")
    assert cluster._results(tmp_path) == {0: 1.5}
