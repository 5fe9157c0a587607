"""The grammar of the demo: small English sentences whose meaning is known slot by slot.

A meaning picks one concept for each of five slots (who, what happened, to what, where, when); a sentence says
it with one of several synonyms a slot in one of four word orders. The score of a pair is the number of slots
that agree, 0 to 5. Synonyms and word order make the words on the surface a poor guide: an encoder has to
learn which words mean the same.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# One line a concept; its synonyms are interchangeable in every sentence.
SUBJECTS = """
doctor | physician | medic
teacher | instructor | schoolmaster
child | kid | youngster
thief | burglar | robber
lawyer | attorney | solicitor
sailor | seaman | mariner
farmer | grower | peasant
soldier | warrior | trooper
writer | author | novelist
boss | manager | supervisor
singer | vocalist | crooner
stranger | outsider | newcomer
scientist | researcher | scholar
king | monarch | ruler
cook | chef | caterer
tourist | traveller | sightseer
"""
ACTIONS = """
bought | purchased | acquired
repaired | fixed | mended
hid | concealed | buried
found | discovered | located
broke | smashed | shattered
cleaned | washed | scrubbed
stole | snatched | swiped
painted | coloured | decorated
carried | hauled | lugged
borrowed | rented | leased
examined | inspected | studied
dropped | lost | misplaced
"""
OBJECTS = """
car | automobile | vehicle
picture | painting | portrait
boat | ship | vessel
stone | rock | boulder
box | crate | chest
lamp | lantern | torch
clock | watch | timepiece
bag | sack | suitcase
cup | mug | goblet
coat | jacket | parka
knife | blade | dagger
bed | mattress | bunk
book | volume | paperback
phone | handset | mobile
chair | stool | seat
ring | jewel | diamond
"""
PLACES = """
in the forest | in the woods | among the trees
at the shop | at the store | in the market
on the street | on the road | along the avenue
by the sea | at the coast | near the ocean
in the cellar | in the basement | below the stairs
at the inn | at the hotel | in the hostel
in the garden | in the yard | behind the hedge
at the office | at work | beside the desk
at the harbour | at the port | near the docks
on the hill | on the slope | up the mountain
"""
TIMES = """
at dawn | at sunrise | at daybreak
at noon | at midday | around lunchtime
in the evening | at dusk | at sunset
at night | after dark | past midnight
last week | seven days ago | a week ago
in winter | during the cold season | while it snowed
in summer | during the hot season | in the heat of July
on the weekend | on Saturday | on Sunday
"""
# Slots appear as {0} who, {1} did, {2} what, {3} where, {4} when.
WORD_ORDERS = (
    "the {0} {1} the {2} {3} {4}",
    "{4} the {2} was {1} by the {0} {3}",
    "{3}, {4}, the {0} {1} a {2}",
    "it was the {0} who {1} that {2} {4} {3}",
)
# As in the word orders; "was stole" would teach a wrong form, so the passive needs the participle.
PARTICIPLES = {"hid": "hidden", "broke": "broken", "stole": "stolen"}
PASSIVE = WORD_ORDERS[1]

SLOTS = tuple(
    tuple(tuple(word.strip() for word in line.split("|")) for line in table.strip().splitlines())
    for table in (SUBJECTS, ACTIONS, OBJECTS, PLACES, TIMES)
)
MAX_SCORE = len(SLOTS)
SAME_WORD_PROBABILITY = 0.2  # share of agreeing slots that also agree on the surface
DEV_SHARE = 5  # one meaning in so many belongs to dev, the others to train

Meaning = tuple[int, ...]  # number of the concept of each slot


@dataclass(frozen=True)
class Pair:
    sentence1: str
    sentence2: str
    score: float  # slots that agree, 0..MAX_SCORE


def write_pairs(folder: Path, num_train: int, num_dev: int, seed: int = 0) -> tuple[Path, Path]:
    """Writes ``train.jsonl.gz`` and ``dev.jsonl.gz`` with sentence1, sentence2 and score (0..5).

    No meaning of dev occurs in train. The same arguments give the same bytes on every machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    train_path, dev_path = folder / "train.jsonl.gz", folder / "dev.jsonl.gz"
    _write_jsonl(train_path, draw_pairs(num_train, dev=False, rng=rng))
    _write_jsonl(dev_path, draw_pairs(num_dev, dev=True, rng=rng))
    return train_path, dev_path


def _write_jsonl(path: Path, pairs: Iterable[Pair]) -> None:
    lines = "".join(json.dumps(vars(pair)) + "\n" for pair in pairs)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))  # no time stamp: equal bytes for equal rows


def read_pairs(path: Path) -> list[Pair]:
    """Reads what `write_pairs` wrote."""
    return [Pair(**json.loads(line)) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def is_dev(meaning: Meaning) -> bool:
    """Whether a meaning is held out. The sum touches every slot, so that no concept is rare in train."""
    return sum(meaning) % DEV_SHARE == 0


def draw_pairs(num_pairs: int, dev: bool, rng: random.Random) -> Iterator[Pair]:
    """Draws pairs, all scores about equally often; both meanings of a pair lie on one side of the split."""
    while num_pairs > 0:
        first = tuple(rng.randrange(len(slot)) for slot in SLOTS)
        num_changes = rng.randint(0, len(SLOTS))
        changed = set(rng.sample(range(len(SLOTS)), num_changes))
        second = tuple(_other(c, len(SLOTS[i]), rng) if i in changed else c for i, c in enumerate(first))
        if is_dev(first) != dev or is_dev(second) != dev:
            continue
        words1 = [rng.randrange(len(SLOTS[i][c])) for i, c in enumerate(first)]
        words2 = [_word(i, c, words1[i], i in changed, rng) for i, c in enumerate(second)]
        yield Pair(_say(first, words1, rng), _say(second, words2, rng), float(len(SLOTS) - num_changes))
        num_pairs -= 1


def _other(chosen: int, num_choices: int, rng: random.Random) -> int:
    return (chosen + rng.randrange(1, num_choices)) % num_choices


def _word(slot: int, concept: int, word1: int, is_changed: bool, rng: random.Random) -> int:
    """Which synonym the second sentence takes: mostly another one than the first where the slot agrees."""
    num_words = len(SLOTS[slot][concept])
    if is_changed:
        return rng.randrange(num_words)
    return word1 if rng.random() < SAME_WORD_PROBABILITY else _other(word1, num_words, rng)


def _say(meaning: Meaning, words: list[int], rng: random.Random) -> str:
    parts = [SLOTS[i][concept][word] for i, (concept, word) in enumerate(zip(meaning, words, strict=True))]
    word_order = rng.choice(WORD_ORDERS)
    if word_order == PASSIVE:
        parts[1] = PARTICIPLES.get(parts[1], parts[1])
    text = word_order.format(*parts)
    return text[0].upper() + text[1:] + "."
