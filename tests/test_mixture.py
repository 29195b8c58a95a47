"""The grammar of mixture names: positions of faults, the one spelling, what may be a name."""

import contextlib
import math
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import (
    GATES,
    HIJACKED_SUBSTRINGS,
    MERGES,
    NAME_PATTERN,
    Mixture,
    Term,
    canonical_weights,
    check_name,
    check_weight,
    parse_mixture,
)

names = st.from_regex(NAME_PATTERN, fullmatch=True)
weights = st.floats(min_value=0.0, max_value=1e300)
mixtures = st.builds(
    Mixture,
    st.lists(st.builds(Term, names, weights), min_size=1, max_size=5)
    .map(tuple)
    .filter(lambda terms: any(t.weight > 0 for t in terms)),
    st.none() | names,
    st.none() | st.sampled_from(MERGES),
    st.none() | st.sampled_from(GATES),
)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("knowledge", "knowledge"),
        ("tone:3+knowledge:7", "knowledge+tone:0.4286"),
        ("a:7+b:3", "a+b:0.4286"),
        ("a+a+b", "a+b:0.5"),
        ("b+a", "a+b"),
        ("a:.5+b:2.", "a:0.25+b"),
        ("a:1e-9+b:1e0", "a:1e-09+b"),
        ("a:0+b:0.3", "b"),
        ("base:0.2+tone:0.8", "base:0.25+tone"),
        ("a:1e308+a:1e308+b:1e308", "a+b:0.5"),
        ("a+b~delta~novelty", "a+b"),
        ("a+b~delta", "a+b"),
        ("a+b~fixed", "a+b~fixed"),
        ("knowledge+tone~linear~fixed", "knowledge+tone~linear~fixed"),
        ("a+b@demo~linear", "a+b@demo~linear"),
        ("a~linear~fixed", "a"),
        ("v1.2_x-y", "v1.2_x-y"),
    ],
)
def test_canonical_spelling(text: str, canonical: str) -> None:
    assert parse_mixture(text).canonical() == canonical


@given(mixtures)
def test_canonical_parses_back_to_itself(mixture: Mixture) -> None:
    text = mixture.canonical()
    assert parse_mixture(text).canonical() == text


@given(mixtures, st.floats(min_value=1e-3, max_value=1e3), st.randoms())
def test_canonical_ignores_order_and_scale(mixture: Mixture, scale: float, random: object) -> None:
    terms = [Term(t.name, round(t.weight % 97, 3) + 0.5) for t in mixture.terms]
    other = [Term(t.name, t.weight * scale) for t in terms]
    random.shuffle(other)  # type: ignore[attr-defined]
    one, two = (canonical_weights(x) for x in (terms, other))
    assert one.keys() == two.keys()
    for name in one:
        # Rounding to 4 digits may fall to either side.
        assert math.isclose(one[name], two[name], rel_tol=1.1e-3)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 0),
        ("+a", 0),
        ("a+", 2),
        ("a++b", 2),
        ("a b", 1),
        ("a,b", 1),
        ("a:", 2),
        ("a:-1", 2),
        ("a:x", 2),
        ("a:nan", 2),
        ("a:1e999", 2),
        ("a:1.5.2", 5),
        ("a+b:0.5x", 7),
        ("a@", 2),
        ("a@m@n", 3),
        ("a~", 2),
        ("a~power", 2),
        ("a~fixed~linear", 8),
        ("a~linear~delta", 9),
        ("a~linear~fixed~fixed", 15),
        ("-a", 0),
        ("mrss/a", 4),
        ("é", 0),
        ("a" * 65, 64),
    ],
)
def test_a_fault_is_a_400_with_its_position(text: str, position: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"at position {position}: ") as caught:
        parse_mixture(text)
    assert caught.value.status_code == 400
    assert caught.value.param == "model"


@given(st.text(alphabet=string.printable + "é", max_size=20))
def test_any_text_parses_or_is_a_400(text: str) -> None:
    with contextlib.suppress(InvalidRequestError):
        parse_mixture(text)


def test_all_zero_weights_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at least one weight must be above 0"):
        parse_mixture("a:0+b:0")


def test_terms_know_where_they_begin() -> None:
    terms = parse_mixture("knowledge:0.5+tone").terms
    assert [term.position for term in terms] == [0, 14]
    assert Term("a", 1.0, 3) == Term("a", 1.0, 9)


def test_with_weights_replaces_the_whole_weight_of_a_name() -> None:
    mixture = parse_mixture("a:3+b+a:5").with_weights({"a": 0.5})
    assert mixture.canonical() == "a:0.5+b"
    assert parse_mixture("a:3+b+a:5").with_weights({"b": 4}).canonical() == "a+b:0.5"


@pytest.mark.parametrize(
    ("given_weights", "message"),
    [
        ({"c": 1.0}, "names 'c', which is not a term of 'a.b'"),
        ({"a": -1.0}, "finite and >= 0, got -1.0"),
        ({"a": math.nan}, "finite and >= 0, got nan"),
        ({"a": "x"}, "a weight is a number, got 'x'"),
        ({"a": True}, "a weight is a number, got True"),
        ({"a": 10**400}, "finite and >= 0"),
        ({"a": 0, "b": 0}, "at least one weight"),
    ],
)
def test_bad_weights_are_a_400(given_weights: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        parse_mixture("a+b").with_weights(given_weights)
    assert caught.value.param == "mrss.weights"


def test_check_weight_takes_integers() -> None:
    assert check_weight(3, "x") == 3.0


@pytest.mark.parametrize("name", ["tone", "Tone-2", "v0.1_beta", "0", "a" * 64])
def test_names_that_may_be(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a letter or digit"),
        ("a b", "a letter or digit"),
        ("a,b", "a letter or digit"),
        ("a+b", "a letter or digit"),
        ("a:b", "a letter or digit"),
        ("a/b", "a letter or digit"),
        (".a", "a letter or digit"),
        ("a" * 65, "at most 63"),
        ("tone\n", "a letter or digit"),
        ("base", "untuned model"),
        ("replicated-style", "must not contain 'replicate': LiteLLM"),
        ("my-Clarifai", "must not contain 'clarifai': LiteLLM"),
    ],
)
def test_names_that_may_not_be(name: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check_name(name)


@pytest.mark.filterwarnings("ignore")
def test_litellm_hijacks_no_name_that_we_allow() -> None:
    """Oracle: the dispatch of the installed litellm, by its lists and by its own code."""
    import inspect
    import re

    import litellm
    import litellm.main

    grammar = re.compile(r"[A-Za-z0-9_.+:@~-]+")
    for provider in ("replicate", "clarifai", "petals", "snowflake", "ovhcloud"):
        listed = getattr(litellm, f"{provider}_models")
        assert listed, f"litellm has no list of {provider}'s models any more"
        allowed = [m for m in listed if grammar.fullmatch(m)]
        assert all(any(taken in m for taken in HIJACKED_SUBSTRINGS) for m in allowed), allowed
    # Each `or "<substring>" in model` is one that we refuse, or is asked inside the branch of one
    # provider, where our names never come (the next test calls litellm with these).
    source = inspect.getsource(litellm.main)
    asked = set(re.findall(r'(?:elif|or|if) +\(?"([^"]+)" in model\b', source))
    assert asked - {"claude", "command-r", "gemini", "v2/", "*"} <= set(HIJACKED_SUBSTRINGS)
    assert "replicate" in asked, "the dispatch is written in another way now: read it"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "knowledge+tone",
        "base:0.2+tone:0.8@demo~linear~fixed",
        "gpt-4o",
        "claude-3",
        "command-r",
        "gemini",
    ],
)
def test_litellm_brings_our_names_to_the_custom_provider(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import litellm
    from litellm import CustomLLM, ModelResponse

    seen = []

    class Spy(CustomLLM):
        def completion(self, model: str, **rest: object) -> ModelResponse:  # type: ignore[override]
            seen.append(model)
            return ModelResponse()

    monkeypatch.setattr(
        litellm, "custom_provider_map", [{"provider": "mrss-spy", "custom_handler": Spy()}]
    )
    monkeypatch.setattr(litellm, "_custom_providers", ["mrss-spy"])
    monkeypatch.setattr(litellm, "provider_list", [*litellm.provider_list, "mrss-spy"])
    litellm.completion(f"mrss-spy/{name}", messages=[{"role": "user", "content": "hi"}])
    assert seen == [name]
