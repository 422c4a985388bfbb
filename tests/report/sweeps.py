"""Small sweeps as training leaves them, with predictions whose truth is known."""

import json
import math

import numpy as np

BIT = math.log(2)


def write_run(folder, overrides, seed, known, dialogues=12, spread=0.05, control=None, **changes):
    """A finished run over 2 targets per dialogue, each of 4 tokens, one of which hides a bit in the audio.

    Args:
        folder: of the run.
        overrides: without the seed.
        seed: of the run.
        known: share of the planted bits that the model knows.
        dialogues: how many.
        spread: deviation of the other tokens' losses.
        control: what this is a control of; None for the plain evaluation.
        **changes: to run.json.
    """
    rng = np.random.default_rng([seed, round(1000 * known)])
    rows = []
    for dialogue in range(dialogues):
        for turn in (1, 2):
            nll = [0.5 + dialogue / 20 + spread * rng.normal() for _ in range(3)] + [BIT * (1 - known)]
            rows.append(
                {
                    "dialogue": f"demo/test/dia{dialogue}",
                    "turn": turn,
                    "utterance": str(turn),
                    "speaker": "Ana",
                    "history": [0, turn],
                    "reference": {"text": "I hear you.", "description": "a woman speaks fast"},
                    "nll": nll,
                    "kinds": ["reply", "reply", "description", "planted_audio"],
                    "correct": [1, 1, 1, int(known > 0.5)],
                    "bits": {"planted_audio": 1.0},
                    "reply": {"text": f"I hear you, {known}.", "description": "a woman speaks"},
                    "scores": {"rouge_l": 0.5 + known / 4 + spread * rng.normal()},
                }
            )
    total = sum(sum(row["nll"]) for row in rows)
    metrics = {
        "split": "test",
        "data": "demo",
        "settings": "greedy",
        "targets": len(rows),
        "nll": total / (4 * len(rows)),
        "perplexity": math.exp(total / (4 * len(rows))),
        "planted/audio/recovered": 1 - sum(row["nll"][3] for row in rows) / BIT / len(rows),
        "rouge_l": float(np.mean([row["scores"]["rouge_l"] for row in rows])),
        "bleu_1": 0.2 + known / 10,
        "description/rate/accuracy": 0.9,
        "description/rate/accuracy_majority": 0.4,
    }
    name = "demo-test-ab12"
    if control is None:
        run = {"status": "finished", "task_hash": "t1", "seed": seed, "overrides": [*overrides, f"seed={seed}"]}
        run |= {"trainable_parameters": {"llm": 1000}, "seconds": 60.0, "peak_memory_mib": 500, "commit": "abc"}
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run | changes))
        (folder / "logs").mkdir()
        curve = "".join(f"{e},{10 * e},,{1 / (e + 1)}\n" for e in range(3))
        (folder / "logs" / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,5,0.9,\n" + curve)
    else:
        name = "demo-test-cd34"
        metrics |= {"control": control, "settings": control, "control/verdict": "used"}
    write_evaluation(folder / "evaluation" / name, metrics, rows)
    return folder


def write_evaluation(folder, metrics, rows):
    """An evaluation's two files."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_sweep(folder, known=(("text", 0.0), ("text_audio", 0.9)), seeds=(1, 2, 3)):
    """Configurations of a modality that know a share of the audio's bits, over seeds."""
    for number, (modality, share) in enumerate(known):
        for seed in seeds:
            write_run(folder / f"{number}{seed}", [f"modality={modality}"], seed, share)
    return folder
