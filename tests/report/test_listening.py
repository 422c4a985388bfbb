"""Answers to a listening page -> the report: what is known comes back, and what the page did not write is named."""

import json
import math
import re
from operator import itemgetter

import numpy as np
import pytest
from clips import write_media
from listeners import call, make_page, prefer, rows_of, write_answers, write_spoken_sweep
from scipy.stats import binom

from msenc.report.listening.answers import COLUMNS, Listener, read_answers, row_check
from msenc.report.listening.heard import judge
from msenc.report.listening.study import BACKWARD, CHECKS, QUESTIONS
from msenc.types import MsencError


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_spoken_sweep(tmp_path_factory.mktemp("spoken"))


@pytest.fixture(scope="module")
def study(sweep):
    return make_page(sweep)[1]


@pytest.fixture(scope="module")
def rating(sweep):
    return make_page(sweep, listen="rating")[1]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def listener(study, code, chosen):
    return Listener(code, chosen, 3.0)


def judged(study, listeners):
    return {(j.treated, j.baseline, j.question): j for j in judge(study, listeners).judgements}


# ---------------------------------------------------------------------------------------------------- what is played


def test_a_page_tells_nothing_of_what_it_plays(sweep, study):
    page = sweep / "report" / "listening" / study["page"] / "page"
    html = (page / "index.html").read_text()
    assert not any(word in html for word in ("text_audio", "modality", "forward", "is_check", "demo/test", "speech/"))
    sounds = {sound["id"] for trial in study["trials"] for sound in trial["sounds"]}
    assert {path.stem for path in (page / "sounds").iterdir()} == sounds
    assert sorted(path.name for path in page.iterdir()) == ["index.html", "sounds"]
    # neither the order of a trial's sounds nor that of the trials says whose they are
    first = [t["sounds"][0]["of"] for t in study["trials"] if not t["is_check"]]
    assert first.count("text") == len(first) / 2
    of_blocks = {t["block"]: t["sounds"][0]["of"] for t in study["trials"] if not t["is_check"]}
    assert 2 < list(of_blocks.values()).count("text") < 10
    checks = [n for n, trial in enumerate(study["trials"]) if trial["is_check"]]
    assert len(checks) == CHECKS
    assert max(checks) - min(checks) > CHECKS


def test_every_dialogue_is_heard_once_before_any_twice(sweep):
    _, study = make_page(sweep, listen_trials=12, listen_seed=5)
    dialogues = [trial["dialogue"] for trial in study["trials"] if not trial["is_check"]]
    assert len(set(dialogues)) == len(dialogues) == 12


def test_the_same_call_makes_the_same_page_and_another_one_is_put_beside_it(sweep, study):
    folder = sweep / "report" / "listening"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    call(sweep, listen=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    make_page(sweep, listen_seed=77)
    assert before.items() <= {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}.items()


def test_replies_without_sound_name_the_command_that_speaks_them(tmp_path):
    sweep = write_spoken_sweep(tmp_path)
    rows = (sweep / "11" / "evaluation" / "demo-test-ab12" / "predictions.jsonl").read_text()
    (sweep / "11" / "evaluation" / "demo-test-ab12" / "predictions.jsonl").write_text(
        rows.replace("speech/", "speech/0")
    )
    with pytest.raises(MsencError, match=rf"text_audio have no sound.*evaluate.py run_dir={sweep} .*speech=espeak"):
        call(sweep, listen=True)
    assert not (sweep / "report" / "listening").exists()


def test_targets_to_which_both_say_the_same_are_not_played(tmp_path, capsys):
    sweep = write_spoken_sweep(tmp_path)
    first, second = (sweep / run / "evaluation" / "demo-test-ab12" for run in ("01", "11"))
    rows = [json.loads(line) for line in (second / "predictions.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows[:6]):
        row["speech"] = f"speech/0-{n}.wav"
        (second / row["speech"]).write_bytes((first / row["speech"]).read_bytes())
    (second / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, study = make_page(sweep)
    played = {(t["dialogue"], t["turn"]) for t in study["trials"] if not t["is_check"]}
    assert played == {(row["dialogue"], row["turn"]) for row in rows[6:]}
    assert "say the same in the same voice to 6 of 24 targets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("text",), {}, "found one configuration.*listen=rating"),
        (("text", "text_audio"), {"listen_trials": 1}, "listen_trials: found 1, expected 2 or more"),
        (("text", "text_audio"), {"listen": "abx"}, "listen: found 'abx', expected"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, names, options, expected):
    with pytest.raises(MsencError, match=expected):
        call(write_spoken_sweep(tmp_path, names, dialogues=3), **{"listen": True, **options})


def test_without_the_dialogues_there_is_no_page(tmp_path):
    sweep = write_spoken_sweep(tmp_path)
    (tmp_path / "data" / "turns").rename(tmp_path / "elsewhere")
    with pytest.raises(MsencError, match=r"listen: .*put the data where the run has it"):
        call(sweep, listen=True)


@pytest.mark.parametrize(
    ("container", "kinds"),
    [("mp4", ["video"]), ("wav", ["audio", "picture"]), ("avi", ["audio", "picture"]), (None, [])],
)
def test_the_last_turn_is_heard_where_it_has_a_clip(tmp_path, container, kinds):
    def clip(path):
        path.write_bytes(b"no clip") if container is None else write_media(
            path, container=container, with_picture=container != "wav"
        )

    page, study = make_page(write_spoken_sweep(tmp_path, clip=clip), listen_trials=4)
    data = json.loads(re.search(r'id="study">(.*?)</script>', (page / "index.html").read_text())[1])
    for shown, trial in zip(data["trials"], study["trials"], strict=True):
        assert [speaker.split()[0] for speaker, *_ in shown["turns"]] == ["Ana"] * trial["turn"]
        assert sorted(shown["clip"]) == kinds
        assert shown["turns"][-1][2] == ("" if kinds else "softly")  # the description, where it cannot be heard
        files = {page / shown["clip"][kind] for kind in ("video", "audio") if kind in kinds}
        assert all(file.is_file() for file in files)
    assert bool(list(page.glob("clips/*"))) == bool(kinds)


# ---------------------------------------------------------------------------------------------------- what is known


def test_a_planted_preference_is_recovered(sweep, study, rng, tmp_path, capsys):
    for n in range(30):
        write_answers(tmp_path, study, f"L{n}", prefer(study, "text_audio", 0.65, rng), rng)
    call(sweep, answers=str(tmp_path))
    found = judge(*read_answers(tmp_path, {study["page"]: study}))
    for j in found.judgements:
        assert (j.treated, j.baseline) == ("text_audio", "text")
        assert j.effect.low < 0.65 < j.effect.high
        assert j.effect.high - j.effect.low < 0.12
        assert j.adjusted < 0.001
    said = " ".join(capsys.readouterr().out.split())
    assert "What listeners prefer" in said
    assert "30 listeners, 24 trials each" in said
    assert "What do people hear?" in (sweep / "report" / "report.html").read_text()
    assert len((sweep / "report" / "listening.csv").read_text().splitlines()) == 1 + len(QUESTIONS)


@pytest.mark.parametrize("spread", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.25), (0.1, 0.2)], ids=str)
def test_without_a_preference_few_studies_find_one_and_intervals_cover(study, spread):
    """Of 200 studies at most 18 may: with a true rate of 5 % that is exceeded in 0.5 % of cases."""
    of_listeners, of_dialogues = spread
    dialogues = sorted({trial["dialogue"] for trial in study["trials"]})
    most = int(binom.ppf(0.995, 200, 0.05))
    significant = missed = 0
    for n in range(200):
        rng = np.random.default_rng([n, round(100 * of_listeners), round(100 * of_dialogues)])
        shift = dict(zip(dialogues, rng.normal(0, of_dialogues, len(dialogues)), strict=True))
        people = []
        for code in range(30):
            own = rng.normal(0, of_listeners)
            chosen = prefer(study, "text_audio", lambda d, s=shift, o=own: 0.5 + s[d] + o, rng)
            people.append(listener(study, str(code), chosen))
        first = judge(study, people).judgements[0]
        significant += first.effect.p_value < 0.05
        missed += not first.effect.low <= 0.5 <= first.effect.high
    assert significant <= most
    assert missed <= most


def test_ratings_give_means_and_differences(rating, rng):
    truth = {"text": 3.0, "text_audio": 3.4}
    people = []
    for n in range(20):
        chosen = {}
        for trial in rating["trials"]:
            (sound,) = trial["sounds"]
            for question in QUESTIONS:
                mean = 1.0 if trial["is_check"] else truth[sound["of"]]
                chosen[trial["id"], question] = str(int(np.clip(round(mean + rng.normal(0, 0.4)), 1, 5)))
        people.append(listener(rating, str(n), chosen))
    found = judged(rating, people)
    assert len(found) == 3 * len(QUESTIONS)
    for question in QUESTIONS:
        low, high = found["text", None, question].effect, found["text_audio", None, question].effect
        assert low.low < 3.0 < low.high
        difference = found["text_audio", "text", question]
        assert difference.effect.mean == pytest.approx(high.mean - low.mean)
        assert difference.adjusted < 0.05


def test_where_all_agree_the_interval_is_that_of_as_many_dialogues(study, rng):
    people = [listener(study, str(n), prefer(study, "text_audio", 1.0, rng)) for n in range(30)]
    effect = judged(study, people)["text_audio", "text", "context"].effect
    assert effect.mean == effect.high == 1.0
    assert effect.low == pytest.approx(1 - (1 - 0.025 ** (1 / 12)))
    assert effect.p_value == pytest.approx(2 * 0.5**12)


def test_no_difference_counts_as_half(study, rng):
    people = []
    for n in range(10):
        chosen = prefer(study, "text_audio", 1.0, rng)
        played = [trial["id"] for trial in study["trials"] if not trial["is_check"]]
        for item in rng.choice(played, 12, replace=False):
            chosen[item, "naturalness"] = "same"
        people.append(listener(study, str(n), chosen))
    found = judged(study, people)["text_audio", "text", "naturalness"]
    assert (found.effect.mean, found.ties) == (0.75, 0.5)


def test_agreement_is_that_of_the_library(study, rng):
    krippendorff = pytest.importorskip("krippendorff", reason="agreement needs the extra listen")
    people = [listener(study, str(n), prefer(study, "text_audio", 0.5, rng)) for n in range(5)]
    played = [trial for trial in study["trials"] if not trial["is_check"]]
    by_sound = {sound["id"]: sound["of"] for trial in played for sound in trial["sounds"]}
    heard = judge(study, people)
    for question in QUESTIONS:
        table = [[by_sound[one.answers[item, question]] for item in map(itemgetter("id"), played)] for one in people]
        expected = krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")  # of two values the same
        assert heard.agreement[question] == pytest.approx(expected)
    (same,) = {judge(study, [people[0]] * 4).agreement[question] for question in QUESTIONS}
    assert same == 1.0
    assert all(math.isnan(alpha) for alpha in judge(study, people[:1]).agreement.values())


def test_who_does_not_listen_is_left_out_by_name(study, rating, rng):
    attentive = [listener(study, f"good{n}", prefer(study, "text_audio", 0.65, rng)) for n in range(3)]
    checks = [trial for trial in study["trials"] if trial["is_check"]]

    def failing(code, count):
        chosen = prefer(study, "text_audio", 0.65, rng)
        for trial in checks[:count]:
            (backward,) = [sound["id"] for sound in trial["sounds"] if sound["of"] == BACKWARD]
            chosen[trial["id"], "engaging"] = backward
        return listener(study, code, chosen)

    heard = judge(study, [*attentive, failing("one", 1), failing("two", 2)])
    assert heard.listeners == 4
    assert "Excluded for inattention: two (failed 2 of 4)." in heard.notes
    with pytest.raises(MsencError, match=r"no listener passed the attention checks: two \(failed 2 of 4\)"):
        judge(study, [failing("two", 2)])
    ties = listener(study, "ties", dict.fromkeys(attentive[0].answers, "same"))
    assert judge(study, [*attentive, ties]).listeners == 3
    always = listener(rating, "always", {(t["id"], q): "3" for t in rating["trials"] for q in QUESTIONS})
    with pytest.raises(MsencError, match="always"):
        judge(rating, [always])


# ---------------------------------------------------------------------------------------------------- bad files


@pytest.fixture
def good(study, rng, tmp_path):
    return write_answers(tmp_path, study, "anna", prefer(study, "text_audio", 0.65, rng), rng)


def changed(path, change):
    lines = path.read_text().split("\n")
    lines[7] = change(lines[7])
    path.write_text("\n".join(lines))


def edit(**values):
    """Change values of a row, and its check with them, as somebody does who knows how."""

    def change(line):
        row = dict(zip(COLUMNS, line.split(","), strict=True)) | values
        row["check"] = row_check([row[name] for name in COLUMNS[:-1]])
        return ",".join(row.values())

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda line: line.replace(",7.5,", ",7.4,"), "row 8: was edited"),
        (lambda line: line + ",more", "row 8: found .* expected values of page,listener"),
        (lambda line: line + "\n" + line, "row 9: .* is answered twice"),
        (lambda line: "", "row 8: found ''"),
        (edit(answer="C"), "row 8: answer: found 'C'"),
        (edit(item="t999"), "row 8: item: found 't999'"),
        (edit(question="beauty"), "row 8: question: found 'beauty'"),
        (edit(first="0" * 12), "row 8: first: found '0"),
        (edit(seconds="nan"), "row 8: seconds: found 'nan'"),
        (edit(listener="ben"), "row 8: listener: found 'ben', expected 'anna'"),
    ],
)
def test_a_changed_file_is_left_out_with_its_row(good, study, rng, change, expected):
    write_answers(good.parent, study, "ben", prefer(study, "text_audio", 0.65, rng), rng)
    changed(good, change)
    _, listeners, problems = read_answers(good.parent, {study["page"]: study})
    assert [one.code for one in listeners] == ["ben"]
    with pytest.raises(MsencError, match=expected):
        raise MsencError(*problems)
    assert str(good) in problems[0]


def test_half_a_file_and_other_files_are_named(good, study, rng):
    folder = good.parent
    half = write_answers(folder, study, "half", prefer(study, "text_audio", 0.65, rng), rng)
    half.write_text("".join(half.read_text().splitlines(keepends=True)[:40]))
    (folder / "letter.txt").write_text("Dear all")
    (folder / "empty.csv").write_text("")
    (folder / "binary.csv").write_bytes(b"\xff\xfe\0")
    (folder / "folder.csv").mkdir()
    (folder / "excel.csv").write_text(good.read_text().replace(",", ";"))
    other = {**study, "page": "another"}
    foreign = write_answers(folder, other, "foreign", prefer(study, "text_audio", 0.65, rng), rng)
    copy = folder / "anna (1).csv"
    copy.write_text(good.read_text())
    _, listeners, problems = read_answers(folder, {study["page"]: study})
    assert [one.code for one in listeners] == ["anna"]
    expected = {
        "anna.csv": "the same answers as anna \\(1\\).csv; counted once",
        "half.csv": "found 39 of 84 answers",
        "letter.txt": "is no CSV file",
        "empty.csv": "is empty",
        "binary.csv": "cannot be read",
        "folder.csv": "cannot be read",
        "excel.csv": "row 1: .* expected the header page,listener",
        foreign.name: "row 2: page: found 'another'",
    }
    assert len(problems) == len(expected)
    for name, words in expected.items():
        (line,) = [line for line in problems if line.startswith(f"{folder / name}")]
        with pytest.raises(MsencError, match=words):
            raise MsencError(line)


def test_one_listener_with_two_opinions_is_left_out(good, study, rng):
    twice = write_answers(good.parent / "b", study, "anna", prefer(study, "text_audio", 0.65, rng), rng)
    twice.rename(good.parent / "second.csv")
    (good.parent / "b").rmdir()
    with pytest.raises(MsencError, match=r"anna\.csv, second\.csv have the same listener anna"):
        read_answers(good.parent, {study["page"]: study})


def test_answers_to_two_pages_are_refused(good, study, rating, rng):
    chosen = {(trial["id"], q): "3" for trial in rating["trials"] for q in QUESTIONS}
    write_answers(good.parent, rating, "ben", chosen, rng)
    with pytest.raises(MsencError, match="has answers to 2 pages"):
        read_answers(good.parent, {s["page"]: s for s in (study, rating)})


def test_no_answers_are_refused(sweep, study, tmp_path):
    with pytest.raises(MsencError, match="no folder"):
        call(sweep, answers=str(tmp_path / "nowhere"))
    with pytest.raises(MsencError, match="It has no files"):
        call(sweep, answers=str(tmp_path))
    with pytest.raises(MsencError, match="no listening page was made of these runs"):
        call(write_spoken_sweep(tmp_path / "other"), answers=str(tmp_path))


def test_a_key_that_is_not_as_it_was_written_is_refused(tmp_path):
    sweep = write_spoken_sweep(tmp_path)
    page, study = make_page(sweep)
    (page.parent / "key.json").write_text(json.dumps({**study, "kind": "abx"}))
    with pytest.raises(MsencError, match=r"key\.json, kind: found 'abx', expected one of ab, rating"):
        call(sweep, answers=str(tmp_path))
    (page.parent / "key.json").write_text(json.dumps({**study, "pairs": []}))
    with pytest.raises(MsencError, match=r"key\.json: was edited since the page was made"):
        call(sweep, answers=str(tmp_path))


def test_rows_are_checked_as_the_page_checks_them():
    # the published test vectors of FNV-1a
    assert [row_check([text]) for text in ("", "a", "foobar")] == ["811c9dc5", "e40c292c", "bf9cf968"]


def test_the_files_of_the_tests_have_the_columns_of_the_page(study, rng):
    assert {len(row) for row in rows_of(study, "L1", prefer(study, "text", 0.5, rng), rng)} == {len(COLUMNS)}
