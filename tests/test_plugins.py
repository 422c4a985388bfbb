"""A user's own classes: built where the user's own command line names their module, and never because a run does."""

import sys

import pytest
from omegaconf import OmegaConf

from msenc.config.targets import buildable
from msenc.pipelines.evaluate import evaluate
from msenc.types import MsencError

MODULE = """
from msenc.config.targets import buildable
from msenc.models.connector import Mlp

@buildable("model.connector")
class Plain(Mlp):
    pass

@buildable("logger.*")
def nothing():
    return None
"""
OVERRIDES = ["modality=text_audio", "model.connector._target_=my_parts.Plain", "trainer.max_steps=1", "evaluate=null"]


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """A module that can be imported; forgotten when the test ends."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "my_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "parts")
    monkeypatch.setattr("msenc.config.targets._registered", {})
    yield
    sys.modules.pop("my_parts", None)


def test_a_connector_of_ones_own_trains_and_is_measured_where_its_module_is_named(
    own_parts, train, compose, monkeypatch
):
    run = train(["plugins=[my_parts]", "model/connector=mlp", *OVERRIDES])
    stored = OmegaConf.load(run.folder / ".hydra" / "config.yaml")
    assert stored.plugins == ["my_parts"]
    measure = [f"run_dir={run.folder}", "generate=false", "limit=1"]
    assert evaluate(compose([*measure, "plugins=[my_parts]"], "evaluate"))
    monkeypatch.setattr("msenc.config.targets._registered", {})  # another process
    sys.modules.pop("my_parts")
    with pytest.raises(MsencError, match=r"model\.connector\._target_: found 'my_parts\.Plain'.*plugins=\[MODULE\]"):
        evaluate(compose(measure, "evaluate"))
    assert "my_parts" not in sys.modules


def test_it_is_built_at_its_place_alone(own_parts, train):
    with pytest.raises(MsencError, match=r"logger\.csv\._target_: found 'my_parts\.Plain'"):
        train(["plugins=[my_parts]", "modality=text", "logger.csv._target_=my_parts.Plain"])


def test_a_module_that_is_not_there_is_refused(train):
    with pytest.raises(MsencError, match=r"plugins: 'my_prats' cannot be imported"):
        train(["plugins=[my_prats]"])


def test_nothing_is_registered_where_nothing_is_built():
    with pytest.raises(MsencError, match=r"buildable\('model\.conector'\): nothing .* Did you mean 'model\.connector'"):
        buildable("model.conector")
