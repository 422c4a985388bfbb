"""Reads what W&B writes offline: records of its own protocol, in LevelDB's log format (wandb itself reads it in Go)."""

import json
from pathlib import Path

BLOCK = 32768


def records(file: Path):
    """The records of a ``.wandb`` file, up to where a kill cut it."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # too little for a header: filled up
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        piece = data[place + 7 : place + 7 + length]
        if kind not in (1, 2, 3, 4) or len(piece) < length:
            return
        place += 7 + length
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def read_runs(folder: Path) -> dict[str, dict]:
    """Id of a run -> what all its files say: name, group, tags, config, history as {metric: [(step, value)]}."""
    runs: dict[str, dict] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run = None
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                facts = record.run
                run = runs.setdefault(facts.run_id, {"config": {}, "history": {}, "files": []})
                run["name"], run["group"], run["tags"] = facts.display_name, facts.run_group, list(facts.tags)
                run["files"].append(file)
                _configure(run, facts.config)
            elif record.WhichOneof("record_type") == "config":
                _configure(run, record.config)
            elif record.WhichOneof("record_type") == "history":
                row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                for name, value in row.items():
                    run["history"].setdefault(name, []).append((row.get("trainer/global_step"), value))
    return runs


def _configure(run: dict, config) -> None:
    for item in config.update:
        run["config"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
