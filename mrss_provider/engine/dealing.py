"""How the prompt tokens that a step may read are dealt to the prompts that want to be read."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mrss_provider.engine.fair import Turns

# The wkv kernels read a prompt in blocks of this many tokens, so a prompt that is dealt out in
# whole blocks sees the same arithmetic whoever shares the step.
PREFILL_BLOCK_LEN = 16


def deal(unread: Sequence[int], budget: int, rows: Sequence[int] | None = None) -> list[int]:
    """Deal `budget` tokens to prompts with so many `unread` tokens, block by block in turn.

    A share is a whole number of blocks or all that is left, unless the budget is below a block. A
    prompt that `rows` rows read costs as many times its share; the first one gets a block even if
    that is more than the budget.
    """
    lengths = [0] * len(unread)
    block_len = min(PREFILL_BLOCK_LEN, budget)
    costs = rows or [1] * len(unread)
    dealt = True
    while dealt:
        dealt = False
        for i, left in enumerate(unread):
            share = min(left - lengths[i], block_len)
            if share > 0 and (share * costs[i] <= budget or not any(lengths)):
                lengths[i] += share
                budget -= share * costs[i]
                dealt = True
    return lengths


def deal_alone(owners: Sequence[str], unread: Sequence[int], length: int) -> list[int]:
    """Deal `length` tokens to each prompt, or where there are several owners, to all of each."""
    if len(set(owners)) < 2:
        return [deal([left], length)[0] for left in unread]
    lengths = [0] * len(unread)
    for owner in dict.fromkeys(owners):
        own = [i for i, other in enumerate(owners) if other == owner]
        shares = deal([unread[i] for i in own], length)
        for i, share in zip(own, shares, strict=True):
            lengths[i] = share
    return lengths


def deal_beside(
    turns: Turns,
    owners: Sequence[str],
    unread: Sequence[int],
    rows: Sequence[int],
    budget: int,
) -> list[int]:
    """Deal `budget` tokens, over all rows, to all prompts; in `turns` where they have owners."""
    if len(set(owners)) < 2:
        return deal(unread, budget, rows)
    return _deal_between(turns, owners, unread, rows, budget)


def _deal_between(
    turns: Turns,
    owners: Sequence[str],
    unread: Sequence[int],
    rows: Sequence[int],
    budget: int,
) -> list[int]:
    """Deal tokens to prompts, a block a turn, the turns to the prompts' `owners`.

    Args:
        turns: kept from one dealing to the next; charged.
        owners: of the prompts; the prompts of one owner take turns too.
        unread: tokens left of each prompt.
        rows: that read each prompt: a token costs as many.
        budget: what all may cost; the first block may cost more.
    """
    lengths = [0] * len(unread)
    block_len = min(PREFILL_BLOCK_LEN, budget)
    queues: dict[str, deque[int]] = {}
    for i, owner in enumerate(owners):
        queues.setdefault(owner, deque()).append(i)
    while queues:
        owner = turns.first(queues)
        i = queues[owner].popleft()
        share = min(unread[i] - lengths[i], block_len)
        cost = share * rows[i]
        # One that does not fit waits for the next dealing, where it comes first.
        if share and (cost <= budget or not any(lengths)):
            lengths[i] += share
            budget -= cost
            turns.charge(owner, cost)
            queues[owner].append(i)
        if not queues[owner]:
            del queues[owner]
    return lengths
