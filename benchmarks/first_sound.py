"""From the end of the user's turn to the reply's first sound, step by step, everything loaded once before.

python benchmarks/first_sound.py RUN [--kokoro FOLDER] [--whisper FOLDER]     # a run on the demo

The turns are those of the demo's test split: typed, and with their clips; with ``--whisper`` also clips alone, whose
words are recognised, and the same sound through an open microphone, at its own pace: there the seconds count from the
last speech, so that the silence by which the end is known is in them. The reply comes as on the page, sentence by
sentence (`msenc.talk.live`); what the browser and its network add, the page says itself. ``openai`` asks a server in
this process that answers at once with a second of sound: what the client adds, and no model's time.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from msenc.raw.media import read_audio
from msenc.runs.overrides import quoted_value
from msenc.speech.wav import to_wav
from msenc.talk.agent import Agent, Turn
from msenc.talk.listening import SAMPLE_RATE, Listeners
from msenc.talk.live import STEPS, Ledger, percentiles, reply_live
from msenc.talk.visitors import Visitors

PART_S = 0.096
"""Of sound that the page sends at once."""


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


def time_turn(
    agent: Agent, turn: Turn, synthesizer: Any, decoding: dict[str, Any], listeners: Listeners | None = None
) -> dict[str, float]:
    """Seconds from the end of the turn to each step; with `listeners`, of its sound through an open microphone."""
    if listeners is None:
        ledger = Ledger()
        heard = agent.hear(turn)
    else:
        path = speak_into(listeners, read_audio(turn.video, SAMPLE_RATE))
        ledger = Ledger(*[listeners.waited_s(path)] * 2)
        words = listeners.words(path)
        heard = agent.hear(Turn(turn.speaker, audio=path), lambda _: words)
    ledger.note_heard(heard)
    *_, last = reply_live(agent, synthesizer, [heard], agent.speakers[1], decoding, 1, ledger)
    if last.fault is not None:
        raise last.fault
    return ledger.seconds


def speak_into(listeners: Listeners, sound: np.ndarray) -> Path:
    """Speak into an open microphone, in real time, and be silent until the turn is over; the turn's file."""
    silence = np.zeros(2 * SAMPLE_RATE, np.float32)
    samples, part = to_wav(np.concatenate([sound, silence]), SAMPLE_RATE)[44:], 2 * round(PART_S * SAMPLE_RATE)
    began = time.perf_counter()
    for at in range(0, len(samples), part):
        time.sleep(max(0.0, began + (at + part) / 2 / SAMPLE_RATE - time.perf_counter()))
        if turns := listeners.hear("benchmark", samples[at : at + part])["turns"]:
            return Path(turns[-1])
    raise RuntimeError("no speech was found in a clip")


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
    results: dict[str, dict[str, tuple[float, float]]] = {}
    with ExitStack() as stack:
        address = stack.enter_context(small_server())
        nodes = {"espeak": ["speech=espeak"], "openai": ["speech=openai", f"speech.base_url={address}"]}
        if options.kokoro:
            nodes["kokoro"] = ["speech=kokoro", f"speech.folder={quoted_value(str(options.kokoro))}"]
        agent = load_agent(options.run, config_of(options.run, overrides))
        visitors = Visitors(Path(stack.enter_context(tempfile.TemporaryDirectory())), 1 << 30)
        listeners = Listeners(visitors, agent.recognise, 60.0)
        stack.callback(listeners.close)
        for speech, chosen in nodes.items():
            config = config_of(options.run, [*overrides, *chosen])
            synthesizer = build(config["speech"], "speech")
            for kind in ("typed", "words and clip", *(["clip alone", "microphone"] if options.whisper else [])):
                words, clips = kind in ("typed", "words and clip"), kind != "typed"
                turns = [
                    Turn(agent.speakers[0], u.text if words else "", video=root / u.clip if clips else None)
                    for u in first
                ]
                ears = listeners if kind == "microphone" else None
                steps = [time_turn(agent, turn, synthesizer, config["decoding"], ears) for turn in turns]
                results[f"{speech}, {kind}"] = percentiles(steps[1:])  # the first one warms up
    print_table(
        f"Seconds from the end of the turn, median (95th percentile) of {num_turns} turns",
        ("", *STEPS),
        [(name, *map(in_words, (found.get(step) for step in STEPS))) for name, found in results.items()],
    )
    write_json(options.json, results)


def in_words(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.3f} ({found[1]:.3f})"


if __name__ == "__main__":
    main()
