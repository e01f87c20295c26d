"""Learned rounding within the one loop: a part is solved by GPTQ, learned beside the BF16 stream, and then written."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.calib.fit import Ahead, Fit, SoftWeights, batches, fit_of, looked_at
from quantkit.calib.replay import Applied, Listening
from quantkit.calib.streams import AttentionPart, MLPPart, Part
from quantkit.job.fisher import LayerMetrics
from quantkit.job.makers import Group, Made, Quantizing
from quantkit.model.spec import Layer, Linear
from quantkit.model.weights import Weights
from quantkit.quant.learned import Learned, SoftWeight, learn
from quantkit.quant.solve import Outcome, Solution
from quantkit.stats import weight_error

if TYPE_CHECKING:
    from quantkit.job.unit import UnitRun

__all__ = ["Learning"]

_ROUTER = 0.2  # of the loss, where a router reads what is learned
_NO_HELP = "learning does not lose less on tokens apart: GPTQ's codes are kept"


class _Objective:
    """What is learned by: the mean over tokens of the squared error of the output times `factor` (of a metric; None: as it
    is), and the divergence of the router that reads it, weighed to be _ROUTER of the whole: at each step, and apart from the
    steps as at the start."""

    def __init__(
        self,
        fit: Fit,
        others: Listening,
        chosen: Sequence[tuple[Linear, Applied]],
        drawn: Iterator[Tensor],
        factor: Tensor | None,
    ) -> None:
        self.fit, self.others, self.chosen, self.drawn, self.factor = fit, others, chosen, drawn, factor
        self._start: tuple[float, float] | None = None

    def _weights(self, values: Sequence[Tensor]) -> SoftWeights:
        pairs = zip(self.chosen, values, strict=True)
        return SoftWeights(self.others, {ref.key: dataclasses.replace(how, weight=w) for (ref, how), w in pairs})

    def _scaled(self, output: Tensor) -> Tensor:
        return output if self.factor is None else output @ self.factor

    def step(self, number: int, values: list[Tensor]) -> Tensor:
        items = next(self.drawn)
        error = self.fit.error(items, self._weights(values))
        loss = self._scaled(error.output).square().sum() / len(error.output)
        if error.router is not None and error.router > 0:
            router = error.router / len(error.output)
            loss = loss + _ROUTER * (loss / router).detach() * router
        return loss

    @torch.no_grad()
    def apart(self, values: list[Tensor]) -> float:
        weights, tokens, squared, router = self._weights(values), 0, 0.0, 0.0
        for items in looked_at(self.fit):
            error = self.fit.error(items, weights)
            tokens += len(error.output)
            squared += float(self._scaled(error.output).double().square().sum())
            router += 0.0 if error.router is None else float(error.router)
        squared, router = squared / tokens, router / tokens
        self._start = self._start or (squared, router)
        share = _ROUTER * self._start[0] / self._start[1] if self._start[1] > 0 else 0.0
        return squared + share * router


class _Measuring(SoftWeights):
    """Measures what quantizing adds to each output, beside running. sources: by key, the weights before."""

    def __init__(self, others: Weights, soft: dict[str, Applied], sources: Mapping[str, Tensor]) -> None:
        super().__init__(others, soft)
        self._sources = sources
        self.lost, self.whole = dict.fromkeys(sources, 0.0), dict.fromkeys(sources, 0.0)

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        if ref.key in self._sources:
            source = self._sources[ref.key]
            self.lost[ref.key] += float((x @ (source - self.matrix(ref)).T).square().sum())
            self.whole[ref.key] += float((x @ source.T).square().sum())
        return super().linear(ref, x)

    def error(self, ref: Linear) -> float:
        return self.lost[ref.key] / max(self.whole[ref.key], 1e-30)


@dataclass(frozen=True)
class _Chosen:
    """A linear to learn: its weight before, float32 [out, in], and what GPTQ made of it."""

    ref: Linear
    weight: Tensor
    solution: Solution

    def soft(self) -> SoftWeight:
        return SoftWeight(self.weight, self.solution.quantized, self.solution.latent)

    def kept(self, why: str) -> Solution:
        """As it is, and why."""
        return Solution(self.solution.quantized, _noted(self.solution.outcome, why))


class Learning(Quantizing):
    """Quantizes, and learns the rounding of those linears whose method says so, a part at a time."""

    def __init__(self, run: UnitRun, ahead: Ahead, metrics: LayerMetrics | None) -> None:
        super().__init__(run)
        self.ahead, self.metrics = ahead, metrics
        self._layer: Layer | None = None
        self._solved: dict[Group, Made] = {}

    def before(self, parts: Sequence[Part]) -> None:
        part = self.own(parts)
        if isinstance(part, AttentionPart):
            self._layer = part.layer
            self.ahead.attention(part.layer)
        elif self.ahead.rest is None:
            assert self._layer is not None and part is not None
            self.ahead.mlps(self._layer, part.stream)
        for wave in parts[0].waves:
            self.solve(part, wave)
        if isinstance(part, MLPPart):
            self.ahead.add(part, self.ahead.weights, -1.0)
            self.ahead.weights.forget()
        reports = self._learn(part) if part is not None else {}
        if isinstance(part, MLPPart):
            self.ahead.add(part, self.run.weights, 1.0)
        for group, solutions in self._solved.items():
            self.run.write(group, solutions)
        for key, report in reports.items():
            self.run.outcomes[key]["learned"] = report
        self._solved = {}

    def made(self, group: Group, solutions: Made) -> None:
        """Written once the whole part is learned."""
        self.apply(group, solutions)
        self._solved[group] = solutions

    def done(self, layer: Layer) -> None:
        self.ahead.done()

    def close(self) -> None:
        self.ahead.remove()

    def _chosen(self) -> list[_Chosen]:
        run, chosen = self.run, list[_Chosen]()
        for group, solutions in self._solved.items():
            for ref, one in zip(group, solutions, strict=True):
                if isinstance(one, Solution) and run.plan.methods[ref.key].name == "learned":
                    chosen.append(_Chosen(ref, run.place.weight(ref).to(run.place.device).float(), one))
        return chosen

    def _learn(self, part: Part) -> dict[str, dict[str, Any]]:
        """What to report of each linear that was learned; `_solved` has the best of it then, and so do the weights."""
        chosen = self._chosen()
        if not chosen:
            return {}
        fit = fit_of(part, self.ahead)
        if not len(fit.learned_from) or not len(fit.held_out):
            nobody = "no token to learn from" if not len(fit.learned_from) else "no token apart to judge learning by"
            self._replace({one.ref: one.kept(f"{nobody}: GPTQ's codes are kept") for one in chosen})
            return {one.ref.key: {"steps": 0, "kept": 0, "tokens": fit.tokens, "change": 0.0} for one in chosen}
        plan = self.run.plan
        steps = max(plan.methods[one.ref.key].steps for one in chosen)
        drawn = batches(fit, steps, [plan.recipe.seed, zlib.crc32(part.last.key.encode())])
        soft = [one.soft() for one in chosen]
        how = [
            (one.ref, Applied(one.weight, plan.schemes[one.ref.key], one.solution.quantized.input_scale)) for one in chosen
        ]
        objective = _Objective(fit, self.run.weights, how, drawn, self._factor(part))
        learned = learn(soft, steps, objective.step, objective.apart)
        self._replace(self._solutions(fit, chosen, learned))
        part.close()  # what was kept of it is of GPTQ's codes
        shares = [one.flipped(q) / q.codes.numel() for one, q in zip(soft, learned.weights, strict=True)]
        counts = {"steps": learned.steps, "kept": learned.kept, "tokens": fit.tokens}
        same = {**counts, "metric": "plain" if objective.factor is None else "fisher", **_losses(learned)}
        return {one.ref.key: {**same, "flipped": round(share, 6)} for one, share in zip(chosen, shares, strict=True)}

    def _factor(self, part: Part) -> Tensor | None:
        assert self._layer is not None
        half = "attention" if isinstance(part, AttentionPart) else "mlp"
        return None if self.metrics is None else self.metrics.factor(self._layer.index, half)

    def _solutions(self, fit: Fit, chosen: list[_Chosen], learned: Learned) -> dict[Linear, Solution]:
        if not learned.kept:
            why = "; ".join(filter(None, (_NO_HELP, learned.stopped)))
            return {one.ref: one.kept(why) for one in chosen}
        values = [q.dequantize() for q in learned.weights]
        schemes = self.run.plan.schemes
        soft = {one.ref.key: Applied(v, schemes[one.ref.key]) for one, v in zip(chosen, values, strict=True)}
        weights = _Measuring(self.run.weights, soft, {one.ref.key: one.weight for one in chosen})
        for items in looked_at(fit):
            fit.error(items, weights)
        replaced = {}
        for one, q, value in zip(chosen, learned.weights, values, strict=True):
            outcome = dataclasses.replace(
                _noted(one.solution.outcome, learned.stopped),
                method="learned",
                error=weights.error(one.ref),
                weight_error=weight_error(one.weight, value),
            )
            replaced[one.ref] = Solution(q, outcome)
        return replaced

    def _replace(self, by: Mapping[Linear, Solution]) -> None:
        for group, solutions in self._solved.items():
            self._solved[group] = [by.get(ref, one) for ref, one in zip(group, solutions, strict=True)]
            self.apply(group, self._solved[group])


def _losses(learned: Learned) -> dict[str, float | None]:
    """before, after: None where not finite; change: relative to before."""
    if not math.isfinite(learned.before):
        return {"before": None, "after": None, "change": 0.0}
    change = learned.after / learned.before - 1 if learned.before else 0.0
    return {"before": learned.before, "after": learned.after, "change": change}


def _noted(outcome: Outcome, why: str) -> Outcome:
    return dataclasses.replace(outcome, fallback="; ".join(filter(None, (outcome.fallback, why))))
