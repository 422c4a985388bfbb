"""The notebook docs/tour.ipynb runs as it is, but for shorter settings, and is committed without its outputs."""

import pytest
from conftest import ROOT, SMALL_DEMO

PATH = ROOT / "docs" / "tour.ipynb"
SHORT = [*SMALL_DEMO, "trainer.max_steps=2", "trainer.max_epochs=1", "decoding.max_new_tokens=4"]

nbformat = pytest.importorskip("nbformat", reason="nbclient is absent (extra dev)")


def test_it_is_committed_without_outputs():
    cells = [cell for cell in nbformat.read(PATH, 4).cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)


def test_it_runs(demo_home, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is absent (extra dev)")
    pytest.importorskip("ipykernel", reason="ipykernel is absent (extra dev)")
    monkeypatch.setenv("MSENC_DATA", str(demo_home / "data"))
    monkeypatch.setenv("MSENC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(PATH, 4)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source = f"settings = {SHORT!r}"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    replies = [data["text/html"] for data in shown if "<audio controls" in data.get("text/html", "")]
    assert len(replies) == 2, "the replies show and play themselves"
    assert any("<video" in data.get("text/html", "") for data in shown)
    assert (tmp_path / "reply.wav").is_file()
    said = "".join(output.get("text", "") for cell in notebook.cells[-2:] for output in cell.get("outputs", ()))
    assert said.count(": ") >= 4
