"""A run's replies to HumDial's dialogues, as its judge reads them: python benchmarks/humdial.py RUN TASK.jsonl OUT.

``TASK.jsonl`` and its recordings are those of HumDial (track 1; HumDial-EIBench's empathetic replies). A line is
``{"dialogue_id": ..., "turns": [{"turn_id": 1, "text": ..., "split_audio_file": ..., "emotion": ...}, ...]}``; files
lie beside it. The run answers each turn, with its own replies before it. ``OUT/replies.jsonl`` is what the benchmark's
``eval_task3.py --input_file`` takes (a 30B judge does the rest), and the replies' sound lies beside it.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msenc
from msenc.files import read_json_lines, write_text
from msenc.files.kinds import check_name, is_below
from msenc.types import MsencError


class _Turn(TypedDict):
    turn_id: int
    text: str
    split_audio_file: NotRequired[str]
    emotion: NotRequired[str]
    input_emotion: NotRequired[str]


class _Dialogue(TypedDict):
    dialogue_id: str
    turns: list[_Turn]


def answer(run: Path, task: Path, out: Path, overrides: list[str]) -> Path:
    """Let the run reply to every turn; returns the file for the judge.

    Raises:
        MsencError: another file than HumDial's, a recording that cannot be used, or replies that are there already.
    """
    written = out / "replies.jsonl"
    if written.exists():
        raise MsencError(f"{written}: is there already. Give another folder, or move it away.")
    dialogues = list(read_json_lines(task, _Dialogue, "Expected a .jsonl of HumDial's track 1."))
    agent = msenc.load(run, overrides)
    lines = []
    for where, dialogue in dialogues:
        name = check_name(dialogue["dialogue_id"], f"{where}, dialogue_id")
        talk, turns = agent.talk(), []
        for turn in sorted(dialogue["turns"], key=lambda turn: turn["turn_id"]):
            audio = turn.get("split_audio_file")
            if audio and not is_below(audio):
                raise MsencError(f"{where}: split_audio_file is {audio!r}; expected a path below {task.parent}.")
            reply = talk.say(turn["text"], audio=task.parent / audio if audio else None)
            sound = out / f"{name}_turn{turn['turn_id']}.wav"
            if reply.sound is not None:
                out.mkdir(parents=True, exist_ok=True)
                reply.save(sound)
            turns.append(_judged(turn, reply.text, None if reply.sound is None else sound))
        lines.append({"dialogue_id": name, "turns": turns})
        print(f"{name}: {len(turns)} replies")
    out.mkdir(parents=True, exist_ok=True)
    write_text(written, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return written


def _judged(turn: _Turn, reply: str, sound: Path | None) -> dict[str, Any]:
    emotion = turn.get("emotion") or turn.get("input_emotion") or ""
    audio = "" if sound is None else str(sound)
    return {"input_emotion": emotion, "input_text": turn["text"], "response_text": reply, "response_audio": audio}


def main() -> None:
    """Answer the task that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, or of its export")
    parser.add_argument("task", type=Path, help="HumDial's file of dialogues")
    parser.add_argument("out", type=Path, help="folder for the replies")
    parser.add_argument("overrides", nargs="*", help="of respond.py, such as speech=kokoro")
    given = parser.parse_args()
    try:
        print(f"Written: {answer(given.run, given.task, given.out, given.overrides)}")
    except MsencError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
