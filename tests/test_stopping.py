"""Stop sequences end a text at the same place however it was split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.errors import InvalidRequestError
from asyncmodels.stopping import StopMatcher, cut

# Two letters make overlaps, repetitions and false starts the rule and not the exception.
texts = st.text("ab", max_size=24)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@st.composite
def split_texts(draw: st.DrawFn) -> list[str]:
    """Pieces of a text, empty ones among them."""
    return draw(st.lists(st.text("ab", max_size=4), max_size=12))


def naive_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    for place in range(len(text)):
        here = [stop for stop in stops if text.startswith(stop, place)]
        if here:
            return text[:place], min(here, key=len)
    return text, None


@given(texts, stop_lists)
def test_cut_is_the_earliest_then_the_shortest_stop(text: str, stops: list[str]) -> None:
    """The cut is before the first place where any stop begins, and names the shortest stop there."""
    assert cut(text, stops) == naive_cut(text, stops)


@given(texts, stop_lists, st.randoms(use_true_random=False))
def test_the_order_of_the_stops_means_nothing(text: str, stops: list[str], random: object) -> None:
    """The same stops in any order cut at the same place."""
    shuffled = list(stops)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis types its Random as an object
    assert cut(text, shuffled) == cut(text, stops)


@given(split_texts(), stop_lists)
def test_every_chunking_emits_what_cut_leaves(pieces: list[str], stops: list[str]) -> None:
    """The pieces that a matcher emits make up exactly the cut of the whole text, and it names the same stop."""
    matcher = StopMatcher(stops)
    emitted = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    expected, stop = cut("".join(pieces), stops)
    assert (emitted, matcher.stop) == (expected, stop)
    assert matcher.matched is (stop is not None)


@given(split_texts(), stop_lists)
def test_no_more_is_held_than_the_beginning_of_a_stop(pieces: list[str], stops: list[str]) -> None:
    """Until a match, what is not emitted is the longest end of the text that begins some stop and is not all of it."""
    matcher = StopMatcher(stops)
    seen = emitted = ""
    for piece in pieces:
        seen += piece
        emitted += matcher.push(piece)
        if matcher.matched:
            break
        ends = [seen[i:] for i in range(len(seen))]
        held = next((end for end in ends if any(s != end and s.startswith(end) for s in stops)), "")
        assert emitted + held == seen


@given(split_texts(), stop_lists)
def test_nothing_is_emitted_after_a_match(pieces: list[str], stops: list[str]) -> None:
    """After a match both push and flush return nothing."""
    matcher = StopMatcher(stops)
    for piece in pieces:
        was_matched = matcher.matched
        emitted = matcher.push(piece)
        assert not (was_matched and emitted)
    if matcher.matched:
        assert matcher.flush() == ""
        assert matcher.push("more") == ""


def test_a_complete_stop_waits_for_one_that_began_before_it() -> None:
    """While a stop that began earlier may still become complete, the later one is not yet the match."""
    matcher = StopMatcher(["bc", "abcd"])
    assert matcher.push("xabc") == "x"
    assert not matcher.matched
    assert matcher.push("d") == ""
    assert matcher.stop == "abcd"


def test_the_end_of_the_text_decides_a_waiting_stop() -> None:
    """At the end of the text the earlier stop can no longer be completed, so the complete one is the match."""
    matcher = StopMatcher(["bc", "abcd"])
    assert matcher.push("abc") == ""
    assert matcher.flush() == "a"
    assert matcher.stop == "bc"
    assert matcher.matched


def test_a_false_start_is_released_at_once() -> None:
    """Held text comes out with the first piece that shows it is no stop."""
    matcher = StopMatcher(["Observation:"])
    assert matcher.push("so Obs") == "so "
    assert matcher.push("ess") == "Obsess"


def test_characters_that_mean_something_in_patterns_are_only_characters() -> None:
    """Stops made of the special characters of regular expressions are found as they are."""
    for stop in ("]", "^a", "\\", "-", "[", "a-z", "\n\n", "</code>", "🛑"):
        matcher = StopMatcher([stop])
        assert matcher.push(f"left{stop}right") == "left"
        assert matcher.stop == stop


def test_without_stops_a_piece_passes_as_it_is() -> None:
    """Without stops push returns the very same string."""
    matcher = StopMatcher(())
    text = "anything " * 3
    assert matcher.push(text) is text
    assert matcher.flush() == ""
    assert cut(text, ()) == (text, None)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "stop", [None], [b"a"]])
def test_unusable_stops_are_refused(stops: list[str]) -> None:
    """An empty stop, one that is no string, and a bare string are each refused before any text is seen."""
    with pytest.raises(InvalidRequestError):
        StopMatcher(stops)
    with pytest.raises(InvalidRequestError):
        cut("text", stops)
