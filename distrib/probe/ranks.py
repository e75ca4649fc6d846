"""One training step of two ranks in one process: two replicas in two threads, which sum as ranks would."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from distrib.probe.watch import (
    EQUAL,
    WAYS,
    Batch,
    Fault,
    Mark,
    Marks,
    context,
    first_difference,
    joined,
    label,
    train_step,
    watched,
)
from nn.array import Array
from nn.network import Network


class Exchange:
    """Sums arrays of as many threads as there are watchers, each for the layer that asks for it."""

    def __init__(self, watchers: list[Marks]) -> None:
        self._turn, self._watchers, self._left = threading.Condition(), watchers, False
        self._given: list[list[tuple[str, np.ndarray]]] = [[] for _ in watchers]
        self._order = [label(layer) for layer in watchers[0].network.layers.walk()]

    def all_reduce(self, rank: int) -> Callable[[Array], None]:
        """The function that sums an array of `rank` with those of the others, in place.

        Fault of the first layer for which some ranks ask for a sum and others do not, or for another.
        """

        def add(x: Array) -> None:
            asking = label(self._watchers[rank].stack[-1])
            with self._turn:
                number = len(self._given[rank])
                self._given[rank].append((asking, np.array(x)))
                self._turn.notify_all()
                self._turn.wait_for(lambda: self._left or all(len(each) > number for each in self._given))
                parts = [each[number] for each in self._given if len(each) > number]
            names, arrays = zip(*parts)
            if len(parts) < len(self._given) or len({(name, array.shape) for name, array in parts}) > 1:
                said = "ranks ask for different sums: call step.all_reduce on all alike, with as many numbers"
                raise Fault("ranks", min(names, key=self._order.index), said)
            x[...] = sum(arrays)

        return add

    def leave(self) -> None:
        """A thread is done, or has failed: nobody waits for it."""
        with self._turn:
            self._left = True
            self._turn.notify_all()


class Outcome:
    """What a step of all ranks leaves: marks of the whole batch, losses, gradients, running statistics."""

    def __init__(self, networks: list[Network], marks: list[Mark], loss: float) -> None:
        self.marks, self.loss = marks, loss
        self.statistics = [network.statistics.copy() for network in networks]
        self.gradients = {
            p.name: sum(network.params[p.name].grad.ravel() for network in networks)
            for p in networks[0].params
        }


def step_of_one(network: Network, batch: Batch) -> Outcome:
    """A training step of one rank."""
    watcher = Marks(network)
    with watched(network, watcher):
        loss = train_step(network, batch, watcher=watcher)
    return Outcome([network], watcher.marks, loss)


def step_of_ranks(networks: list[Network], batch: Batch, parts: list[slice]) -> Outcome:
    """A training step of as many ranks as there are networks, each on its part; Fault if one fails."""
    watchers, losses = [Marks(network) for network in networks], [0.0 for _ in networks]
    exchange, errors = Exchange(watchers), list[Exception]()

    def work(rank: int) -> None:
        network, mine = networks[rank], batch.part(parts[rank])
        step = context(network, mine, len(batch.x), exchange.all_reduce(rank))
        try:
            with watched(network, watchers[rank]):
                losses[rank] = train_step(network, mine, step, watchers[rank])
        except Exception as error:
            errors.append(error)
        finally:
            exchange.leave()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(networks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:  # the first is the cause of the others
        raise errors[0]
    return Outcome(networks, joined([watcher.marks for watcher in watchers]), sum(losses))


def departure(network: Network, one: Outcome, other: Outcome) -> tuple[str, str] | None:
    """The layer at which a step departs from another by more than rounding, and what there is another."""
    ahead, back = ([[m for m in step.marks if m.way == way] for step in (one, other)] for way in WAYS[:2])
    if mark := first_difference(*ahead):
        return mark.layer, "output"
    names = {label(layer): layer for layer in network.layers.walk()}
    start = 0
    for name, layer in names.items():
        stop = start + sum(layer.statistics().values())
        mine, *rest = (each[start:stop] for each in (*one.statistics, *other.statistics))
        if not all(np.allclose(mine, each, EQUAL, EQUAL) for each in rest):
            return name, "running statistic"
        start = stop
    wrong = wrong_gradients(one, other)
    owners = {spec.name: name for name, layer in names.items() for spec in layer.specs()}
    mark = first_difference(*back)
    for each in back[0]:  # a layer's parameters are blamed before its dL/dx, and the last layer first
        for name in wrong:
            if owners[name] == each.layer:
                return each.layer, f"gradient of {name}"
        if each is mark:
            return each.layer, "gradient of its input"
    return (owners[wrong[-1]], f"gradient of {wrong[-1]}") if wrong else None


def wrong_gradients(one: Outcome, other: Outcome) -> list[str]:
    """Parameters whose gradient is another.

    One that is nothing but rounding, as of a bias before a batch norm, is compared with all others.
    """
    total = sum(float((gradient**2).sum()) for gradient in one.gradients.values()) ** 0.5
    wrong = []
    for name, mine in one.gradients.items():
        bound = EQUAL * np.linalg.norm(mine) + EQUAL / 100 * total
        if not np.linalg.norm(mine - other.gradients[name]) <= bound:
            wrong.append(name)
    return wrong
