"""The commands of the README and of docs/commands.md run as they are written, but shorter and on the small demo."""

import re
import shlex
import shutil
from collections import Counter

import pytest
from conftest import ROOT, SMALL_DEMO

PAGES = (ROOT / "README.md", ROOT / "docs" / "commands.md")
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)

SHORT = {
    "prepare.py": ["prepare_workers=0"],
    "train.py": ["trainer.max_steps=1", "decoding.max_new_tokens=4"],
    "evaluate.py": ["decoding.max_new_tokens=4"],
    "report.py": [],
}
"""Added to every command of a script."""

REPLACED = {"trainer=gpu": "trainer=cpu"}
"""What takes too long, or another machine."""

STAND_INS = {
    "model/audio=wavlm": ["model.streams.audio.dim=16", "model.streams.audio.encoder.name_or_path={wavlm}"],
    "model/video=clip": ["model.streams.video.dim=12", "model.streams.video.encoder.name_or_path={clip}"],
    "model/llm=mistral_7b": ["model.llm.name_or_path={mistral}"],
    "model/llm=smollm2": ["model.llm.name_or_path={llama}"],
    "model/connector=qformer_blip2": [
        "model.connector.init=null",
        "model.connector.num_layers=2",
        "model.connector.hidden_dim=16",
        "model.connector.num_heads=2",
        "model.connector.encoder_dim=16",
    ],
}
"""Choice -> overrides that replace a large model by a random one of the same class."""

SKIPPED: dict[str, str] = {}
"""Command -> why it cannot run in a test."""


def commands() -> list[str]:
    """The lines of the pages' bash blocks, each once, without their comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = (shlex.join(shlex.split(line, comments=True)) for line in lines)
    return [*dict.fromkeys(command for command in found if command)]


PYTHON = [c for c in commands() if c.startswith("python ")]
MAKE = [c for c in commands() if c.startswith("make ")]


def test_every_command_is_of_a_kind_that_is_run():
    assert sorted(PYTHON + MAKE) == sorted(commands())
    assert set(SKIPPED) <= set(PYTHON)
    count = Counter(command.split()[1] for command in PYTHON)
    print(f"{len(PYTHON) - len(SKIPPED)} of {len(PYTHON)} commands run: {dict(count)}; make: {len(MAKE)}")
    assert set(count) == set(SHORT)
    assert not [key for key in [*REPLACED, *STAND_INS] if key not in README]


@pytest.fixture(scope="module")
def shared_home(demo_home, tmp_path_factory):
    """Data and runs of all commands, which build on each other in the README's order; the demo is prepared."""
    home = tmp_path_factory.mktemp("readme")
    for part in ("demo", "demo-raw", "tiny-llm"):
        shutil.copytree(demo_home / "data" / part, home / "data" / part)
    return home


@pytest.fixture
def own_home(shared_home, monkeypatch):
    monkeypatch.setenv("MSENC_DATA", str(shared_home / "data"))
    monkeypatch.setenv("MSENC_RUNS", str(shared_home / "runs"))
    return shared_home


@pytest.fixture
def a_run(own_home, call_script):
    folder = own_home / "runs" / "sweep" / "0"
    if not folder.exists():
        call_script("train.py", "modality=text", *SHORT["train.py"], f"paths.output_dir={folder}")
    return folder


@pytest.mark.parametrize("command", PYTHON)
def test_a_command_runs(command, call_script, own_home, a_run, tiny_models, capsys):
    if command in SKIPPED:
        pytest.skip(SKIPPED[command])
    _, script, *arguments = shlex.split(command)
    stand_ins = [o.format(**tiny_models) for choice in arguments for o in STAND_INS.get(choice, ())]
    given = {o.split("=")[0] for o in stand_ins}
    arguments = [REPLACED.get(a, a) for a in arguments if a.split("=")[0] not in given]
    placeholders = {"RUN": a_run, "SWEEP": a_run.parent, "FOLDER": own_home / "data" / "demo-raw"}
    arguments = [re.sub(r"=([A-Z]+)$", lambda m: f"={placeholders[m[1]]}", a) for a in arguments]
    small = SMALL_DEMO if "data=demo" in arguments else []
    before = files_of(own_home)
    capsys.readouterr()
    call_script(script, *arguments, *stand_ins, *SHORT[script], *small)
    is_done = "resume=auto" in arguments and f"Already finished: {a_run}" in capsys.readouterr().out.replace("\n", "")
    assert ("plan=true" in arguments) or is_done or files_of(own_home) != before, "the command wrote nothing"


def files_of(folder):
    return {(p, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", MAKE)
def test_a_make_target_exists(command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (word for word in command.split()[1:] if "=" not in word):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make has no target {target}"


@pytest.mark.parametrize("path", re.findall(r"`((?:docs|configs|msenc|tests)/[\w./-]*)`", README))
def test_a_path_exists(path):
    assert (ROOT / path).exists()
