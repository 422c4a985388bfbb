"""A Slurm of two nodes on this machine, from the packages that unpack.sh leaves in a folder (MSENC_SLURM)."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
CredType=cred/munge
PluginDir={plugins}
StateSaveLocation={state}/jobs
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/control.pid
SlurmdPidFile={state}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=60
MessageTimeout=90
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""

# submitit asks sacct what became of a job, and a Slurm without a database has none to answer.
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
for job in "$@"; do
    case "$job" in [0-9]*) ;; *) continue ;; esac
    scontrol show job "$job" --oneliner 2>/dev/null | while read -r line; do
        value() { echo "$line" | tr ' ' '\\n' | sed -n "s/^$1=//p" | head -1; }
        if [ -n "$(value ArrayJobId)" ]; then id="$(value ArrayJobId)_$(value ArrayTaskId)"; else id=$(value JobId); fi
        echo "$id|$(value JobState)|$(value NodeList)"
    done
done
"""


_started: list[subprocess.Popen] = []


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


@pytest.fixture(scope="session")
def slurm_packages() -> Path:
    """The folder of unpacked packages."""
    if not (packages := os.environ.get("MSENC_SLURM")):
        pytest.skip("MSENC_SLURM names no folder of Slurm's packages: tests/cluster/unpack.sh FOLDER")
    return Path(packages).resolve()


@pytest.fixture(scope="session")
def slurm(slurm_packages, demo_home) -> Iterator[SimpleNamespace]:
    """A running Slurm: its programs are on PATH.

    `start(script, *args)` starts a script of the project, `call(...)` runs one to its end, `ask(program, *args)` asks
    Slurm, `wait(condition)` waits until it holds.
    """
    libraries = next((slurm_packages / "usr" / "lib").glob("*/slurm-wlm"))
    state = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    state.chmod(0o711)  # or munged refuses
    for folder in ("jobs", "n1", "n2", "bin"):
        (state / folder).mkdir()
    (state / "key").write_bytes(secrets.token_bytes(1024))
    (state / "key").chmod(0o400)
    sacct = state / "bin" / "sacct"
    sacct.write_text(SACCT)
    sacct.chmod(0o755)
    host, (control, first, second) = socket.gethostname().split(".")[0], _free_ports(3)
    places = {"host": host, "control": control, "first": first, "second": second, "state": state}
    config = state / "slurm.conf"
    config.write_text(CONFIG.format(**places, user=getpass.getuser(), plugins=libraries))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(config))
        patch.setenv("LD_LIBRARY_PATH", f"{libraries.parent}:{libraries}")
        patch.setenv("PATH", f"{state / 'bin'}:{slurm_packages / 'usr' / 'bin'}:{os.environ['PATH']}")
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes' names are in no table of hosts
        patch.setenv("COLUMNS", "200")
        programs = slurm_packages / "usr" / "sbin"
        munge = [f"--{what}={state / what}" for what in ("pid-file", "log-file", "seed-file")]
        munged = [programs / "munged", "--foreground", f"--socket={state / 'munge.socket'}"]
        commands = {
            "munged": [*munged, f"--key-file={state / 'key'}", "--num-threads=2", *munge],
            "slurmctld": [programs / "slurmctld-wlm", "-D"],
            "n1": [programs / "slurmd-wlm", "-D", "-N", "n1", "-d", programs / "slurmstepd-wlm"],
            "n2": [programs / "slurmd-wlm", "-D", "-N", "n2", "-d", programs / "slurmstepd-wlm"],
        }
        daemons = []
        try:
            for name, command in commands.items():
                with (state / f"{name}.log").open("wb") as log:
                    daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
                if name == "munged":
                    _wait((state / "munge.socket").exists, 30)
            _wait(lambda: _ask("sinfo", "--noheader", "--format=%t %D") == "idle 2", 60)
            yield SimpleNamespace(start=_start, call=_call, ask=_ask, wait=_wait)
        finally:
            for process in _started:  # those of tests that failed
                process.kill()
            with suppress(subprocess.CalledProcessError):
                _ask("scancel", "--full", f"--user={getpass.getuser()}")
                _wait(lambda: _ask("squeue", "--noheader") == "")
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)
            shutil.rmtree(state)


def _ask(program: str, *args: str) -> str:
    asked = subprocess.run([program, *args], capture_output=True, text=True, check=False)
    if asked.returncode:  # the daemons are still starting
        return asked.stderr
    return asked.stdout.strip()


def _wait(condition: Callable[[], object], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "Slurm, or a job, did not get there in time"
        time.sleep(0.5)


def _start(script: str, *args: str) -> subprocess.Popen:
    command: Sequence[str] = [sys.executable, script, *args]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _started.append(process)
    return process


def _call(script: str, *args: str) -> str:
    process = _start(script, *args)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output
