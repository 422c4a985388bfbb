import json
import math
import os
import re
import threading

import pytest
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser

from msenc.files import digest, read_json, write_json, write_text
from msenc.runs.find import find_run
from msenc.runs.overrides import quoted_value
from msenc.runs.record import RunRecord, read_run
from msenc.types import MsencError


def make_run(folder):
    RunRecord(folder, seed=3).add(status="finished")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("seed: 3\nmodality: text\n")
    return folder


def test_a_record_is_written_at_once_and_whenever_something_is_known(tmp_path):
    record = RunRecord(tmp_path / "a" / "b", seed=3)
    first = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert (first["status"], first["seed"], first["schema_version"]) == ("running", 3, 1)
    assert set(first["versions"]) >= {"torch", "lightning", "transformers", "peft"}
    assert all(re.match(r"\d+\.\d+", version) for version in first["versions"].values())
    record.add(status="finished", steps=7)
    second = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert (second["status"], second["seed"], second["steps"]) == ("finished", 3, 7)
    assert second["seconds"] >= first["seconds"]
    assert second["peak_memory_mib"] > 0


def test_a_jobs_run_that_another_process_works_on_is_waited_for(tmp_path, capsys):
    RunRecord(tmp_path, seed=3).close()
    other, is_held, may_end = FileLock(tmp_path / ".lock", thread_local=False), threading.Event(), threading.Event()

    def work():
        with other:
            is_held.set()
            may_end.wait()
            write_json(tmp_path / "run.json", {**read_json(tmp_path / "run.json"), "status": "finished"})

    worker = threading.Thread(target=work)
    worker.start()
    is_held.wait()
    with pytest.raises(MsencError, match="another process is using this run's folder"):
        RunRecord.reopen(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**read_json(tmp_path / "run.json"), "steps": 9}))
    threading.Timer(0.3, may_end.set).start()
    record = RunRecord.reopen(tmp_path, wait=True)
    worker.join()
    assert (record.facts["status"], record.facts["steps"], record.facts["resumed"]) == ("finished", 9, 0)
    assert "waiting for it" in capsys.readouterr().out
    with pytest.raises(MsencError, match="another process is using"):
        RunRecord.reopen(tmp_path)  # it is held again
    record.close()


def test_a_run_is_read_back(tmp_path):
    facts, config = read_run(make_run(tmp_path / "run"))
    assert facts["status"] == "finished"
    assert config.modality == "text"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(MsencError, match=r"run_dir=.*nowhere: does not exist \(no run\.json\).*train\.py"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MsencError, match=r"empty: is not a run's folder \(no run\.json\)\. Expected"):
        read_run(tmp_path / "empty")
    for name in ("0", "1"):
        make_run(tmp_path / "sweep" / name)
    with pytest.raises(MsencError, match=r"sweep: is not a run's folder .* It contains runs, though: 0, 1\."):
        read_run(tmp_path / "sweep")
    broken = make_run(tmp_path / "broken")
    (broken / ".hydra" / "config.yaml").unlink()
    with pytest.raises(MsencError, match=r"broken: is not a run's folder \(no \.hydra/config\.yaml\)"):
        read_run(broken)
    broken = make_run(tmp_path / "half")
    (broken / "run.json").write_text('{"status": ')
    with pytest.raises(MsencError, match=r"run\.json: cannot be read as JSON"):
        read_run(broken)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"text": "naïve"})
    assert read_json(path) == {"text": "naïve"}
    assert "naïve" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"text": object()})
    assert read_json(path) == {"text": "naïve"}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    with pytest.raises(UnicodeEncodeError):  # in the middle of writing
        write_text(path, "no such letter: \ud800")
    assert read_json(path) == {"text": "naïve"}
    with pytest.raises(MsencError, match=r"cannot be written \(Is a directory\)"):
        write_text(tmp_path / "deep", "x")


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"loss": math.nan, "most": [math.inf, -math.inf, 1.5], "n": True})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "most": [None, None, 1.5], "n": True}


def test_of_runs_with_one_identity_a_finished_one_is_found_before_later_ones(tmp_path):
    def run(name, status, age, identity="a"):
        write_json(tmp_path / name / "run.json", {"status": status, "identity": identity})
        os.utime(tmp_path / name / "run.json", (age, age))

    run("older", "finished", 10)
    run("newest", "interrupted", 30)
    run("other", "finished", 40, identity="b")
    assert find_run([tmp_path], "a") == tmp_path / "older"
    run("newer", "finished", 20)
    assert find_run([tmp_path], "a") == tmp_path / "newer"
    for name in ("older", "newer"):
        run(name, "failed", 5)
    assert find_run([tmp_path], "a") == tmp_path / "newest"
    assert find_run([tmp_path], "c") is None


def test_digests_tell_settings_apart():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(v) for v in ({}, {"a": 1}, {"a": 2}, {"a": "1"}, {"a": None})}) == 5


@pytest.mark.parametrize(
    "text", ["a\\b", "it's", "a\\'b", "end\\", "two\\\\", "x\\\\'y", "a=b,c", "two\nlines", "[x]", "null", "$5", " "]
)
def test_hydra_reads_a_quoted_value_as_it_was(text):
    assert OverridesParser.create().parse_override(f"key={quoted_value(text)}").value() == text
