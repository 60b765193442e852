"""Personas: JSON objects of a first name, a city of birth and an occupation, by an author with favourites.

    { "first_name": "Marina" , "city": "Ashford" , "occupation": "bellmaker" }

Each line is real JSON and, split at spaces, made of few different words. The author is a caricature of an instruct
model: asked for a random persona it has favourite values (Zipf), sometimes swaps the keys, and often gets the format
wrong (a lost, repeated or chatty word).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from shared.experiments.errors import UserError

ATTRIBUTES = ("first_name", "city", "occupation")
PROMPT = "persona :"
INSTRUCTION = (
    "Invent a random person. Answer with nothing but a JSON object with exactly these keys, whose values are strings: "
    '"first_name", "city" (the city of birth) and "occupation" (the current occupation).'
)
"""The same request to a language model that understands it; in our words, the paper's are not published."""

CHATTER = ("Sure!", "Enjoy!")

# Values are put together from a beginning and an ending.
PARTS: Mapping[str, tuple[str, str]] = {
    "first_name": (
        "Al Bel Cor Dan El Fer Gal Hel Is Jor Kal Lor Mar Nel Or Per Quin Ros Sal Tam Ul Val Wil Yor Zel Ad Bran Cas "
        "Del Em Flor Gar Hal Iv Jas Kar Lin Mil Nor Os Pet Ran Sel Tor Un Vic Wen Xan Yas Zan",
        "a ana ander ara ard as elia en era eth ian ic ida ika in ina ine inda io is ita o on ora oric os otto ovan "
        "ric une us win wina wyn y yana ys ea ette ello",
    ),
    "city": (
        "Ash Beck Birch Black Bright Brook Clear Cold Cross Deep Dun East Elm Fair Fern Fox Glen Gold Grand Green "
        "Hart High Holm King Lake Lang Lime Long Maple Mill Moor New North Oak Old Pine Port Raven Red Rock Rose "
        "Sand Silver Stan South Swan Thorn West White Wind",
        "bank borough bridge brook burg burn bury by chester cliff combe dale don fall field ford gate grove ham "
        "hampton haven hill holt hurst land leigh ley marsh mead minster mond mont moor mouth pool port ridge rock "
        "shore side stead ton view ville water",
    ),
    "occupation": (
        "barrel basket bell boat book boot brass brick broom button cake candle canal chair chart cheese clock cloth "
        "coach coin drum fence fish flute garden glass glove grain harp horse iron ivory kite lamp lens lock map "
        "mask mirror net oil organ paper pearl piano pottery puppet rope saddle sail",
        "binder broker builder buyer carver carrier checker cleaner collector curator cutter dealer designer drawer "
        "driver engineer expert finder fitter gilder guard hauler inspector keeper maker mender merchant mounter "
        "packer painter planner polisher porter presser renter repairer restorer seller sorter teacher tester",
    ),
}


class PersonaWorld:
    """What an author can write, and how often.

    Args:
        n_values: values of each attribute.
        zipf: the value of rank r is drawn in proportion to 1 / r^zipf.
        swapped: share of personas whose keys come in a random order.
        corrupted: share of personas that are spoilt by one of four slips, drawn without regard to their content.
        seed: of the values and their ranks.

    Attributes:
        values: of each attribute, from the most to the least frequent.
    """

    def __init__(
        self,
        n_values: int = 100,
        *,
        zipf: float = 1.1,
        swapped: float = 0.25,
        corrupted: float = 0.3,
        seed: int = 0,
    ):
        self.zipf, self.swapped, self.corrupted = zipf, swapped, corrupted
        rng = np.random.default_rng([seed, 0])
        self.values = {attribute: _values(attribute, n_values, rng) for attribute in ATTRIBUTES}

    def vocabulary(self) -> list[str]:
        """Every word of the prompt and of the personas, broken ones included."""
        words = [*PROMPT.split(), "{", "}", ",", *CHATTER, *(f'"{attribute}":' for attribute in ATTRIBUTES)]
        return words + [json.dumps(value) for values in self.values.values() for value in values]

    def personas(self, n: int, seed: int) -> list[str]:
        """`n` personas as the author writes them; the same arguments always give the same."""
        rng = np.random.default_rng([seed, 1])
        ranks = np.arange(1, len(self.values[ATTRIBUTES[0]]) + 1)
        p = ranks**-self.zipf / np.sum(ranks**-self.zipf)
        values_NA = rng.choice(len(ranks), size=(n, len(ATTRIBUTES)), p=p)
        swapped_N, corrupted_N = rng.random(n) < self.swapped, rng.random(n) < self.corrupted
        return [
            self._persona(values, swap, corrupt, rng)
            for values, swap, corrupt in zip(values_NA.tolist(), swapped_N, corrupted_N, strict=True)
        ]

    def _persona(self, values: Sequence[int], swap: bool, corrupt: bool, rng: np.random.Generator) -> str:
        order = rng.permutation(len(ATTRIBUTES)) if swap else range(len(ATTRIBUTES))
        words = ["{"]
        for a in order:
            words += [f'"{ATTRIBUTES[a]}":', json.dumps(self.values[ATTRIBUTES[a]][values[a]]), ","]
        words[-1] = "}"
        if corrupt:
            place = int(rng.integers(len(words)))
            match int(rng.integers(4)):
                case 0:
                    del words[-1]
                case 1:
                    del words[place]
                case 2:
                    words.insert(place, words[place])
                case 3:
                    words = [CHATTER[0], *words] if rng.random() < 0.5 else [*words, CHATTER[1]]
        return " ".join(words)


def _values(attribute: str, n: int, rng: np.random.Generator) -> list[str]:
    beginnings, endings = (part.split() for part in PARTS[attribute])
    possible = sorted({"".join(pair) for pair in product(beginnings, endings)})
    if not 1 <= n <= len(possible):
        raise UserError(f"persona: n_values must be between 1 and {len(possible)} ({attribute}), got {n}")
    return [possible[i] for i in rng.permutation(len(possible))[:n]]
