"What several test files share: a quiet environment, a project of two toy steps, and one run of the preset `tiny`."
import io, json, os, re, subprocess, sys
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1",
                  MPLBACKEND="Agg")

import nbformat, pytest
import nbformat.v4 as nbf

ROOT = Path(__file__).resolve().parent.parent


def notebook(file, params, step, code, export="", test=""):
    "Write a step: title, cells tagged `parameters` and `step`, what it exports, a test, and its code under `## Run`."
    cells = [nbf.new_markdown_cell("# A step"),
             nbf.new_code_cell(params, metadata={"tags": ["parameters"]}),
             nbf.new_code_cell(step, metadata={"tags": ["step"]})]
    if export: cells.append(nbf.new_code_cell(f"#| export\n{export}"))
    if test: cells.append(nbf.new_code_cell(test, metadata={"tags": ["test"]}))
    cells += [nbf.new_markdown_cell("## Run"), nbf.new_code_cell(code)]
    nb = nbf.new_notebook(cells=cells)
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, file)


ONE = "from llmdiff.core import *\nwrite_json(run_dir(run)/'x.json', n*2)"
TWO = ("from llmdiff.core import *\nimport json, pandas as pd\n"
       "x = json.loads(need(f'{run}/x.json', 'one').read_text())\n"
       "save_table(pd.DataFrame({'x': [x], 'y': [x + bias]}), 'main', run)")


def at_once(nb, out, params, env, report, cwd=None):
    "In place of `execute`: the cells run here, without a kernel, which is enough to test what runs and when."
    d = nbformat.read(nb, 4)
    space = {}
    for c in d.cells:
        if c.cell_type == "code":
            exec(c.source, space)
            space.update(params if "parameters" in c.metadata.get("tags", []) else {})
    nbformat.write(d, out)


class Toy:
    """A project folder with two small steps; `run` calls the driver in this process (with real kernels if asked),
    `cli` in another."""
    def __init__(self, home):
        self.home, self.nbs, self.R = home, home/"nbs", home/"runs"/"toy"
        for d in ("nbs", "data"): (home/d).mkdir()
        (home/"data"/"words.txt").write_text("some words")
        (home/"settings.ini").write_text("[DEFAULT]\nbias = 1\n[toy]\nn = 3\n")
        self.step(1, ONE); self.step(2, TWO)

    def step(self, i, code, **more):
        name, params, says = [("01_one", 'run = "runs/toy"\nn = 1   # how many', "needs = []\nreads = []"),
                              ("02_two", 'run = "runs/toy"\nbias = 0.5   # added', 'needs = ["one"]')][i-1]
        notebook(self.nbs/f"{name}.ipynb", params, more.pop("says", says), code, **more)

    def add(self, name, says, code="pass", **more):
        "One more step, e.g. '03_three' or 'closer/look'; it declares nothing."
        notebook(self.nbs/f"{name}.ipynb", 'run = "runs/toy"', says, code, **more)

    def edit(self, name, change):
        "Change the cells of a notebook in place."
        nb = self.nbs/f"{name}.ipynb"
        d = json.loads(nb.read_text())
        change(d["cells"])
        nb.write_text(json.dumps(d))

    def run(self, kernels=False, **kw):
        "The steps that ran, e.g. ['one']."
        import llmdiff.driver.steps as S
        f = io.StringIO()
        with pytest.MonkeyPatch.context() as m:
            if not kernels: m.setattr(S, "execute", at_once)
            S.run_all("toy", home=self.home, file=f, **kw)
        self.out = f.getvalue()
        return re.findall(r"(\w+): done in", self.out)

    def cmd(self, *args):
        code = ("import sys, pathlib, llmdiff.driver.commands as c; c.root = lambda: pathlib.Path(sys.argv[1]); "
                "sys.exit(c.main(sys.argv[2:]))")
        return [sys.executable, "-c", code, str(self.home), *args]

    def cli(self, *args, **kw):
        cmd = self.cmd(*args, "--preset", "toy", "--runs", str(self.R.parent))
        return subprocess.run(cmd, capture_output=True, text=True, timeout=120, cwd=ROOT, **kw)


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


def llmdiff(*args):
    "The command, as a user would type it."
    code = "import sys; from llmdiff.driver.commands import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=900, cwd=ROOT)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The run folder of the preset `tiny`, run from nothing; its tables and latents are there for any test to read,
    not to change."""
    runs = tmp_path_factory.mktemp("first")
    r = llmdiff("run", "--preset", "tiny", "--runs", str(runs))
    assert r.returncode == 0, r.stderr[-2000:]
    return runs/"tiny"
