"""The page under load: visitors who talk, upload, go away, save and continue all at once.

python benchmarks/page.py RUN [--visitors 30] [--turns 100] [--data FOLDER] [--quick] [--json FILE]

It serves the page in a process and a temporary folder of its own and speaks to it as a browser does. Each visitor
says other words; a third continue a saved talk, a third begin a second one, and some send a turn and are gone at once.
Meanwhile files of 300 MB arrive that are not wanted. A reply is right if it equals what the run answers to the same
turns with nobody else there; a talk is mixed up if it holds a turn that its visitor did not send, or not in this place.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from hydra import compose, initialize_config_dir
from measure import parser, print_table, write_json

from msenc.config.messages import CONFIGS
from msenc.config.schema import plain, register_schemas
from msenc.pipelines.respond import load_agent
from msenc.runs.overrides import quoted_value
from msenc.talk.agent import Turn, read_talk

ROOT = Path(__file__).parents[1]
OVERRIDES = ["speech=none", "decoding.max_new_tokens=24"]
LARGE_BYTES = 300 << 20


class Visitor:
    """One browser at the page, without the browser.

    Args:
        address: of the page.
        name: of the session.
        password: of the page.
    """

    def __init__(self, address: str, name: str, password: str | None = None) -> None:
        auth = None if password is None else ("visitor", password)
        self.http = httpx.Client(base_url=address, timeout=300, auth=auth, trust_env=False)
        self.name = name
        self.functions: dict[str, int] = {}
        self.outputs: list[int] = []
        self.run: str | None = None
        self._heart: Any = None

    def __enter__(self) -> "Visitor":
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def open(self) -> float:
        """Open the page; seconds until its first values are there."""
        began = time.perf_counter()
        self.http.get("/").raise_for_status()
        config = self.http.get("/config").raise_for_status().json()
        self.functions = {d["api_name"]: d["id"] for d in config["dependencies"]}
        self.outputs = next(d["outputs"] for d in config["dependencies"] if d["api_name"] == "on_send")
        self._heart = self.http.stream("GET", f"/gradio_api/heartbeat/{self.name}")
        self._heart.__enter__()
        runs = self.call("on_open")[0]
        self.run = runs["value"]
        return time.perf_counter() - began

    def leave(self) -> None:
        """Close the page."""
        if self._heart is not None:
            self._heart.__exit__(None, None, None)
        self.http.close()

    def call(self, function: str, *values: Any) -> list[Any]:
        """What a handler beside the queue answers."""
        body = {"data": values, "fn_index": self.functions[function], "session_hash": self.name}
        return self.http.post("/gradio_api/run/predict", json=body).raise_for_status().json()["data"]

    def join(self, function: str, *values: Any) -> httpx.Response:
        """Ask for a place in the queue."""
        body = {"data": values, "fn_index": self.functions[function], "session_hash": self.name}
        return self.http.post("/gradio_api/queue/join", json=body)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the queue tells; whoever ends this early has gone."""
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def wait_for(self, function: str, *values: Any) -> str:
        """Queue a handler, and wait until it is done; the status line without its tags."""
        self.join(function, *values).raise_for_status()
        said, status = "", 1  # the place of `status` among the outputs
        for message in self.messages():
            if message["msg"] in ("process_generating", "process_completed") and message["success"]:
                value = message["output"]["data"][status]
                said = re.sub("<[^>]*>", "", value) if isinstance(value, str) else said
            if message["msg"] == "process_completed":
                if not message["success"]:
                    raise RuntimeError(f"{function} failed: {message}")
                break
        return said

    def say(self, text: str, audio: str | None = None, video: str | None = None) -> str:
        """Send a turn, and wait for its reply."""
        return self.wait_for("on_send", self.run, text, as_file(audio), as_file(video), None)

    def say_and_go(self, text: str) -> None:
        """Send a turn, and be gone as soon as it is being answered."""
        self.join("on_send", self.run, text, None, None, None).raise_for_status()
        for message in self.messages():
            if message["msg"] == "process_starts":
                return

    def upload(self, content: Any, name: str) -> httpx.Response:
        """Send a file; the answer lists its path."""
        return self.http.post("/gradio_api/upload", files={"files": (name, content)})

    def saved(self) -> bytes | None:
        """The talk's saved file, or None if nothing is said so far."""
        value = self.call("on_save")[4]
        if not isinstance(value, dict) or not value.get("value"):
            return None
        return self.http.get(f"/gradio_api/file={value['value']['path']}").raise_for_status().content


def as_file(path: str | None) -> dict[str, Any] | None:
    """An uploaded file as the browser names it."""
    return None if path is None else {"path": path, "meta": {"_type": "gradio.FileData"}}


@dataclass
class Story:
    """What one visitor did, and what came of it."""

    sent: list[str] = field(default_factory=list)
    saved: list[bytes] = field(default_factory=list)
    opening_s: float = 0.0
    turns_s: list[float] = field(default_factory=list)


def visit(address: str, number: int, num_turns: int) -> Story:
    """A visitor's turns; every third talks in a file that is continued, every third begins anew in the middle."""
    story = Story()
    visitor = Visitor(address, f"visitor{number}")
    story.opening_s = visitor.open()
    try:
        for turn in range(num_turns):
            if turn == num_turns // 2 and turn and number % 3:
                file = visitor.saved() or b""
                visitor.call("on_new")
                if number % 3 == 1:
                    (path,) = visitor.upload(file, "talk.json").raise_for_status().json()
                    visitor.wait_for("on_continue", as_file(path), visitor.run)
                else:
                    story.saved.append(file)
                    story.sent.append("")
            if turn == 1 and number % 4 == 0:
                visitor.say_and_go(f"Visitor {number} is gone before the reply.")
            text = f"I am visitor {number}, and this is turn {turn}. How are you?"
            began = time.perf_counter()
            visitor.say(text)
            story.turns_s.append(time.perf_counter() - began)
            story.sent.append(text)
        story.saved.append(visitor.saved() or b"")
    finally:
        visitor.leave()
    return story


def large_upload(address: str, is_stated: bool) -> int:
    """The status that a file of 300 MB meets, whether or not its length is stated before."""

    def parts() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="large.wav"\r\n\r\n'
        for _ in range(LARGE_BYTES >> 20):
            yield bytes(1 << 20)
        yield b"\r\n--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    if is_stated:
        headers["Content-Length"] = str(sum(map(len, parts())))
    try:
        url = f"{address}gradio_api/upload"
        return httpx.post(url, content=parts(), headers=headers, timeout=300, trust_env=False).status_code
    except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
        return 413  # it hung up in the middle


def check_replies(agent: Any, config: Mapping[str, Any], saved: bytes, sent: Sequence[str]) -> dict[str, int]:
    """How many replies of a saved talk are right, and how many of its turns are not as they were sent."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "talk.json"
        path.write_bytes(saved)
        turns = read_talk(path)
    found = {"replies": 0, "right": 0, "mixed up": int([t.text for t in turns[::2]] != [*sent])}
    heard = [agent.hear(Turn(turn.speaker, turn.text, description=turn.description)) for turn in turns]
    for at in range(1, len(turns), 2):
        (answer, *_), _ = agent.answer(heard[:at], turns[at].speaker, config["decoding"], config["seed"])
        found["replies"] += 1
        found["right"] += " ".join(answer.text.split() or ["..."]) == turns[at].text
    return found


@contextmanager
def served(run: Path, folder: Path, overrides: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """The page in a process whose temporary files lie in a folder: its address, and the process's id."""
    command = [sys.executable, str(ROOT / "respond.py"), "page=true", f"run_dir={run}"]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(
        [*command, f"runs_dir={folder}", *OVERRIDES, *overrides],
        cwd=ROOT,
        env={**environment, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = []
        while not (match := re.search(r"http://\S+:\d+/", said[-1] if said else "")):
            line = server.stdout.readline()
            if not line:
                raise RuntimeError(f"The page did not start:\n{''.join(said)}")
            said.append(line)
        yield match[0].replace("0.0.0.0", "127.0.0.1"), server.pid
    finally:
        server.terminate()
        rest = server.communicate(timeout=60)[0]
    if server.returncode or rest.strip():
        raise RuntimeError(f"The page ended with {server.returncode} and said:\n{rest}")


def resident_bytes(pid: int) -> int:
    """Memory that a process holds now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def bytes_below(folder: Path) -> int:
    """Bytes of the files below a folder."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += (Path(place) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def load_page(
    run: Path, folder: Path, num_visitors: int, num_turns: int, overrides: Sequence[str], wait_s: float = 90.0
) -> dict[str, Any]:
    """Let everybody come at once; what came of it.

    Args:
        run: that replies.
        folder: empty, for the page's temporary files.
        num_visitors: who come.
        num_turns: of all together.
        overrides: of respond.py.
        wait_s: at most, for what the visitors left to go.
    """
    with served(run, folder, overrides) as (address, pid):
        with Visitor(address, "first") as first:
            first.say("Hello!")  # the model is loaded
        before, peaks, openings, is_over = resident_bytes(pid), [0, 0], [], threading.Event()

        def observe() -> None:
            while not is_over.wait(0.05):
                peaks[:] = max(peaks[0], resident_bytes(pid)), max(peaks[1], bytes_below(folder))

        def look_in() -> None:
            number = 0
            while not is_over.wait(0.2):
                number += 1
                visitor = Visitor(address, f"passer-by{number}")
                openings.append(visitor.open())
                visitor.leave()

        shares = [num_turns // num_visitors + (n < num_turns % num_visitors) for n in range(num_visitors)]
        began = time.perf_counter()
        with ThreadPoolExecutor(num_visitors + 4) as pool:
            others = [pool.submit(observe), pool.submit(look_in)]
            large = [pool.submit(large_upload, address, is_stated) for is_stated in (True, False)]
            try:
                stories = list(pool.map(visit, [address] * num_visitors, range(num_visitors), shares))
            finally:
                is_over.set()
            seconds = time.perf_counter() - began
            statuses = [one.result() for one in large]
            for one in others:
                one.result()
        until = time.monotonic() + wait_s  # a talk is kept for a minute
        while bytes_below(folder) > 0 and time.monotonic() < until:
            time.sleep(0.5)
        final, after = bytes_below(folder), resident_bytes(pid)
    config = config_of(run, [*OVERRIDES, *overrides])
    agent = load_agent(run, config)
    counts = {"replies": 0, "right": 0, "mixed up": 0}
    for story in stories:
        talks, sent = [], story.sent
        if "" in sent:
            at = sent.index("")
            talks = [sent[:at], sent[at + 1 :]]
        for saved, texts in zip(story.saved, talks or [sent], strict=True):
            for key, value in check_replies(agent, config, saved, texts).items():
                counts[key] += value
    turns = [second for story in stories for second in story.turns_s]
    return {
        **counts,
        "gone in mid-turn": sum(number % 4 == 0 and share > 1 for number, share in enumerate(shares)),
        "status of 300 MB": statuses,
        "seconds": seconds,
        "opening p50 s": percentile(openings, 50),
        "opening p95 s": percentile(openings, 95),
        "turn p50 s": percentile(turns, 50),
        "turn p95 s": percentile(turns, 95),
        "memory growth, peak MiB": (peaks[0] - before) / 2**20,
        "memory growth, end MiB": (after - before) / 2**20,
        "temporary files, peak MiB": peaks[1] / 2**20,
        "temporary files, end bytes": final,
    }


def percentile(values: Sequence[float], share: int) -> float:
    """The value below which so many of a hundred lie."""
    return statistics.quantiles(values, n=100)[share - 1] if len(values) > 1 else values[0]


def config_of(run: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What respond.py's config is with these overrides."""
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return plain(compose("respond", [f"run_dir={quoted_value(str(run))}", *overrides]))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    arguments.add_argument("--visitors", type=int, default=30, help="default: %(default)s")
    arguments.add_argument("--turns", type=int, default=100, help="of all together; default: %(default)s")
    arguments.add_argument("--data", type=Path, metavar="FOLDER", help="where the run's data lie")
    options = arguments.parse_args()
    overrides = [f"data_dir={quoted_value(str(options.data.resolve()))}"] if options.data else []
    visitors, turns = (4, 12) if options.quick else (options.visitors, options.turns)
    with tempfile.TemporaryDirectory(prefix="msenc-page-") as folder:
        results = load_page(options.run.resolve(), Path(folder), visitors, turns, overrides)
    print_table(f"The page with {visitors} visitors and {turns} turns", ("", "found"), [*results.items()])
    write_json(options.json, results)


if __name__ == "__main__":
    main()
