"""How a report writes names and numbers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msenc.config.hints import nearest
from msenc.report.compare import DEFAULT, Configuration, direction_of
from msenc.types import MsencError

COSTS = ("trainable parameters", "seconds", "peak memory MiB")
ARROWS = {1: " ↑", -1: " ↓", 0: ""}


@dataclass(frozen=True)
class Style:
    """What tables, page and figures have in common.

    Args:
        names: of a metric, key, value of a key, configuration or cost -> what is written in its place.
        decimals: of all metrics, or metric -> decimals; by default 1 of percentages, else 3.
        percent: metrics from 0 to 1 that are written in percent.
        spread: what follows ±: ``ci`` (half of the confidence interval) or ``sd`` (standard deviation between seeds).

    Example:
        >>> style = Style({"nll": "loss", "text_audio": "T+A"}, percent=("bleu_4",))
        >>> style.header("nll"), style.header("bleu_4"), style.number("bleu_4", 0.25), style.number("nll", 1.5)
        ('loss ↓', 'bleu_4 (%) ↑', '25.0', '1.500')
        >>> style.row(Configuration({"modality": "text_audio", "lr": "(default)"}, [], [], []))
        'T+A, lr=(default)'
    """

    names: Mapping[str, str] = field(default_factory=dict)
    decimals: int | Mapping[str, int] | None = None
    percent: Sequence[str] = ()
    spread: str = "ci"

    def name(self, name: str) -> str:
        """What is written for a name."""
        return self.names.get(name, f"{name} (%)" if name in self.percent else name)

    def header(self, metric: str) -> str:
        """A metric's name with an arrow to where it is better."""
        return self.name(metric) + ARROWS[direction_of(metric)]

    def row(self, configuration: Configuration) -> str:
        """A configuration's name."""
        levels = configuration.levels.items()
        values = [self.name(v) if v != DEFAULT else f"{self.name(k)}={v}" for k, v in levels]
        return self.names.get(configuration.name, ", ".join(values) or configuration.name)

    def rows(self, configurations: Iterable[Configuration]) -> dict[str, str]:
        """A configuration's name -> what is written for it."""
        return {c.name: self.row(c) for c in configurations}

    def scaled(self, metric: str, value: float) -> float:
        """A value in the unit that it is written in."""
        return 100 * value if metric in self.percent else value

    def digits(self, metric: str) -> int:
        """Decimals of a metric."""
        given = self.given_digits(metric)
        if given is not None:
            return given
        return 1 if metric.endswith("%") or metric in self.percent else 3

    def given_digits(self, metric: str) -> int | None:
        """Decimals that were asked for."""
        return self.decimals.get(metric) if isinstance(self.decimals, Mapping) else self.decimals

    def number(self, metric: str, value: float, sign: str = "") -> str:
        """A value as it is written; `sign` is ``+`` for differences."""
        return f"{self.scaled(metric, value):{sign}.{self.digits(metric)}f}"

    def check(self, metrics: Iterable[str], configurations: Iterable[Configuration]) -> None:
        """Refuse names that nothing in the report has."""
        known = {*metrics, *COSTS, "seeds"}
        for c in configurations:
            known |= {*c.levels, *c.levels.values(), c.name}
        refuse_unknown("names", self.names, known)
        refuse_unknown("decimals", self.decimals if isinstance(self.decimals, Mapping) else (), metrics)
        refuse_unknown("percent", self.percent, [m for m in metrics if not m.endswith("%")])


def refuse_unknown(key: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse what a key of `report.py` names and the reported runs do not have."""
    for name in given:
        if name not in known:
            raise MsencError(f"{key}: the reported runs have no {name}.{nearest(name, sorted(known))}")
