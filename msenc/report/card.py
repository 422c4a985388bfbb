"""A run's export -> its README.md, the model card that the Hugging Face hub shows: data, results, limits, loading."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msenc.files import read_text, write_text
from msenc.models.pretrained import split_revision
from msenc.report.collect import Evaluation, collect_runs
from msenc.report.compare import metric_order, table_metrics
from msenc.report.style import Style
from msenc.runs.record import read_facts
from msenc.training.export import read_export

MARK = "<!-- Written by msenc, and anew after each evaluation. Without this line it stays as you leave it. -->"
TRAINED = {"adapter": "with LoRA adapters", "llm": "in full", None: "not trained"}


def write_card(run_dir: Path, repo: str = "OWNER/NAME") -> None:
    """Write the model card of a run's export, if it has an export and no card of the user's own.

    Args:
        run_dir: the run.
        repo: where it is shared.

    Raises:
        MsencError: a file of the run cannot be understood.
    """
    export = run_dir / "export"
    path = export / "README.md"
    if not (export / "export.json").is_file() or (path.is_file() and MARK not in read_text(path)):
        return
    (run,) = collect_runs(run_dir)
    write_text(path, "\n".join(card(read_export(export), read_facts(run_dir / "run.json"), run.evaluations, repo)))


def card(
    content: Mapping[str, Any], facts: Mapping[str, Any], evaluations: Sequence[Evaluation], repo: str
) -> Iterator[str]:
    """Its lines.

    Args:
        content: of ``export.json``.
        facts: of ``run.json``.
        evaluations: of the run.
        repo: where it is shared.
    """
    base, streams = content["base_llm"], content["streams"]
    trained = content["llm"]["trained"]
    name, revision = split_revision(base["name"]) if base["name"] else (None, None)
    heard = ", ".join(["text", *streams])
    yield "---"
    yield "library_name: msenc"
    yield f"tags: {json.dumps(['msenc', 'multisensory', 'conversational', 'text', *streams])}"
    if name and trained:
        yield f"base_model: {json.dumps(name)}"
        yield f"base_model_relation: {'adapter' if trained == 'adapter' else 'finetune'}"
    yield from ("---", MARK, "", f"# {_plain(content['data'])}: {heard}", "")
    yield f"A multisensory conversational agent of msenc: from the dialogue so far ({heard}), it writes the next turn"
    yield "and a voice description that says how to speak it."
    yield from ("", "## How to load it", "", "```python", "import msenc", "")
    given = ['base="FOLDER"'] if not base["name"] and trained != "llm" else []
    missing = [stream for stream, facts_of in streams.items() if facts_of.get("left_out")]
    given += [f"encoders={json.dumps(dict.fromkeys(missing, 'FOLDER'))}"] if missing else []
    yield f"agent = msenc.load({', '.join([json.dumps(f'hub:{repo}'), *given])})"
    clip = {"audio": ', audio="clip.wav"', "video": ', video="clip.mp4"'}.get(next(reversed(streams), ""), "")
    yield f'agent.reply("That is amazing!"{clip})'
    yield from ("```", "")
    yield f"`hub:{repo}@COMMIT` loads one commit. What is loaded is refused if its weights are not those below; no code"
    yield "of this repository is run."
    yield from ("", "## What it is made of", "")
    turns = str(content.get("turns_hash"))[:12]
    yield f"- Data: `{_plain(content['data'])}`{_amount(facts)}; hash of the turns `{turns}`"
    yield f"- Base LLM: {_model(name, revision)}, fingerprint `{base['fingerprint']}`, {TRAINED[trained]}"
    licence = base.get("licence")
    yield f"- Licence of the base LLM: {_plain(licence) if licence else 'its files state none'}"
    for stream, facts_of in streams.items():
        model, known = facts_of["encoder"].get("name_or_path"), facts_of.get("fingerprint")
        weights = f", {_model(*split_revision(model) if model else (None, None))}" if known or model else ""
        weights += f", fingerprint `{known}`" if known else ""
        queries = facts_of["num_queries"]
        yield f"- {stream.capitalize()}: encoder `{facts_of['encoder_name']}`{weights}; {queries} vectors per utterance"
    steps = ", ".join(f"{facts[key]:,} {key}" for key in ("epochs", "steps") if facts.get(key))
    yield f"- Training: {steps or 'none'}, seed {content['seed']}, msenc at commit `{content.get('commit')}`"
    yield from ("", "## Results", "")
    yield from _results(evaluations)
    yield from ("", "## Known limits", "")
    yield from (f"- {limit}" for limit in _limits(content, facts, evaluations))
    yield ""


def _results(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    plain = [e for e in evaluations if e.control is None]
    if not plain:
        yield "It has not been evaluated."
        return
    found = [table_metrics(e.metrics) for e in plain]
    names = sorted({name for metrics in found for name in metrics}, key=metric_order)
    style = Style()
    yield f"| metric | {' | '.join(_plain(f'{e.data}, {e.split}') for e in plain)} |"
    yield f"| --- |{' ---: |' * len(plain)}"
    yield f"| targets | {' | '.join(format(round(e.metrics.get('targets', 0)), ',') for e in plain)} |"
    for metric in names:
        cells = [style.number(metric, m[metric]) if m.get(metric) is not None else "-" for m in found]
        yield f"| {style.header(metric)} | {' | '.join(cells)} |"
    yield ""
    settings = dict.fromkeys(_plain(e.settings) for e in plain)
    yield f"Settings: {'; '.join(f'`{text}`' for text in settings)}"


def _limits(content: Mapping[str, Any], facts: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> Iterator[str]:
    yield f"It knows what `{_plain(content['data'])}` holds, and was tested on nothing else than is listed above."
    yield "It may say what is wrong or hurts, and its voice descriptions say how to speak, not who somebody is."
    if names := [_plain(name) for name in content.get("speakers") or []]:
        yield f"Names matter: it takes those it has read most, {' and '.join(names)}, unless others are given."
    if not content["streams"]:
        yield "It reads words alone: audio and video are ignored."
    for evaluation in evaluations:
        if evaluation.control is not None and evaluation.verdict:
            yield f"Control `{evaluation.control}` on {evaluation.split}: {_plain(evaluation.verdict)}."
    if content.get("checkpoint") is None:
        yield "No checkpoint was saved: its weights are those at the end of training."
    for warning in facts.get("warnings") or []:
        yield _plain(warning)


def _amount(facts: Mapping[str, Any]) -> str:
    batches, history = facts.get("batches") or {}, facts.get("history") or {}
    found = [(batches.get("dialogues"), "dialogues"), (history.get("targets"), "targets")]
    said = " with ".join(f"{number:,} {what}" for number, what in found if isinstance(number, int))
    return f", {said} for training" if said else ""


def _model(name: str | None, revision: str | None) -> str:
    if name is None:
        return "a model from a local folder"
    return f"`{name}`{f' at `{revision}`' if revision else ''}"


def _plain(text: Any) -> str:
    """A text from a file, in one line that is no markup."""
    return " ".join(str(text).split()).replace("|", "/").replace("<", "&lt;").replace("`", "'")
