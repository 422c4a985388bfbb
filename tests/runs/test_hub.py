"""Exports on a stand-in of the Hugging Face hub: what is sent, what is not, and what is loaded from it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_DEMO
from hub_server import TOKEN, serve_hub

import msenc
from msenc.pipelines.push import push
from msenc.runs.hub import fetched
from msenc.types import MsencError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")  # the hub's client, of its library
SHORT = ["decoding.max_new_tokens=8", "speech=null"]
REPO = "anna/my-agent"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve_hub() as server:
        files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        own = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": files}
        for name, value in {**own, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def export(short_run, tmp_path):
    """A copy, to be spoilt."""
    return shutil.copytree(short_run / "export", tmp_path / "copied" / "export")


def refusal(call) -> str:
    with pytest.raises(MsencError) as refused:
        call()
    assert len(str(refused.value).splitlines()) <= 2
    assert TOKEN not in str(refused.value)
    return str(refused.value)


def test_a_run_talks_elsewhere_when_its_folder_is_gone(demo_home, tmp_path):
    """Two folders, two caches, the commands as they are typed; between them only the hub."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(demo_home / "data", first / "data")
    second.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MSENC_", "HF_"))}

    def call(*arguments: str, cwd: Path) -> str:
        own = {"HF_HOME": str(cwd / "hf"), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment = {**kept, **own, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ask = "import msenc, sys; talk = msenc.load(sys.argv[1], sys.argv[2:]).talk(); "
    ask += "print('\\n', *(talk.say(words).text.encode() for words in ('Hello there.', 'And now?')))"
    with serve_hub() as hub:
        steps = ["trainer.max_steps=2", "trainer.max_epochs=1", "evaluate=val", "decoding.max_new_tokens=8"]
        run = first / "runs" / "mine"
        place = f"paths.output_dir={run}"
        call("-m", "msenc", "train", "modality=text_audio", *SMALL_DEMO, *steps, place, cwd=first)
        expected = call("-c", ask, str(run), *SHORT, cwd=first).splitlines()[-1]
        said = call("-m", "msenc", "push", "runs/mine", REPO, cwd=first)
        shutil.rmtree(first)
        assert call("-c", ask, f"hub:{REPO}", *SHORT, cwd=second).splitlines()[-1] == expected
        repo = hub.repos[REPO]
        assert f'msenc.load("hub:{REPO}@{repo.main}")' in said
        replied = call(
            "-m", "msenc", "respond", f"run_dir=hub:{REPO}@{repo.main}", "text=Hello there.", *SHORT, cwd=second
        )
        assert "Written: runs/replies/" in replied
    assert repo.private
    assert {name.partition("/")[0] for name in repo.files} == {
        "README.md",
        "export.json",
        "connectors.safetensors",
        "llm",
    }
    for name, content in repo.files.items():
        assert str(tmp_path).encode() not in content, name
        assert str(Path.home()).encode() + b"/" not in content, name


def test_the_card_says_what_the_run_is(short_run, hub):
    push([str(short_run), REPO])
    text = hub.repos[REPO].files["README.md"].decode()
    assert text.startswith("---\nlibrary_name: msenc\n")
    for said in (
        f'msenc.load("hub:{REPO}")',
        "a model from a local folder",
        "16 dialogues",
        "It has not been evaluated.",
    ):
        assert said in text


def test_a_card_of_the_users_own_stays(short_run, hub, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    (run / "export" / "README.md").write_text("# Mine\n")
    push([str(run), REPO])
    assert hub.repos[REPO].files["README.md"] == b"# Mine\n"


def test_an_evaluation_enters_the_card(short_run, tmp_path, call_script):
    run = shutil.copytree(short_run, tmp_path / "run")
    call_script("evaluate.py", f"run_dir={run}", "split=val", "generate=false", "control=shuffle_audio")
    text = (run / "export" / "README.md").read_text()
    assert "| metric | demo, val |" in text
    assert "| nll ↓ |" in text
    assert "Control `shuffle_audio` on val: " in text
    assert "not been evaluated" not in text


def test_a_commit_is_loaded_again_without_a_network(export, hub, monkeypatch):
    push([str(export), REPO])
    first = hub.repos[REPO].main
    content = json.loads((export / "export.json").read_text())
    (export / "export.json").write_text(json.dumps(content | {"seed": 99}))
    push([str(export), REPO])
    of = {place: fetched(f"hub:{REPO}{place}") for place in ("", f"@{first}", "@main")}
    seeds = {place: json.loads((folder / "export.json").read_text())["seed"] for place, folder in of.items()}
    assert seeds == {"": 99, f"@{first}": content["seed"], "@main": 99}
    asked = len(hub.asked)
    assert fetched(f"hub:{REPO}@{first}") == of[f"@{first}"]
    assert len([a for a in hub.asked[asked:] if a.startswith("GET /anna")]) == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetched(f"hub:{REPO}@{first}") == of[f"@{first}"]


def test_what_is_no_part_of_an_export_is_neither_sent_nor_removed_nor_fetched(export, hub, capsys):
    push([str(export), REPO])
    hub.repos[REPO].commit(
        {**hub.repos[REPO].files, "notes.md": b"mine", "adapter/adapter_config.json": b"old", "evil.py": b"evil"}
    )
    (export / "replies" / "one").mkdir(parents=True)
    (export / "replies" / "one" / "clip.wav").write_bytes(b"a voice")
    (export / "llm" / "pytorch_model.bin").write_bytes(b"pickle")
    push([str(export), REPO])
    assert (
        "Not sent, since an export has none of them: llm/pytorch_model.bin, replies/one/clip.wav"
        in capsys.readouterr().out
    )
    names = set(hub.repos[REPO].files)
    assert not {"replies/one/clip.wav", "llm/pytorch_model.bin", "adapter/adapter_config.json"} & names
    assert {"notes.md", "evil.py"} <= names
    folder = fetched(f"hub:{REPO}")
    assert {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} == names - {
        "notes.md",
        "evil.py",
    }


@pytest.mark.parametrize("name", ["llm/../../../outside.json", "llm/../../../../../x.json"])
def test_a_file_name_leads_nowhere_else(export, hub, name, tmp_path):
    push([str(export), REPO])
    hub.repos[REPO].commit({**hub.repos[REPO].files, name: b"{}"})
    before = {f for f in tmp_path.rglob("*") if f.is_file()}
    assert "cannot be fetched" in refusal(lambda: fetched(f"hub:{REPO}"))
    new = {f for f in tmp_path.rglob("*") if f.is_file()} - before
    assert not [f for f in new if not f.is_relative_to(tmp_path / "cache") or f.name == Path(name).name]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda repo: repo.pop("export.json"), "has no export.json"),
        (lambda repo: repo.update({"export.json": b'{"format_version": 9}'}), "format_version 9, this msenc reads"),
        (lambda repo: repo.update({"export.json": b"[1]"}), "found a list of 1, expected an object"),
        (lambda repo: repo.update({"connectors.safetensors": b"damaged"}), "connectors.safetensors: cannot be loaded"),
        (lambda repo: repo.pop("llm/model.safetensors"), "cannot load"),
    ],
)
def test_what_is_fetched_is_held_to_the_checks_of_any_export(export, hub, spoil, said):
    push([str(export), REPO])
    files = dict(hub.repos[REPO].files)
    spoil(files)
    hub.repos[REPO].commit(files)
    with pytest.raises(MsencError) as refused:
        msenc.load(f"hub:{REPO}", SHORT)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("hub:anna/other", "there is no such repository, or HF_TOKEN may not read it"),
        (f"hub:{REPO}@v9", f"{REPO} is there, but has no revision v9"),
        (f"hub:{REPO}@", "no revision after the @"),
        ("hub:my-agent", "'my-agent': no repository of the hub"),
        ("hub:../../etc/x", "no repository of the hub"),
        ("hub:http://127.0.0.1/x", "no repository of the hub"),
    ],
)
def test_a_wrong_place_is_refused(export, hub, place, said):
    push([str(export), REPO])
    assert said in refusal(lambda: fetched(place))


def test_without_a_token_nothing_is_sent_and_nothing_private_read(export, hub, monkeypatch, tmp_path):
    push([str(export), REPO])
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)  # as the hub's own client would find it
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "HF_TOKEN: no value" in refusal(lambda: push([str(export), REPO]))
    assert "HF_TOKEN may not read it" in refusal(lambda: fetched(f"hub:{REPO}"))
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "cannot be sent" in refusal(lambda: push([str(export), "anna/new"]))
    assert list(hub.repos) == [REPO]


def test_what_is_public_is_said_to_be(export, hub):
    push([str(export), REPO, "--public"])
    assert not hub.repos[REPO].private
    before = hub.repos[REPO].main
    assert f"{REPO}: is public" in refusal(lambda: push([str(export), REPO]))
    assert hub.repos[REPO].main == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "msenc push RUN OWNER/NAME"),
        (["RUN", REPO, "--private"], "msenc push RUN OWNER/NAME"),
        (["nowhere", REPO], "export.json: missing"),
        (["RUN", "my-agent"], "'my-agent': no repository of the hub"),
    ],
)
def test_a_wrong_command_line_is_refused(export, arguments, said):
    assert said in refusal(lambda: push([str(export) if a == "RUN" else a for a in arguments]))


@pytest.mark.parametrize("place", ["base", "encoder", "card", "link"])
def test_a_path_of_this_machine_is_not_sent(export, hub, place, tmp_path):
    content = json.loads((export / "export.json").read_text())
    if place == "base":
        content["base_llm"]["name"] = "/data/models/llm"
    elif place == "encoder":
        content["streams"]["audio"]["encoder"]["name_or_path"] = f"{Path.home()}/wavlm"
    elif place == "card":
        (export / "README.md").write_text(f"Trained in {Path.home()}/runs.")
    else:
        (tmp_path / "secret.json").write_text("{}")
        (export / "llm" / "secret.json").symlink_to(tmp_path / "secret.json")
    (export / "export.json").write_text(json.dumps(content))
    said = refusal(lambda: push([str(export), REPO]))
    assert "path of this machine" in said or (place == "link" and "leads out of" in said)
    assert hub.repos == {}


def test_an_export_of_an_earlier_version_is_not_sent(export, hub):
    content = json.loads((export / "export.json").read_text())
    (export / "export.json").write_text(json.dumps(content | {"format_version": 1}))
    assert "format_version 1 names models by the paths" in refusal(lambda: push([str(export), REPO]))
