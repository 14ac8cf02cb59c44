"""Split the tone phrases into train, validation and test, and check the result.

    python split.py          # read phrases.jsonl, write the three split files
    python split.py check    # verify the files as they stand; exit 1 with a message if not

`phrases.jsonl` holds every phrase, one ``{"phrase", "tone", "split"}`` object a line.
Only the standard library is used, and the result depends on nothing but the phrases
and ``SEED``.

Two phrases *share a frame* when any of these holds (see ``frames``):

* their first three words are the same;
* their skeletons are the same: function words kept, each run of other words replaced
  by ``_``; only skeletons with at least three function words count;
* they have a run of five words in common.

Phrases that share a frame, directly or through others, form a group, and a group goes
whole to one split, so that no sentence pattern is seen in training and tested later.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ALL = HERE / "phrases.jsonl"
FILES = {
    "train": HERE / "dataset-classification.json",
    "validation": HERE / "validation.json",
    "test": HERE / "test.json",
}
TONES = ("sadness", "joy", "fear", "surprise")
SHARES = {"validation": 0.10, "test": 0.20}  # the rest is train
SEED = 20250
MAX_GROUP = 15
MIN_WORDS, MAX_WORDS = 4, 40
MIN_FUNCTION_WORDS = 3
OPENING_WORDS = 3
SHARED_RUN = 5

FUNCTION_WORDS_TEXT = """
    a an the this that these those
    i me my mine myself you your yours yourself he him his himself she her hers herself
    it its itself we us our ours they them their theirs
    who whom whose which what where when why how
    someone somebody something anyone anybody anything everyone everybody everything
    no nobody nothing none not never
    and or but nor so yet if because as than though although unless until while since whether
    of in on at by to for from with without about into onto over under up down out off
    through between behind before after above below near across along against during
    around beside beneath past like per
    am is are was were be been being
    do does did done doing have has had having
    will would shall should can could may might must ought
    there here then now just only even still ever too very also again
    all any both each every few more most much many some such other another
    i'm i've i'd i'll you're you've you'd you'll he's he'd he'll she's she'd she'll
    it's it'd it'll we're we've we'd we'll they're they've they'd they'll
    that's there's here's who's what's where's how's let's
    isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't
    won't wouldn't can't couldn't shouldn't mustn't
"""
FUNCTION_WORDS = frozenset(FUNCTION_WORDS_TEXT.split())

Row = dict[str, str]


def words(phrase: str) -> list[str]:
    """The phrase's words: lower case, straight apostrophes, no other punctuation."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", phrase.lower().replace("\u2019", "'"))


def skeleton(tokens: Sequence[str]) -> str | None:
    """Function words kept, other runs as ``_``; None where too few function words remain."""
    parts: list[str] = []
    kept = 0
    for token in tokens:
        if token in FUNCTION_WORDS:
            parts.append(token)
            kept += 1
        elif not parts or parts[-1] != "_":
            parts.append("_")
    return " ".join(parts) if kept >= MIN_FUNCTION_WORDS else None


def frames(phrase: str) -> Iterator[tuple[str, str]]:
    """Every frame of a phrase, as (kind, text)."""
    tokens = words(phrase)
    yield "opening", " ".join(tokens[:OPENING_WORDS])
    shape = skeleton(tokens)
    if shape is not None:
        yield "skeleton", shape
    for start in range(len(tokens) - SHARED_RUN + 1):
        yield "run", " ".join(tokens[start : start + SHARED_RUN])


def groups(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows that share frames, joined transitively, in order of first row."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        for frame in frames(row["phrase"]):
            parent[root(index)] = root(first_with.setdefault(frame, index))
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(rows)):
        members[root(index)].append(index)
    return sorted(members.values(), key=lambda group: group[0])


def assign(rows: Sequence[Row]) -> list[str]:
    """The split of each row: groups whole, tones in exact balance.

    Groups are taken largest first, then in the order of a seeded hash of their phrases;
    each goes to the split that is furthest below its share of the group's tones, never
    past it.
    """
    totals = Counter(row["tone"] for row in rows)
    room: dict[str, Counter[str]] = {
        name: Counter({tone: round(totals[tone] * share) for tone in TONES}) for name, share in SHARES.items()
    }
    room["train"] = Counter({tone: totals[tone] - sum(room[name][tone] for name in SHARES) for tone in TONES})
    size = {name: sum(left.values()) for name, left in room.items()}

    def order(group: list[int]) -> tuple[int, str]:
        text = "\n".join(sorted(rows[index]["phrase"] for index in group))
        return -len(group), hashlib.sha256(f"{SEED}\n{text}".encode()).hexdigest()

    split = [""] * len(rows)
    for group in sorted(groups(rows), key=order):
        need = Counter(rows[index]["tone"] for index in group)
        fitting = [name for name in room if all(room[name][t] >= n for t, n in need.items())]
        if not fitting:
            raise SystemExit(f"a group of {len(group)} fits no split: reword {rows[group[0]]}")
        name = max(fitting, key=lambda n: (sum(room[n][t] for t in need) / size[n], n))
        room[name] -= need
        for index in group:
            split[index] = name
    return split


def read(path: Path) -> list[Row]:
    """A JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[Row]) -> None:
    """A JSON Lines file, one row a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def problems(rows: Sequence[Row], parts: dict[str, list[Row]]) -> Iterator[str]:
    """Everything wrong with the phrases and their splits."""
    yield from phrase_problems(rows)
    yield from balance_problems(ALL.name, rows)
    for name, part in parts.items():
        yield from balance_problems(FILES[name].name, part)
        listed = [{"phrase": r["phrase"], "tone": r["tone"]} for r in rows if r["split"] == name]
        if sorted(listed, key=str) != sorted(part, key=str):
            yield f"{FILES[name].name} does not hold the {name} rows of {ALL.name}"
    for group in groups(rows):
        if len(group) > MAX_GROUP:
            yield f"{len(group)} phrases in one frame group, from: {rows[group[0]]['phrase']}"
    yield from shared_frames(parts)


def phrase_problems(rows: Sequence[Row]) -> Iterator[str]:
    """Phrases of unknown tone, of odd length, or the same after normalisation."""
    seen: dict[str, str] = {}
    for row in rows:
        phrase = row["phrase"]
        tokens = words(phrase)
        if row["tone"] not in TONES:
            yield f"unknown tone {row['tone']!r}: {phrase}"
        if not MIN_WORDS <= len(tokens) <= MAX_WORDS:
            yield f"{len(tokens)} words: {phrase}"
        key = " ".join(tokens)
        if key in seen:
            yield f"twice: {phrase!r} and {seen[key]!r}"
        seen[key] = phrase


def balance_problems(name: str, rows: Sequence[Row]) -> Iterator[str]:
    """A file in which the tones are not equally many."""
    counts = Counter(row["tone"] for row in rows)
    if len({counts[tone] for tone in TONES}) != 1:
        yield f"tones not balanced in {name}: {dict(counts)}"


def shared_frames(parts: dict[str, list[Row]]) -> Iterator[str]:
    """Frames found in two splits."""
    owner: dict[tuple[str, str], tuple[str, str]] = {}
    for name, part in parts.items():
        for row in part:
            for frame in frames(row["phrase"]):
                other, phrase = owner.setdefault(frame, (name, row["phrase"]))
                if other != name:
                    kind, text = frame
                    yield f"{kind} {text!r} in {other} and {name}: {phrase!r}, {row['phrase']!r}"


def check() -> None:
    """Exit 1 with a message for each broken rule; otherwise print the counts."""
    rows = read(ALL)
    parts = {name: read(path) for name, path in FILES.items()}
    found = list(problems(rows, parts))
    if found:
        raise SystemExit("\n".join(found))
    for name, part in parts.items():
        by_tone = Counter(row["tone"] for row in part)
        print(f"{name}: {len(part)} ({', '.join(f'{t} {by_tone[t]}' for t in TONES)})")
    sizes = [len(group) for group in groups(rows)]
    print(f"{len(rows)} phrases in {len(sizes)} frame groups, the largest of {max(sizes)}")


def main(arguments: Sequence[str]) -> None:
    """Write the splits, or check them."""
    if list(arguments) not in ([], ["check"]):
        raise SystemExit("usage: split.py [check]")
    if not arguments:
        rows = read(ALL)
        for row, name in zip(rows, assign(rows), strict=True):
            row["split"] = name
        write(ALL, rows)
        for name, path in FILES.items():
            # The order of the files mixes the tones, whatever order the phrases are in.
            part = [{"phrase": r["phrase"], "tone": r["tone"]} for r in rows if r["split"] == name]
            part.sort(key=lambda r: hashlib.sha256(f"{SEED}{r['phrase']}".encode()).hexdigest())
            write(path, part)
    check()


if __name__ == "__main__":
    main(sys.argv[1:])
