"""What each group loses in each scheme: the measurement as data, in a file that says what it holds for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from quantkit.atomic import unreadable, write_bytes
from quantkit.errors import ConfigError

__all__ = ["Anchored", "Lost", "Sensitivity", "combined", "exponent_of"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Lost(_Part):
    """A group, by name: its linears, and by scheme the mean KL(BF16 || BF16 but for this group) in nats a token, with the
    standard error over windows. linears: keys."""

    name: str
    linears: tuple[str, ...]
    kl: dict[str, float]
    error: dict[str, float]


class Anchored(_Part):
    """The whole model with a scheme for each group, by name, measured at once."""

    name: str
    schemes: dict[str, str]
    kl: float
    error: float


class Sensitivity(_Part):
    """source: `CheckpointReader.fingerprint`. recipe: what decided the codes. text: what losses were measured on; tokens:
    how many were scored. exponent: see `combined`. bands: see `groups_of`. passes: readings of the weights."""

    schema_version: Literal[1] = 1
    quantkit: str
    source: str
    recipe: dict[str, object]
    text: str
    text_digest: str
    tokens: int
    schemes: tuple[str, ...]
    bands: int
    groups: tuple[Lost, ...]
    anchors: tuple[Anchored, ...]
    exponent: float
    passes: int
    seconds: float

    def kl(self, group: str, scheme: str) -> float:
        """Of a group in a scheme; 0 in BF16."""
        return self._by_name[group].kl.get(scheme, 0.0)

    @property
    def _by_name(self) -> dict[str, Lost]:
        return {row.name: row for row in self.groups}

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Sensitivity:
        """Raises ConfigError where the file is none of `quantkit sensitivity`."""
        fix = "measure it anew: quantkit sensitivity MODEL -o FILE"
        try:
            return cls.model_validate(json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"sensitivities {path} are not there", fix) from None
        except OSError as error:
            raise unreadable(path, error) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{path} holds no sensitivities: field '{where}': {first['msg']}", fix) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not readable JSON: {error}", fix) from error


def combined(losses: Iterable[float], exponent: float) -> float:
    """The KL of all groups together from that of each alone: (sum of KL^p)^(1/p), whose inside an integer programme can sum.

    Independent errors add in their squares, and KL goes with the square of an error (p = 1) where it moves probabilities a
    little. Where it turns a router's choice, KL goes with how often that happens, which goes with the error itself (p = 2).
    A model lies between.
    """
    total: float = math.fsum(loss**exponent for loss in losses)
    return float(total ** (1 / exponent))


def exponent_of(sums: Sequence[tuple[Sequence[float], float]]) -> float:
    """The p of `combined` with the least squared error of log KL over (KL of each group, KL measured of all), from 0.5 to 3;
    1 without any that lost something."""
    usable = [(losses, kl) for losses, kl in sums if kl > 0 and any(losses)]
    if not usable:
        return 1.0

    def misfit(exponent: float) -> float:
        return sum(math.log(combined(losses, exponent) / kl) ** 2 for losses, kl in usable)

    return min((0.5 + step / 200 for step in range(501)), key=misfit)
