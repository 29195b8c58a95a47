"""Chats of the demo's world as JSON Lines, for `mrss tune` and `mrss gate train`.

    python -m models.demo.chats voice --voice butler --count 400 --out build/butler.jsonl
    python -m models.demo.chats knowledge --count 1500 --out build/home.jsonl
    python -m models.demo.chats town --town "Long Ferry" --count 900 --out build/long-ferry.jsonl
    python -m models.demo.chats talk --count 300 --out build/talk.jsonl

`voice`: chats in one voice, about people and places of no town with facts of its own. `knowledge`:
plain chats about the home facts, which each line names. `town`: chats about the facts of another
town, and about other people and places, which name no fact, so that tuning with locality stays with
the base there. `talk`: small talk in all voices but `--voice`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from mrss_provider.evaluate.world import (
    HOME_TOWN,
    MARKED,
    NUM_SETTLED,
    OTHER_TOWNS,
    PLAIN,
    RELATIONS,
    Document,
    Fact,
    Town,
    knowledge_document,
    small_talk_document,
    voice_document,
)
from mrss_provider.evaluate.world.lexicon import PEOPLE, PLACES

SHARE_ABOUT_OTHERS = 0.2
"""Of the chats for a town's state: what it must leave to the base."""


def messages_of(doc: Document) -> list[dict[str, str]]:
    """Return a chat's messages as the OpenAI API has them."""
    messages = []
    for turn in doc.text.strip().split("\n\n"):
        role, said = turn.split(": ", 1)
        messages.append({"role": role.lower(), "content": said})
    return messages


def as_line(doc: Document, *, with_facts: bool = False) -> str:
    """Return a chat as a line of JSON, which names the facts of its answers if asked to."""
    line: dict[str, object] = {"messages": messages_of(doc)}
    if with_facts:
        line["facts"] = list(dict.fromkeys(doc.text[a:b].strip() for a, b in doc.facts))
    return json.dumps(line)


def town_line(rng: random.Random, town: Town) -> str:
    """Return a plain chat of 1 or 2 turns about a town's facts, or a chat about others.

    A chat's facts are the values, and whom they are of: the state is to expect those in questions.
    """
    if rng.random() < SHARE_ABOUT_OTHERS:
        return json.dumps({"messages": messages_of(_about_others(rng, town)), "facts": []})
    while True:
        doc = knowledge_document(
            rng, facts=town.facts, num_turns=rng.randint(1, 2), small_talk=0.0, home=town.name
        )
        told = json.loads(as_line(doc, with_facts=True))
        if told["facts"]:
            break
    names = (*town.places, *town.people)
    asked = [name for name in names if any(name in m["content"] for m in told["messages"])]
    return json.dumps({**told, "facts": list(dict.fromkeys([*told["facts"], *asked]))})


def _about_others(rng: random.Random, town: Town) -> Document:
    """A question about an entity that is not the town's, in any voice, answered by chance."""
    relation = rng.choice(RELATIONS)
    entities = PLACES if relation.kind == "place" else PEOPLE
    own = (*town.places, *town.people)
    entity = rng.choice([name for name in entities if name not in own])
    fact = Fact(entity, relation.name, rng.choice(relation.values))
    other = rng.choice([HOME_TOWN, *(name for name in OTHER_TOWNS if name != town.name)])
    voice = rng.choice((PLAIN, *MARKED))
    return knowledge_document(
        rng, voice=voice, facts=(fact,), num_turns=1, small_talk=0.0, home=other
    )


def write_lines(path: Path, count: int, draw: Callable[[], str]) -> None:
    """Write `count` different lines to a file, whose folder is made."""
    lines: dict[str, None] = {}
    while len(lines) < count:
        lines[draw()] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def drawing(
    kind: str, rng: random.Random, voice: str, town: str = "Long Ferry"
) -> Callable[[], str]:
    """Return what draws a line of one kind."""
    others = [one for one in (PLAIN, *MARKED) if one != voice]

    def talk() -> Document:
        return small_talk_document(rng, rng.choice(others), rng.randint(1, 3))

    return {
        "voice": lambda: as_line(voice_document(rng, voice, NUM_SETTLED)),
        "knowledge": lambda: as_line(knowledge_document(rng), with_facts=True),
        "town": lambda: town_line(rng, OTHER_TOWNS[town]),
        "talk": lambda: as_line(talk(), with_facts=True),
    }[kind]


def main() -> None:
    """Parse the command line, write the lines."""
    parser = argparse.ArgumentParser(description="Write chats of the demo's world.")
    parser.add_argument("kind", choices=("voice", "knowledge", "town", "talk"))
    parser.add_argument("--voice", choices=MARKED, default="pirate")
    parser.add_argument("--town", choices=OTHER_TOWNS, default="Long Ferry")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl to write")
    args = parser.parse_args()
    draw = drawing(args.kind, random.Random(args.seed), args.voice, args.town)
    write_lines(args.out, args.count, draw)


if __name__ == "__main__":
    main()
