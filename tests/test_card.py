"""A model's card: where it lies, and what is no card."""

import pytest

from mrss_provider.async_engine.card import Card, read_card
from mrss_provider.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("template = 5", "template must be a string"),
        ("stop = 'x'", "a list"),
        ("stop = ['']", "1 to 256 characters"),
        ("temperature = -1", "temperature must be"),
        ("top_p = 'x'", "top_p must be"),
        ("temprature = 1", "no key of a card"),
        ("context_length = 'x'", "an integer"),
        ("= x", "cannot read"),
    ],
)
def test_a_bad_card_is_a_configuration_error(tmp_path, text, words):
    (tmp_path / "card.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_card(tmp_path)


def test_a_card_lies_in_the_models_folder_or_beside_its_file(tmp_path):
    (tmp_path / "card.toml").write_text('template = "g1"\nstop = ["x"]\ntop_p = 0.3\n')
    expected = Card(template="g1", stop=("x",), top_p=0.3)
    assert read_card(tmp_path) == expected
    assert read_card(tmp_path / "model.pth") == expected
    (tmp_path / "card.toml").unlink()
    assert read_card(tmp_path) == Card()
