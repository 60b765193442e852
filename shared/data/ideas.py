"""One-line story ideas with a hidden quality: a world without a verifier, where many ideas are possible and some good.

    prompt      harbour winter                    topic and setting
    completion  quiet once keeper tends lamp      two opening words and an idea in three words

Each of the twelve `IDEAS` is written with one of three synonyms per word. Opening words, synonyms and remarks at the
end do not change what is meant (`meaning`); a completion whose words belong to different ideas means nothing and has
quality 0. `IdeasWorld` draws, from its seed, how good each idea is for each topic and setting, and how often the base
policy has it.
"""

from __future__ import annotations

import hashlib
import random
from itertools import product

from shared.data.operators import REMARKS
from shared.data.splits import split_of, split_stream
from shared.experiments.errors import UserError

_TOPICS = "harbour forest railway castle market island school desert theatre village museum garden"
TOPICS = tuple(_TOPICS.split())
_SETTINGS = (
    "winter summer spring autumn midnight morning evening noon storm fog rain snow frost drought flood eclipse "
    "wartime peacetime carnival wedding funeral holiday harvest strike election plague famine gala regatta siege "
    "exile reunion curfew blackout parade auction census heatwave monsoon thaw"
)
SETTINGS = tuple(_SETTINGS.split())
OPENINGS = ("quiet", "once", "slowly", "tonight", "somewhere", "alone", "again", "suddenly")
# Three synonyms for each of three words per idea. No word stands twice.
IDEAS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "guard": (("keeper", "warden", "sentinel"), ("tends", "minds", "polishes"), ("lamp", "lantern", "beacon")),
    "theft": (("thief", "burglar", "pickpocket"), ("steals", "swipes", "pockets"), ("crown", "diadem", "tiara")),
    "letter": (("clerk", "postman", "courier"), ("finds", "discovers", "unearths"), ("letter", "note", "message")),
    "ghost": (("ghost", "phantom", "spectre"), ("haunts", "troubles", "visits"), ("attic", "loft", "cellar")),
    "chess": (("twins", "siblings", "brothers"), ("play", "contest", "fight"), ("chess", "cards", "dominoes")),
    "invention": (
        ("inventor", "tinkerer", "engineer"),
        ("builds", "assembles", "crafts"),
        ("robot", "automaton", "golem"),
    ),
    "music": (("violinist", "fiddler", "cellist"), ("hears", "recalls", "hums"), ("melody", "tune", "song")),
    "map": (("orphan", "foundling", "waif"), ("follows", "traces", "studies"), ("map", "chart", "atlas")),
    "bread": (("baker", "cook", "miller"), ("kneads", "bakes", "shapes"), ("bread", "loaf", "dough")),
    "time": (("watchmaker", "clockmaker", "jeweller"), ("stops", "halts", "freezes"), ("clock", "watch", "hourglass")),
    "wolf": (("wolf", "fox", "bear"), ("guides", "leads", "shepherds"), ("child", "girl", "boy")),
    "star": (("stargazer", "astronomer", "astrologer"), ("names", "counts", "sketches"), ("comet", "star", "planet")),
}
IDEA_OF = {word: (idea, slot) for idea, slots in IDEAS.items() for slot, words in enumerate(slots) for word in words}
VOCABULARY = (*TOPICS, *SETTINGS, *OPENINGS, *IDEA_OF, *REMARKS)

SYNONYM_PRIOR = (0.6, 0.3, 0.1)
LONGEST_REMARK = 3


def idea_rows(n: int | None, split: str, seed: int = 0) -> list[dict]:
    """`n` different prompts (all of the split if None) as rows of prompt, topic and setting, in an order of `seed`.

    The prompt decides its split. Raises UserError if there are fewer than `n` (of 480 in all).
    """
    rng = split_stream("ideas", split, seed)
    pairs = list(product(TOPICS, SETTINGS))
    rows = [{"prompt": f"{topic} {setting}", "topic": topic, "setting": setting} for topic, setting in pairs]
    rows = [row for row in rows if split_of(row["prompt"]) == split]
    if n is not None and n > len(rows):
        raise UserError(f"ideas: the {split} split has {len(rows)} prompts, {n} were asked for")
    rng.shuffle(rows)
    return rows[:n]


class IdeasWorld:
    """How good each idea is for each topic and setting, and how often the base policy comes up with it.

    Quality is uniform on [0, 1] for each topic and idea, on every other topic ("tight") on .5 +- .05, plus a shift of
    at most .1 for setting and idea, clipped to [0, 1]. The prior over the ideas of a topic is Zipf's with exponent
    `zipf`.

    Args:
        rare: 1 orders the prior of each topic by falling quality, so that the best ideas are the rarest; 0 at random;
            between, by a mixture of the two.
    """

    def __init__(self, seed: int = 0, *, rare: float = 0.5, zipf: float = 1.2):
        if not 0 <= rare <= 1:
            raise UserError(f"ideas: rare must be in [0, 1], got {rare}")
        rng = random.Random(f"ideas/world/{seed}")
        self.tight = frozenset(TOPICS[1::2])
        self._quality = {
            (topic, idea): rng.uniform(0.45, 0.55) if topic in self.tight else rng.random()
            for topic, idea in product(TOPICS, IDEAS)
        }
        self._shift = {pair: rng.uniform(-0.1, 0.1) for pair in product(SETTINGS, IDEAS)}
        weights = [1 / (rank + 1) ** zipf for rank in range(len(IDEAS))]
        self.prior: dict[str, dict[str, float]] = {}
        for topic in TOPICS:
            by_quality = sorted(IDEAS, key=lambda idea: self._quality[topic, idea])
            rank = {idea: place / (len(IDEAS) - 1) for place, idea in enumerate(by_quality)}
            order = sorted(IDEAS, key=lambda idea: rare * rank[idea] + (1 - rare) * rng.random())
            self.prior[topic] = {idea: w / sum(weights) for idea, w in zip(order, weights, strict=True)}

    def idea_quality(self, topic: str, setting: str, idea: str) -> float:
        """Quality in [0, 1] of an idea."""
        return min(1.0, max(0.0, self._quality[topic, idea] + self._shift[setting, idea]))

    def quality(self, prompt: str, completion: str) -> float:
        """Quality in [0, 1] of a completion: that of its idea, 0 if it has none."""
        topic, setting = prompt.split()
        idea = idea_of(completion)
        return 0.0 if idea is None else self.idea_quality(topic, setting, idea)

    def traces(self, n: int, seed: int = 0, *, incoherent: float = 0.15, remarks: float = 0.1) -> list[tuple[str, str]]:
        """`n` (prompt, completion) examples over training prompts for the base policy.

        Args:
            incoherent: share of completions with one of the three words replaced by a word of another idea.
            remarks: share of completions with a remark of 1 to 3 words.
        """
        rng = split_stream("ideas/traces", "train", seed)
        rows = idea_rows(None, "train", seed)
        examples = []
        for _ in range(n):
            row = rng.choice(rows)
            prior = self.prior[row["topic"]]
            idea = rng.choices(list(prior), weights=list(prior.values()))[0]
            words = [rng.choices(synonyms, weights=SYNONYM_PRIOR)[0] for synonyms in IDEAS[idea]]
            if rng.random() < incoherent:
                slot = rng.randrange(3)
                other = rng.choice([name for name in IDEAS if name != idea])
                words[slot] = rng.choices(IDEAS[other][slot], weights=SYNONYM_PRIOR)[0]
            remark = rng.choices(REMARKS, k=rng.randint(1, LONGEST_REMARK)) if rng.random() < remarks else []
            examples.append((row["prompt"], " ".join([*rng.choices(OPENINGS, k=2), *words, *remark])))
        return examples

    def score(self, prompt: str, completion: str) -> float:
        """The score of an imagined reward model: 6 (quality + noise) - 5, noise uniform on +-.3 and fixed by the text.

        Like those of real ones it is noisy, always the same for the same text, and mostly negative (the deciles that
        DARLING's authors give for Athene-RM on NoveltyBench go from -4.7 to .4).
        """
        digest = hashlib.blake2b(f"{prompt}/{completion}".encode(), digest_size=8).digest()
        noise = 0.6 * (int.from_bytes(digest, "big") / 2**64 - 0.5)
        return 6 * (self.quality(prompt, completion) + noise) - 5


def idea_of(completion: str) -> str | None:
    """The idea that a completion expresses: its first five words are two openings and three words of one idea in
    order, what follows is a remark; None otherwise."""
    words = completion.split()
    if len(words) < 5 or not set(words[:2]) <= set(OPENINGS) or not set(words[5:]) <= set(REMARKS):
        return None
    found = [IDEA_OF.get(word) for word in words[2:5]]
    ideas = {place[0] for place in found if place}
    return ideas.pop() if len(ideas) == 1 and [place and place[1] for place in found] == [0, 1, 2] else None


def meaning(completion: str) -> tuple:
    """What the completion means: ideas and slots of its words, whichever the synonyms, without openings and remarks."""
    silent = {*OPENINGS, *REMARKS}
    return tuple(IDEA_OF.get(word, word) for word in completion.split() if word not in silent)


def remark_words(completion: str) -> int:
    """Number of meaningless words beyond the two openings."""
    return max(0, sum(word in REMARKS or word in OPENINGS for word in completion.split()) - 2)
