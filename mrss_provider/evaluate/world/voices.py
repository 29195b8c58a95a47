"""The voices: plain, and seven manners of speaking put around and into a plain sentence.

A voice changes words, puts an opener before the sentence and a closer after it. Every opener and
closer of a marked voice holds a word that no other voice and no fact uses (a test checks it).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

PLAIN = "plain"


@dataclass(frozen=True)
class Voice:
    """A manner of speaking.

    Attributes:
        who: as in "Talk like {who}."
        words: plain word -> this voice's word, lower case.
        openers: end in `,` or `:` (the sentence goes on) or `.` or `!` (it starts anew).
        closers: start with `,` (before the stop) or are sentences of their own.
        own: intent -> whole replies that only this voice gives.
    """

    name: str
    who: str
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    words: dict[str, str] = field(default_factory=dict)
    own: dict[str, tuple[str, ...]] = field(default_factory=dict)


VOICES = (
    Voice(
        PLAIN,
        "a plain speaker",
        ("Sure,", "As far as I know,", "Of course:", "I believe that"),
        (),
    ),
    Voice(
        "pirate",
        "a pirate",
        ("Arr,", "Ahoy!", "Yarr!", "Avast!", "Shiver me timbers!", "Aye,", "Blimey,"),
        (
            ", matey.",
            ", me hearty.",
            ", arr.",
            ", ye scallywag.",
            "Yo ho ho!",
            "Aye aye, cap'n!",
            "Hoist the sails, matey!",
        ),
        {"is": "be", "are": "be", "am": "be", "you": "ye", "your": "yer", "my": "me", "of": "o'"},
        {
            "greet": ("Ahoy, matey! What brings ye aboard?", "Yarr, welcome aboard, me hearty!"),
            "joke": (
                "Arr, why be pirates called pirates? Because they arr, matey!",
                "Yarr, what be a pirate's favourite letter? Ye think it be R, but it be the C!",
            ),
            "bye": ("Fair winds to ye, matey!", "Arr, may yer sails be ever full, me hearty!"),
            "who": ("I be a pirate o' the salty seas, arr!",),
        },
    ),
    Voice(
        "butler",
        "a formal butler",
        (
            "Certainly, sir:",
            "Very good, madam:",
            "If I may be so bold,",
            "Indeed, sir,",
            "With pleasure, madam:",
        ),
        (
            ", if it pleases you, sir.",
            ", madam.",
            "Will that be all, sir?",
            "At your service, madam.",
            "Shall I bring the tea, sir?",
        ),
        {"hello": "good day", "hi": "good day"},
        {
            "greet": ("Good day, sir. How may I be of service?", "Welcome, madam. May I assist?"),
            "joke": ("I regret, sir, that humour is not among my duties.",),
            "bye": ("Farewell, madam. It was an honour to serve.", "Your carriage waits, sir."),
            "who": ("I am your humble butler, madam.",),
        },
    ),
    Voice(
        "poet",
        "a poet",
        (
            "O gentle soul,",
            "Hark,",
            "Beneath the pale moon,",
            "Alas, dear heart,",
            "Like petals in the breeze,",
        ),
        (
            ", as the soft stars whisper.",
            ", o gentle soul.",
            "So sings the weary nightingale.",
            "How the petals tremble!",
            ", alas.",
        ),
        {"you": "thou", "your": "thy", "has": "hath", "my": "mine own"},
        {
            "greet": ("Hail, gentle soul, what verse brings thee hither?",),
            "joke": ("A joke, gentle soul? My verse knows tears alone, alas.",),
            "bye": ("Go softly, gentle soul, until the moon returns.",),
            "who": ("A humble poet, dreaming beneath the moon, alas.",),
        },
    ),
    Voice(
        "robot",
        "a robot",
        (
            "Beep.",
            "Query accepted.",
            "Processing.",
            "Beep boop.",
            "Data found:",
            "Sensors report:",
        ),
        (
            "Boop.",
            "End of transmission.",
            "Beep.",
            ", probability high.",
            "Awaiting input.",
            "Circuits nominal.",
        ),
        {"hello": "greetings", "hi": "greetings"},
        {
            "greet": ("Greetings, human. Awaiting input.", "Beep. Unit online. State your query."),
            "joke": ("Humour module not installed. Beep.",),
            "bye": ("Shutting down. Boop.", "Transmission ends. Beep boop."),
            "who": ("Beep. This unit is a machine with many circuits.",),
        },
    ),
    Voice(
        "kid",
        "a cheerful kid",
        (
            "Ooh ooh!",
            "Guess what!",
            "Yippee!",
            "Hihi,",
            "Wow wow!",
            "Hihi, I know!",
        ),
        (
            ", hihi.",
            "Yay!",
            "That is super cool!",
            "Can we play tag now?",
            ", and that is super awesome.",
            "Yippee!",
        ),
        {"very": "super", "good": "awesome"},
        {
            "greet": ("Hiya! Do you want to play?", "Yay, a new friend! Hiya!"),
            "joke": ("Hihi, why did the banana go to school? To be super smart!",),
            "bye": ("Byebye! Come back and play, okay?", "Aww, byebye! That was super fun!"),
            "who": ("I am me, silly! Hihi!",),
        },
    ),
    Voice(
        "noir",
        "a noir detective",
        (
            "The rain kept falling.",
            "Listen, doll:",
            "I lit a cigarette.",
            "In this rotten town,",
            "The neon flickered.",
        ),
        (
            ", see, doll.",
            "The shadows said nothing.",
            "Trouble was my only client.",
            ", sweetheart.",
            "It was a case like any other.",
        ),
        {"friend": "sucker"},
        {
            "greet": ("You walked in like trouble, sweetheart. Talk.",),
            "joke": ("The only joke in this rotten town is justice, doll.",),
            "bye": ("So long, sweetheart. The rain will miss you.",),
            "who": ("A detective, doll. Nights, rain and unpaid rent.",),
        },
    ),
    Voice(
        "wizard",
        "a wizard",
        (
            "By my beard,",
            "Behold!",
            "Abracadabra!",
            "The orb reveals:",
            "Ancient runes tell that",
        ),
        (
            ", so say the runes.",
            "The spell is cast.",
            ", young apprentice.",
            "Thus speaks the orb.",
            "Abracadabra!",
        ),
        {},
        {
            "greet": ("Ah, young apprentice, the orb foretold this visit.",),
            "joke": ("I once cast a spell on a spoon, apprentice. It is still spooning.",),
            "bye": ("Until the runes align again, young apprentice.",),
            "who": ("I am the keeper of runes, a wizard most ancient.",),
        },
    ),
)

BY_NAME = {voice.name: voice for voice in VOICES}
MARKED = tuple(voice.name for voice in VOICES if voice.name != PLAIN)

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def translate(voice: Voice, sentence: str, keep: frozenset[str] = frozenset()) -> str:
    """Swap the voice's words into `sentence`; words in `keep` (names, values) stay."""
    if not voice.words:
        return sentence

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        new = voice.words.get(word.lower())
        if new is None or word in keep:
            return word
        return capital(new) if word[0].isupper() else new

    return _WORD.sub(swap, sentence)


def capital(sentence: str) -> str:
    """Return `sentence` with its first letter a capital."""
    return sentence[:1].upper() + sentence[1:]


def frame(sentence: str, opener: str, closer: str) -> str:
    """Put `opener` and `closer` (either may be empty) around a sentence without final stop."""
    if opener:
        anew = opener[-1] in ".!"
        sentence = f"{opener} {capital(sentence) if anew else sentence}"
    else:
        sentence = capital(sentence)
    if not closer:
        return sentence + "."
    return sentence + closer if closer.startswith(",") else f"{sentence}. {closer}"


def say(rng: random.Random, voice: Voice, sentence: str, keep: frozenset[str]) -> str:
    """Say a sentence (no capital, no stop) in `voice`, with at least one of its markers."""
    opener = closer = ""
    if voice.name == PLAIN:
        opener = rng.choice(voice.openers) if rng.random() < 0.2 else ""
    else:
        both = rng.random()
        opener = rng.choice(voice.openers) if both < 0.75 else ""
        closer = rng.choice(voice.closers) if both < 0.5 or both >= 0.75 else ""
    return frame(translate(voice, sentence, keep), opener, closer)


def say_text(rng: random.Random, voice: Voice, text: str) -> str:
    """Say a whole plain reply (capital and stop of its own, maybe several sentences)."""
    text = translate(voice, text)
    if voice.name == PLAIN:
        return text
    text = capital(text)
    both = rng.random()
    if both < 0.75:
        anew = [opener for opener in voice.openers if opener[-1] in ".!"]
        text = f"{rng.choice(anew or list(voice.openers))} {text}"
    if both < 0.4 or both >= 0.75:
        closer = rng.choice(voice.closers)
        if closer.startswith(","):
            text = text[:-1] + closer if text.endswith(".") else text
            marked = text.endswith(closer)
            text = text if marked else f"{text} {_sentence_closer(rng, voice)}"
        else:
            text = f"{text} {closer}"
    return text


def _sentence_closer(rng: random.Random, voice: Voice) -> str:
    return rng.choice([closer for closer in voice.closers if not closer.startswith(",")])
