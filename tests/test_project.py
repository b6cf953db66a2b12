"What holds for the tree as a whole: notebooks, package, pages and presets agree, and the preset `tiny` gives the same bytes twice."
import ast, json, re, shutil, subprocess, sys, tomllib

import pytest

from conftest import ROOT, llmdiff
from llmdiff import run as R
from llmdiff.core import load_preset, preset_names

NBS = sorted((ROOT/"nbs").glob("*.ipynb"))
NUMBERED = [f for f in NBS if f.name[0].isdigit()]
each = pytest.mark.parametrize("nb", NBS, ids=lambda f: f.stem)
numbered = pytest.mark.parametrize("nb", NUMBERED, ids=lambda f: f.stem)
MACHINE = re.compile(r"(?<![\w.:/])/(?:root|home|tmp|work|Users|private|opt|mnt|var)/|site-packages|file:///")


def cells(nb): return json.loads(nb.read_text(encoding="utf-8"))["cells"]


def outputs(nb):
    "Every text of every output, with the cell it belongs to."
    for c in cells(nb):
        for o in c.get("outputs", []):
            texts = [o.get("text", "")] + [v for k, v in o.get("data", {}).items() if not k.startswith("image/")]
            for t in texts: yield c, o, "".join(t) if isinstance(t, (str, list)) else json.dumps(t)


def shipped():
    "The files that a clone holds."
    if (ROOT/".git").exists():
        names = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT/n for n in names if n and (ROOT/n).is_file()]
    skip = {"runs", "_docs", "_proc", ".venv", "build", "dist"}
    return [f for f in ROOT.rglob("*") if f.is_file() and not skip & set(f.relative_to(ROOT).parts) and "__pycache__" not in f.parts]


# ---- notebooks

def test_the_chain_is_complete():
    assert [f.name[:2] for f in R.pick(R.steps(ROOT))] == [f"{i:02d}" for i in range(1, 11)]


@numbered
def test_parameters_cell(nb):
    "nbdev-clean can take tags away without a word; papermill would then run with the defaults."
    assert R.declared(nb)["run"] == "runs/tiny"
    cell = next(c for c in cells(nb) if "parameters" in c["metadata"].get("tags", []))
    source = "".join(cell["source"])
    assert not source.startswith("#|") and all(isinstance(s, (ast.Assign, ast.AnnAssign)) for s in ast.parse(source).body)


@numbered
def test_defaults_are_the_tiny_preset(nb):
    tiny = load_preset("tiny")
    for k, v in R.declared(nb).items():
        if k in tiny and k != "run": assert v == R.fit(k, tiny[k], v), f"{nb.name}: {k} = {v!r}, and the preset tiny has {tiny[k]!r}"


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_key_is_declared_somewhere(preset):
    R.parameters(load_preset(preset), R.steps(ROOT))


@numbered
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
        if c["cell_type"] == "code": assert "eval: false" not in source and "nbdev_export" not in source and not MACHINE.search(source), source[:80]


# ---- package, pages

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "Notebooks and package in a folder of their own, exported and cleaned again."
    d = tmp_path_factory.mktemp("copy")
    for f in ("nbs", "llmdiff"): shutil.copytree(ROOT/f, d/f, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT/"pyproject.toml", d)
    for cmd in ("export", "clean"):
        r = subprocess.run([sys.executable, "-c", f"from nbdev.{'doclinks' if cmd == 'export' else 'clean'} import nbdev_{cmd}; nbdev_{cmd}()"], cwd=d, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
    return d


def test_package_is_what_the_notebooks_export(copy):
    files = sorted(f.name for f in (ROOT/"llmdiff").glob("*.py"))
    assert files == sorted(f.name for f in (copy/"llmdiff").glob("*.py"))
    assert [f for f in files if (copy/"llmdiff"/f).read_text() != (ROOT/"llmdiff"/f).read_text()] == []


def test_every_notebook_exports_a_module():
    names = {f.stem for f in (ROOT/"llmdiff").glob("*.py") if f.stem[0] != "_"}
    assert {R.page_name(f) for f in NUMBERED} == names


@each
def test_notebook_is_clean(nb, copy):
    assert json.loads((copy/"nbs"/nb.name).read_text()) == json.loads(nb.read_text())


def test_readme_is_index():
    assert R.readme(write=False) == (ROOT/"README.md").read_text(), "run `llmdiff readme`"


def test_site_is_built_without_a_word(tmp_path):
    r = llmdiff("site", "--out", str(tmp_path/"docs"))
    assert (r.returncode, r.stderr) == (0, "")
    pages = {f.stem: f.read_text() for f in (tmp_path/"docs").glob("*.html")}
    assert set(pages) == {R.page_name(f) for f in NBS}
    for name, text in pages.items():
        assert not re.search(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["'](?:https?:)?//""", text), f"{name} loads something from elsewhere"
        assert "#|" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.S), name
        for used in re.findall(r"""(?:src|href)=["'](?!data:|#|https?:|mailto:)([^"'#?]+)""", text): assert (tmp_path/"docs"/used).exists(), f"{name}: {used}"
    assert "katex/katex.min.css" in pages["scaling"] and 'id="load_preset"' in pages["core"]


def test_ruff():
    pytest.importorskip("ruff")
    r = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "-q", "."], cwd=ROOT, capture_output=True, text=True)
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
    assert {f.name for f in (ROOT/"figures").iterdir()} == {*m["files"], "manifest.json"}
    for f, h in m["files"].items(): assert R.sha256(ROOT/"figures"/f) == h, f


# ---- the preset tiny, in full

def test_tiny_leaves_tables_and_figures(tiny):
    assert (tiny/"tables"/"main.csv").exists() and list((tiny/"figures").glob("*.png"))
    assert {f.stem for f in tiny.glob("*.ipynb")} == {f.stem for f in R.pick(R.steps(ROOT))}
    assert not list(tiny.rglob(".*.tmp*"))
    for nb in sorted(tiny.glob("*.ipynb")):
        for c, o, text in outputs(nb):
            assert not re.search(r"\w*Warning\b", text), f"{nb.name}: {text[:300]}"


def test_tiny_twice_gives_the_same_bytes(tiny, tmp_path):
    r = llmdiff("run", "--preset", "tiny", "--runs", str(tmp_path))
    assert r.returncode == 0, r.stderr[-2000:]
    again = tmp_path/"tiny"
    names = lambda d: sorted(str(f.relative_to(d)) for k in ("tables", "figures", "latents") for f in (d/k).rglob("*") if f.is_file())
    assert names(tiny) == names(again)
    assert [n for n in names(tiny) if (tiny/n).read_bytes() != (again/n).read_bytes()] == []


def test_tiny_is_up_to_date(tiny):
    r = llmdiff("run", "--preset", "tiny", "--runs", str(tiny.parent))
    assert r.returncode == 0 and r.stdout.count("up to date") == len(R.pick(R.steps(ROOT))), r.stdout


def test_a_step_alone_names_what_it_needs(tmp_path):
    r = llmdiff("run", "--preset", "tiny", "--only", "10", "--runs", str(tmp_path))
    assert r.returncode == 1 and "run notebook" in r.stderr and r.stderr.count("\n") == 1 and "Traceback" not in r.stderr, r.stderr


def test_one_pair_is_enough(tiny, tmp_path):
    "Two models of one's own make one pair: the comparisons of the embedded family are left out, and the tables are of that pair."
    shutil.copytree(tiny, tmp_path/"tiny")
    r = llmdiff("run", "--preset", "tiny", "--only", "10", "--runs", str(tmp_path), "-p", 'pairs=[["it", "SimPO"]]')
    assert r.returncode == 0, r.stderr
    tables = tmp_path/"tiny"/"tables"
    assert (tables/"direct_class_it_SimPO.csv").exists() and not (tables/"planted.csv").exists()
    assert len((tables/"main.csv").read_text().splitlines()) == 2
