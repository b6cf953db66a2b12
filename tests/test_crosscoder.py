"The crosscoder: sparse gradients are the dense ones, codes stand alone, what is saved is loaded."
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

from llmdiff import crosscoder, training
from llmdiff.caching import finish_store
from llmdiff.core import UserError
from llmdiff.crosscoder import (
    aux_grads, batch_topk, calibrate, Crosscoder, delta_norm, dense_aux, dense_code, dense_loss, encode, load, save,
    scan_dtype, score_norm, select, set_normalisation, sparse_grads)
from llmdiff.engine.store import moments, Store, write_tensors
from llmdiff.training import train, train_pair, train_step
from llmdiff.worlds.synthetic import easy_world

D = 200   # latents of `make`


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def make(d=24, D=D, k=6, M=2, score="sum", seed=0, noise=.03):
    "A crosscoder away from its symmetric start, as training leaves it."
    cc = Crosscoder(d, D, k, "ABC"[:M], score, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in cc.parameters(): p += noise*torch.randn(p.shape, generator=g)
        cc.W_dec *= torch.rand(D, M, 1, generator=g)*2     # norms differ between models and latents
    return cc


def acts(n=300, M=2, d=24, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, M, d, generator=g)*torch.rand(n, 1, 1, generator=g).pow(-.5)   # heavy tails


def no_grads(cc):
    for p in cc.parameters(): p.grad = None


def dense_grads(cc, x, dead=None, k_aux=8, alpha=1/32):
    "Loss and gradients of the specification, by autograd."
    no_grads(cc)
    loss, e = dense_loss(cc, x)
    if dead is not None: loss = loss + dense_aux(cc, x, e, dead, k_aux, alpha)
    loss.backward()
    out = {name: p.grad.clone() for name, p in cc.named_parameters()}
    no_grads(cc)
    return loss.item(), out


def assert_same_grads(cc, want, tol=1e-5):
    for name, p in cc.named_parameters():
        assert (p.grad - want[name]).abs().max() <= tol*want[name].abs().max(), name


def pairs(codes):
    "Codes as rows (token, latent)."
    return torch.stack(codes[:2], 1)


# ---- the specification

@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("score", ["sum", "l2"])
def test_forward_is_the_equations(M, score):
    "pre, ReLU, the k*B largest scores of the batch, and one reconstruction a model, written out token by token."
    cc, x = make(M=M, score=score), acts(40, M)
    f, x_hat = cc(x)
    rows = cc.W_dec.norm(dim=2)
    n = rows.sum(1) if score == "sum" else rows.pow(2).sum(1).sqrt()
    pre = torch.stack([sum(cc.W_enc[:, m] @ t[m] for m in range(M)) + cc.b_enc for t in x]).clamp(min=0)
    cut = (pre*n).flatten().sort(descending=True).values[cc.k*len(x) - 1]
    want = torch.where(pre*n >= cut, pre, 0.)
    torch.testing.assert_close(f, want, rtol=1e-4, atol=1e-5)
    by_model = torch.stack([want @ cc.W_dec[:, m] + cc.b_dec[m] for m in range(M)], 1)
    torch.testing.assert_close(x_hat, by_model, rtol=1e-4, atol=1e-5)
    assert cc(x, per_token=2)[0].gt(0).sum() == 2*len(x)


def test_batch_topk_is_over_the_whole_batch():
    mask = batch_topk(torch.tensor([[5., 4., 3.], [1., 2., 0.]]), 3)
    assert mask.tolist() == [[True, True, True], [False, False, False]]


def test_scores():
    cc = Crosscoder(4, 3, 1, "AB")
    cc.W_dec.data.zero_()
    cc.W_dec.data[0, 0, 0] = 3
    cc.W_dec.data[0, 1, 0] = 4
    assert score_norm(cc)[0] == 7
    cc.score = "l2"
    assert score_norm(cc)[0] == 5


def test_start():
    cc = Crosscoder(16, 50, 4, "ABC")
    assert torch.equal(cc.W_enc, cc.W_dec)
    for m in (1, 2): assert torch.equal(cc.W_dec[:, 0], cc.W_dec[:, m])
    torch.testing.assert_close(cc.W_dec.detach().flatten(1).norm(dim=1), torch.ones(50))


def test_normalisation_has_one_scalar_a_model():
    cc, x = make(), acts(5000)*torch.tensor([1., 50.])[:, None] + 100
    set_normalisation(cc, x.double().mean(0), x.double().var(0, unbiased=False).sum(1))
    n = cc.normalise(x)
    torch.testing.assert_close(n.pow(2).sum(2).mean(0), torch.full((2,), 24.), rtol=1e-3, atol=0)
    ratio = n[:, 0]/(x - x.mean(0))[:, 0]
    assert (ratio.median() - ratio).abs().quantile(.9) < 1e-3*ratio.median()   # a vector's direction does not change
    torch.testing.assert_close(cc.denormalise(n), x, rtol=1e-3, atol=1e-2)
    with pytest.raises(UserError, match="do not vary"): set_normalisation(cc, torch.zeros(2, 24), torch.zeros(2))


# ---- the sparse step

@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("score", ["sum", "l2"])
def test_gradients_equal_autograd(M, score):
    cc, x = make(M=M, score=score), acts(M=M)
    loss, want = dense_grads(cc, x)
    e = sparse_grads(cc, x, select(cc, x)[0])
    assert float(e.pow(2).sum()/len(x)) == pytest.approx(loss, rel=1e-5)
    assert_same_grads(cc, want)


def test_gradients_without_mkl(monkeypatch):
    "The way taken on other processors and on GPUs gives the same."
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    cc, x = make(), acts()
    _, want = dense_grads(cc, x)
    sparse_grads(cc, x, select(cc, x)[0])
    assert_same_grads(cc, want)


@pytest.mark.parametrize("k_aux", [3, 8, 10**6])
def test_aux_gradients_equal_autograd(k_aux):
    cc, x, dead = make(), acts(), torch.arange(1, D, 9)
    loss, want = dense_grads(cc, x, dead, k_aux)
    plain, without = dense_grads(cc, x)
    e = sparse_grads(cc, x, select(cc, x)[0])
    aux = float(aux_grads(cc, x, e, dead, k_aux, 1/32))
    assert aux > 0 and plain + aux == pytest.approx(loss, rel=1e-5)
    assert_same_grads(cc, want)
    helped = (want["W_dec"] - without["W_dec"])[dead]
    assert helped.abs().max() > 1e-3   # it is in the gradient, not only computed
    alive = torch.ones(D, dtype=torch.bool)
    alive[dead] = False
    assert torch.equal(want["W_dec"][alive], without["W_dec"][alive])   # the residual is held fixed


def test_aux_tiles(monkeypatch):
    cc, x, dead = make(), acts(), torch.arange(0, D, 3)
    _, want = dense_grads(cc, x, dead)
    monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: 37)
    e = sparse_grads(cc, x, select(cc, x)[0])
    aux_grads(cc, x, e, dead, 8, 1/32)
    assert_same_grads(cc, want)


@pytest.mark.parametrize("tile", [7, 64, 10**6])
@pytest.mark.parametrize("guess", [0., .5, 1., 1.04, 3., 1e9])
def test_selection_is_flat_topk(monkeypatch, tile, guess):
    monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: tile)
    cc, x = make(), acts()
    want = dense_code(cc, x).detach()
    threshold = float((want*score_norm(cc))[want > 0].min())
    codes, last = select(cc, x, guess*threshold)
    assert torch.equal(pairs(codes), want.nonzero())      # and in this order: token, then latent
    assert len(codes.row) == 6*300 and last == pytest.approx(threshold, rel=1e-5)
    torch.testing.assert_close(codes.value, want[want > 0], rtol=1e-4, atol=1e-5)


def test_selection_takes_positive_scores_only():
    cc, x = make(), acts()
    cc.b_enc.data -= 1e3
    codes, _ = select(cc, x)
    assert len(codes.row) == 0
    sparse_grads(cc, x, codes)     # no active latent at all
    assert cc.W_dec.grad.abs().max() == 0 and cc.b_dec.grad.abs().max() > 0


def test_bfloat16_proposes_float32_decides():
    cc, x = make(d=256, D=1024, k=16), acts(400, d=256)
    exact, threshold = select(cc, x)
    scanned, _ = select(cc, x, threshold, torch.bfloat16)
    values = [dict(zip((c.row*1024 + c.latent).tolist(), c.value.tolist())) for c in (exact, scanned)]
    both = values[0].keys() & values[1].keys()
    assert len(both)/len(values[0]) > .999
    for i in both: assert values[1][i] == pytest.approx(values[0][i], rel=1e-4)   # not rounded to bfloat16


def test_no_array_of_tokens_by_latents(monkeypatch):
    monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: 16)
    cc, x = make(), acts()
    real, seen = torch.addmm, []

    def addmm(*a, **k):
        seen.append(len(a[1]))
        return real(*a, **k)

    monkeypatch.setattr(torch, "addmm", addmm)
    e = sparse_grads(cc, x, select(cc, x)[0])
    aux_grads(cc, x, e, torch.arange(20), 4, 1/32)
    assert seen and max(seen) <= 16


# ---- inference

def test_theta_gives_k():
    cc, x = make(), acts(1000)
    calibrate(cc, x.split(170))
    assert len(cc.encode(x).row) == 6*1000
    assert abs(len(cc.encode(acts(1000, seed=8)).row)/1000 - 6) < .6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_stand_alone(dtype):
    cc, x = make(), acts()
    calibrate(cc, [x])
    every = encode(cc, x, dtype)
    assert ((every.row*D + every.latent).diff() > 0).all()      # sorted, each pair once
    for part in ([3], list(range(40, 90)), torch.randperm(300)[:20].tolist()):
        codes = encode(cc, x[part], dtype)
        for i, r in enumerate(part):
            here, there = codes.row == i, every.row == r
            assert torch.equal(codes.latent[here], every.latent[there])
            torch.testing.assert_close(codes.value[here], every.value[there], rtol=1e-5, atol=1e-6)
    loud = encode(cc, torch.cat([x[:1], 1000*x[1:]]), dtype)    # loud batch mates push nobody out
    assert torch.equal(loud.latent[loud.row == 0], every.latent[every.row == 0])


def test_encode_follows_the_threshold_exactly():
    cc, x = make(), acts()
    calibrate(cc, [x])
    pre = torch.relu(x.flatten(1) @ cc.W_enc.detach().flatten(1).T + cc.b_enc.detach())
    want = pre*(pre*score_norm(cc) > cc.theta)
    torch.testing.assert_close(cc.dense_codes(x), want, rtol=1e-4, atol=1e-5)
    x_hat = torch.einsum("nj,jmd->nmd", want, cc.W_dec.detach()) + cc.b_dec.detach()
    torch.testing.assert_close(cc.decode(*cc.encode(x), len(x)), x_hat, rtol=1e-4, atol=1e-5)


def test_encode_needs_a_threshold():
    with pytest.raises(UserError, match="no threshold yet"): make().encode(acts())


def test_delta_norm_orientation():
    cc = Crosscoder(8, 4, 1, ["pt", "it"])
    cc.W_dec.data[0, 1] = 0
    cc.W_dec.data[1, 0] = 0
    cc.W_dec.data[3, 0] *= .5
    assert delta_norm(cc).tolist() == pytest.approx([0, 1, .5, .75])     # A only, B only, both, twice as long in B
    with pytest.raises(UserError, match="compares two models"): delta_norm(Crosscoder(8, 4, 1, "ABC"))


# ---- files, settings

def test_save_and_load(tmp_path):
    cc, x, info = make(), acts(), {"settings": {"lr": .1}}
    set_normalisation(cc, torch.randn(2, 24).double(), torch.tensor([3.7, 41.3]))
    calibrate(cc, [x])
    save(cc, tmp_path, info)
    again = load(tmp_path)
    saved, loaded = cc.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    for name, a in saved.items(): assert torch.equal(a, loaded[name]) and a.dtype == loaded[name].dtype
    assert again.config() == cc.config()
    for a, b in zip(cc.encode(x), again.encode(x)): assert torch.equal(a, b)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    first = (tmp_path/"model.safetensors").read_bytes()
    save(cc, tmp_path, info)
    assert (tmp_path/"model.safetensors").read_bytes() == first


def test_files_that_do_not_make_a_crosscoder(tmp_path):
    save(make(), tmp_path, {"settings": {"lr": .1}})
    first = (tmp_path/"model.safetensors").read_bytes()
    save(make(), tmp_path/"other")
    (tmp_path/"other/config.json").rename(tmp_path/"config.json")
    with pytest.raises(UserError, match="does not belong"): load(tmp_path)
    (tmp_path/"model.safetensors").write_bytes(first[:500])
    with pytest.raises(UserError, match="cannot be read"): load(tmp_path)
    with pytest.raises(UserError, match="run step training"): load(tmp_path/"nowhere")


def test_settings_that_cannot_work():
    with pytest.raises(UserError, match="k = 9 does not fit a dictionary of 8"): Crosscoder(4, 8, 9, "AB")
    with pytest.raises(UserError, match="score 'max' is unknown"): Crosscoder(4, 8, 2, "AB", score="max")
    with pytest.raises(UserError, match="select 'fp8' is unknown"): scan_dtype("fp8")


# ---- training: moves to test_training

def test_trajectory_of_adam_steps():
    a, b = make(), make()
    oa, ob = (torch.optim.Adam(c.parameters(), lr=1e-3, fused=True) for c in (a, b))
    state = dict(threshold=0., since=torch.zeros(200, dtype=torch.long))
    for i in range(8):
        x = acts(seed=i)
        oa.zero_grad(); dense_loss(a, x)[0].backward(); torch.nn.utils.clip_grad_norm_(a.parameters(), 1.); oa.step()
        train_step(b, ob, x, state)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6)


def test_planted_concepts_are_found_with_their_owner():
    world = easy_world(32, 40); stat = world(8000, seed=9).double()
    cc = set_normalisation(Crosscoder(32, 64, 3, "AB"), stat.mean(0), stat.var(0, unbiased=False).sum(1))
    train(lambda s: (world(256, seed=100+i) for i in itertools.count(s)), cc, 300, 5e-3, dead_after=10**6)
    target, kind = (torch.from_numpy(world.decoder).float()*cc.scale.float()[:, None]).flatten(1), world.truth.kind.to_numpy()
    cos = torch.nn.functional.normalize(target, dim=1) @ torch.nn.functional.normalize(cc.W_dec.detach().flatten(1), dim=1).T
    best, d = cos.max(1).values, torch.from_numpy(delta_norm(cc))[cos.max(1).indices]
    assert (best > .8).float().mean() > .8
    assert d[kind == "A-only"].median() < .15 and d[kind == "B-only"].median() > .85


def small_store(folder, n=6000, d=24, docs=60, names=("pt", "it")):
    "A real store on disk, in two shards, with planted concepts."
    folder.mkdir(); world, shards = easy_world(d, 40), {}
    for i in range(2):
        a = world(n//2, seed=i).bfloat16(); doc = (torch.arange(len(a))*(docs//2)//len(a) + i*docs//2).int(); _, mean, q = moments(a); f = f"shard_{i:05d}.safetensors"
        shards[f] = dict(file=f, rows=len(a), docs=docs//2, doc_first=int(doc[0]), doc_end=int(doc[-1])+1,
                         **write_tensors(folder/f, dict(acts=a, token=doc*0, pos=doc*0, doc=doc, mean=mean, q=q)))
    state = dict(format=1, models={m: m for m in names}, names=list(names), layer=1, corpus="c", tokenizer=None, dtype="float32", n_docs=docs, shard_tokens=n//2, shards=shards, parts={})
    return finish_store(folder, state, {m: m for m in names}, d)


ARGS = dict(n_latents=64, k=4, batch=256, train_tokens=30_000, lr=3e-3, dead_after=4000, k_aux=8, aux_latents=16)


class Killed(Exception): pass


def kill_at(monkeypatch, step):
    real = training.train_step
    def f(cc, opt, x, state, *a, **k):
        if state["step"] == step: raise Killed
        return real(cc, opt, x, state, *a, **k)
    monkeypatch.setattr(training, "train_step", f)


def saves_always(monkeypatch):
    real = training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: real(*a, **{**k, "every": 0}))


def test_killed_run_goes_on_to_the_last_bit(tmp_path, monkeypatch):
    store = small_store(tmp_path/"store")
    whole, log, res = train_pair(store, ["pt", "it"], tmp_path/"whole", **ARGS)
    for stop in (40, 95):
        with monkeypatch.context() as m:
            saves_always(m); kill_at(m, stop)
            with pytest.raises(Killed): train_pair(store, ["pt", "it"], tmp_path/"cut", **ARGS)
        assert (tmp_path/"cut/checkpoint.safetensors").exists() and not (tmp_path/"cut/model.safetensors").exists()
    steps = []
    with monkeypatch.context() as m:
        real = training.train_step
        m.setattr(training, "train_step", lambda cc, opt, x, state, *a, **k: steps.append(state["step"]) or real(cc, opt, x, state, *a, **k))
        cut, log2, res2 = train_pair(store, ["pt", "it"], tmp_path/"cut", **ARGS)
    assert steps[0] == 95 and len(steps) == 117-95          # it did go on, and not from the beginning
    for f in ("model.safetensors", "config.json", "log.parquet"): assert (tmp_path/"whole"/f).read_bytes() == (tmp_path/"cut"/f).read_bytes(), f
    assert not (tmp_path/"cut/checkpoint.safetensors").exists()


TRAIN = """
import sys, json, torch
from pathlib import Path
import llmdiff.training as training
from llmdiff.engine.store import Store
torch.set_num_threads(1)
real = training.train
training.train = lambda *a, **k: real(*a, **{**k, "every": 0})
training.train_pair(Store(sys.argv[1]), ["pt", "it"], sys.argv[2], **json.loads(sys.argv[3]))
"""


def test_killed_by_the_system_at_random_points(tmp_path):
    "SIGKILL leaves no time for anything: whatever is on disk then must do."
    store, args, rng, kills = small_store(tmp_path/"store"), {**ARGS, "train_tokens": 400_000}, np.random.default_rng(), 0
    train_pair(store, ["pt", "it"], tmp_path/"whole", **args)
    for _ in range(3):
        p = subprocess.Popen([sys.executable, "-c", TRAIN, str(tmp_path/"store"), str(tmp_path/"cut"), json.dumps(args)])
        file = tmp_path/"cut/checkpoint.safetensors"
        before = file.stat().st_mtime_ns if file.exists() else 0
        while p.poll() is None and not (file.exists() and file.stat().st_mtime_ns > before): time.sleep(.01)
        time.sleep(rng.uniform(0, .5)); p.kill(); kills += p.wait() == -signal.SIGKILL
    assert kills and not (tmp_path/"cut/model.safetensors").exists()
    train_pair(store, ["pt", "it"], tmp_path/"cut", **args)
    for f in ("model.safetensors", "config.json", "log.parquet"): assert (tmp_path/"whole"/f).read_bytes() == (tmp_path/"cut"/f).read_bytes(), f


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    "The system refuses files above a size, as a full disk would, from the second half of the run on."
    code = TRAIN.replace("import sys,", "import resource, signal, sys,").replace("real = training.train\n", """real, save, n = training.train, training.save_checkpoint, []
def full(*a):
    n.append(1)
    if len(n) == 3: signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return save(*a)
training.save_checkpoint = full
""")
    small_store(tmp_path/"store")
    r = subprocess.run([sys.executable, "-c", code, str(tmp_path/"store"), str(tmp_path/"cut"), json.dumps(ARGS)], capture_output=True, text=True)
    last = r.stderr.strip().splitlines()[-1]
    assert r.returncode and re.search(r"UserError: the checkpoint of step 3 of pt-it could not be written .*: make room and run again, training goes on from the one before it", last), r.stderr
    with safe_open(tmp_path/"cut/checkpoint.safetensors", "pt") as f: assert f.metadata()["step"] == "2"
    assert [f.name for f in (tmp_path/"cut").iterdir()] == ["checkpoint.safetensors"]


def test_gpu_memory_that_runs_out_is_one_sentence(tmp_path, monkeypatch):
    def out(*a, **k): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(training, "train_step", out)
    for total, words in ((80e9, "set batch = 128"), (100_000, "latents need .* set n_latents = ")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda dev, total=total: types.SimpleNamespace(total_memory=total))
        with pytest.raises(UserError, match=words): train_pair(small_store(tmp_path/f"store{total}"), ["pt", "it"], tmp_path/"cc", **ARGS)


def test_annealed_k_ends_at_k(tmp_path, monkeypatch):
    store, places = small_store(tmp_path/"store"), []
    real = training.train_step
    monkeypatch.setattr(training, "train_step", lambda cc, opt, x, state, dtype, per_token, **k: places.append(per_token) or real(cc, opt, x, state, dtype, per_token, **k))
    cc, log, res = train_pair(store, ["pt", "it"], tmp_path/"cc", **{**ARGS, "k_start": 12})
    assert places[0] == 12 and set(places[36:]) == {4} and sorted(places, reverse=True) == places
    assert log.l0.iloc[0] > 10 and log.l0.iloc[-1] == 4 and abs(res["l0"]-4) < 1
    with pytest.raises(UserError, match="k_start = 65 does not fit a dictionary of 64"): train_pair(store, ["pt", "it"], tmp_path/"other", **{**ARGS, "k_start": 65})


def test_a_large_dictionary_needs_no_large_memory():
    "114,688 latents, batches of 4,096: the scores of a batch alone would take 1.9 GB."
    code = """
import resource, torch
from llmdiff.crosscoder import Crosscoder
from llmdiff.training import train_step
cc = Crosscoder(8, 114_688, 100, "AB"); opt = torch.optim.Adam(cc.parameters(), fused=True)
x, state = torch.randn(4096, 2, 8), dict(threshold=0., since=torch.zeros(cc.n_latents, dtype=torch.long))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(2): train_step(cc, opt, x, state)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1e6)
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert float(r.stdout) < .6, r.stdout


def test_checkpoint_of_other_settings_is_not_used(tmp_path, monkeypatch, capsys):
    store = small_store(tmp_path/"store")
    for other in (dict(lr=1e-3), dict(seed=7), dict(batch=128)):
        with monkeypatch.context() as m:
            saves_always(m); kill_at(m, 50)
            with pytest.raises(Killed): train_pair(store, ["pt", "it"], tmp_path/"cc", **ARGS)
        a = train_pair(store, ["pt", "it"], tmp_path/"cc", **{**ARGS, **other})[1]
        assert "belongs to other settings" in capsys.readouterr().out and a.step.iloc[0] <= 2
        for f in (tmp_path/"cc").iterdir(): f.unlink()
    (tmp_path/"cc/checkpoint.safetensors").write_bytes(b"half a file")
    train_pair(store, ["pt", "it"], tmp_path/"cc", **ARGS)
    assert "is damaged" in capsys.readouterr().out


def test_finished_pair_is_loaded_unless_something_changed(tmp_path, monkeypatch):
    store = small_store(tmp_path/"store"); calls = []
    real = training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: calls.append(1) or real(*a, **k))
    one = train_pair(store, ["pt", "it"], tmp_path/"cc", **ARGS)
    two = train_pair(store, ["pt", "it"], tmp_path/"cc", **ARGS)
    assert len(calls) == 1 and one[2] == two[2] and one[1].equals(two[1]) and torch.equal(one[0].W_dec, two[0].W_dec)
    json.loads((tmp_path/"cc/config.json").read_text())
    train_pair(store, ["pt", "it"], tmp_path/"cc", **{**ARGS, "k": 5}); assert len(calls) == 2
    store.manifest["shards"][0]["sha256"] = "other"                       # the store has changed
    train_pair(store, ["pt", "it"], tmp_path/"cc", **{**ARGS, "k": 5}); assert len(calls) == 3


def test_held_documents_are_never_trained_on(tmp_path, monkeypatch):
    store, asked = small_store(tmp_path/"store"), []
    real = Store.batches
    monkeypatch.setattr(Store, "batches", lambda *a, docs, **k: asked.append(docs) or real(*a, docs=docs, **k))
    _, _, res = train_pair(store, ["pt", "it"], tmp_path/"cc", **ARGS)
    assert asked == [(0, 54)] and res["tokens"] == 300                    # 6 of 60 documents: 3 for the threshold, 3 to measure
    assert abs(res["l0"]-4) < 1 and min(res["fve"]) > .7


def test_order_of_the_pair_is_kept(tmp_path):
    store = small_store(tmp_path/"store")
    cc = train_pair(store, ["it", "pt"], tmp_path/"cc", **ARGS)[0]
    assert cc.names == ["it", "pt"] and torch.allclose(cc.mean, torch.tensor(store.mean).flip(0))


def test_run_that_diverges_is_one_sentence(tmp_path):
    store = small_store(tmp_path/"store")
    with pytest.raises(UserError, match="training of pt-it diverged at step .* lower lr"): train_pair(store, ["pt", "it"], tmp_path/"cc", **{**ARGS, "lr": 300.})
    assert not (tmp_path/"cc/model.safetensors").exists()


@pytest.mark.parametrize("change, sentence", [(dict(n_latents=10_000), "fewer than 10,000 latents"), (dict(train_tokens=60, batch=8), "60 training tokens are fewer"),
                                              (dict(k=65), "k = 65"), (dict(batch=20_000), "batch = 20,000 is larger")])
def test_settings_refused_before_training(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence): train_pair(small_store(tmp_path/"store"), ["pt", "it"], tmp_path/"cc", **{**ARGS, **change})
    assert not (tmp_path/"cc").exists()


def test_dead_latents_come_back():
    "With AuxK, latents that cannot win a place at the start come to win some; without it they stay dead."
    world = easy_world(32, 96); stat = world(8000, seed=9).double(); dead = {}
    data = [world(256, seed=100+i) for i in range(250)]
    for weight in (1/32, 0.):
        cc = set_normalisation(Crosscoder(32, 64, 4, "AB"), stat.mean(0), stat.var(0, unbiased=False).sum(1))
        cc.W_enc.data[:32] *= .02
        dead[weight] = train(lambda s: iter(data[s:]), cc, 250, 1e-2, dead_after=2000, k_aux=16, aux_weight=weight).dead.iloc[-1]
    assert dead[0.] > .4 and dead[1/32] < .15
