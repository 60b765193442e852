"""Keyword stories: five keywords for the title of a story, and a rule that says how good they are.

    title     quiet golden harbour
    keywords  gullsong ropekeeper cranelight gullbridge barrelthief

A title is two words of style and a topic; each topic has its own words, compounds that begin alike. The author of the
keywords prefers some words of the topic, strays to others now and then, and does not always write five.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations, product

import numpy as np

from shared.data.splits import SPLITS, split_of
from shared.experiments.errors import UserError, unknown
from shared.rewards.contract import Completions, checked, column, texts

N_KEYWORDS = 5
INSTRUCTION = (
    'Think of a story with the title "{title}". Write exactly five keywords for it, single words separated by spaces, '
    "and nothing else."
)
"""The request to a language model that understands it; in our words, the paper's are not published."""

# Separated by spaces, like the beginnings of words in TOPICS.
STYLES = (
    "quiet golden broken hidden last northern silver burning forgotten crooked gentle hollow distant scarlet frozen "
    "wandering midnight patient stolen weeping"
)

TOPICS = {
    "sea": "tide wave salt reef",
    "forest": "oak moss fern pine",
    "mountain": "peak cliff snow eagle",
    "desert": "sand dune sun cactus",
    "city": "street neon tower tram",
    "kitchen": "bread honey pepper butter",
    "garden": "rose petal lily clover",
    "war": "sword shield blood spear",
    "winter": "frost ice sleigh fur",
    "space": "star comet moon orbit",
    "school": "chalk slate ink lesson",
    "harbour": "gull rope crane barrel",
    "circus": "clown acrobat drum tent",
    "voyage": "sail mast anchor oar",
    "railway": "rail steam whistle wagon",
    "castle": "throne crown moat knight",
    "library": "book page scroll word",
    "concert": "harp fiddle song bell",
    "river": "mill trout reed otter",
    "farm": "wheat barn hen plough",
    "storm": "thunder rain gale cloud",
    "market": "coin spice silk basket",
    "mine": "gold coal lamp shaft",
    "temple": "incense prayer altar candle",
    "night": "dream owl lullaby pillow",
    "island": "palm coral shell lagoon",
    "village": "thatch hearth lane goose",
    "hospital": "pulse fever balm pill",
    "theatre": "mask stage curtain velvet",
    "workshop": "hammer nail glue timber",
    "observatory": "lens dial sky quartz",
    "prison": "chain lock cell rust",
    "wedding": "ring veil toast ribbon",
    "orchard": "apple plum cherry pear",
    "jungle": "vine tiger parrot orchid",
    "swamp": "mud toad mist willow",
    "court": "law oath gavel robe",
    "bakery": "flour crust sugar cream",
    "carnival": "lantern paper rocket parade",
    "chess": "pawn queen bishop rook",
    "ghost": "grave bone chill whisper",
    "dragon": "scale fire claw wing",
    "robot": "wire bolt chip laser",
    "bank": "vault note debt ledger",
    "portrait": "brush canvas pigment easel",
    "loom": "wool thread dye needle",
    "apiary": "hive wax nectar sting",
    "volcano": "lava ash smoke cinder",
}

ENDINGS = (
    "light song gate path keeper heart stone wind bird maker house dance mark bearer field thief child bridge tree "
    "flower wheel fall rise watch craft side land walker singer seeker root branch feather jewel blade cup box key map "
    "letter boat road wall window door roof stair yard hill pool kiss tale vow gift smith mother brother hunter dust"
)


class StoryWorld:
    """Titles, an author of keywords, and the true quality of keywords.

    Args:
        n_topics, n_words: topics, and words of each.
        n_styles: words of style; a title has two different ones.
        zipf: the topic's word of rank r is drawn in proportion to 1 / r^zipf.
        on_topic: probability that a keyword is drawn from the topic's words; otherwise from all words, uniformly.
        five: probability that there are exactly five keywords; otherwise 3, 4, 6 or 7.
        seed: of the words, their ranks and the readers' taste.

    Attributes:
        words: of each topic, from the author's most to least frequent.
        taste: what readers think of a word wherever it stands: normal, standard deviation .15.
    """

    def __init__(
        self,
        n_topics: int = 12,
        n_words: int = 30,
        n_styles: int = 10,
        *,
        zipf: float = 1.1,
        on_topic: float = 0.85,
        five: float = 0.8,
        seed: int = 0,
    ):
        most = len(ENDINGS.split()) * 4
        for name, value, limit in (
            ("n_topics", n_topics, len(TOPICS)),
            ("n_words", n_words, most),
            ("n_styles", n_styles, len(STYLES.split())),
        ):
            if not 2 <= value <= limit:
                raise UserError(f"story: {name} must be between 2 and {limit}, got {value}")
        self.zipf, self.on_topic, self.five = zipf, on_topic, five
        self.styles = STYLES.split()[:n_styles]
        rng = np.random.default_rng([seed, 0])
        self.words = {}
        for topic in list(TOPICS)[:n_topics]:
            possible = ["".join(pair) for pair in product(TOPICS[topic].split(), ENDINGS.split())]
            self.words[topic] = [possible[i] for i in rng.permutation(len(possible))[:n_words]]
        every = self.all_words
        self.taste = dict(zip(every, rng.normal(0, 0.15, len(every)).tolist(), strict=True))
        self._rank = {topic: {word: r for r, word in enumerate(words)} for topic, words in self.words.items()}

    @property
    def all_words(self) -> list[str]:
        return [word for words in self.words.values() for word in words]

    def vocabulary(self) -> list[str]:
        return [":", *self.styles, *self.words, *self.all_words]

    def rows(self, split: str) -> list[dict]:
        """All titles of a split: `item`, `title`, `topic` and `prompt`. The title alone decides its split."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        titles = [" ".join((*styles, topic)) for styles, topic in product(permutations(self.styles, 2), self.words)]
        return [
            {"item": title, "title": title, "topic": title.split()[-1], "prompt": f"{title} :"}
            for title in titles
            if split_of(title) == split
        ]

    def stories(self, rows: Sequence[dict], seed: int) -> list[str]:
        """Keywords for each row as the author writes them; the same arguments always give the same."""
        rng = np.random.default_rng([seed, 1])
        words_TW = np.array(list(self.words.values()))
        topics = {topic: t for t, topic in enumerate(self.words)}
        ranks = np.arange(1, words_TW.shape[1] + 1)
        p = ranks**-self.zipf / np.sum(ranks**-self.zipf)
        most = 7
        shape = (len(rows), most)
        counts_R = np.where(rng.random(len(rows)) < self.five, N_KEYWORDS, rng.choice([3, 4, 6, most], len(rows)))
        topic_R1 = np.array([[topics[row["topic"]]] for row in rows], dtype=int).reshape(-1, 1)
        of_topic_RK = words_TW[topic_R1, rng.choice(len(ranks), shape, p=p)]
        anywhere_RK = rng.choice(words_TW.ravel(), shape)
        drawn_RK = np.where(rng.random(shape) < self.on_topic, of_topic_RK, anywhere_RK)
        return [" ".join(words[:count]) for words, count in zip(drawn_RK.tolist(), counts_R.tolist(), strict=True)]

    def quality(self, topic: str, text: str) -> float:
        """0 unless `text` has exactly five words; else the mean over its words of 1 - .3 r / n_words for the topic's
        word of rank r (from 0) and .2 for any other, plus the readers' taste, minus .15 for each repeated word."""
        found = text.split()
        if len(found) != N_KEYWORDS:
            return 0.0
        rank, n = self._rank[topic], len(self._rank[topic])
        worth = [1 - 0.3 * rank[w] / n if w in rank else 0.2 for w in found]
        repeated = sum(count - 1 for count in Counter(found).values())
        return float(np.mean(worth) + np.mean([self.taste.get(w, 0.0) for w in found]) - 0.15 * repeated)


class StoryQuality:
    """`StoryWorld.quality` as a reward with TRL's signature; needs the dataset column `topic`."""

    __name__ = "story_quality"

    def __init__(self, world: StoryWorld):
        self.world = world

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        found = texts(completions)
        topics = column("topic", columns, len(found), self.__name__)
        rewards = [self.world.quality(topic, text) for topic, text in zip(topics, found, strict=True)]
        return checked(rewards, len(found), self.__name__)
