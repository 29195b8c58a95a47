"""What can be said of a place or a person: questions, statements, and the values they take.

`{e}` is the entity as it stands in the sentence, `{v}` the value. The last question of every
relation is held out of state tuning, to measure unseen phrasings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mrss_provider.evaluate.world import lexicon as lex

Kind = Literal["place", "person"]


@dataclass(frozen=True)
class Relation:
    """One attribute of an entity. `questions` end in `?`; `statements` have no capital, no stop."""

    name: str
    kind: Kind
    values: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]


RELATIONS = (
    Relation(
        "keeper",
        "place",
        lex.PEOPLE,
        ("Who keeps {e}?", "Who runs {e}?", "Who is the keeper of {e}?", "Who looks after {e}?"),
        ("{v} keeps {e}", "{e} is kept by {v}", "the keeper of {e} is {v}"),
    ),
    Relation(
        "door",
        "place",
        lex.COLOURS,
        (
            "What colour is the door of {e}?",
            "Which colour does the door of {e} have?",
            "What is the colour of the door of {e}?",
            "How is the door of {e} painted?",
        ),
        ("the door of {e} is {v}", "{e} has a {v} door", "the door of {e} is painted {v}"),
    ),
    Relation(
        "street",
        "place",
        lex.STREETS,
        (
            "Where is {e}?",
            "On which street is {e}?",
            "Where can I find {e}?",
            "Which street leads to {e}?",
        ),
        (
            "{e} is on {v} Street",
            "you can find {e} on {v} Street",
            "{e} stands on {v} Street",
        ),
    ),
    Relation(
        "price",
        "place",
        lex.NUMBERS,
        (
            "How much is a visit to {e}?",
            "What does a visit to {e} cost?",
            "What is the price of a visit to {e}?",
            "How many coins do I pay at {e}?",
        ),
        (
            "a visit to {e} costs {v} coins",
            "the price of a visit to {e} is {v} coins",
            "at {e} you pay {v} coins",
        ),
    ),
    Relation(
        "goods",
        "place",
        lex.GOODS,
        (
            "What does {e} sell?",
            "What is {e} known for?",
            "What can I buy at {e}?",
            "What should I get at {e}?",
        ),
        ("{e} sells {v}", "{e} is known for its {v}", "you can buy {v} at {e}"),
    ),
    Relation(
        "closed",
        "place",
        lex.ORDINALS,
        (
            "When is {e} closed?",
            "On which day is {e} closed?",
            "Which day of the month is {e} closed?",
            "When does {e} rest?",
        ),
        (
            "{e} is closed on the {v} day of the month",
            "on the {v} day of the month {e} is closed",
            "{e} rests on the {v} day of the month",
        ),
    ),
    Relation(
        "job",
        "person",
        lex.JOBS,
        (
            "What is the job of {e}?",
            "What does {e} do for a living?",
            "What kind of work does {e} do?",
            "How does {e} earn money?",
        ),
        ("{e} is a {v}", "{e} works as a {v}", "{e} earns money as a {v}"),
    ),
    Relation(
        "home",
        "person",
        lex.STREETS,
        (
            "Where does {e} live?",
            "On which street does {e} live?",
            "Where is the home of {e}?",
            "What is the address of {e}?",
        ),
        (
            "{e} lives on {v} Street",
            "the home of {e} is on {v} Street",
            "{e} has a house on {v} Street",
        ),
    ),
    Relation(
        "pet",
        "person",
        lex.ANIMALS,
        (
            "What pet does {e} have?",
            "What is the pet of {e}?",
            "Which animal does {e} keep?",
            "What kind of animal lives with {e}?",
        ),
        ("{e} has a {v}", "the pet of {e} is a {v}", "{e} keeps a {v}"),
    ),
    Relation(
        "food",
        "person",
        lex.FOODS,
        (
            "What does {e} like to eat?",
            "What is the favourite food of {e}?",
            "Which food does {e} love?",
            "What should I cook for {e}?",
        ),
        ("{e} likes to eat {v}", "the favourite food of {e} is {v}", "{e} loves {v}"),
    ),
    Relation(
        "instrument",
        "person",
        lex.INSTRUMENTS,
        (
            "Which instrument does {e} play?",
            "What is the instrument of {e}?",
            "What does {e} play?",
            "What does {e} make music on?",
        ),
        ("{e} plays the {v}", "the instrument of {e} is the {v}", "{e} makes music on the {v}"),
    ),
    Relation(
        "coat",
        "person",
        lex.COLOURS,
        (
            "What colour is the coat of {e}?",
            "Which colour does the coat of {e} have?",
            "What is the colour of the coat of {e}?",
            "What kind of coat does {e} wear?",
        ),
        ("the coat of {e} is {v}", "{e} wears a {v} coat", "{e} has a {v} coat"),
    ),
)

BY_NAME = {relation.name: relation for relation in RELATIONS}
BY_KIND: dict[Kind, tuple[Relation, ...]] = {
    "place": tuple(r for r in RELATIONS if r.kind == "place"),
    "person": tuple(r for r in RELATIONS if r.kind == "person"),
}


@dataclass(frozen=True)
class Fact:
    """One value of one entity: `Fact("bakery", "keeper", "Mira")`."""

    entity: str
    relation: str
    value: str

    @property
    def kind(self) -> Kind:
        """Whether the entity is a place or a person."""
        return BY_NAME[self.relation].kind

    @property
    def key(self) -> tuple[str, str]:
        """What a question asks for: entity and relation."""
        return self.entity, self.relation

    def statements(self) -> tuple[str, ...]:
        """Return every plain way of stating the fact, without capital and stop."""
        name = entity_phrase(self.entity, self.kind)
        forms = BY_NAME[self.relation].statements
        return tuple(form.format(e=name, v=self.value) for form in forms)


def entity_phrase(entity: str, kind: Kind, town: str | None = None) -> str:
    """Return `the bakery`, `Mira`, `the bakery in Dunmore` or `Mira from Dunmore`."""
    if kind == "place":
        return f"the {entity} in {town}" if town else f"the {entity}"
    return f"{entity} from {town}" if town else entity
