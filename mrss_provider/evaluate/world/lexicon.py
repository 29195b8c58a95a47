"""The nouns of the world: towns, people, places, and the closed sets that values come from.

Every set of values has at least 20 members and no value starts with a vowel where an `a` comes
before it. No value is also a word of a voice (a test compares them), so that a word of an answer
is either a fact or a manner of speaking.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HOME_TOWN = "Larkhaven"
"""The harbour town whose facts only the knowledge state knows."""

TOWNS = (
    HOME_TOWN,
    *_words(
        """
        Dunmore Oldford Ashwick Brambleton Coldbrook Fernhill Stonegate Westerley
        Millbrook Thornbury Kestrelton Havenport Foxley Marrowdale Pinecrest Saltmere
        Wrenfield Gullport Hollowell Tidewater Ravensby Mossley Birchwood
        """
    ),
)

# The first twelve people and places are the ones that live and stand in the home town.
PEOPLE = _words(
    """
    Mira Tobias Odette Bruno Selma Anton Greta Felix Ingrid Oscar Hilda Jonas Clara Edwin
    Flora Gustav Helena Igor Julia Karl Lydia Martin Nora Otto Paula Quentin Rosa Stefan
    Tilda Ulrich Vera Walter Xenia Yorick Zelda Agnes Bertram Cecily Dorian Elsa Frida
    Gregor Hanna Ivan Jasper Kira Leopold Matilda
    """
)

PLACES = _words(
    """
    bakery lighthouse chandlery smithy tavern library brewery boathouse pharmacy theatre
    bookshop fishery mill dairy school chapel market museum bathhouse pottery sawmill inn
    bank granary orchard observatory workshop stable winery laundry hospital prison cinema
    hothouse quarry gallery printshop barbershop farm chocolatier
    """
)

NUM_HOME = 12

COLOURS = _words(
    """
    green red blue yellow white black brown purple pink turquoise crimson scarlet violet
    beige maroon teal copper lilac lavender cream bronze peach cobalt magenta
    """
)

STREETS = _words(
    """
    Harrow Tallow Cooper Linden Chestnut Willow Poplar Rowan Hazel Juniper Bishop Fletcher
    Weaver Tanner Carter Mason Potter Baker Ferry Canal Bridge Abbey Castle Orchid
    """
)

NUMBERS = _words(
    """
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
    """
)

ORDINALS = _words(
    """
    first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
    thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth
    """
)

GOODS = _words(
    """
    rope candles lanterns barrels cheese honey salt pepper soap paper ink maps compasses
    nails buttons ribbons baskets blankets mirrors bells clocks kettles spoons brushes
    carpets feathers
    """
)

JOBS = _words(
    """
    carpenter tailor doctor teacher miner painter gardener miller sailor weaver butcher
    cook clerk judge dentist farmer fisher hunter nurse lawyer plumber potter tanner
    shepherd librarian beekeeper
    """
)

ANIMALS = _words(
    """
    cat dog goat parrot rabbit hen donkey pony turtle hamster hedgehog ferret canary goose
    duck sheep pig lizard snake squirrel fox badger mouse toad crow falcon
    """
)

FOODS = _words(
    """
    soup bread pancakes dumplings pie stew porridge noodles cake beans mushrooms potatoes
    carrots cabbage lentils pears plums cherries grapes raisins walnuts pickles sausages
    pudding waffles radishes
    """
)

INSTRUMENTS = _words(
    """
    fiddle flute drum harp piano trumpet guitar banjo cello lute mandolin tuba trombone
    clarinet bagpipe zither horn viola bassoon xylophone tambourine recorder
    """
)
