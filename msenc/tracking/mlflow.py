"""A run's log in MLflow: on a server, or in a data base beside the runs."""

import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from msenc.types import MsencError

RUN_TAG = "msenc.run"
"""Of MLflow's runs: the id by which a run is found again, however its process ended."""
QUICKLY = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Unless the environment says otherwise: a server that is gone must not hold up a training for a quarter of an hour."""


class MlflowLogger(Logger):
    """A run of MLflow's, which a resumed run continues and an evaluation adds to.

    Nothing is contacted or written before the first use.

    Args:
        experiment_name: the experiment, made if it is missing.
        tracking_uri: of the server or data base; None: ``MLFLOW_TRACKING_URI``, or else ``mlflow.db`` in `save_dir`.
        save_dir: folder of ``mlflow.db`` and, in ``mlflow-artifacts``, of what its runs hold beside numbers.
        run_name: shown in MLflow's tables.
        key: value of the tag by which the run is found again; None makes a new one.
        tags: of a new run.
        create: False: only continue a run that is there.

    Raises:
        MsencError: MLflow, or what it needs for a data base, is not installed.
    """

    def __init__(
        self,
        experiment_name: str = "msenc",
        tracking_uri: str | None = None,
        save_dir: str = ".",
        run_name: str | None = None,
        key: str | None = None,
        tags: Mapping[str, str] | None = None,
        create: bool = True,
    ) -> None:
        super().__init__()
        self._uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        needed = ["mlflow", *(["sqlalchemy", "alembic"] if (self._uri or "sqlite:").startswith("sqlite:") else [])]
        if missing := [package for package in needed if find_spec(package) is None]:
            raise MsencError(
                f"MlflowLogger needs the package {missing[0]}, which is not installed. Install it with an extra of "
                "msenc: pip install -e '.[mlflow]'"
            )
        self._folder = Path(save_dir).absolute()
        self._experiment_name, self._run_name, self._key, self._tags = experiment_name, run_name, key, dict(tags or {})
        self._create = create
        self._client: Any = None
        self._run: Any = None

    @property
    def experiment(self) -> Any:
        """MLflow's client, its run open."""
        if self._client is None:
            self._client = self._open()
        return self._client

    def _open(self) -> Any:
        for name, value in QUICKLY.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        is_own = self._uri is None
        if is_own and self._create:
            self._folder.mkdir(parents=True, exist_ok=True)
        if is_own and not (self._folder / "mlflow.db").is_file() and not self._create:
            raise MsencError(f"{self._folder / 'mlflow.db'}: missing, so there is no run to continue.")
        # Jobs of a sweep begin together; tables and experiments can only be made once.
        with FileLock(self._folder / ".mlflow.lock") if is_own else nullcontext():
            client = MlflowClient(f"sqlite:///{self._folder / 'mlflow.db'}" if is_own else self._uri)
            experiment = client.get_experiment_by_name(self._experiment_name)
            if experiment is None and self._create:
                place = (self._folder / "mlflow-artifacts").as_uri() if is_own else None
                with suppress(Exception):  # another job was faster, or it is missing below
                    client.create_experiment(self._experiment_name, place)
                experiment = client.get_experiment_by_name(self._experiment_name)
        if experiment is None:
            raise MsencError(f"MLflow has no experiment {self._experiment_name!r}.")
        found = client.search_runs([experiment.experiment_id], f"tags.`{RUN_TAG}` = '{self._key}'") if self._key else []
        if found:
            self._run = found[0]
        elif self._create:
            tags = {**self._tags, **({RUN_TAG: self._key} if self._key else {})}
            self._run = client.create_run(experiment.experiment_id, tags=resolve_tags(tags), run_name=self._run_name)
        else:
            raise MsencError(f"MLflow's experiment {self._experiment_name!r} has no run {RUN_TAG}={self._key}.")
        return client

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self._experiment_name

    @property
    def version(self) -> str:
        """MLflow's id of the run."""
        _ = self.experiment
        return self._run.info.run_id

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log parameters that the run has not got yet: MLflow takes no other value for one that it has."""
        from mlflow.entities import Param

        has = self.experiment.get_run(self.version).data.params
        new = {mlflow_name(key): str(value)[:500] for key, value in _flatten_dict(dict(params)).items()}
        new = [Param(key, value) for key, value in new.items() if key not in has]
        for first in range(0, len(new), 100):  # as many as it takes at once
            self.experiment.log_batch(self.version, params=new[first : first + 100])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        logged = [Metric(mlflow_name(name), float(value), now, step or 0) for name, value in metrics.items()]
        self.experiment.log_batch(self.version, metrics=logged)

    def begin(self) -> None:
        """Mark the run as running: the one before may have been killed, or have finished."""
        self.experiment.update_run(self.version, status="RUNNING")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Mark the run as ended: ``success``, ``failed`` or ``interrupted``."""
        if self._client is not None:
            self._client.set_terminated(self.version, {"success": "FINISHED", "failed": "FAILED"}.get(status, "KILLED"))


def mlflow_name(name: str) -> str:
    """A name with the signs that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]
