"What `test_shape` measures: the modules of the package and the cells of the notebooks, read without running them."
import ast
import graphlib
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from html.parser import HTMLParser
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

PACKAGE = "llmdiff"


class Found(NamedTuple):
    "One measured thing: the chapter it is in, where exactly, and how much."
    chapter: str
    where: str
    value: float


# ---- what there is to measure

@dataclass(frozen=True)
class Cell:
    chapter: str            # its module without the package, "caching" or "engine.store"
    file: str               # "nbs/05_caching.ipynb"
    number: int             # place in the notebook, from 0
    kind: str               # code or markdown
    source: str
    tags: tuple = ()
    html: tuple = ()        # what it shows as HTML
    after_run: bool = False # does it stand after `## Run`?

    @property
    def code(self): return self.kind == "code"

    @property
    def directives(self): return set(re.findall(r"^#\|\s*([\w-]+)", self.source, re.M))

    @property
    def exported(self): return self.code and bool(self.directives & {"export", "exporti", "exports"})

    @property
    def hidden(self):
        "Is its code folded or left out on the page?"
        folded = re.search(r"^#\|\s*(?:code-fold: *true|echo: *false)", self.source, re.M)
        return bool(folded or self.directives & {"hide", "hide_input", "default_exp"})

    @cached_property
    def tree(self):
        "Syntax tree; lines for IPython (`%`, `!`) count as `pass`."
        plain = re.sub(r"^(\s*)[%!].*$", r"\1pass", self.source, flags=re.M)
        return ast.parse(plain, filename=f"{self.file} cell {self.number}")

    def at(self, line): return f"{self.file} cell {self.number} line {line}"


@dataclass(repr=False)
class House:
    modules: dict   # "engine.store" -> source of the module
    chapters: dict  # "engine.store" -> the cells of its notebook; without `index`

    @cached_property
    def trees(self): return {name: ast.parse(source) for name, source in self.modules.items()}

    @property
    def cells(self): return chain.from_iterable(self.chapters.values())

    @property
    def code(self): return [c for c in self.cells if c.code]

    @property
    def exported(self): return [c for c in self.code if c.exported]


def dotted(file):
    "`engine/store.py` -> `engine.store`, `05_caching.ipynb` -> `caching`."
    file = Path(file)
    return ".".join([*file.parent.parts, re.sub(r"^\d+_", "", file.stem)])


def read_cells(file, cells):
    "The cells of one notebook, from its JSON."
    out, after_run = [], False
    for number, c in enumerate(cells):
        source = "".join(c["source"])
        if c["cell_type"] == "markdown" and re.search(r"^## Run\s*$", source, re.M): after_run = True
        html = ["".join(o["data"]["text/html"]) for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
        tags = tuple(c.get("metadata", {}).get("tags", []))
        chapter = dotted(Path(file).relative_to("nbs"))
        out.append(Cell(chapter, str(file), number, c["cell_type"], source, tags, tuple(html), after_run))
    return out


def notebooks(root):
    "The notebooks that export modules: not the first page, and not the pages of the guide."
    files = sorted((root/"nbs").rglob("*.ipynb"))
    pages = {".ipynb_checkpoints", "guide"}
    return [f for f in files if f.stem != "index" and not pages & set(f.parts)]


def read_house(root):
    "The package and the notebooks of a checkout."
    modules, chapters = {}, {}
    for file in sorted((root/PACKAGE).rglob("*.py")):
        if file.stem in ("__init__", "_modidx"): continue
        modules[dotted(file.relative_to(root/PACKAGE))] = file.read_text()
    for file in notebooks(root):
        name, cells = file.relative_to(root), json.loads(file.read_text())["cells"]
        chapters[dotted(name.relative_to("nbs"))] = read_cells(name.as_posix(), cells)
    return House(modules, chapters)


# ---- who imports whom

def imported_from(node, module):
    "The (module, name) pairs of one import statement, without the package's own name; none for other packages."
    if isinstance(node, ast.Import):
        own = [a.name for a in node.names if a.name.startswith(f"{PACKAGE}.")]
        return [(name.removeprefix(f"{PACKAGE}."), "") for name in own]
    if node.level:
        above = module.split(".")[:-node.level]
        base = ".".join([*above, *filter(None, [node.module])])
    elif f"{node.module}.".startswith(f"{PACKAGE}."):
        base = node.module.removeprefix(PACKAGE).strip(".")
    else:
        return []
    return [(base, a.name) for a in node.names]


def called_imports(node):
    "`import_module('llmdiff.run')`, with the name written out."
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    first = str(getattr(node.args[0], "value", "")) if node.args else ""
    ours = name in ("import_module", "__import__") and first.startswith(f"{PACKAGE}.")
    return [(first.removeprefix(f"{PACKAGE}."), "")] if ours else []


def imports(tree, module, known):
    "Every import of the package's own modules: (module, name, line, inside a function?)."
    inner = {id(n) for f in functions(tree) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)): pairs = imported_from(node, module)
        elif isinstance(node, ast.Call): pairs = called_imports(node)
        else: continue
        for base, name in pairs:
            whole = f"{base}.{name}".strip(".")
            if base not in known and whole in known: base, name = whole, ""
            if base: yield base, name, node.lineno, id(node) in inner


@dataclass
class Floors:
    "Who may import whom. Module names as in `llmdiff.engine.store` without the package."
    story: list       # chapters from the ground up; each may import those before it and the engine
    engine: list      # under the story; each may import `core` and those before it
    engine_may: dict  # engine module -> chapters of the story that it may import as well
    above: dict       # folder over the story -> folders that it may import besides itself, story and engine
    above_may: dict   # module over the story -> modules of the driver that it may import as well

    def folder(self, module): return module.partition(".")[0] if "." in module else ""

    def knows(self, module): return module in self.story + self.engine or self.folder(module) in self.above

    def refuses(self, a, b, test=False):
        "Why `a` must not import `b`, or nothing; tests and demos may import `worlds`, and ask for the example run."
        if test and b == "driver.example": return ""
        over, under = self.folder(a), self.folder(b)
        if a == b: return ""
        if over in self.above:
            fine = under in ("", "engine", over, *self.above[over]) or b in self.above_may.get(a, [])
            return "" if fine else f"{over}/ does not import {under}/"
        if under in self.above:
            return "" if test and under == "worlds" else f"story and engine import nothing of {under}/"
        if over == "engine":
            earlier = self.engine[:self.engine.index(a)]
            return "" if b in ["core", *earlier, *self.engine_may.get(a, [])] else "it lies above this module"
        earlier = self.story[:self.story.index(a)]
        return "" if under == "engine" or b in earlier else "it is a later chapter"


def without_floor(house, floors):
    "Modules that no floor is named for."
    return [m for m in {**house.modules, **house.chapters} if not floors.knows(m)]


def climbs(house, floors):
    "Imports that go up: in the modules, and in those cells that are not exported."
    places = [(m, tree, f"{m}.py line ", False) for m, tree in house.trees.items()]
    for c in house.code:
        if not c.exported: places.append((c.chapter, c.tree, c.at(""), bool({"test", "demo"} & set(c.tags))))
    names = {*house.modules, *floors.story, *floors.engine}
    for module, tree, where, test in places:
        if not floors.knows(module): continue
        for target, line in sorted({(target, line) for target, _, line, _ in imports(tree, module, names)}):
            reason = floors.refuses(module, target, test) if floors.knows(target) else "it has no floor"
            if reason: yield f"{where}{line}: {module} imports {target}: {reason}"


def eager_imports(house, folder, floors):
    "Imports of chapters at the top of the modules of a folder that should wait until a command needs them."
    for module, tree in house.trees.items():
        if floors.folder(module) != folder: continue
        for target, _, line, inside in imports(tree, module, house.modules):
            light = target == "core" or floors.folder(target) in ("engine", folder)
            if not inside and not light: yield f"{module}.py line {line}: {target}"


def graph(house):
    "Module -> the modules that it imports, at the top or inside a function."
    found = {}
    for module, tree in house.trees.items():
        targets = {target for target, *_ in imports(tree, module, house.modules)}
        found[module] = targets & set(house.modules) - {module}
    return found


def circles(house):
    "One circle of imports as a sentence, if there is any."
    try: graphlib.TopologicalSorter(graph(house)).prepare()
    except graphlib.CycleError as e: return [" <- ".join(e.args[1])]
    return []


def private_imports(house):
    "Names with a leading underscore that leave their module."
    for module, tree in house.trees.items():
        for target, name, line, _ in imports(tree, module, house.modules):
            if name.startswith("_"): yield f"{module}.py line {line}: {target}.{name}"
    for c in house.code:
        for target, name, line, _ in imports(c.tree, c.chapter, house.modules):
            if name.startswith("_") and not c.exported and target != c.chapter: yield f"{c.at(line)}: {target}.{name}"


def top_level(statements):
    "The statements of a module outside functions and classes, those under if, try and with too."
    for s in statements:
        yield s
        if isinstance(s, (ast.If, ast.Try, ast.With)):
            inner = [*s.body, *getattr(s, "orelse", []), *getattr(s, "finalbody", [])]
            yield from top_level(inner + [t for h in getattr(s, "handlers", []) for t in h.body])


def patched(node):
    "Is it a method that fastcore's `@patch` puts into a class?"
    return any(getattr(d, "id", getattr(d, "attr", "")).startswith("patch") for d in node.decorator_list)


def defined(tree):
    "The names that a module defines at its top; what it imports is not among them."
    for s in top_level(tree.body):
        if isinstance(s, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            if not patched(s): yield s.name
        elif isinstance(s, (ast.Assign, ast.AnnAssign)):
            for target in getattr(s, "targets", None) or [s.target]:
                names = [n for n in ast.walk(target) if isinstance(n, ast.Name)]
                yield from (n.id for n in names if isinstance(n.ctx, ast.Store))


def defined_twice(house, allowed):
    "Names that two modules define."
    where = defaultdict(set)
    for module, tree in house.trees.items():
        for name in defined(tree): where[name].add(module)
    twice = {name: sorted(m) for name, m in sorted(where.items()) if len(m) > 1 and name not in allowed}
    return [f"{name}: {', '.join(modules)}" for name, modules in twice.items()]


# ---- how dense the code is

def code_lines(source):
    "The lines that are neither blank nor a directive."
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def widths(house):
    for c in house.code:
        for i, line in enumerate(c.source.splitlines(), 1): yield Found(c.chapter, c.at(i), len(line))


def statement_lists(tree):
    "Every block of statements of a tree."
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block: yield block


def crowded_lines(tree):
    "Lines with several statements (`a = 1; b = 2`)."
    return {b.lineno for block in statement_lists(tree) for a, b in pairwise(block) if a.end_lineno == b.lineno}


def one_line_bodies(tree, source):
    "Lines that hold a header and its one statement (`if x: y`)."
    lines = [line.encode() for line in source.splitlines()]
    firsts = [block[0] for block in statement_lists(tree)]
    shared = {s.lineno for s in firsts if lines[s.lineno - 1][:s.col_offset].strip()}
    return shared - crowded_lines(tree)


def shared_lines(cells, row):
    "Where several statements share a line (`crowded`), or one statement shares it with its header (`one_line`)."
    find = {"crowded": lambda c: crowded_lines(c.tree), "one_line": lambda c: one_line_bodies(c.tree, c.source)}[row]
    return [c.at(line) for c in cells for line in sorted(find(c))]


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def function_lines(f):
    "Lines of the body after the docstring, plus one for the signature, however many lines of docments that takes."
    body = f.body[1:] if ast.get_docstring(f, clean=False) is not None else f.body
    return f.end_lineno - body[0].lineno + 2 if body else 1


def function_lengths(house, allowed=()):
    for c in house.code:
        for f in functions(c.tree):
            if f.name not in allowed: yield Found(c.chapter, f"{c.at(f.lineno)}: {f.name}", function_lines(f))


def parameter_names(f):
    "The parameters of a function, `*rest` and `**others` too, `self` and `cls` not."
    a = f.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return [p.arg for p in every if p.arg not in ("self", "cls")]


def parameter_counts(house, allowed=()):
    for c in house.code:
        for f in functions(c.tree):
            if f.name not in allowed: yield Found(c.chapter, f"{c.at(f.lineno)}: {f.name}", len(parameter_names(f)))


def cell_lengths(house):
    for c in house.exported: yield Found(c.chapter, c.at(1), len(code_lines(c.source)))


def exported_lines(house):
    for name, cells in house.chapters.items():
        n = sum(len(code_lines(c.source)) for c in cells if c.exported)
        if cells: yield Found(name, cells[0].file, n)


def given_values(node):
    "The (name, value) pairs that a node sets: defaults of a function, assignments, fields of a class, `setdefault`."
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        a = node.args
        by_place = zip(reversed([*a.posonlyargs, *a.args]), reversed(a.defaults))
        return [(p.arg, value) for p, value in [*by_place, *zip(a.kwonlyargs, a.kw_defaults)]]
    if isinstance(node, ast.AnnAssign): return [(getattr(node.target, "id", ""), node.value)]
    if isinstance(node, ast.Assign): return [(getattr(t, "id", ""), node.value) for t in node.targets]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setdefault" and len(node.args) == 2:
        return [(getattr(node.args[0], "value", ""), node.args[1])]
    return []


def defaults_of(tree, name):
    "Lines that give `name` a number, written out, as its default."
    for node in ast.walk(tree):
        values = [value for found, value in given_values(node) if found == name]
        yield from (v.lineno for v in values if isinstance(getattr(v, "value", None), (int, float)))


def repeated_defaults(house, name):
    return [c.at(line) for c in house.exported for line in defaults_of(c.tree, name)]


# ---- what a reader meets

def words(cells): return sum(len(c.source.split()) for c in cells if not c.code)


def prose_ratios(house):
    "Words of prose to a line of code, exported or not."
    for name, cells in house.chapters.items():
        n = sum(len(code_lines(c.source)) for c in cells if c.code)
        if n: yield Found(name, cells[0].file, words(cells)/n)


def reading_minutes(cells, words_a_minute=200, lines_a_minute=40, columns=80):
    "Minutes to read the prose and the code that the page shows; lines wrap, folded and hidden cells are left out."
    shown = [line for c in cells if c.code and not c.hidden for line in code_lines(c.source)]
    rows = sum(math.ceil(len(line)/columns) for line in shown)
    return words(cells)/words_a_minute + rows/lines_a_minute


class Columns(HTMLParser):
    "Counts the columns of every <table>: the most cells of a row, without the unnamed index of a data frame."
    def __init__(self):
        super().__init__()
        self.tables, self.rows, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag == "table": self.rows = []
        elif tag == "tr": self.rows.append([])
        elif tag in ("td", "th"):
            span = dict(attrs).get("colspan") or 1
            self.text = ""
            if self.rows: self.rows[-1].append([int(span), tag, ""])

    def handle_data(self, data):
        if self.rows and self.rows[-1]: self.rows[-1][-1][2] += data.strip()

    def handle_endtag(self, tag):
        if tag != "table" or not self.rows: return
        widest = max(sum(span for span, *_ in row) for row in self.rows)
        index = [row for row in self.rows if row and row[0][1:] == ["th", ""]]
        self.tables.append(widest - bool(index))


def table_columns(house):
    for c in house.code:
        for html in c.html:
            parser = Columns()
            parser.feed(html)
            for n in parser.tables: yield Found(c.chapter, c.at(1), n)


# ---- what a notebook says of itself

def assigned(tree):
    "The names that a cell of plain assignments gives a value."
    for s in tree.body:
        if isinstance(s, ast.Assign): yield from ((t.id, s.value) for t in s.targets if isinstance(t, ast.Name))
        elif isinstance(s, ast.AnnAssign): yield s.target.id, s.value


def declared_twice(house, shared):
    "Parameters that two chapters declare."
    where = defaultdict(list)
    for c in house.code:
        if "parameters" not in c.tags: continue
        for name, _ in assigned(c.tree): where[name].append(c.chapter)
    return [f"{name}: {', '.join(m)}" for name, m in sorted(where.items()) if len(m) > 1 and name not in shared]


def steps(house):
    "The names of the steps: the notebooks with a cell tagged `step`."
    return {c.chapter.split(".")[-1] for c in house.code if "step" in c.tags}


# which argument of a call names a step
STEP_AT = {"need": 1, "rerun": 0, "settings_of": 0, "save_settings": 0, "save_latents": 2}


def named_step(call):
    "The step that a call names in plain letters."
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    if name not in STEP_AT: return None
    at = STEP_AT[name]
    by_name = [k.value for k in call.keywords if k.arg == "step"]
    given = [*call.args[at:at + 1], *by_name]
    return getattr(given[0], "value", None) if given and isinstance(given[0], ast.Constant) else None


def unknown_steps(house):
    "Names of steps that do not exist, in calls and in `needs`."
    known = steps(house)
    for c in house.code:
        calls = [n for n in ast.walk(c.tree) if isinstance(n, ast.Call)]
        named = [(named_step(n), n.lineno) for n in calls]
        if "step" in c.tags:
            needs = dict(assigned(c.tree)).get("needs")
            named += [(e.value, e.lineno) for e in getattr(needs, "elts", [])]
        for step, line in named:
            if step is not None and step not in known: yield f"{c.at(line)}: {step!r}"


ROLES = {"parameters", "step", "test", "demo"}


def untagged(house):
    "Cells before `## Run` that neither leave the notebook nor say what they are for."
    for c in house.code:
        plain = not (c.exported or c.after_run or "default_exp" in c.directives or ROLES & set(c.tags))
        if plain and c.source.strip(): yield c.at(1)


def exported_after_run(house):
    return [c.at(1) for c in house.exported if c.after_run]


# ---- the first page

def blocks(text):
    "Paragraphs, bullets, headings and rows of tables of a Markdown text, one string each, code blocks left out."
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    out = [""]
    for line in text.splitlines():
        new = re.match(r"\s*(?:[-*+]|\d+\.)\s|#|>|\|", line)
        if new or not line.strip(): out.append("")
        out[-1] = f"{out[-1]} {line.strip()}".strip()
        if re.match(r"#|\|", line): out.append("")
    return [b for b in out if b]


def visible(block):
    "What a reader sees of a block: no targets of links, no tags, no code."
    block = re.sub(r"\]\([^)]*\)", "]", block)
    return re.sub(r"<[^>]+>|`[^`]*`|https?://\S+", " ", block)


def long_numbers(text, digits=3):
    "Numbers of more digits; years, versions and arXiv ids are none."
    names = r"\b\d{4}\.\d{4,5}(?:v\d+)?\b|\bv?\d+\.\d+\.\d+[\w.+-]*|\b(?:19|20)\d\d\b(?![,.]\d)"
    for block in blocks(text):
        for number in re.findall(r"\d(?:[\d.,]*\d)?", re.sub(names, " ", visible(block))):
            significant = re.sub(r"\D", "", number).lstrip("0")
            if len(significant) > digits: yield f"{number} in: {block[:80]}"


def is_bullet(block): return bool(re.match(r"(?:[-*+]|\d+\.)\s", block))


def sentences(text):
    for block in blocks(text):
        if block.startswith(("|", "#")): continue
        plain = re.sub(r"`[^`]*`", "code", block)
        yield from re.split(r"(?<=[.!?])[\"')*_]*\s+", re.sub(r"\]\([^)]*\)", "]", plain))


def n_words(sentence): return sum(bool(re.search(r"\w", w)) for w in sentence.split())


def long_bullets(text, columns, lines):
    return [b[:80] for b in blocks(text) if is_bullet(b) and math.ceil(len(b)/columns) > lines]


def has_picture(lines): return any(re.search(r"!\[|<img\b", line) for line in lines)


# ---- how long a chapter's own tests take

def seconds_of_tests(nb):
    "Cell number -> seconds of the cells tagged test or demo; all cells before `## Run` are run, with one thread."
    import os

    import nbclient
    import nbformat

    d = nbformat.read(nb, 4)
    read = read_cells(f"nbs/{nb.name}", d.cells)
    d.cells = [cell for cell, c in zip(d.cells, read) if not c.after_run]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    client = nbclient.NotebookClient(d, record_timing=True, resources={"metadata": {"path": str(nb.parent)}})
    client.execute(env=env)

    seconds = {}
    for number, cell in enumerate(d.cells):
        if not {"test", "demo"} & set(cell.metadata.get("tags", [])): continue
        start, end = (datetime.fromisoformat(cell.metadata.execution[f"iopub.status.{s}"]) for s in ("busy", "idle"))
        seconds[number] = round((end - start).total_seconds(), 2)
    return seconds
