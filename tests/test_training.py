"Training: the sparse steps follow the dense ones, a killed run loses nothing, what is finished is not trained again."
import itertools
import json
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llmdiff import training
from llmdiff.engine.progress import finish_store
from llmdiff.core import UserError
from llmdiff.crosscoder import Crosscoder, delta_norm, dense_loss, set_normalisation
from llmdiff.engine.store import moments, Store, write_tensors
from llmdiff.training import new_state, Options, PairOptions, train, train_pair, train_step
from llmdiff.worlds.synthetic import easy_world

PAIR = ["pt", "it"]
ARGS = dict(n_latents=64, k=4, batch=256, train_tokens=30_000, lr=3e-3, dead_after=4000, k_aux=8, aux_latents=16)
FILES = ("model.safetensors", "config.json", "log.parquet")


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def write_shard(folder, i, acts, first, n_docs):
    "One shard of a store; its documents follow `first`."
    file = f"shard_{i:05d}.safetensors"
    doc = (torch.arange(len(acts))*n_docs//len(acts) + first).int()
    _, mean, q = moments(acts)
    wrote = write_tensors(folder/file, dict(acts=acts, token=doc*0, pos=doc*0, doc=doc, mean=mean, q=q))
    return dict(file=file, rows=len(acts), docs=n_docs, doc_first=int(doc[0]), doc_end=int(doc[-1])+1, **wrote)


def small_store(folder, n=6000, d=24, docs=60, names=("pt", "it")):
    "A real store on disk, in two shards, with planted concepts."
    folder.mkdir()
    world, shards = easy_world(d, 40), {}
    for i in range(2):
        s = write_shard(folder, i, world(n//2, seed=i).bfloat16(), i*docs//2, docs//2)
        shards[s["file"]] = s
    specs = {m: m for m in names}
    state = dict(format=1, models=specs, names=list(names), layer=1, corpus="c", tokenizer=None, dtype="float32",
                 n_docs=docs, shard_tokens=n//2, shards=shards, parts={})
    return finish_store(folder, state, specs, d)


@pytest.fixture
def store(tmp_path): return small_store(tmp_path/"store")


def fit(store, folder, pair=PAIR, every=60., **changed):
    return train_pair(store, pair, folder, PairOptions(**{**ARGS, **changed}), every=every)


def assert_same_files(a, b):
    for f in FILES: assert (a/f).read_bytes() == (b/f).read_bytes(), f


# ---- steps

def make(d=24, D=200, k=6, noise=.03):
    "A crosscoder away from its symmetric start, as training leaves it."
    cc = Crosscoder(d, D, k, "AB")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in cc.parameters(): p += noise*torch.randn(p.shape, generator=g)
        cc.W_dec *= torch.rand(D, 2, 1, generator=g)*2     # norms differ between models and latents
    return cc


def acts(n=300, M=2, d=24, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, M, d, generator=g)*torch.rand(n, 1, 1, generator=g).pow(-.5)   # heavy tails


def test_trajectory_of_adam_steps():
    dense, sparse = make(), make()
    dense_opt, sparse_opt = (torch.optim.Adam(c.parameters(), lr=1e-3, fused=True) for c in (dense, sparse))
    state, options = new_state(sparse), Options(select="float32")
    for i in range(8):
        x = acts(seed=i)
        dense_opt.zero_grad()
        dense_loss(dense, x)[0].backward()
        torch.nn.utils.clip_grad_norm_(dense.parameters(), 1.)
        dense_opt.step()
        train_step(sparse, sparse_opt, x, state, options)
    for p, q in zip(dense.parameters(), sparse.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6)


def new(world, D, k, seed=9):
    stat = world(8000, seed=seed).double()
    cc = Crosscoder(world.d_model, D, k, "AB")
    return set_normalisation(cc, stat.mean(0), stat.var(0, unbiased=False).sum(1))


def test_planted_concepts_are_found_with_their_owner():
    world = easy_world(32, 40)
    cc = new(world, 64, 3)
    options = Options(lr=5e-3, dead_after=10**6)
    train(lambda s: (world(256, seed=100+i) for i in itertools.count(s)), cc, 300, options)
    rows = world.decoder*cc.scale.float()[:, None]
    target = torch.nn.functional.normalize(rows.flatten(1), dim=1)
    cos = target @ torch.nn.functional.normalize(cc.W_dec.detach().flatten(1), dim=1).T
    best = cos.max(1)
    d = torch.from_numpy(delta_norm(cc))[best.indices]
    assert (best.values > .8).float().mean() > .8
    kind = world.truth.kind.to_numpy()
    assert d[kind == "A-only"].median() < .15 and d[kind == "B-only"].median() > .85


def test_dead_latents_come_back():
    "With AuxK, latents that cannot become active at the start come to life; without it they stay dead."
    world, dead = easy_world(32, 96), {}
    data = [world(256, seed=100+i) for i in range(250)]
    for weight in (1/32, 0.):
        cc = new(world, 64, 4)
        cc.W_enc.data[:32] *= .02
        options = Options(lr=1e-2, dead_after=2000, k_aux=16, aux_weight=weight)
        dead[weight] = train(lambda s: iter(data[s:]), cc, 250, options).dead.iloc[-1]
    assert dead[0.] > .4 and dead[1/32] < .15


def test_annealed_k_ends_at_k(store, tmp_path, monkeypatch):
    active, real = [], training.train_step

    def step(cc, opt, x, state, options, per_token):
        active.append(per_token)
        return real(cc, opt, x, state, options, per_token)

    monkeypatch.setattr(training, "train_step", step)
    cc, log, res = fit(store, tmp_path/"cc", k_start=12)
    assert active[0] == 12 and set(active[36:]) == {4} and sorted(active, reverse=True) == active
    assert log.l0.iloc[0] > 10 and log.l0.iloc[-1] == 4 and abs(res["l0"]-4) < 1
    with pytest.raises(UserError, match="k_start = 65 does not fit a dictionary of 64"):
        fit(store, tmp_path/"other", k_start=65)


def test_a_large_dictionary_needs_no_large_memory():
    "114,688 latents, batches of 4,096: the scores of a batch alone would take 1.9 GB."
    code = """
import resource, torch
from llmdiff.crosscoder import Crosscoder
from llmdiff.training import new_state, Options, train_step
cc = Crosscoder(8, 114_688, 100, "AB")
opt = torch.optim.Adam(cc.parameters(), fused=True)
x, state, options = torch.randn(4096, 2, 8), new_state(cc), Options(select="float32")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(2): train_step(cc, opt, x, state, options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1e6)
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert float(r.stdout) < .6, r.stdout


# ---- killed runs

class Killed(Exception): pass


def kill_at(monkeypatch, step):
    real = training.train_step

    def f(cc, opt, x, state, *args):
        if state.step == step: raise Killed
        return real(cc, opt, x, state, *args)

    monkeypatch.setattr(training, "train_step", f)


def test_killed_run_goes_on_to_the_last_bit(store, tmp_path, monkeypatch):
    whole, log, res = fit(store, tmp_path/"whole")
    for stop in (40, 95):
        with monkeypatch.context() as m:
            kill_at(m, stop)
            with pytest.raises(Killed): fit(store, tmp_path/"cut", every=0)
        assert (tmp_path/"cut/checkpoint.safetensors").exists() and not (tmp_path/"cut/model.safetensors").exists()
    steps, real = [], training.train_step
    with monkeypatch.context() as m:
        m.setattr(training, "train_step", lambda *a: steps.append(a[3].step) or real(*a))
        cut, log2, res2 = fit(store, tmp_path/"cut")
    assert steps[0] == 95 and len(steps) == 117-95          # it did go on, and not from the beginning
    assert_same_files(tmp_path/"whole", tmp_path/"cut")
    assert not (tmp_path/"cut/checkpoint.safetensors").exists()


TRAIN = """
import sys, json, torch
import llmdiff.training as training
from llmdiff.engine.store import Store
torch.set_num_threads(1)
options = training.PairOptions(**json.loads(sys.argv[3]))
training.train_pair(Store(sys.argv[1]), ["pt", "it"], sys.argv[2], options, every=0)
"""


def train_command(tmp_path, code=TRAIN, args=ARGS):
    return [sys.executable, "-c", code, str(tmp_path/"store"), str(tmp_path/"cut"), json.dumps(args)]


def test_killed_by_the_system_at_random_points(store, tmp_path):
    "SIGKILL leaves no time for anything: whatever is on disk then must do."
    args, rng, kills = {**ARGS, "train_tokens": 400_000}, np.random.default_rng(), 0
    fit(store, tmp_path/"whole", **args)
    file = tmp_path/"cut/checkpoint.safetensors"
    for _ in range(3):
        p = subprocess.Popen(train_command(tmp_path, args=args))
        before = file.stat().st_mtime_ns if file.exists() else 0
        while p.poll() is None and not (file.exists() and file.stat().st_mtime_ns > before): time.sleep(.01)
        time.sleep(rng.uniform(0, .5))
        p.kill()
        kills += p.wait() == -signal.SIGKILL
    assert kills and not (tmp_path/"cut/model.safetensors").exists()
    fit(store, tmp_path/"cut", **args)
    assert_same_files(tmp_path/"whole", tmp_path/"cut")


FULL_DISK = """
import resource, signal
import llmdiff.training
save, n = llmdiff.training.save_checkpoint, []
def full(*a):
    n.append(1)
    if len(n) == 3:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return save(*a)
llmdiff.training.save_checkpoint = full
"""


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(store, tmp_path):
    "The system refuses files above a size, as a full disk would, from the third checkpoint on."
    r = subprocess.run(train_command(tmp_path, FULL_DISK + TRAIN), capture_output=True, text=True)
    last = r.stderr.strip().splitlines()[-1]
    said = (r"UserError: the checkpoint of step 3 of pt-it could not be written .*: make room and run again, "
            "training goes on from the one before it")
    assert r.returncode and re.search(said, last), r.stderr
    with safe_open(tmp_path/"cut/checkpoint.safetensors", "pt") as f: assert f.metadata()["step"] == "2"
    assert [f.name for f in (tmp_path/"cut").iterdir()] == ["checkpoint.safetensors"]


def test_checkpoint_of_other_settings_is_not_used(store, tmp_path, monkeypatch, capsys):
    folder = tmp_path/"cc"
    for other in (dict(lr=1e-3), dict(seed=7), dict(batch=128)):
        with monkeypatch.context() as m:
            kill_at(m, 50)
            with pytest.raises(Killed): fit(store, folder, every=0)
        log = fit(store, folder, **other)[1]
        assert "belongs to other settings" in capsys.readouterr().out and log.step.iloc[0] <= 2
        for f in folder.iterdir(): f.unlink()
    (folder/"checkpoint.safetensors").write_bytes(b"half a file")
    fit(store, folder)
    assert "is damaged" in capsys.readouterr().out


# ---- one pair

def test_finished_pair_is_loaded_unless_something_changed(store, tmp_path, monkeypatch):
    calls, real = [], training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: calls.append(1) or real(*a, **k))
    one, two = fit(store, tmp_path/"cc"), fit(store, tmp_path/"cc")
    assert len(calls) == 1 and one[2] == two[2]
    assert one[1].equals(two[1]) and torch.equal(one[0].W_dec, two[0].W_dec)
    json.loads((tmp_path/"cc/config.json").read_text())
    fit(store, tmp_path/"cc", k=5)
    assert len(calls) == 2
    store.manifest["shards"][0]["sha256"] = "other"                       # the store has changed
    fit(store, tmp_path/"cc", k=5)
    assert len(calls) == 3


def test_what_the_key_holds(store):
    "The settings as they have always been named, so that what is finished stays finished; not how they are computed."
    options = PairOptions(**ARGS)
    assert options.named(("pt", "it")) == dict(
        pair=["pt", "it"], n_latents=64, k=4, batch=256, train_tokens=30_000, lr=3e-3, score="sum", seed=0, held=.1,
        k_start=None, dead_after=4000, k_aux=8, aux_latents=16, aux_weight=.25)
    assert PairOptions(**ARGS, select="float32").named(PAIR) == options.named(PAIR)
    keys = {training.pair_key(store, PAIR, PairOptions(**ARGS, select=s), "cpu") for s in ("float32", "bfloat16")}
    assert len(keys) == 2    # the dtype of the scan changes what is learned


def test_held_documents_are_never_trained_on(store, tmp_path, monkeypatch):
    asked, real = [], Store.batches
    monkeypatch.setattr(Store, "batches", lambda *a, docs, **k: asked.append(docs) or real(*a, docs=docs, **k))
    _, _, res = fit(store, tmp_path/"cc")
    assert asked == [(0, 54)] and res["tokens"] == 300     # 6 of 60 documents: 3 for the threshold, 3 to measure
    assert abs(res["l0"]-4) < 1 and min(res["fve"]) > .7


def test_order_of_the_pair_is_kept(store, tmp_path):
    cc = fit(store, tmp_path/"cc", ["it", "pt"])[0]
    assert cc.names == ["it", "pt"] and torch.allclose(cc.mean, torch.tensor(store.mean).flip(0))


# ---- what is refused

def test_run_that_diverges_is_one_sentence(store, tmp_path):
    with pytest.raises(UserError, match="training of pt-it diverged at step .* lower lr"):
        fit(store, tmp_path/"cc", lr=300.)
    assert not (tmp_path/"cc/model.safetensors").exists()


@pytest.mark.parametrize("change, sentence", [
    (dict(n_latents=10_000), "fewer than 10,000 latents"),
    (dict(train_tokens=60, batch=8), "60 training tokens are fewer"),
    (dict(k=65), "k = 65"),
    (dict(batch=20_000), "batch = 20,000 is larger")])
def test_settings_refused_before_training(store, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence): fit(store, tmp_path/"cc", **change)
    assert not (tmp_path/"cc").exists()


def test_gpu_memory_that_runs_out_is_one_sentence(store, tmp_path, monkeypatch):
    def out(*a): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(training, "train_step", out)
    for total, words in ((80e9, "set batch = 128"), (100_000, "latents need .* set n_latents = ")):
        device = types.SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda dev, device=device: device)
        with pytest.raises(UserError, match=words): fit(store, tmp_path/"cc")
