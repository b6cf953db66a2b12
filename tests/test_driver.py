"The driver on a project of two toy steps: what runs again and why, how it fails, what it leaves."
import json, os, signal, subprocess, sys, time

import pytest

from conftest import ONE, TWO, llmdiff
from llmdiff.core import UserError, sha256
from llmdiff.driver import commands, kernel, publish, settings, steps


def sentence(text, *parts):
    "One line that holds all parts and no traceback."
    text = text.strip()
    assert "\n" not in text and "Traceback" not in text, text
    for p in parts: assert p in text, text


def set_source(i, text):
    "For `Toy.edit`: the source of cell i."
    def change(cells): cells[i]["source"] = text
    return change


# ---- what runs again, and what does not

def test_second_run_does_nothing(toy):
    assert toy.run(kernels=True) == ["one", "two"]
    assert toy.run(kernels=True) == [] and toy.out.count("up to date") == 2
    assert (toy.R/"tables"/"main.csv").read_text() == "x,y\n6,7\n"
    assert (toy.R/"01_one.ipynb").exists() and (toy.R/"02_two.ipynb").exists()


def test_a_parameter_repeats_its_step_and_what_needs_it(toy):
    toy.run()
    assert toy.run(values={"bias": 2}) == ["two"] and "two: bias changed" in toy.out
    assert toy.run(values={"bias": 2, "n": 4}) == ["one", "two"]
    assert toy.run(values={"bias": 2, "n": 4}) == []


def test_a_default_that_no_preset_sets_counts(toy):
    toy.add("03_three", 'needs = ["one"]')
    toy.run()
    toy.edit("03_three", set_source(1, 'run = "runs/toy"\nwidth = 3   # a new parameter'))
    assert toy.run() == ["three"]
    toy.edit("03_three", set_source(1, 'run = "runs/toy"\nwidth = 3   # another remark'))
    assert toy.run() == []
    toy.edit("01_one", set_source(1, 'run = "runs/toy"\nn = 2   # the preset sets it'))
    assert toy.run() == []


def test_code_counts_and_prose_does_not(toy):
    toy.run()
    def prose(cells):
        cells[0]["source"] = "# Another title"
        cells[-1]["source"] = ONE + "   # a remark"
        cells[-1]["outputs"] = []
        cells.insert(1, {"cell_type": "markdown", "id": "new", "metadata": {}, "source": "More words."})
    toy.edit("01_one", prose)
    assert toy.run() == []
    toy.step(1, ONE.replace("n*2", "n*3"))
    assert toy.run() == ["one", "two"]


def test_an_edited_test_or_demo_repeats_nothing(toy):
    toy.step(1, ONE, export="def double(x): return 2*x", test="assert n > 0")
    toy.run()
    toy.step(1, ONE, export="def double(x): return 2*x", test="assert n > 0 and double(n) == 2*n")
    assert toy.run() == []
    def demo(cells):
        cells.insert(4, {**cells[4], "id": "demo", "source": "double(3)", "metadata": {"tags": ["demo"]}})
    toy.edit("01_one", demo)
    assert toy.run() == []
    toy.step(1, ONE, export="def double(x): return x + x", test="assert n > 0")
    assert toy.run() == ["one", "two"]


def test_a_run_executes_no_tests_and_no_demos(toy):
    toy.step(1, ONE, test="assert False, 'a test was run'")
    def demo(cells): cells.append({**cells[-1], "id": "demo", "source": "1/0", "metadata": {"tags": ["demo"]}})
    toy.edit("02_two", demo)
    assert toy.run() == ["one", "two"]
    done = json.loads((toy.R/"01_one.ipynb").read_text())
    assert not any("a test was run" in "".join(c["source"]) for c in done["cells"])
    assert "a test was run" in (toy.nbs/"01_one.ipynb").read_text()   # the notebook itself keeps it


def test_docstrings_comments_and_layout_do_not_count(toy):
    toy.step(1, ONE, export='def double(x):\n    "Twice."\n    return 2*x')
    toy.run()
    toy.step(1, ONE, export='def double(x): # any number\n    "Two times `x`."\n\n    return (2*x)')
    assert toy.run() == []


def test_a_step_is_not_repeated_for_a_step_that_it_does_not_need(toy):
    "An edit of the answers does not repeat the harvest."
    toy.add("03_three", 'needs = ["one"]')
    toy.add("04_four", 'needs = ["three"]')
    toy.add("05_five", "needs = []")
    assert toy.run() == ["one", "two", "three", "four", "five"]
    assert toy.run(values={"bias": 2}) == ["two"]
    assert toy.run(values={"bias": 2, "n": 4}) == ["one", "two", "three", "four"]
    toy.add("03_three", 'needs = ["one"]', "x = 1")
    assert toy.run(values={"bias": 2, "n": 4}) == ["three", "four"]


def test_a_file_that_a_step_reads_repeats_it_and_no_other_file_does(toy):
    (toy.home/"data"/"other.txt").write_text("other words")
    toy.step(2, TWO, says='needs = ["one"]\nreads = ["data/words.txt"]')
    toy.run()
    (toy.home/"data"/"other.txt").write_text("OTHER WORDS")
    (toy.home/"data"/"new.txt").write_text("more")
    assert toy.run() == []
    (toy.home/"data"/"words.txt").write_text("SOME WORDS")
    assert toy.run() == ["two"]


def test_a_folder_that_a_step_reads_counts_with_all_its_files(toy):
    (toy.home/"data"/"texts").mkdir()
    (toy.home/"data"/"texts"/"a.txt").write_text("a")
    toy.step(2, TWO, says='needs = ["one"]\nreads = ["data/texts"]')
    toy.run()
    (toy.home/"data"/"texts"/"b.txt").write_text("b")
    assert toy.run() == ["two"]


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A package on disk: llmdiff.low, llmdiff.high (imports low), llmdiff.engine.store (imports engine.raw),
    llmdiff.closer.look."""
    lib = tmp_path/"package"
    texts = {"__init__": "", "low": "A = 1", "high": "from .low import *\nB = 2",
             "engine/__init__": "", "engine/raw": "C = 3",
             "engine/store": "from .raw import *\nfrom ..low import A", "closer/__init__": "",
             "closer/look": "from ..engine.store import *\ndef f():\n    from .. import high"}
    for name, text in texts.items():
        file = lib/f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(steps, "package", lambda: lib)
    return lib


STORE = {"engine", "engine.store", "engine.raw", "low"}

@pytest.mark.parametrize("source, within, found", [
    ("from llmdiff.engine.raw import *", "llmdiff", {"engine", "engine.raw"}),
    ("from llmdiff.engine.store import *", "llmdiff", STORE),
    ("import llmdiff.engine.store as s", "llmdiff", STORE),
    ("from llmdiff.engine import store", "llmdiff", STORE),
    ("from llmdiff import low, high", "llmdiff", {"low", "high"}),
    ("from ..low import *", "llmdiff.closer", {"low"}),
    ("from .. import high", "llmdiff.closer", {"low", "high"}),
    ("from .store import x", "llmdiff.engine", STORE),
    ("from . import raw", "llmdiff.engine", {"engine", "engine.raw"}),
    ("from .engine import (  # over lines\n    store,\n    raw as r)", "llmdiff", STORE),
    ("def f():\n    if 1:\n        import os, llmdiff.high", "llmdiff", {"low", "high"}),
    ("import llmdiff.closer.look", "llmdiff", STORE | {"closer", "closer.look", "high"}),
    ("text = '''\nfrom .low import *\n'''  # from .high import *", "llmdiff", set()),
    ("import numpy, llmdifference.low; from os import path", "llmdiff", set()),
])
def test_imports_are_found_wherever_they_point(house, source, within, found):
    assert steps.modules(source, within) == {f"llmdiff.{m}" for m in found}


def test_a_changed_module_repeats_the_steps_that_import_it(toy, house):
    "Also through other modules, and in a subpackage."
    toy.step(1, ONE, export="def f():\n    from llmdiff.low import A")
    toy.step(2, TWO, export="def f():\n    import llmdiff.engine.store")
    look = "#| default_exp closer.look\ndef f():\n    from ..engine.store import C"
    toy.add("closer/look", "needs = []", export=look)
    assert toy.run() == ["one", "two"] and toy.run(only="look") == ["look"]
    (house/"engine"/"raw.py").write_text("C = 4")
    assert toy.run() == ["two"] and "look: what it left is of an earlier state" in toy.out
    assert toy.run(only="look") == ["look"]
    (house/"engine"/"raw.py").write_text('"Its purpose."\nC = 4   # a remark')
    assert toy.run() == []
    (house/"high.py").write_text("B = 3")
    assert toy.run() == []
    (house/"low.py").write_text("A = 2")
    assert toy.run() == ["one", "two"]


def test_files_named_by_parameters_count(tmp_path):
    "Also those in data/: a model of the preset tiny."
    weights = tmp_path/"data"/"m"/"w"
    weights.parent.mkdir(parents=True)
    weights.write_text("1")
    nb = tmp_path/"nb.ipynb"
    nb.write_text('{"cells": []}')
    key = lambda spec: steps.step_key(steps.Step(nb), {"models": {"a": spec}}, {}, tmp_path)
    for spec in ("data/m", f"{tmp_path/'data'/'m'}+nowhere", "gguf:some+data/m", "hub:x@data/m", "gguf:data/m/w"):
        first = key(spec)
        assert key(spec) == first
        weights.write_text(weights.read_text() + "2")
        assert key(spec) != first, spec


# ---- order and names

def test_a_closer_look_runs_when_it_is_named_and_after_those_it_needs(toy):
    toy.add("closer/a_look", 'needs = ["two", "zoom"]')
    toy.add("closer/zoom", 'needs = ["one"]')
    toy.add("scale/other", "needs = []")
    assert [s.name for s in steps.steps(toy.home)] == ["one", "two", "zoom", "a_look"]
    assert toy.run() == ["one", "two"]
    assert toy.run(start="zoom") == ["zoom", "a_look"] and (toy.R/"zoom.ipynb").exists()
    assert toy.run(only="a_look", force=True) == ["a_look"]
    assert toy.run(values={"bias": 3}) == ["two"]
    assert "a_look: what it left is of an earlier state" in toy.out and "zoom:" not in toy.out


def test_a_notebook_without_a_step_cell_is_not_run(toy):
    toy.edit("02_two", lambda cells: cells[2]["metadata"].clear())
    assert [s.name for s in steps.steps(toy.home)] == ["one"]


@pytest.mark.parametrize("name, says, said", [
    ("02_two", 'needs = ["ones"]', "02_two.ipynb needs 'ones', and the steps are one, two"),
    ("01_one", 'needs = ["two"]', "in a circle: one -> two -> one"),
    ("01_one", 'needs = ["one"]', "in a circle: one -> one"),
    ("01_one", 'needs = ["three"]', "03_three.ipynb is needed by a chapter with a smaller number"),
    ("02_two", 'needs = ["look"]', "only run when it is asked for"),
    ("02_two", 'needs = "one"', "plain lists of words"),
    ("02_two", 'need = ["one"]', "and nothing else"),
    ("02_two", 'needs = [', "this is not Python"),
    ("02_two", 'reads = ["data/lost.csv"]', "02_two.ipynb reads data/lost.csv, and there is no such file"),
    ("03_two", "needs = []", "two steps are named two"),
])
def test_what_a_step_says_wrongly_is_one_sentence(toy, name, says, said):
    toy.add("03_three", "needs = []"); toy.add("closer/look", "needs = []")
    toy.edit(name, set_source(2, says)) if (toy.nbs/f"{name}.ipynb").exists() else toy.add(name, says)
    with pytest.raises(UserError) as e: toy.run()
    sentence(str(e.value), said)
    assert not toy.R.exists()


@pytest.mark.parametrize("left", ["state", "table"])
def test_a_run_of_the_numbered_steps_is_refused_before_anything_runs(toy, left):
    if left == "state":
        toy.R.mkdir(parents=True)
        (toy.R/"state.json").write_text('{"steps": {"06_scaling": {"key": "", "files": {}, "parameters": {}}}}')
    else:
        (toy.R/"latents"/"a-b").mkdir(parents=True)
        (toy.R/"latents"/"a-b"/"06_scaling.parquet").write_text("")
    r = toy.cli("run")
    assert r.returncode == 1 and r.stdout == ""
    sentence(r.stderr, "runs/toy holds a run of an older version", "--runs", "remove it")


# ---- what a run leaves, and how it fails

@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_harmed_output_is_noticed(toy, harm):
    toy.run()
    f = toy.R/"x.json"
    f.unlink() if harm == "missing" else f.write_text("12345")
    assert toy.run() == ["one", "two"] and f"x.json {'is missing' if harm == 'missing' else 'has changed'}" in toy.out


def test_only_from_force(toy):
    toy.run()
    assert toy.run(only="two") == [] and toy.run(only="two", force=True) == ["two"]
    assert toy.run(start="one", force=True) == ["one", "two"]
    assert toy.run(start="two", force=True) == ["two"]
    assert toy.run(only="one", force=True) == ["one"]
    assert toy.run() == ["two"]   # because one ran again since


def test_a_step_run_on_old_inputs_is_not_taken_for_new(toy):
    toy.run()
    assert toy.run(values={"n": 4}, only="two") == []         # its own inputs on disk are as they were
    assert toy.run(values={"n": 4}) == ["one", "two"]


def test_a_table_no_longer_made_goes(toy):
    toy.run()
    toy.step(2, TWO.replace("'main'", "'other'"))
    toy.run()
    assert sorted(f.name for f in (toy.R/"tables").iterdir()) == ["other.csv", "other.tex"]


def test_unreadable_state_is_no_state(toy):
    toy.run()
    (toy.R/"state.json").write_text('{"steps": {"o')
    assert toy.run() == ["one", "two"]


def test_a_failing_cell(toy):
    toy.step(2, "1/0")
    r = toy.cli("run")
    assert r.returncode == 1 and "one: done" in r.stdout
    sentence(r.stderr, "step two stopped", "ZeroDivisionError: division by zero (see runs/toy/02_two.ipynb)")
    assert (toy.R/"02_two.ipynb").exists()
    toy.step(2, TWO)
    assert toy.run() == ["two"]


def test_a_user_error_is_its_message(toy):
    toy.step(1, "from llmdiff.core import *\ncheck(False, 'the corpus is\\nempty.')")
    r = toy.cli("run")
    assert r.returncode == 1
    sentence(r.stderr, "the corpus is empty (see runs/toy/01_one.ipynb)")
    assert "UserError" not in r.stderr


def test_a_step_that_failed_is_not_up_to_date(toy):
    toy.run()
    toy.step(1, ONE + "\n1/0")
    with pytest.raises(UserError): toy.run()
    toy.step(1, ONE)
    assert toy.run() == ["one", "two"]


def test_a_process_that_dies(toy):
    toy.step(1, "import os\nos._exit(3)")
    with pytest.raises(UserError, match="ended by itself"): toy.run(kernels=True)


def test_missing_input_is_named(toy):
    r = toy.cli("run", "--only", "two")
    assert r.returncode == 1
    sentence(r.stderr, "x.json is missing: run step one first, `llmdiff run --from one`")


def alive(pid):
    try: return open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] != "Z"
    except OSError: return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(toy, sig):
    pidfile = toy.home/"pid"
    toy.step(2, f"import os, time\nopen({str(pidfile)!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)")
    cmd = toy.cmd("run", "--preset", "toy", "--runs", str(toy.R.parent))
    # a shell's background job ignores Ctrl-C, and so would its children
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    end = time.monotonic() + 60
    while not (pidfile.exists() and pidfile.read_text()) and time.monotonic() < end: time.sleep(.1)
    pid = int(pidfile.read_text())
    p.send_signal(sig)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130
    sentence(err, "interrupted")
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end: time.sleep(.1)
    assert not alive(pid)
    toy.step(2, TWO)
    assert toy.run() == ["two"]


def test_two_drivers_in_one_folder(toy):
    toy.R.mkdir(parents=True)
    with steps.locked(toy.R), pytest.raises(UserError, match="another llmdiff run"): toy.run()
    assert toy.run() == ["one", "two"]


def test_the_kernel_is_this_interpreter(toy, monkeypatch, tmp_path):
    d = tmp_path/"jupyter"/"kernels"/"python3"; d.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "trap", "language": "python"}
    (d/"kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    toy.step(1, "import sys, os\nfrom llmdiff.core import *\n"
                "write_json(run_dir(run)/'x.json', [sys.executable, {k: os.environ.get(k) for k in "
                "('HF_HUB_OFFLINE', 'PYTHONHASHSEED', 'TOKENIZERS_PARALLELISM', 'HF_HUB_DISABLE_TELEMETRY', "
                "'DO_NOT_TRACK')}])")
    toy.run(kernels=True, only="one")
    exe, env = json.loads((toy.R/"x.json").read_text())
    assert exe == sys.executable
    assert env == {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def test_hub_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "HF_HUB_OFFLINE" not in settings.environment({"models": {"a": "google/gemma-2-9b+data"}})
    assert "HF_HUB_OFFLINE" not in settings.environment({"models": {"a": "data"}, "sources": {"hub:fineweb": 1}})
    values = {"models": {"a": "data", "b": "gguf:x+data"}, "sources": {"brown": .5, "hub:fineweb@data": .5}}
    assert settings.environment(values)["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("args, said", [
    (["--preset", "tyo"], "unknown preset 'tyo': settings.ini defines toy"),
    (["-p", "bais=64"], "did you mean 'bias'?"),
    (["-p", "n=many"], "parameter n is 'many'"),
    (["-p", "run=elsewhere"], "no notebook declares a parameter 'run'"),
    (["-p", "n"], "-p takes key=value, not 'n'"),
    (["--only", "three"], "there is no step 'three': the steps are one, two"),
    (["--from", "tow"], "there is no step 'tow' (did you mean two?): the steps are one, two"),
    (["--from", "06"], "there is no step '06': the steps are one, two"),
    (["--only", "2"], "there is no step '2': the steps are one, two"),
])
def test_bad_input_before_anything_starts(toy, args, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "root", lambda: toy.home)
    assert commands.main(["run", "--preset", "toy", *args, "--runs", str(tmp_path/"none")]) == 1
    sentence(capsys.readouterr().err, said)
    assert not (tmp_path/"none").exists()


def test_kinds():
    fit = settings.as_kind
    assert fit("a", 3, 0.5) == 3.0 and isinstance(fit("a", 3, .5), float)
    assert fit("a", 2e5, 1) == 200000 and isinstance(fit("a", 2e5, 1), int)
    assert fit("a", 4, "word") == "4" and fit("a", None, 3) is None and fit("a", [1], None) == [1]
    for value, default in ((.5, 1), ("x", 1), (True, 1), ([], {}), ({}, "w")):
        with pytest.raises(UserError): fit("a", value, default)


def test_a_notebook_without_parameters_is_refused(toy):
    nb = toy.nbs/"02_two.ipynb"
    nb.write_text(nb.read_text().replace('"parameters"', '"lost"'))
    with pytest.raises(UserError, match="02_two.ipynb has no cell tagged"): toy.run()


def published(out): return sorted(f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file())


def test_publish(toy):
    toy.add("closer/look", "needs = []")   # not part of a whole run
    toy.run(only="one")
    with pytest.raises(UserError, match="two of preset toy has not run"): publish.publish("toy", toy.R, toy.home)
    toy.run()
    out = publish.publish("toy", toy.R, toy.home, {"bias": 1})
    m = json.loads((out/"manifest.json").read_text())
    assert m["preset"] == "toy" and m["parameters"] == {"bias": 1, "n": 3}
    assert m["versions"]["numpy"] and set(m["seconds"]) == {"one", "two"}
    assert m["files"] == {f: sha256(out/f) for f in ("main.csv", "tables/main.tex")}
    (out/"mine.txt").write_text("not published")
    toy.step(2, TWO.replace("'main'", "'other'")); toy.run(); publish.publish("toy", toy.R, toy.home)
    assert published(out) == ["manifest.json", "mine.txt", "other.csv", "tables/other.tex"]


def test_texts_of_models_and_doubles_are_not_published(toy):
    toy.run()
    (toy.R/"figures").mkdir()
    names = ("figures/plot.png", "figures/plot.pdf", "tables/model_answers.csv", "tables/steering_texts.tex",
             "tables/main.html")
    for name in names: (toy.R/name).write_text("x")
    out = publish.publish("toy", toy.R, toy.home)
    assert published(out) == ["main.csv", "manifest.json", "plot.png", "tables/main.html", "tables/main.tex"]


@pytest.mark.parametrize("name", [
    "../settings.ini",
    "tables/../../settings.ini",
    "tables/..",
    "..",
    "",
    ".",
    "/etc/hosts",
    "other/settings.ini",
])
def test_publishing_removes_nothing_outside_its_folder(toy, name):
    toy.run()
    out = publish.publish("toy", toy.R, toy.home)
    (out/"manifest.json").write_text(json.dumps({"files": {"main.csv": "", name: ""}}))
    with pytest.raises(UserError, match="not a file of that folder"): publish.publish("toy", toy.R, toy.home)
    assert (out/"main.csv").exists() and (toy.home/"settings.ini").exists()


def test_progress_line(toy, tmp_path):
    "What a step shows or writes to LLMDIFF_PROGRESS is on the line; nothing of it stays."
    seen = []
    out = tmp_path/"out.ipynb"
    toy.step(1, "import os, time\nprint('first'); print('half\\r\\x1b[1mdone\\x1b[0m', end='')\ntime.sleep(1.5)\n"
                "open(os.environ['LLMDIFF_PROGRESS'], 'w').write('1,000 of 2,000 tokens')\ntime.sleep(1)")
    report = lambda job: seen.append(kernel.progress(job))
    kernel.execute(toy.nbs/"01_one.ipynb", out, {"run": str(tmp_path)}, settings.environment({}), report)
    assert ("cell 4/4", "done") in seen
    assert any(line == "1,000 of 2,000 tokens" for _, line in seen)
    assert not (tmp_path/".progress").exists()


def test_help_is_quick():
    t = time.monotonic()
    r = llmdiff("--help")
    assert r.returncode == 0 and "run" in r.stdout and time.monotonic() - t < 5
    code = ("import sys, llmdiff.driver.commands; "
            "print([m for m in ('torch', 'transformers', 'papermill', 'nbdev', 'smalldocs') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert llmdiff("--version").stdout.startswith("llmdiff ")


def test_presets_are_listed(capsys):
    assert commands.main(["presets"]) == 0
    out = capsys.readouterr().out
    assert "[tiny]" in out and "[small] (default)" in out and "n_latents = 114688" in out


def test_a_key_for_claude_counts_where_it_is_used(toy, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    toy.step(2, TWO + "\nimport os; os.environ.get('ANTHROPIC_API_KEY')")
    toy.run()
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not a real one")
    assert toy.run() == ["two"]
    monkeypatch.setenv("ANTHROPIC_API_KEY", "another")
    assert toy.run() == []
    assert "not a real one" not in (toy.R/"state.json").read_text()
