"""Random sentences, words, numbers and letters for examples; the same vocabulary for evaluation and training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

WORDS = (
    "acid age air ant apple april arch arm army art ash aunt axe baby back bag ball band bank bar base bath bay beam "
    "bean bear bed bee beer bell belt bill bird bit blade blood board boat body bolt bone book boot border bowl box "
    "boy brain branch bread brick bridge brother brush bus bush butter button cab cake call camel camp can candle cap "
    "car card cart case cat cave cell chain chair chalk charm chest chief child chin church city clay cliff clock "
    "cloth cloud club coal coat coin comb cook cord corn cost cotton cover cow crew crime crop crowd crown cup curve "
    "dance dawn day deal deer desk dirt dish dock dog doll door dot dream dress drink drop drum duck dust ear earth "
    "east edge egg engine eye face fact fair farm father feast fence field fig finger fire fish flag flame flock "
    "floor flower fly fog food foot fork fox frame friend frog front fruit game garden gate ghost gift girl glass "
    "glove goat gold goose grain grape grass group guard guest guide gun hair hall hammer hand harbor hat hawk head "
    "heart heat hen herb hill hole home honey hook horn horse hotel hour house ice inch ink iron island jar jewel job "
    "judge juice key king kitchen knee knife knot lady lake lamb lamp land law lead leaf leg lemon letter library "
    "line lion lip lock log lord lunch map mark market mask meal meat metal milk mill mind mine mirror monkey month "
    "moon mother motor mouse mouth music nail name neck needle nest net night noise north nose note nurse nut oak oil "
    "onion orange oven owl page paint pan paper park path pen pencil piano pig pin pipe plane plant plate pocket poem "
    "pond pool pot potato powder price prince queen rabbit rail rain rat rice ring river road rock roof room root "
    "rope rose rule sail salt sand school sea seat seed sheep shelf ship shirt shoe shop silk silver sister skin sky "
    "smoke snail snake snow soap song soup spade spoon spring square stage stamp star station steam steel stem step "
    "stick stone store storm stove street sugar summer sun table tail tea team tent thread throat thumb ticket tiger "
    "toe tongue tooth tower town toy train tray tree truck uncle valley voice wagon wall watch water wave wax west "
    "wheel wind window wine wing winter wolf wood wool world worm yard year"
).split()
"""Short and common words, which most tokenizers encode as few tokens."""
_SENTENCES = (
    "Rain fell on the roof until noon.",
    "A cart went slowly up the hill.",
    "The baker swept the step of his shop.",
    "Two boats lay still beside the bridge.",
    "Smoke rose from the houses by the wood.",
    "The clock in the hall had stopped again.",
    "Someone had left a lamp in the window.",
    "Children ran along the wall to school.",
)
_FIRST = (
    "amber bitter brave bright broad calm clear cold copper crisp dark deep dry early empty faint fair fast firm flat "
    "fresh gentle golden grand green grey hollow humble iron kind late light lively long mild narrow noble old pale "
    "plain proud quick quiet rare rough round scarlet silver slow small soft steady still stony sweet tall tame thin "
    "warm white wide wild wise young"
).split()
_SECOND = (
    "anchor apple arrow barn basket beacon bell bird boat bridge brook candle canyon castle cloud coast crane creek "
    "desert door eagle falcon fern field forest fountain garden gate glacier harbor hill horse island kettle ladder "
    "lake lantern maple marsh meadow mill mirror moon mountain needle oak ocean orchard otter path pebble pine pond "
    "raven ridge river rose sail shore spring stone tower valley wheel willow window"
).split()


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield random sentences that are unrelated to any question."""
    while True:
        yield rng.choice(_SENTENCES)


def pairs(rng: random.Random) -> Iterator[str]:
    """Yield unique pairs of words; after all pairs, with a number appended."""
    count = len(_FIRST) * len(_SECOND)
    for turn in itertools.count(1):
        for pair in unique(lambda: rng.randrange(count), count):
            key = f"{_FIRST[pair % len(_FIRST)]}-{_SECOND[pair // len(_FIRST)]}"
            yield key if turn == 1 else f"{key}-{turn}"


def numbers(rng: random.Random) -> Iterator[str]:
    """Yield unique numbers of five digits."""
    return (str(value) for value in unique(lambda: rng.randrange(10_000, 100_000), 90_000))


def letters(rng: random.Random, count: int, alphabet: str) -> Iterator[str]:
    """Yield unique words of random letters."""
    return unique(lambda: "".join(rng.choice(alphabet) for _ in range(count)), len(alphabet) ** count)


def unique(sample: Callable[[], Any], count: int) -> Iterator[Any]:
    """Yield each of the `count` possible results of a random function once."""
    seen: set[Any] = set()
    while len(seen) < count:
        value = sample()
        if value not in seen:
            seen.add(value)
            yield value
