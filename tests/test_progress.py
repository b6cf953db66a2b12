"A harvest that is killed, damaged, shared or asked for something else: it ends with the same bytes, or says why not."
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import harvests
from harvests import files, flip, patch_writes, save_toy
from llmdiff import caching
from llmdiff.core import UserError
from llmdiff.engine import progress
from llmdiff.engine.progress import disk_width, join, ProgressLine
from llmdiff.engine.store import Store

one_thread = harvests.one_thread
docs = harvests.docs
family = harvests.family
folder = harvests.folder
make = harvests.make
whole = harvests.whole
whole8 = harvests.whole8


# ---- killed runs

KILL = """
import os, signal, sys, json, pandas as pd, torch
torch.set_num_threads(1)
from llmdiff.caching import harvest, HarvestOptions
from llmdiff.engine import progress, store
real, left = store.write_tensors, [int(sys.argv[2])]
def write(file, tensors):
    if left[0] == 0:
        open(str(file) + ".half", "wb").write(b"half")           # what a cut leaves: a file under another name
        open(file.parent/f".{file.stem}.tmp1.safetensors", "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(file, tensors)
progress.write_tensors = store.write_tensors = write
a = json.load(open(sys.argv[1]))
options = HarvestOptions(dtype="float32", shard_tokens=100, batch_tokens=64)
harvest(a["models"], pd.read_parquet(a["docs"]), 1, a["folder"], options)
"""


def python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)


def test_killed_by_the_system_it_continues_and_ends_with_the_same_bytes(make, folder, docs, family, whole, tmp_path):
    docs.to_parquet(tmp_path/"docs.parquet")
    args = dict(models=family, docs=str(tmp_path/"docs.parquet"), folder=str(folder))
    (tmp_path/"a.json").write_text(json.dumps(args))
    n = len(Store(whole).manifest["shards"])
    r = python(KILL, tmp_path/"a.json", n + 2)
    assert r.returncode == -signal.SIGKILL, r.stderr
    with pytest.raises(UserError, match="half built.*continues"): Store(folder)
    said = []
    make(say=said.append)
    assert [line.split(":")[0] for line in said] == ["B", "C"]    # A was whole and is not read again
    assert files(folder) == files(whole)                          # manifest, shards, and no debris


def interrupted(make, monkeypatch, kill_at, **kw):
    "A harvest that ends after `kill_at` files are written."
    left = iter(range(kill_at))

    def write(real, *a):
        if next(left, None) is None: raise KeyboardInterrupt
        return real(*a)

    with monkeypatch.context() as m:
        patch_writes(m, write)
        with pytest.raises(KeyboardInterrupt): make(**kw)


@pytest.mark.parametrize("kill_at", [0, 1, 4, 7, 13])
def test_an_interruption_anywhere_leaves_nothing_wrong(make, folder, whole, monkeypatch, kill_at):
    interrupted(make, monkeypatch, kill_at)
    make()
    assert files(folder) == files(whole)


@pytest.mark.parametrize("kill_at", [0, 1, 7, 9, 13])
def test_int8_interrupted_and_continued(make, folder, whole8, monkeypatch, kill_at):
    interrupted(make, monkeypatch, kill_at, store_dtype="int8")
    make(store_dtype="int8")
    assert files(folder) == files(whole8)


FORKS = """
import json, os, random, signal, sys, time, traceback, pandas as pd, torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from llmdiff.caching import harvest, HarvestOptions
a = json.load(open(sys.argv[1])); docs = pd.read_json(a["docs"]); r = random.Random(a["seed"])
def start(folder, **kw):
    if pid := os.fork(): return pid
    options = HarvestOptions(dtype="float32", shard_tokens=100, batch_tokens=64, **kw)
    try:
        harvest(a["models"], docs, 1, folder, options, say=lambda s: None)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
t = time.monotonic(); assert end(start(a["folder"] + "_undisturbed")) == 0; took = time.monotonic() - t
world, killed = a["world"], 0
for n in range(a["kills"]):
    pids = [start(a["folder"], part=(i, world)) for i in range(world)]
    time.sleep(r.random()*took*.5/world); victim = pids[n % world]
    os.kill(victim, signal.SIGKILL); codes = [end(p) for p in pids]; killed += codes.count(-signal.SIGKILL)
    assert set(codes) <= {0, -signal.SIGKILL}, codes
codes = [end(p) for p in [start(a["folder"], part=(i, world)) for i in range(world)]]
assert set(codes) == {0}, codes
print(killed)
"""


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(docs, family, whole, folder, tmp_path, world):
    docs.to_json(tmp_path/"docs.json")
    args = dict(models=family, docs=str(tmp_path/"docs.json"), folder=str(folder), kills=6, seed=world, world=world)
    (tmp_path/"a.json").write_text(json.dumps(args))
    r = python(FORKS, tmp_path/"a.json")
    assert r.returncode == 0, r.stderr
    assert int(r.stdout) >= 1, "no run was killed before its end"
    if world > 1: join(folder)
    assert files(folder) == files(whole) == files(tmp_path/"store_undisturbed")


# ---- damaged files

def test_a_bad_part_is_named_and_read_again(make, folder, whole, monkeypatch):
    def stop(*a): raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(caching, "join_parts", stop)
        with pytest.raises(KeyboardInterrupt): make()
    flip(folder/"parts"/"B_00001.safetensors", -3)
    (folder/"parts"/"C_00000.safetensors").write_bytes(b"short")
    said = []
    make(say=said.append)
    assert said[0].startswith("part B 1 ") and said[1].startswith("part C 0 ") and len(said) == 4
    assert files(folder) == files(whole)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_bad_shard_is_named_and_rebuilt_alone(make, folder, whole, harm):
    shutil.copytree(whole, folder)
    file = folder/"shard_00002.safetensors"
    if harm == "flip": flip(file)
    if harm == "cut": file.write_bytes(file.read_bytes()[:1000])
    if harm == "remove": file.unlink()
    if harm != "flip":
        with pytest.raises(UserError, match="shard_00002.safetensors is missing or cut short"): Store(folder)
    said = []
    make(say=said.append)
    assert "shard_00002" in said[0] and all("in 1 shard," in s for s in said[1:])
    assert files(folder) == files(whole)


def test_a_whole_store_is_not_read_again(make, folder, whole, monkeypatch):
    shutil.copytree(whole, folder)
    monkeypatch.setattr(caching, "load_model", lambda *a: pytest.fail("loaded a model"))
    make()


# ---- several processes

@pytest.mark.parametrize("world, kind", [(2, "bfloat16"), (3, "bfloat16"), (2, "int8")])
def test_several_processes_leave_the_bytes_of_one(make, folder, whole, whole8, world, kind):
    one = whole8 if kind == "int8" else whole
    for r in reversed(range(world)):
        assert make(part=(r, world), store_dtype=kind) is None
        if r:
            with pytest.raises(UserError, match="lacks shards 0, "): join(folder)
        else:
            with pytest.raises(UserError, match="half built"): Store(folder)
    join(folder)
    assert files(folder) == files(one) and Store(folder).hash == Store(one).hash
    assert join(folder).n_tokens == Store(whole).n_tokens                       # again: nothing to do
    make(part=(0, world), store_dtype=kind)
    assert files(folder) == files(one)


def test_another_number_of_processes_continues(make, folder, whole, monkeypatch):
    real, loaded = caching.load_model, []

    def noted(*a):
        loaded.append(a[0])
        return real(*a)

    monkeypatch.setattr(caching, "load_model", noted)
    make(part=(1, 3))
    make(part=(2, 3))
    n = len(loaded)
    make(part=(1, 2))                                           # of its shards 1, 3, 5, only 3 is missing
    assert len(loaded) == n + 3
    make()
    assert files(folder) == files(whole)


def test_processes_that_were_asked_for_different_things(make, folder):
    make(part=(0, 2))
    with pytest.raises(UserError, match="layer 1, and 2 is asked.*rebuild=True"): make(layer=2, part=(1, 2))
    make(layer=2, part=(1, 2), rebuild=True)
    with pytest.raises(UserError, match="asked for different things.*layer"): join(folder)
    with pytest.raises(UserError, match="below 2"): make(part=(2, 2))


def test_a_rebuild_by_several_processes(make, folder, whole, docs):
    make(docs=docs[:29], shard_tokens=50)                       # other shards in the folder, and more of them
    with pytest.raises(UserError, match="rebuild=True"): make(part=(1, 2))
    for r in (1, 0): make(part=(r, 2), rebuild=True)
    join(folder)
    assert files(folder) == files(whole)


def test_a_bad_shard_is_rebuilt_by_its_process(make, folder, whole):
    shutil.copytree(whole, folder)
    flip(folder/"shard_00002.safetensors")
    said = []
    for r in (0, 1): make(say=said.append, part=(r, 2))
    assert "shard_00002" in said[0] and len(said) == 4
    join(folder)
    assert files(folder) == files(whole)


# ---- changed inputs

def rows_of(store, model): return next(store.rows([model]))["acts"]


def test_a_changed_model_is_refused_or_rebuilt_when_told(make, folder, whole, family, tmp_path):
    shutil.copytree(whole, folder)
    s, new = Store(folder), {**family, "B": save_toy(tmp_path/"newB", seed=9)}
    s.check(models=family, layer=1)
    s.check(models={"C": family["C"]})
    same = str(shutil.copytree(family["B"], tmp_path/"copy"))
    s.check(models={**family, "B": same})                       # the same weights elsewhere
    with pytest.raises(UserError, match="other weights of B"): s.check(models=new)
    with pytest.raises(UserError, match="other weights of B.*rebuild=True"): make(models=new)
    assert files(folder) == files(whole)                        # refused: nothing lost
    said = []
    t = make(models=new, rebuild=True, say=said.append)
    assert "other weights of B" in said[0]
    t.check(models=new)
    assert not torch.equal(rows_of(t, "B"), rows_of(Store(whole), "B"))
    assert torch.equal(rows_of(t, "C"), rows_of(Store(whole), "C"))


CHANGES = {"layer": (2, "layer 1, and 2 is asked"), "docs": (20, "another corpus"),
           "models": (2, "the models A, B, C, and A, B are asked"), "shard_tokens": (50, "shard_tokens 100, and 50"),
           "dtype": ("bfloat16", "dtype float32, and bfloat16")}


@pytest.mark.parametrize("name", CHANGES)
def test_other_inputs_are_named(make, folder, whole, docs, family, name):
    shutil.copytree(whole, folder)
    value, says = CHANGES[name]
    if name == "docs": value = docs[:value]
    if name == "models": value = {n: family[n] for n in list(family)[:value]}
    with pytest.raises(UserError, match=says): make(**{name: value})
    assert files(folder) == files(whole)


def test_an_unreadable_manifest_is_refused(make, folder, whole):
    shutil.copytree(whole, folder)
    (folder/"manifest.json").write_text('{"format": 1, "na')
    with pytest.raises(UserError, match="format unreadable"): make()
    make(rebuild=True)
    assert files(folder) == files(whole)


# ---- room on the disk

def test_the_disk_never_holds_more_than_was_said(make, folder, whole8, monkeypatch):
    "Measured at every write, for parts and shards together."
    most = []

    def write(real, *a):
        entry = real(*a)
        most.append(sum(f.stat().st_size for f in folder.rglob("*.safetensors")))
        return entry

    patch_writes(monkeypatch, write)
    for kind in ("bfloat16", "int8"):
        most.clear()
        s = make(store_dtype=kind, rebuild=True)
        rows = [x["rows"] for x in s.manifest["shards"]]
        head = 3000*len(rows)*4             # headers, moments and norms, which matter in a toy alone
        assert max(most) <= disk_width(3, 32, kind, torch.float32)*(s.n_tokens + max(rows)) + head


# ---- the line of progress

def test_progress_goes_to_the_drivers_file(make, monkeypatch, tmp_path):
    note, lines = tmp_path/"note", []
    monkeypatch.setenv("LLMDIFF_PROGRESS", str(note))
    seconds = iter(range(0, 10**6, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))

    def write(real, *a):
        if note.exists(): lines.append(note.read_text())
        return real(*a)

    patch_writes(monkeypatch, write)
    make()
    assert len(lines) > 5 and all("tokens/s" in x and x.endswith("left") for x in lines) and not note.exists()
    done = [int(x.split()[1].replace(",", "")) for x in lines]
    assert done == sorted(done)


def test_progress_is_silent_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("LLMDIFF_PROGRESS", raising=False)
    line = ProgressLine(10, "x")
    line.add(5)
    line.add(5)
    assert capsys.readouterr() == ("", "")
