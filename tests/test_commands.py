"""The wheel in an empty folder and an environment of its own: the commands do what the scripts of a checkout do."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CONFIGS, ROOT, SMALL_DEMO

from msenc.files import read_json

SHORT = ["trainer.max_steps=2", "trainer.max_epochs=1", "evaluate=val", "decoding.max_new_tokens=2"]


@pytest.fixture(scope="module")
def installed(demo_home, tmp_path_factory):
    """``installed(*arguments, cwd=...)`` -> the finished process of msenc, installed from its wheel."""
    home = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(home), str(ROOT)]
    built = subprocess.run(build, cwd=home, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = home.glob("*.whl")
    venv.create(home / "env", symlinks=True)
    # What msenc needs is that of this environment; msenc itself is only in the new one, whose path comes first.
    (packages,) = (home / "env").glob("lib/python*/site-packages")
    (packages / "needs.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    python = home / "env" / "bin" / "python"
    install = [*pip, f"--python={python}", "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    done = subprocess.run(install, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MSENC_RUNS")}

    def call(*arguments: str, cwd: Path, program: str = "msenc") -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(python.parent / program), *arguments],
            cwd=cwd,
            env={**environment, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )

    return SimpleNamespace(call=call, packages=packages, wheel=wheel)


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_module_and_every_config(installed):
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    files = [*(ROOT / "msenc").rglob("*.py"), *(f for f in (ROOT / "msenc" / "pages").iterdir() if f.is_file())]
    assert {str(f.relative_to(ROOT)) for f in files} <= names
    configs = [*CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.json")]  # with the schemas that they name
    assert {f"msenc/configs/{f.relative_to(CONFIGS)}" for f in configs} <= names


def test_a_sweep_its_report_and_a_reply_in_an_empty_folder(installed, tmp_path):
    where = said(installed.call("-c", "import msenc; print(msenc.__file__)", cwd=tmp_path, program="python"))
    assert where.startswith(str(installed.packages))
    sweep = ["train", "-m", "modality=text,text_audio", *SHORT]
    assert "Sweep folder: runs/sweeps/" in said(installed.call(*sweep, cwd=tmp_path))
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    runs = sorted(folder.glob("*/*/run.json"))
    assert [read_json(run)["status"] for run in runs] == ["finished"] * 2
    assert all(read_json(run)["commit"] is None for run in runs)
    listed = said(installed.call(*sweep, "dry_run=true", cwd=tmp_path))
    assert listed.count("│ finished") == 2
    page = (folder / "report" / "report.html").read_text()
    assert "msenc train" in page
    assert ".py" not in page

    run = f"run_dir={runs[0].parent}"
    assert "report.html" in said(installed.call("report", f"sweep_dir={folder}", "split=val", cwd=tmp_path))
    assert "Written: " in said(installed.call("evaluate", run, "split=val", "generate=false", cwd=tmp_path))
    assert "reply.json" in said(installed.call("respond", run, "text=Well, yes!", "speech=null", "out=A", cwd=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "runs"]


def test_a_project_of_ones_own(installed, tmp_path):
    assert "cd my-idea && msenc train experiment=my-idea" in said(installed.call("new", "my-idea", cwd=tmp_path))
    project = tmp_path / "my-idea"
    said(installed.call("configs", "--copy", "trainer/cpu.yaml", cwd=project))
    own = project / "configs" / "trainer" / "cpu.yaml"
    own.write_text(own.read_text().replace("max_epochs:", "max_time: 00:00:10:00\nmax_epochs:"))
    composed = said(installed.call("train", "experiment=my-idea", "--cfg", "job", cwd=project))
    assert "max_time: 00:00:10:00" in composed
    said(
        installed.call("train", "experiment=my-idea", *SMALL_DEMO, "evaluate=null", "trainer.max_steps=2", cwd=project)
    )
    (run,) = (project / "runs" / "single").iterdir()
    assert read_json(run / "run.json")["streams"].keys() == {"audio"}
    assert installed.call("-m", "pytest", "-q", cwd=project, program="python").returncode == 0


def test_without_a_command_it_says_what_there_is(installed, tmp_path):
    everything = said(installed.call(cwd=tmp_path))
    assert all(name in everything for name in ("train", "prepare", "respond", "import-upstream", "configs", "new"))
    assert said(installed.call("--version", cwd=tmp_path)).startswith("msenc ")
    helped = said(installed.call("train", "--help", cwd=tmp_path))
    assert "msenc train modality=text_audio" in helped
    assert "train.py" not in helped
    as_module = installed.call("-m", "msenc", "report", "sweep_dir=absent", cwd=tmp_path, program="python")
    assert as_module.returncode == 1
    assert as_module.stderr.startswith("error: No folder absent.")
    assert "as msenc train -m prints it" in as_module.stderr


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["trian"], "trian: no such command. Did you mean 'train'?"),
        (["new"], "msenc new NAME: expected one name"),
        (["new", "a b"], "'a b': expected letters"),
        (["new", "taken"], "taken: is there already"),
        (["configs", "--copy"], "expected files or groups"),
        (["configs", "--copy", "trainer/cpu"], "configs/trainer/cpu.yaml: is there already"),
        (
            ["configs", "--copy", "trainer/gpuu.yaml"],
            "trainer/gpuu.yaml: no such config. Did you mean 'trainer/gpu.yaml'?",
        ),
        (["import-upstream", "checkpoint=x"], "llm: no value"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_lost(arguments, refusal, tmp_path, monkeypatch, capsys):
    from msenc import commands

    (tmp_path / "taken").mkdir()
    (tmp_path / "configs" / "trainer").mkdir(parents=True)
    (tmp_path / "configs" / "trainer" / "cpu.yaml").write_text("mine: 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["msenc", *arguments])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert refusal in str(stopped.value)
    assert (tmp_path / "configs" / "trainer" / "cpu.yaml").read_text() == "mine: 1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["configs", "taken"]


def test_a_further_process_of_a_run_does_the_same_command(monkeypatch):
    """Lightning starts it with the arguments as they were after the command's name was taken from them."""
    from msenc import commands

    done = []
    monkeypatch.setattr(commands, "run", lambda command: done.append((command, sys.argv[1:])))
    monkeypatch.setenv("MSENC_COMMAND", "")
    monkeypatch.delenv("MSENC_COMMAND")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["msenc", "evaluate", "trainer=ddp", "run_dir=A"])
    commands.main()
    monkeypatch.setenv("LOCAL_RANK", "1")
    commands.main()
    assert done == [("evaluate", ["trainer=ddp", "run_dir=A"])] * 2


def test_a_python_without_the_packages_is_told_where_they_are():
    done = subprocess.run([sys.executable, "-S", "report.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {sys.executable} has no package hydra.")
    assert "source .venv/bin/activate" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_a_refusal(demo_home, tmp_path):
    arguments = [sys.executable, ROOT / "prepare.py", "data=demo", "prepare_workers=0", *SMALL_DEMO]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(arguments, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: output cannot be written (No space left on device). Free space where it goes, and repeat the command.\n"
    )
