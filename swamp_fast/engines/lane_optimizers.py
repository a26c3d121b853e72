"""LaneOptimizers: a recipe's own optimizers, one set per lane, each on that lane's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from swamp_fast.particles.bank import ParticleBank
from swamp_fast.particles.optimizer_state import read_state, with_inner, write_state
from swamp_fast.problem.problem import Problem

Again = Callable[[int], Tensor]  # lane -> its loss; adds its gradients on the step's batch to the bank's


class LaneOptimizers:
    """The optimizers of the lanes of a bank.

    An optimizer sees each parameter in its own shape, so a compact bank is expanded for each step. `weights` and
    `grads`, each [L, P], are copies if the bank is compact, and the bank's own tensors otherwise.
    """

    def __init__(self, problem: Problem, bank: ParticleBank, grads: Tensor) -> None:
        self.problem, self.bank, self.bank_grads = problem, bank, grads
        self.weights, self.grads = bank.expanded(bank.weights), bank.expanded(grads)
        masks = bank.expanded_masks()
        clip = [None] * bank.lanes if bank.clip_norm is None else bank.clip_norm.tolist()
        self.lanes = [
            _Lane(problem, self.weights[lane], self.grads[lane], masks[run], clip[lane])
            for lane, run in enumerate(bank.run_of_lane.tolist())
        ]

    def step(self, factors: Sequence[float], step_keys: Tensor, swa_weight: Tensor, again: Again) -> None:
        """Take one step in every lane with the bank's gradients, and update the averages.

        factors     the factor of each lane's initial learning rates
        step_keys   [L, 3]  the keys of the step's random draws
        swa_weight  [L]  the weight of each lane's new sample in its average
        again       computes a lane's gradients again, for optimizers that need a closure
        """
        if self.grads is not self.bank_grads:
            self.grads.copy_(self.bank.expanded(self.bank_grads))
        for number, (lane, factor) in enumerate(zip(self.lanes, factors, strict=True)):
            self.problem.seeded_for_optimizer(step_keys[number : number + 1])
            lane.step(factor, partial(again, number))
        if self.weights is not self.bank.weights:
            self.bank.put_expanded_(self.bank.weights, self.weights)
        if bool(swa_weight.any()):
            weight = swa_weight.to(self.bank.swa.dtype)[:, None]
            self.bank.swa.add_(torch.where(weight != 0, (self.bank.weights - self.bank.swa) * weight, 0))

    def state(self, lanes: slice) -> dict[str, Tensor]:
        """Return the state of a range of lanes for a checkpoint, each tensor with a leading lane axis."""
        first, *others = [read_state(lane.optimizers, lane.parameters) for lane in self.lanes[lanes]]
        return {
            f"optimizer/{name}": torch.stack([tensor.cpu(), *(other[name].cpu() for other in others)])
            for name, tensor in first.items()
        }

    def load_state_(self, state: Mapping[str, Tensor]) -> None:
        """Restore a result of `state` for all lanes."""
        own = {name.removeprefix("optimizer/"): each for name, each in state.items() if name.startswith("optimizer/")}
        for number, lane in enumerate(self.lanes):
            write_state(lane.optimizers, lane.parameters, {name: tensor[number] for name, tensor in own.items()})


def why_not_without_closure(problem: Problem) -> str | None:
    """Return why lanes can't take a step together; None if they can. Closures run lane by lane."""
    if problem.own_optimizer is not None and problem.own_optimizer.needs_closure:
        return "the recipe's optimizer computes gradients several times per step, which is done lane by lane"
    return None


class _Lane:
    """The optimizers of one lane, whose parameters are views of its weights [P] and gradients [P].

    rates  for each optimizer, the initial learning rate of each group
    last   the learning rate that each group, by its id, was last set to
    """

    def __init__(self, problem: Problem, weights: Tensor, grads: Tensor, mask: Tensor, clip_norm: float | None) -> None:
        self.problem, self.clip_norm = problem, clip_norm
        self.needs_closure = problem.own_optimizer is not None and problem.own_optimizer.needs_closure
        weight_of, self.grad_of = problem.layout.views(weights), problem.layout.views(grads)
        names = [name for name, _ in problem.template.named_parameters() if name in weight_of]
        self.weight_of = {name: weight_of[name] for name in names}
        self.parameters = {name: nn.Parameter(weight_of[name]) for name in names}
        self.masks = problem.layout.mask_views(mask)
        self.optimizers = problem.recipe.optimizers(self.parameters)
        self.rates = [
            [None if "lr" not in group else float(group["lr"]) for group in each.param_groups]
            for each in self.optimizers
        ]
        self.last: dict[int, float] = {}

    def step(self, factor: float, again: Callable[[], Tensor]) -> None:
        """Take one step at `factor` times the initial rates; `again` computes the gradients again."""
        self._set_rates(factor)
        self._take_gradients()

        def closure() -> Tensor:
            for grad in self.grad_of.values():
                grad.zero_()
            with torch.enable_grad():
                loss = again()
            self._take_gradients()
            return loss

        for optimizer in self.optimizers:
            optimizer.step(closure) if self.needs_closure else optimizer.step()  # type: ignore[arg-type]
        self._mask()

    def _set_rates(self, factor: float) -> None:
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if rate is None:
                    continue
                if float(group["lr"]) != self.last.get(id(group), float(group["lr"])):
                    raise ValueError(
                        "`recipe`: the optimizer changes its learning rate in step(), but the rate is set before each "
                        "step. Take the change out, and say it by Recipe(schedule=...) or the setting `schedule`."
                    )
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor
                self.last[id(group)] = float(group["lr"])

    def _take_gradients(self) -> None:
        """Assign the gradients to the parameters and clip them; the gradients of pruned weights are set to 0 first."""
        for name, mask in self.masks.items():
            self.grad_of[name].mul_(mask)
        for name, parameter in self.parameters.items():
            parameter.grad = self.grad_of[name]
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_norm)

    @torch.no_grad()
    def _mask(self) -> None:
        """Set pruned weights and their optimizer state to 0."""
        for name, parameter in self.parameters.items():
            if parameter.data_ptr() != self.weight_of[name].data_ptr():  # an optimizer has replaced the view
                self.weight_of[name].copy_(parameter)
                parameter.data = self.weight_of[name]
            parameter.grad = None
        for name, mask in self.masks.items():
            self.weight_of[name].mul_(mask)
            for optimizer in with_inner(self.optimizers):
                for value in optimizer.state.get(self.parameters[name], {}).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value.mul_(mask)
