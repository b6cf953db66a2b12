"""Are the tables of two runs the same, byte for byte? `python tests/same_tables.py OLD_RUN NEW_RUN`

Prints what is missing, what is new and what differs with its first differing line; exits with 1 if anything does.
"""
import sys
from itertools import zip_longest
from pathlib import Path

# tables that go on purpose -> why
GONE = {"crosscoder_planted": "the toy world of planted concepts is shown by the chapter and is no part of a run"}

# words of the tables that changed on purpose, old -> new: the verdict by the estimates alone says so
RENAMED = {b",point,": b",verdict_point,"}


def tables(run):
    "Name -> file of every table of a run, folders under `tables/` too."
    folder = Path(run)/"tables"
    return {f.relative_to(folder).with_suffix("").as_posix(): f for f in sorted(folder.rglob("*.csv"))}


def content(file, renamed=()):
    "The bytes of a table, words that changed on purpose replaced."
    out = file.read_bytes()
    for before in renamed:
        out = out.replace(before, RENAMED[before])
    return out


def first_difference(old, new): # bytes
    "The first line in which two files differ, as three lines to print."
    pairs = zip_longest(old.split(b"\n"), new.split(b"\n"))
    number, a, b = next((i, a, b) for i, (a, b) in enumerate(pairs, 1) if a != b)
    show = lambda line: "(no such line)" if line is None else line.decode(errors="backslashreplace")[:200]
    return f"line {number}\n    old {show(a)}\n    new {show(b)}"


def compare(old_run, new_run):
    "What is not the same: one text a table, and the reasons for tables that went on purpose."
    old, new = tables(old_run), tables(new_run)
    missing = [name for name in old if name not in new]
    both = {name: (content(old[name], RENAMED), content(new[name], RENAMED)) for name in old if name in new}
    differ = [name for name, (a, b) in both.items() if a != b]

    wrong = [f"missing: {name}" for name in missing if name not in GONE]
    wrong += [f"new: {name}" for name in new if name not in old]
    wrong += [f"differs: {name}, {first_difference(*both[name])}" for name in differ]
    notes = [f"gone on purpose: {name} ({GONE[name]})" for name in missing if name in GONE]
    return wrong, notes


def main(args):
    if len(args) != 2: sys.exit(__doc__.splitlines()[0])
    for run in args:
        if not tables(run): sys.exit(f"{run} has no tables: make it with `llmdiff run --preset tiny --runs FOLDER`")
    wrong, notes = compare(*args)
    for line in wrong + notes: print(line)
    same = len(tables(args[0])) - sum(not line.startswith("new: ") for line in wrong) - len(notes)
    print(f"{same} tables are the same, {len(wrong)} are not")
    return bool(wrong)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
