import pytest
from sweeps import write_run, write_sweep

from msenc.report.foresight import foresee
from msenc.types import MsencError

AXES = ["modality", "seed"]
KNOWN = [("text", 0.0), ("text_audio", 0.02)]


def jobs(modalities=("text", "text_audio", "text_video"), seeds=range(1, 7)):
    return [[f"modality={m}", f"seed={s}"] for m in modalities for s in seeds]


def finished(folder, **arguments):
    write_sweep(folder, **arguments)
    return {
        f: [f"modality={'text_audio' if f.name[0] == '1' else 'text'}", f"seed={f.name[1]}"] for f in folder.iterdir()
    }


def test_first_runs_tell_what_all_jobs_will_show(tmp_path):
    done = finished(tmp_path, known=KNOWN)
    heading, (head, *rows) = foresee(jobs(), done, AXES, "test", {"nll": 0.01})
    assert "6 finished runs (test, 12 dialogues)" in heading
    assert head[2:] == ["these jobs", "5 seeds each", "10 seeds each", "20 seeds each", "seeds needed"]
    assert [row[:2] for row in rows] == [
        ["text_audio - text", metric] for metric in ("nll", "rouge_l", "planted/audio/recovered %")
    ]
    five, six, ten, twenty = (float(rows[0][i]) for i in (3, 2, 4, 5))
    assert five >= six > ten > twenty > 0
    needed = int(rows[0][-1].removesuffix(" for 0.01"))
    again = foresee(jobs(seeds=range(needed)), done, AXES, "test", {})[1][1]
    assert float(again[2]) <= 0.0105
    # A larger family of comparisons asks more of each.
    alone = foresee(jobs(["text", "text_audio"]), done, AXES, "test", {})[1][1]
    assert float(alone[2]) < six


def test_what_first_runs_do_not_tell_is_said(tmp_path):
    with pytest.raises(MsencError, match="no job is finished yet"):
        foresee(jobs(), {}, AXES, "test", {})
    with pytest.raises(MsencError, match="two rows with two finished seeds each are needed"):
        foresee(jobs(), finished(tmp_path / "a", known=KNOWN[:1]), AXES, "test", {})
    with pytest.raises(MsencError, match="two rows with two finished seeds each are needed"):
        foresee(jobs(), finished(tmp_path / "b", known=KNOWN, seeds=(1,)), AXES, "test", {})
    done = finished(tmp_path / "c", known=KNOWN)
    with pytest.raises(MsencError, match="No finished run with an evaluation of val"):
        foresee(jobs(), done, AXES, "val", {})
    with pytest.raises(MsencError, match="margins: the reported runs have no nul"):
        foresee(jobs(), done, AXES, "test", {"nul": 1.0})
    write_run(tmp_path / "c" / "odd", ["modality=text"], 9, 0.0, task_hash="t2")
    with pytest.raises(MsencError, match="different tasks"):
        foresee(jobs(), {**done, tmp_path / "c" / "odd": ["modality=text", "seed=9"]}, AXES, "test", {})
