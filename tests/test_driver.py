"The driver on a project of two toy steps: what runs again and why, how it fails, what it leaves."
import json, os, signal, subprocess, sys, time

import pytest

from conftest import ONE, TWO, llmdiff
from llmdiff import run as R
from llmdiff.core import UserError


def sentence(text, *parts):
    "One line that holds all parts and no traceback."
    text = text.strip()
    assert "\n" not in text and "Traceback" not in text, text
    for p in parts: assert p in text, text


def test_second_run_does_nothing(toy):
    assert toy.run(kernels=True) == ["01_one", "02_two"]
    assert toy.run(kernels=True) == [] and toy.out.count("up to date") == 2
    assert (toy.R/"tables"/"main.csv").read_text() == "x,y\n6,7\n"
    assert (toy.R/"01_one.ipynb").exists() and (toy.R/"02_two.ipynb").exists()


def test_a_parameter_repeats_its_step_and_the_later_ones(toy):
    toy.run()
    assert toy.run(values={"bias": 2}) == ["02_two"] and "02_two: bias changed" in toy.out
    assert toy.run(values={"bias": 2, "n": 4}) == ["01_one", "02_two"]
    assert toy.run(values={"bias": 2, "n": 4}) == []


def test_code_counts_and_prose_does_not(toy):
    toy.run()
    nb = toy.nbs/"01_one.ipynb"
    d = json.loads(nb.read_text())
    d["cells"][0]["source"] = "# Another title"; d["cells"][2]["source"] = ONE + "   # a remark"; d["cells"][2]["outputs"] = []
    nb.write_text(json.dumps(d))
    assert toy.run() == []
    toy.step(1, ONE.replace("n*2", "n*3"))
    assert toy.run() == ["01_one", "02_two"]


def test_data_counts(toy):
    toy.run()
    (toy.home/"data"/"words.txt").write_text("SOME WORDS")
    assert toy.run() == ["01_one", "02_two"]


def test_modules_count(toy, monkeypatch):
    toy.run()
    real = R.syntax
    monkeypatch.setattr(R, "syntax", lambda s: real(s) + ("changed" if "def need(" in s else ""))
    assert toy.run() == ["01_one", "02_two"]


def test_files_named_by_parameters_count(tmp_path):
    (tmp_path/"m").mkdir(); (tmp_path/"m"/"w").write_text("1")
    spec = {"models": {"a": f"{tmp_path/'m'}+nowhere"}}
    nb = tmp_path/"nb.ipynb"; nb.write_text('{"cells": []}')
    key = lambda: R.step_key(nb, spec, "", "", tmp_path)
    first = key()
    assert key() == first
    (tmp_path/"m"/"w").write_text("2")
    assert key() != first


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_harmed_output_is_noticed(toy, harm):
    toy.run()
    f = toy.R/"x.json"
    f.unlink() if harm == "missing" else f.write_text("12345")
    assert toy.run() == ["01_one", "02_two"] and f"x.json {'is missing' if harm == 'missing' else 'has changed'}" in toy.out


def test_only_from_force(toy):
    toy.run()
    assert toy.run(only="2") == [] and toy.run(only="02", force=True) == ["02_two"]
    assert toy.run(start="1", force=True) == ["01_one", "02_two"]
    assert toy.run(only="1", force=True) == ["01_one"]
    assert toy.run() == ["02_two"]   # because 01 ran again since


def test_a_step_run_on_old_inputs_is_not_taken_for_new(toy):
    toy.run()
    assert toy.run(values={"n": 4}, only="2") == []         # its own inputs on disk are as they were
    assert toy.run(values={"n": 4}) == ["01_one", "02_two"]


def test_a_table_no_longer_made_goes(toy):
    toy.run()
    toy.step(2, TWO.replace("'main'", "'other'"))
    toy.run()
    assert sorted(f.name for f in (toy.R/"tables").iterdir()) == ["other.csv", "other.tex"]


def test_unreadable_state_is_no_state(toy):
    toy.run()
    (toy.R/"state.json").write_text('{"steps": {"01_o')
    assert toy.run() == ["01_one", "02_two"]


def test_a_failing_cell(toy):
    toy.step(2, "1/0")
    r = toy.cli("run")
    assert r.returncode == 1 and "01_one: done" in r.stdout
    sentence(r.stderr, "02_two", "ZeroDivisionError: division by zero (see runs/toy/02_two.ipynb)")
    assert (toy.R/"02_two.ipynb").exists()
    toy.step(2, TWO)
    assert toy.run() == ["02_two"]


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
    assert toy.run() == ["01_one", "02_two"]


def test_a_process_that_dies(toy):
    toy.step(1, "import os\nos._exit(3)")
    with pytest.raises(UserError, match="ended by itself"): toy.run(kernels=True)


def test_missing_input_is_named(toy):
    r = toy.cli("run", "--only", "2")
    assert r.returncode == 1
    sentence(r.stderr, "x.json is missing: run notebook 01_one first")


def alive(pid):
    try: return open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] != "Z"
    except OSError: return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(toy, sig):
    pidfile = toy.home/"pid"
    toy.step(2, f"import os, time\nopen({str(pidfile)!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)")
    p = subprocess.Popen(toy.cmd("run", "--preset", "toy", "--runs", str(toy.R.parent)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # a shell's background job ignores Ctrl-C, and so would its children
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
    assert toy.run() == ["02_two"]


def test_two_drivers_in_one_folder(toy):
    toy.R.mkdir(parents=True)
    with R.locked(toy.R), pytest.raises(UserError, match="another llmdiff run"): toy.run()
    assert toy.run() == ["01_one", "02_two"]


def test_the_kernel_is_this_interpreter(toy, monkeypatch, tmp_path):
    d = tmp_path/"jupyter"/"kernels"/"python3"; d.mkdir(parents=True)
    (d/"kernel.json").write_text(json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "trap", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    toy.step(1, "import sys, os\nfrom llmdiff.core import *\nwrite_json(run_dir(run)/'x.json', [sys.executable, {k: os.environ.get(k) for k in "
                "('HF_HUB_OFFLINE', 'PYTHONHASHSEED', 'TOKENIZERS_PARALLELISM', 'HF_HUB_DISABLE_TELEMETRY', 'DO_NOT_TRACK')}])")
    toy.run(kernels=True, only="1")
    exe, env = json.loads((toy.R/"x.json").read_text())
    assert exe == sys.executable
    assert env == {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def test_hub_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "HF_HUB_OFFLINE" not in R.environment({"models": {"a": "google/gemma-2-9b+data"}})
    assert "HF_HUB_OFFLINE" not in R.environment({"models": {"a": "data"}, "sources": {"hub:fineweb": 1}})
    assert R.environment({"models": {"a": "data", "b": "gguf:x+data"}, "sources": {"brown": .5, "hub:fineweb@data": .5}})["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("args, said", [
    (["--preset", "smal"], "unknown preset 'smal': settings.ini defines tiny, small"),
    (["--preset", "tiny", "-p", "n_latens=64"], "did you mean 'n_latents'?"),
    (["--preset", "tiny", "-p", "n_latents=many"], "parameter n_latents is 'many'"),
    (["--preset", "tiny", "-p", "run=elsewhere"], "no notebook declares a parameter 'run'"),
    (["--preset", "tiny", "-p", "n_latents"], "-p takes key=value, not 'n_latents'"),
    (["--preset", "tiny", "--only", "42"], "there is no step 42: the steps are 01"),
    (["--preset", "tiny", "--from", "x"], "there is no step x"),
])
def test_bad_input_before_anything_starts(args, said, tmp_path, capsys):
    assert R.main(["run", *args, "--runs", str(tmp_path)]) == 1
    sentence(capsys.readouterr().err, said)
    assert not list(tmp_path.iterdir())


def test_kinds():
    fit = R.fit
    assert fit("a", 3, 0.5) == 3.0 and isinstance(fit("a", 3, .5), float) and fit("a", 2e5, 1) == 200000 and isinstance(fit("a", 2e5, 1), int)
    assert fit("a", 4, "word") == "4" and fit("a", None, 3) is None and fit("a", [1], None) == [1]
    for value, default in ((.5, 1), ("x", 1), (True, 1), ([], {}), ({}, "w")):
        with pytest.raises(UserError): fit("a", value, default)


def test_a_notebook_without_parameters_is_refused(toy):
    nb = toy.nbs/"02_two.ipynb"
    nb.write_text(nb.read_text().replace('"parameters"', '"lost"'))
    with pytest.raises(UserError, match="02_two.ipynb has no cell tagged"): toy.run()


def test_publish(toy):
    toy.run(only="1")
    with pytest.raises(UserError, match="02_two of preset toy has not run"): R.publish("toy", toy.R, toy.home)
    toy.run()
    out = R.publish("toy", toy.R, toy.home, {"bias": 1})
    m = json.loads((out/"manifest.json").read_text())
    assert m["preset"] == "toy" and m["parameters"] == {"bias": 1, "n": 3} and m["versions"]["numpy"] and set(m["seconds"]) == {"01_one", "02_two"}
    assert m["files"] == {f: R.sha256(out/f) for f in ("main.csv", "main.tex")}
    (out/"mine.txt").write_text("not published")
    toy.step(2, TWO.replace("'main'", "'other'")); toy.run(); R.publish("toy", toy.R, toy.home)
    assert sorted(f.name for f in out.iterdir()) == ["manifest.json", "mine.txt", "other.csv", "other.tex"]


def test_progress_line(toy, tmp_path):
    "What a step shows or writes to LLMDIFF_PROGRESS is on the line; nothing of it stays."
    seen = []
    out = tmp_path/"out.ipynb"
    toy.step(1, "import os, time\nprint('first'); print('half\\r\\x1b[1mdone\\x1b[0m', end='')\ntime.sleep(1.5)\nopen(os.environ['LLMDIFF_PROGRESS'], 'w').write('1,000 of 2,000 tokens')\ntime.sleep(1)")
    R.execute(toy.nbs/"01_one.ipynb", out, {"run": str(tmp_path)}, R.environment({}), lambda job: seen.append(R.progress(job)))
    assert ("cell 2/2", "done") in seen or ("cell 3/3", "done") in seen
    assert any(line == "1,000 of 2,000 tokens" for _, line in seen)
    assert not (tmp_path/".progress").exists()


def test_help_is_quick():
    t = time.monotonic()
    r = llmdiff("--help")
    assert r.returncode == 0 and "run" in r.stdout and time.monotonic() - t < 5
    code = "import sys, llmdiff.run; print([m for m in ('torch', 'transformers', 'papermill', 'nbdev', 'smalldocs') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert llmdiff("--version").stdout.startswith("llmdiff ")


def test_presets_are_listed(capsys):
    assert R.main(["presets"]) == 0
    out = capsys.readouterr().out
    assert "[tiny]" in out and "[small] (default)" in out and "n_latents = 114688" in out


def test_a_key_for_claude_counts_where_it_is_used(toy, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    toy.step(2, TWO + "\nimport os; os.environ.get('ANTHROPIC_API_KEY')")
    toy.run()
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not a real one")
    assert toy.run() == ["02_two"]
    monkeypatch.setenv("ANTHROPIC_API_KEY", "another")
    assert toy.run() == []
    assert "not a real one" not in (toy.R/"state.json").read_text()
