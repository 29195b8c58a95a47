"""Text files as Windows' editors save them, a byte order mark first, read as without it."""

from pathlib import Path

import pytest

from mrss_provider.async_engine.card import read_card
from mrss_provider.chat import TEMPLATES, load_template
from mrss_provider.cli.output import read_text
from mrss_provider.compare.prompts import read_prompts
from mrss_provider.engine.library_files import edit_mixtures
from mrss_provider.engine.mixtures_file import read_mixtures
from mrss_provider.tokenizer import Tokenizer
from mrss_provider.tune.chats import read_chats

CHAT = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n'
QUESTION = '{"messages": [{"role": "user", "content": "Hi"}]}\n'
MIXTURE = '[story]\nterms = "knowledge+tone"\n'
TEMPLATE = '{#-\nstop = ["Human:"]\n-#}\n{{ messages[0].content }}'


def edited(path):
    edit_mixtures(path.parent, lambda text: text + "# more\n")
    return path.read_bytes()


def chats(path):
    vocabulary = Path(__file__).parent.parent / "models/demo/vocab.txt"
    return read_chats(path, Tokenizer.load(vocabulary), TEMPLATES["world"])


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("card.toml", 'name = "x"\n', lambda path: read_card(path.parent)),
        ("mine.jinja", TEMPLATE, lambda path: load_template(str(path))),
        ("mixtures.toml", MIXTURE, read_mixtures),
        ("mixtures.toml", MIXTURE, edited),
        ("chats.jsonl", CHAT, chats),
        ("prompts.jsonl", QUESTION, lambda path: read_prompts(path).prompts),
        ("manual.txt", "A long text.", read_text),
    ],
)
def test_a_byte_order_mark_says_nothing(tmp_path, name, text, read):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    without = read(path)
    path.write_text(text, encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert read(path) == without
