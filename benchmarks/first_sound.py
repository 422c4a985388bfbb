"""From the end of the user's turn to the reply's first sound, step by step, everything loaded once before.

python benchmarks/first_sound.py RUN [--kokoro FOLDER] [--whisper FOLDER]     # a run on the demo

The turns are clips of the demo's test split with their words; with ``--whisper`` also clips alone, whose words are
recognised. The first sound is the reply's first sentence, which `Synthesizer.stream` has ready first; the page and
respond.py hand over the whole reply. ``openai`` asks a server in this process that answers at once
with a second of sound: what the client adds, and no model's time.
"""

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from measure import parser, print_table, write_json

from msenc.config.build import build
from msenc.config.messages import CONFIGS
from msenc.config.schema import plain, register_schemas
from msenc.pipelines.respond import load_agent
from msenc.raw.annotations import read_meld
from msenc.runs.overrides import quoted_value
from msenc.speech.wav import to_wav
from msenc.talk.agent import Agent, Turn

STEPS = ("recognition", "features", "reply", "first sound", "in all", "whole reply")


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sound = to_wav((0.1 * np.sin(np.arange(24_000) / 20)).astype(np.float32), 24_000)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.sound)))
        self.end_headers()
        self.wfile.write(self.sound)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def small_server() -> Iterator[str]:
    """The address of a server that answers every request with the same sound."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def time_turn(agent: Agent, turn: Turn, synthesizer: Any, decoding: dict[str, Any]) -> dict[str, float]:
    """Seconds of each step of one reply; the last two from the end of the turn."""
    began = time.perf_counter()
    heard = agent.hear(turn)
    encoded = time.perf_counter()
    (answer, *_), _ = agent.answer([heard], agent.speakers[1], decoding)
    written = time.perf_counter()
    sentences = synthesizer.stream(answer.text, answer.attributes, agent.speakers[1])
    next(sentences)
    end = time.perf_counter()
    for _ in sentences:
        pass
    whole = time.perf_counter()
    steps = dict(heard.seconds)
    steps |= {
        "reply": written - encoded,
        "first sound": end - written,
        "in all": end - began,
        "whole reply": whole - began,
    }
    return steps


def config_of(run: Path, overrides: list[str]) -> dict[str, Any]:
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return plain(compose("respond", [f"run_dir={quoted_value(str(run))}", *overrides]))


def main() -> None:
    arguments = parser(__doc__, repetitions=20)
    data = Path(os.environ.get("MSENC_DATA", "data"))
    arguments.add_argument("run", type=Path, metavar="RUN", help="folder of a run on the demo")
    arguments.add_argument("--data", type=Path, default=data, help="where its data lie; default: %(default)s")
    arguments.add_argument("--kokoro", type=Path, metavar="FOLDER", help="a local Kokoro model")
    arguments.add_argument("--whisper", type=Path, metavar="FOLDER", help="a local Whisper")
    options = arguments.parse_args()
    num_turns = 3 if options.quick else options.repetitions
    overrides = [f"data_dir={quoted_value(str(options.data))}"]
    overrides += [f"recogniser={quoted_value(str(options.whisper))}"] if options.whisper else []
    root = options.data / "demo-raw"
    dialogues = [d for d in read_meld(root, "demo").dialogues if d.split == "test"]
    first = [d.utterances[0] for d in dialogues[: num_turns + 1]]
    results: dict[str, dict[str, float]] = {}
    with small_server() as address:
        nodes = {"espeak": ["speech=espeak"], "openai": ["speech=openai", f"speech.base_url={address}"]}
        if options.kokoro:
            nodes["kokoro"] = ["speech=kokoro", f"speech.folder={quoted_value(str(options.kokoro))}"]
        agent = load_agent(options.run, config_of(options.run, overrides))
        for speech, chosen in nodes.items():
            config = config_of(options.run, [*overrides, *chosen])
            synthesizer = build(config["speech"], "speech")
            for kind in ("words and clip", *(["clip alone"] if options.whisper else [])):
                turns = [
                    Turn(agent.speakers[0], u.text if kind.startswith("words") else "", video=root / u.clip)
                    for u in first
                ]
                steps = [time_turn(agent, turn, synthesizer, config["decoding"]) for turn in turns][1:]  # warm
                results[f"{speech}, {kind}"] = {
                    step: statistics.median(one.get(step, 0.0) for one in steps) for step in STEPS
                }
    print_table(
        f"From the end of the turn to the first sound, seconds, median of {num_turns} turns",
        ("", *STEPS),
        [(name, *(found[step] for step in STEPS)) for name, found in results.items()],
    )
    write_json(options.json, results)


if __name__ == "__main__":
    main()
