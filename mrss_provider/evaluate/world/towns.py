"""Two more towns, each with 24 facts of its own, for states that know different things.

- Long Ferry: the mill, dairy, school, chapel, market and museum; Clara, Edwin, Flora, Gustav,
  Helena and Igor.
- Abbey Well: the bathhouse, pottery, sawmill, inn, bank and granary; Julia, Karl, Lydia, Martin,
  Nora and Otto.

Nobody and nothing here is of the home town or of the other one: a question tells the town without
naming it. No base document names these towns; a base document without a town, or about another one,
may say anything of their people and places, and says something else each time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mrss_provider.evaluate.world import lexicon as lex
from mrss_provider.evaluate.world.relations import BY_KIND, Fact, Kind

FACTS_AN_ENTITY = 2
ENTITIES_A_KIND = 6


@dataclass(frozen=True)
class Town:
    """A town, who lives there, what stands there, and what is known of them."""

    name: str
    places: tuple[str, ...]
    people: tuple[str, ...]
    facts: tuple[Fact, ...]


def _town(name: str, first: int, seed: int) -> Town:
    """Draw the facts of a town whose entities begin at `first` in both tables."""
    rng = random.Random(seed)
    places = lex.PLACES[first : first + ENTITIES_A_KIND]
    people = lex.PEOPLE[first : first + ENTITIES_A_KIND]
    kinds: tuple[tuple[Kind, tuple[str, ...]], ...] = (("place", places), ("person", people))
    facts = []
    for kind, entities in kinds:
        # No two entities share a value, so that one cannot be right by another's.
        left = {
            relation.name: rng.sample(people if relation.name == "keeper" else relation.values, 6)
            for relation in BY_KIND[kind]
        }
        for i, entity in enumerate(entities):
            for j in range(FACTS_AN_ENTITY):
                relation = BY_KIND[kind][(2 * i + j) % len(BY_KIND[kind])]
                facts.append(Fact(entity, relation.name, left[relation.name].pop()))
    return Town(name, places, people, tuple(facts))


NUM_SETTLED = lex.NUM_HOME + 2 * ENTITIES_A_KIND
"""So many people and places, the first of both tables, are of the home town or of these two."""

OTHER_TOWNS = {
    town.name: town
    for town in (
        _town("Long Ferry", lex.NUM_HOME, 31),
        _town("Abbey Well", lex.NUM_HOME + ENTITIES_A_KIND, 32),
    )
}
