"""ProntoQA-style problems: is the statement true? Decided by a chain of rules about invented concepts.

The paper takes its data from the generator of Saparov and He (github.com/asaparov/prontoqa): 5 hops, fictional
concepts, no worked examples, sentences in random order. These are the same kind of problems, not its grammar, with
one difference: two people stand at the heads of two chains of equal length that end in opposite statements. Asking
about the other person turns the answer round, so nothing but following the chain beats 1/2.
"""

from __future__ import annotations

import random

from papers.coconut.data import CONCEPTS, PEOPLE, PROPERTIES
from shared.data.splits import split_of, split_stream
from shared.experiments.errors import UserError


def prontoqa_rows(n: int, split: str, seed: int = 0, *, hops: int = 5) -> list[dict]:
    """`n` rows with answer `True` or `False`. Splits are disjoint: the set of sentences decides.

    With h hops there are h + 1 steps: what is known of the person and the rule that applies to it, then the conclusion
    (inferred: so the authors' longest chains have the 6 steps that their 6 stages need).

        Ada is a blolm. Every blolm is a snix. | Ada is a snix. Every snix is not cold. | Ada is not cold.

    Raises:
        UserError: unknown split, or more hops than there are concepts for.
    """
    most = len(CONCEPTS) // 4  # two chains, and a side branch for each of their concepts
    if not 1 <= hops <= most:
        raise UserError(f"ProntoQA: hops must be 1..{most}, got {hops}")
    rng = split_stream("prontoqa", split, seed)
    rows: list[dict] = []
    while len(rows) < n:
        key, row = _problem(hops, rng)
        if split_of(key) == split:
            rows.append(row)
    return rows


def _problem(hops: int, rng: random.Random) -> tuple[str, dict]:
    concepts = rng.sample(CONCEPTS, 4 * hops)
    chains = [concepts[:hops], concepts[hops : 2 * hops]]
    people = rng.sample(PEOPLE, 2)
    asked_property, *other_properties = rng.sample(PROPERTIES, len(PROPERTIES))
    negated = rng.sample(["", "not "], 2)
    ends = [f"{negated[i]}{asked_property}" for i in range(2)]
    # One of "cold" and "not cold" in the whole problem, so that nobody is both.
    qualities = [f"{rng.choice(['', 'not '])}{quality}" for quality in other_properties]

    facts = []
    for person, chain, end in zip(people, chains, ends, strict=True):
        facts += [f"{person} is a {chain[0]}.", *_rules(chain, end)]
    for concept, other in zip(concepts[: 2 * hops], concepts[2 * hops :], strict=True):
        if rng.random() < 0.5:  # side branches: another concept, or a property that is not asked about
            facts.append(f"Every {concept} is {rng.choice([f'a {other}', rng.choice(qualities)])}.")
    rng.shuffle(facts)

    # The two people are drawn alike: asking about the first is asking about a random one.
    person, chain, end = people[0], chains[0], ends[0]
    known = [f"{person} is a {concept}." for concept in chain]
    conclusion = f"{person} is {end}."
    steps = [f"{fact} {rule}" for fact, rule in zip(known, _rules(chain, end), strict=True)]
    claim = rng.choice(ends)
    row = {
        "question": f"{' '.join(facts)} True or false: {person} is {claim}.",
        "steps": [*steps, conclusion],
        "answer": "True" if claim == end else "False",
    }
    return " ".join(sorted(facts)), row


def _rules(chain: list[str], end: str) -> list[str]:
    consequences = [*(f"a {concept}" for concept in chain[1:]), end]
    return [f"Every {concept} is {what}." for concept, what in zip(chain, consequences, strict=True)]
