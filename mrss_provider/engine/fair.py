"""Fair shares between owners: who is next when several want more than there is.

A single owner's requests keep their order of arrival. Costs are rows times tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

from mrss_provider.engine.request import EngineRequest


class Turns:
    """Gives each turn to the owner that has had least so far.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): of two owners that both want something
    all the while, neither gets more than the other by over the cost of one turn of each. Who comes
    back begins where the others are: what it did not use is not saved up.
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        # What the owner of the last turn had had before it.
        self._now = 0.0

    def first(self, owners: Iterable[str]) -> str:
        """Return whose turn it is among `owners`; of equals, the earlier."""
        return min(owners, key=self._begin)

    def charge(self, owner: str, cost: float) -> None:
        """Note a turn."""
        self._now = self._begin(owner)
        self._had[owner] = self._now + cost
        # The others begin at `now` anyway.
        self._had = {who: had for who, had in self._had.items() if had > self._now}

    def give_back(self, owner: str, cost: float) -> None:
        """Note that an earlier turn cost less than was charged."""
        if owner in self._had:
            self._had[owner] -= cost

    def _begin(self, owner: str) -> float:
        return max(self._had.get(owner, 0.0), self._now)


class WaitingRequests:
    """Requests without rows, a queue for each owner.

    The head is the one request that is next. It changes when it is taken, or when somebody comes
    who has had less: so it waits at most until each other owner has had its turn.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[EngineRequest]] = {}
        self._turns = Turns()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[EngineRequest]:
        return chain.from_iterable(self._queues.values())

    def __contains__(self, request_id: str) -> bool:
        return any(request.id == request_id for request in self)

    def num_of(self, owner: str) -> int:
        """Return how many of an owner's wait."""
        return len(self._queues.get(owner, ()))

    def num_before(self, owner: str) -> int:
        """Return about how many will be taken before one that this owner adds now."""
        own = self.num_of(owner)
        others = (len(queue) for who, queue in self._queues.items() if who != owner)
        return own + sum(min(num, own + 1) for num in others)

    def append(self, request: EngineRequest) -> None:
        """Add a request after those of its owner."""
        self._queues.setdefault(request.owner, deque()).append(request)

    def head(self) -> EngineRequest:
        """Return the next one; there must be one."""
        return self._queues[self._turns.first(self._queues)][0]

    def take(self) -> EngineRequest:
        """Remove the head, and charge its owner for all that it may read and write."""
        request = self.head()
        self._pop(request)
        self._turns.charge(request.owner, cost_of(request))
        return request

    def settle(self, request: EngineRequest, num_unused: int) -> None:
        """Give back what an answer of `request` was charged for and did not write, in tokens."""
        self._turns.give_back(request.owner, request.mixture.rows * num_unused)

    def remove(self, request_id: str) -> None:
        """Remove a request; an unknown id is no error."""
        for request in self:
            if request.id == request_id:
                self._pop(request)
                return

    def _pop(self, request: EngineRequest) -> None:
        queue = self._queues[request.owner]
        queue.remove(request)
        if not queue:
            del self._queues[request.owner]


def cost_of(request: EngineRequest) -> int:
    """Return what a request may cost at most, in rows times tokens."""
    num_tokens = request.sampling.max_tokens
    assert num_tokens is not None
    return request.mixture.rows * len(request.prompt) + request.rows * num_tokens
