"The tree as a whole: notebooks, package, pages and presets agree; the preset `tiny` gives the same bytes twice."
import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from conftest import ROOT, llmdiff
from llmdiff.core import load_preset, preset_names, sha256
from llmdiff.driver import settings, site, steps

NBS = settings.notebooks(ROOT)
CHAPTERS = [f for f in NBS if f.stem != "index" and f.parent.name != "guide"]   # the guide exports nothing
STEPS = [s.nb for s in steps.steps(ROOT)]
name_of = lambda f: f.relative_to(ROOT/"nbs").with_suffix("").as_posix()
each = pytest.mark.parametrize("nb", NBS, ids=name_of)
chapter = pytest.mark.parametrize("nb", CHAPTERS, ids=name_of)
step = pytest.mark.parametrize("nb", STEPS, ids=name_of)
MACHINE = re.compile(r"(?<![\w.:/])/(?:root|home|tmp|work|Users|private|opt|mnt|var)/|site-packages|file:///")


def cells(nb): return json.loads(nb.read_text(encoding="utf-8"))["cells"]


def tags(c): return set(c["metadata"].get("tags", []))


def exports(c): return re.search(r"(?m)^#\|\s*(export|exporti|default_exp)\b", "".join(c["source"]))


def parts(nb):
    "The code cells before `## Run`, and those after it."
    before, after, now = [], [], None
    now = before
    for c in cells(nb):
        if c["cell_type"] == "markdown" and re.search(r"(?m)^## Run\b", "".join(c["source"])): now = after
        elif c["cell_type"] == "code": now.append(c)
    return before, after


def chain(): return [s.name for s in steps.steps(ROOT) if not s.closer]


def outputs(nb):
    "Every text of every output, with the cell it belongs to."
    for c in cells(nb):
        for o in c.get("outputs", []):
            texts = [o.get("text", "")] + [v for k, v in o.get("data", {}).items() if not k.startswith("image/")]
            for t in texts: yield c, o, "".join(t) if isinstance(t, (str, list)) else json.dumps(t)


def shipped():
    "The files that a clone holds."
    if (ROOT/".git").exists():
        listing = ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"]
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT/n for n in names if n and (ROOT/n).is_file()]
    skip = {"runs", "_docs", "_proc", ".venv", "build", "dist", "__pycache__"}
    return [f for f in ROOT.rglob("*") if f.is_file() and not skip & set(f.relative_to(ROOT).parts)]


# ---- notebooks

def test_the_chain_is_complete():
    named = ["caching", "training", "scaling", "annotation", "tables"]
    assert [n for n in chain() if n in named] == named
    numbered = [f.stem for f in CHAPTERS if f.parent.name == "nbs"]
    assert numbered == sorted(numbered)


def test_what_runs_is_a_step_and_nothing_else_is():
    "A chapter with a `## Run`, or a closer look."
    found = {s.nb for s in steps.steps(ROOT)}
    can = [f for f in CHAPTERS if f.parent.name in ("nbs", "closer")]
    assert {f for f in can if parts(f)[1]} == found
    assert [f for f in CHAPTERS if f not in found and any("step" in tags(c) for c in cells(f))] == []


def test_what_steps_need_and_read_is_there():
    steps.check_reads(steps.steps(ROOT), ROOT)


def test_a_step_says_that_it_needs_what_it_asks_for():
    "`need(file, step)` names the step that makes a file: it is among the step's needs, or theirs."
    by_name = {s.name: s for s in steps.steps(ROOT)}
    def all_needs(s): return {n for name in s.needs for n in {name, *all_needs(by_name[name])}}
    wrong = []
    for s in by_name.values():
        known = {s.name, *all_needs(s)}
        for node in ast.walk(ast.parse("\n".join(steps.run_cells(s.nb)))):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "need" and len(node.args) == 2
            if called and isinstance(node.args[1], ast.Constant):
                if node.args[1].value not in known: wrong.append(f"{s.name} asks for what {node.args[1].value} makes")
    assert wrong == []


@step
def test_parameters_cell(nb):
    "nbdev-clean can take tags away without a word; papermill would then run with the defaults."
    import papermill
    assert settings.declared(nb)["run"] == "runs/tiny"
    assert list(papermill.inspect_notebook(str(nb))) == list(settings.declared(nb))
    [source] = ["".join(c["source"]) for c in cells(nb) if "parameters" in tags(c)]
    assert not source.startswith("#|")
    assert all(isinstance(s, (ast.Assign, ast.AnnAssign)) for s in ast.parse(source).body)


@chapter
def test_cells_say_what_they_are_for(nb):
    "What a run executes is what counts in a step's key: before `## Run` a cell exports, declares, or is for readers."
    before, after = parts(nb)
    for c in before:
        assert exports(c) or tags(c) & {"parameters", "step", "test", "demo"}, "".join(c["source"])[:200]
    for c in after:
        source = "".join(c["source"])
        assert not exports(c), source[:200]
        check = re.compile(r"test_(eq|ne|fail|close|is|sig)\(")
        body = ast.parse(source).body
        asserts = [isinstance(s, ast.Assert) or bool(check.match(ast.unparse(s))) for s in body]
        assert not (asserts and all(asserts)) or "test" in tags(c), source[:200]
    for c in before + after:
        assert len(tags(c)) <= 1 and not (tags(c) & {"test", "demo"} and exports(c)), "".join(c["source"])[:200]


@step
def test_defaults_are_the_tiny_preset(nb):
    tiny = load_preset("tiny")
    for k, v in settings.declared(nb).items():
        if k in tiny and k != "run":
            same = v == settings.as_kind(k, tiny[k], v)
            assert same, f"{nb.name}: {k} = {v!r}, and the preset tiny has {tiny[k]!r}"


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_key_is_declared_somewhere(preset):
    settings.parameters(load_preset(preset), [s.nb for s in steps.steps(ROOT)])


@chapter
def test_title_and_subtitle(nb):
    first = next("".join(c["source"]) for c in cells(nb) if c["cell_type"] == "markdown")
    assert re.match(r"# .+\n\n?> .+", first)


@each
def test_outputs_are_fit_to_read(nb):
    assert nb.stat().st_size < 300_000
    for c, o, text in outputs(nb):
        where = "".join(c["source"])[:80]
        assert o["output_type"] != "error", where
        assert o.get("name") != "stderr", f"{where}: {text[:200]}"
        assert not re.search(r"\w*Warning\b|Traceback", text), f"{where}: {text[:200]}"
        assert not MACHINE.search(text), f"{where}: {MACHINE.search(text)[0]}"
        assert "\r" not in text.replace("\r\n", "\n"), where


@each
def test_cells_run_under_papermill(nb):
    "papermill knows no directives, and an export from inside would rewrite the package while it runs."
    for c in cells(nb):
        source = "".join(c["source"])
        if c["cell_type"] == "code":
            assert "eval: false" not in source and "nbdev_export" not in source, source[:80]
            assert not MACHINE.search(source), source[:80]


# ---- package, pages

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "Notebooks and package in a folder of their own, exported and cleaned again."
    d = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for f in ("nbs", "llmdiff"): shutil.copytree(ROOT/f, d/f, ignore=ignore)
    shutil.copy(ROOT/"pyproject.toml", d)
    for cmd in ("export", "clean"):
        code = f"from nbdev.{'doclinks' if cmd == 'export' else 'clean'} import nbdev_{cmd}; nbdev_{cmd}()"
        r = subprocess.run([sys.executable, "-c", code], cwd=d, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
    return d


def modules(lib):
    files = sorted(lib.rglob("*.py"))
    return {f.relative_to(lib).as_posix(): f.read_text(encoding="utf-8") for f in files}


def test_package_is_what_the_notebooks_export(copy):
    here, again = modules(ROOT/"llmdiff"), modules(copy/"llmdiff")
    assert list(here) == list(again)
    assert [f for f in here if here[f] != again[f]] == []


def test_a_module_lies_where_its_notebook_lies():
    "nbs/05_caching.ipynb is llmdiff.caching, nbs/engine/store.ipynb llmdiff.engine.store; there are no others."
    files = {"llmdiff/" + f for f in modules(ROOT/"llmdiff") if f.rpartition("/")[2][0] != "_"}
    at = {f: "/".join(["llmdiff", *f.relative_to(ROOT/"nbs").parts[:-1], settings.step_name(f)]) for f in CHAPTERS}
    assert {f"{p}.py" for p in at.values()} == files
    assert {f: settings.module_of(f) for f in CHAPTERS} == {f: p.replace("/", ".") for f, p in at.items()}


@each
def test_notebook_is_clean(nb, copy):
    assert json.loads((copy/nb.relative_to(ROOT)).read_text()) == json.loads(nb.read_text())


def test_readme_is_index():
    assert site.readme(write=False) == (ROOT/"README.md").read_text(), "run `llmdiff readme`"


def test_site_is_built_without_a_word(tmp_path):
    r = llmdiff("site", "--out", str(tmp_path/"docs"))
    assert (r.returncode, r.stderr) == (0, "")
    pages = {f.stem: f.read_text() for f in (tmp_path/"docs").glob("*.html")}
    assert set(pages) == set(site.page_names(NBS).values())
    for name, text in pages.items():
        elsewhere = re.search(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["'](?:https?:)?//""", text)
        assert not elsewhere, f"{name} loads something from elsewhere"
        assert "#|" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.S), name
        for used in re.findall(r"""(?:src|href)=["'](?!data:|#|https?:|mailto:)([^"'#?]+)""", text):
            assert (tmp_path/"docs"/used).exists(), f"{name}: {used}"
    assert "Closer looks" in pages["index"] and "Engine room" in pages["index"]
    assert "katex/katex.min.css" in pages["scaling"] and 'id="load_preset"' in pages["core"]


def test_ruff():
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "-q", "."]
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout


def test_sizes():
    sizes = {f: f.stat().st_size for f in shipped()}
    assert max(sizes.values()) < 8e6, max(sizes, key=sizes.get)
    assert sum(sizes.values()) < 45e6


def test_dependencies_are_pinned():
    norm = lambda s: re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", s)[0]).lower()
    pins = {norm(s) for s in (ROOT/"constraints.txt").read_text().splitlines() if s and not s.startswith("#")}
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    assert {norm(s) for s in project["dependencies"] + sum(project["optional-dependencies"].values(), [])} <= pins


def test_published_set_is_whole():
    "Every file of figures/ is the one that the manifest describes."
    file = ROOT/"figures"/"manifest.json"
    if not file.exists(): pytest.skip("nothing is published yet")
    m = json.loads(file.read_text())
    files = {f.relative_to(ROOT/"figures").as_posix() for f in (ROOT/"figures").rglob("*") if f.is_file()}
    assert files == {*m["files"], "manifest.json"}
    for f, h in m["files"].items(): assert sha256(ROOT/"figures"/f) == h, f


# ---- the preset tiny, in full

def test_tiny_leaves_tables_and_figures(tiny):
    assert (tiny/"tables"/"main.csv").exists() and list((tiny/"figures").glob("*.png"))
    assert sorted(settings.step_name(f) for f in tiny.glob("*.ipynb")) == sorted(chain())
    assert not list(tiny.rglob(".*.tmp*"))
    for nb in sorted(tiny.glob("*.ipynb")):
        for c, o, text in outputs(nb):
            assert not re.search(r"\w*Warning\b", text), f"{nb.name}: {text[:300]}"


def test_tiny_twice_gives_the_same_bytes(tiny, tmp_path):
    r = llmdiff("run", "--preset", "tiny", "--runs", str(tmp_path))
    assert r.returncode == 0, r.stderr[-2000:]
    again = tmp_path/"tiny"
    def names(d):
        files = [f for k in ("tables", "figures", "latents") for f in (d/k).rglob("*")]
        return sorted(str(f.relative_to(d)) for f in files if f.is_file())

    assert names(tiny) == names(again)
    assert [n for n in names(tiny) if (tiny/n).read_bytes() != (again/n).read_bytes()] == []


def test_tiny_is_up_to_date(tiny):
    r = llmdiff("run", "--preset", "tiny", "--runs", str(tiny.parent))
    assert r.returncode == 0 and r.stdout.count("up to date") == len(chain()), r.stdout


def test_a_step_alone_names_what_it_needs(tmp_path):
    r = llmdiff("run", "--preset", "tiny", "--only", "tables", "--runs", str(tmp_path))
    assert r.returncode == 1 and "run step" in r.stderr, r.stderr
    assert r.stderr.count("\n") == 1 and "Traceback" not in r.stderr, r.stderr


def test_one_pair_is_enough(tiny, tmp_path):
    "Two models of one's own make one pair: no comparison of the embedded family, and the tables are of that pair."
    shutil.copytree(tiny, tmp_path/"tiny")
    one = 'pairs=[["it", "SimPO"]]'
    r = llmdiff("run", "--preset", "tiny", "--only", "tables", "--runs", str(tmp_path), "-p", one)
    assert r.returncode == 0, r.stderr
    tables = tmp_path/"tiny"/"tables"
    assert (tables/"direct_class_it_SimPO.csv").exists() and not (tables/"planted.csv").exists()
    assert len((tables/"main.csv").read_text().splitlines()) == 2
