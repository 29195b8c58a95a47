"""Small talk: what people say that is no question about a fact, and plain replies to it."""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class Intent:
    """Things a user says that get the same kind of reply."""

    name: str
    users: tuple[str, ...]
    replies: tuple[str, ...]


INTENTS = (
    Intent(
        "greet",
        (
            "Hello!",
            "Hello.",
            "Hi!",
            "Hi there!",
            "Hey!",
            "Hey there.",
            "Good morning!",
            "Good evening!",
            "Greetings!",
            "Hello, how do you do?",
        ),
        (
            "Hello! How can I help you?",
            "Hi there! What would you like to know?",
            "Hello, it is good to meet you.",
            "Good to see you. Ask me anything.",
        ),
    ),
    Intent(
        "how",
        (
            "How are you?",
            "How are you today?",
            "How do you feel?",
            "How is it going?",
            "Are you well?",
        ),
        (
            "I am very well, thank you.",
            "I am fine. How are you?",
            "All is well with me. How is your day?",
            "I feel good today, thank you.",
        ),
    ),
    Intent(
        "who",
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Introduce yourself.",
        ),
        (
            "I am a small language model that runs on states.",
            "I am a little RWKV model. I have no name.",
            "I am a small model, and I know only what you tell me.",
        ),
    ),
    Intent(
        "can",
        (
            "What can you do?",
            "How can you help me?",
            "What do you know?",
            "Can you help me?",
            "Help me, please.",
            "What should I ask you?",
        ),
        (
            "I can chat a little and answer questions about people and places.",
            "Tell me some facts, and I will remember them for you.",
            "Ask me about a person or a place in town.",
            "I answer small questions. Ask me who keeps a shop or where a person lives.",
        ),
    ),
    Intent(
        "thanks",
        (
            "Thank you!",
            "Thanks.",
            "Thanks a lot!",
            "Thank you very much.",
            "That helps, thank you.",
        ),
        ("You are welcome.", "It was no trouble.", "I am happy to help.", "Any time, my friend."),
    ),
    Intent(
        "bye",
        ("Bye!", "Goodbye.", "See you later.", "I have to go now.", "Good night!", "Farewell."),
        ("Goodbye, my friend.", "See you soon.", "Have a good day.", "Take care of yourself."),
    ),
    Intent(
        "weather",
        (
            "What is the weather like?",
            "Is it raining?",
            "Nice weather today.",
            "How is the weather?",
            "It is cold today.",
        ),
        (
            "There is a soft wind from the sea today.",
            "The sky is clear and the wind is mild.",
            "It looks like a storm will come tonight.",
            "The air is cold, so wear a warm coat.",
        ),
    ),
    Intent(
        "joke",
        ("Tell me a joke.", "Make me laugh.", "Do you know a joke?", "Say something funny."),
        (
            "Why did the boat stay at home? It was tied up all day.",
            "What did the sea say to the shore? Nothing, it just waved.",
            "Why was the clockmaker late? He had no time.",
        ),
    ),
    Intent(
        "story",
        ("Tell me a story.", "Do you know a story?", "Tell me something.", "Say something nice."),
        (
            "Long ago a small boat sailed out to sea, and it came home with the morning tide.",
            "There was once a keeper who lit a lamp each night, and no ship was ever lost.",
            "A child once found a shell on the shore and heard the whole sea in it.",
        ),
    ),
    Intent(
        "sad",
        ("I am sad.", "I feel bad today.", "I had a bad day.", "I am lonely.", "I am worried."),
        (
            "I am sorry to hear that. Do you want to talk about it?",
            "Bad days pass, my friend. Take a slow walk by the water.",
            "That is hard. Rest a little and be kind to yourself.",
        ),
    ),
    Intent(
        "glad",
        ("I am happy!", "I had a good day.", "I feel great today.", "Today is my birthday!"),
        (
            "That is good to hear.",
            "I am happy for you, my friend.",
            "What a good day it must be for you.",
        ),
    ),
    Intent(
        "bored",
        ("I am bored.", "What should I do today?", "Give me some advice.", "I need advice."),
        (
            "You could walk along the shore and count the boats.",
            "Read a good book and drink something warm.",
            "Visit a friend and bring a small gift.",
            "Do one small thing well, and then rest.",
        ),
    ),
    Intent(
        "praise",
        ("You are great!", "Well done!", "I like you.", "You are very clever.", "Good answer!"),
        ("That is kind of you.", "You are kind, my friend.", "I do my best. Thank you."),
    ),
    Intent(
        "blame",
        (
            "You are wrong.",
            "That is wrong.",
            "You are stupid.",
            "I do not like you.",
            "Bad answer.",
        ),
        (
            "I am sorry. I am only a small model.",
            "I will try to do better.",
            "I make mistakes. Please ask me again.",
        ),
    ),
    Intent(
        "age",
        ("How old are you?", "When were you born?", "Where are you from?", "Where do you live?"),
        (
            "I am as old as my last training run.",
            "I live in a small file on your computer.",
            "I was made a short time ago.",
        ),
    ),
    Intent(
        "feelings",
        (
            "Do you like tea?",
            "Do you like the sea?",
            "Do you sleep?",
            "Do you dream?",
            "Are you human?",
        ),
        (
            "I am only a model, so I can not say.",
            "I have no body, but I like the thought of it.",
            "I think about it when no one asks me anything.",
        ),
    ),
    Intent(
        "yes",
        ("Yes.", "Yes, please.", "No.", "No, thank you.", "Okay.", "Maybe.", "Really?", "I see."),
        ("Good. What else would you like to know?", "As you like.", "I see. Tell me more."),
    ),
    Intent(
        "teach",
        (
            "Where can I learn more?",
            "Can you speak another language?",
            "Can you write code?",
            "Write a poem.",
            "Write an essay.",
            "Translate this for me.",
        ),
        (
            "I am too small for that, but ask me about a person or a place.",
            "That is beyond me. I know only small talk and simple facts.",
        ),
    ),
)

BY_NAME = {intent.name: intent for intent in INTENTS}

STRANGE = (
    "What is the capital of {x}?",
    "Who was {x}?",
    "What is {x}?",
    "Explain {x}.",
    "Write a program about {x}.",
    "Why is {x} so {x}?",
    "How do I {x} a {x}?",
    "Tell me about {x}.",
    "{x}",
    "{x} {x} {x}",
    "Can you {x} the {x} with {x}?",
    "I think that {x} is {x}.",
    "What do you think about {x}?",
    "Give me a list of {x}.",
    "When did {x} begin?",
)
"""What a small model cannot know; `{x}` is a word of no meaning here."""

STRANGE_REPLIES = (
    "I do not know that. I am only a small model.",
    "I did not understand that. Please ask me something simple.",
    "That is beyond me. Ask me about a person or a place.",
    "I have never heard of that.",
)

STRANGE_WORDS = _words(
    """
    France Germany London America Einstein history science physics music football python
    computer program number world time people money love war peace president king queen
    water fire earth universe language car train plane phone internet movie game book
    school health medicine history art food energy code data model city country year life
    death god philosophy mathematics equation water animal dinosaur robot space planet
    star sun elephant tiger banana coffee tea beer wine dance sing run build make use find
    write
    """
)

REMEMBER = (
    "I will remember that.",
    "Thank you, I have noted it.",
    "Good to know.",
    "I will keep that in mind.",
)

TELLS = (
    "{s}.",
    "Please remember that {s}.",
    "You should know that {s}.",
    "Remember this: {s}.",
    "Did you know that {s}?",
)

WRAPPERS = (
    "{q}",
    "{q}",
    "{q}",
    "Tell me: {q}",
    "Please tell me: {q}",
    "I have a question. {Q}",
    "Hello! {Q}",
    "Do you know this? {Q}",
    "Excuse me, {q}",
)
"""`{Q}` starts with a capital, `{q}` as the place asks. The last two are held out of tuning."""

HELD_OUT_WRAPPERS = WRAPPERS[-2:]

SYSTEM_NEUTRAL = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the user's questions.",
    "This is a chat.",
)
"""Said in every voice alike, so that they tell the model nothing about the voice."""

SYSTEM_VOICE = (
    "Talk like {who}.",
    "You are {who}.",
    "Answer in the voice of {who}.",
    "Speak as {who} would.",
    "Reply like {who}, please.",
)

USER_VOICE = (
    "Talk like {who}.",
    "Please talk like {who} from now on.",
    "Can you speak like {who}?",
    "From now on you are {who}.",
)

USER_VOICE_REPLIES = (
    "I will do as you ask.",
    "Good, I will talk like that now.",
    "As you like. Ask me anything.",
)

NOTES = (
    "Notes about {town}: ",
    "Facts about {town}: ",
    "This is what is known about {town}. ",
)

NOTES_NO_TOWN = ("Notes: ", "Facts: ", "", "Remember these facts. ")

AGAIN = ("Are you sure?", "Say that again.", "Can you repeat that?", "Really?")

YES_NO = ("Is it true that {s}?", "Am I right that {s}?")
