"Training over ranks: as in one process, with real processes over gloo; one of them killed; the layout changed."
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from llmdiff import training
from llmdiff.core import UserError
from llmdiff.crosscoder import Crosscoder, select, set_normalisation
from llmdiff.scale import parallel
from llmdiff.scale.cost import cluster_cost, Machine, traffic
from llmdiff.scale.parallel import check_layout, nth_largest, select_ranks, step_ranks
from llmdiff.training import Kit, new_state, Options, train, train_pair, train_step
from llmdiff.worlds.synthetic import easy_world

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT/'tests'}"}
N_STEPS = 120
OPTIONS = Options(lr=3e-3, select="float32", dead_after=1500, k_aux=8, aux_latents=64)
LOST = ("another rank has died or hangs, or the job was cancelled: run the same command again, "
        "training goes on from the last checkpoint")


def torchrun(n, *args):
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return [sys.executable, "-m", *start, *map(str, args)]


# ---- what the ranks do: this file run by torchrun

WORLD = easy_world(16, 40, seed=1)


def new():
    x = WORLD(5000, seed=10**6).double()
    return set_normalisation(Crosscoder(16, 64, 4, ["A", "B"], seed=3), x.mean(0), x.var(0, unbiased=False).sum(1))


def stream(start, stop=10**9):
    for i in itertools.count(start):
        if i == stop: raise KeyboardInterrupt
        yield WORLD(128, seed=i)


def far(a, b): return float((a-b).abs().max()/b.abs().max())


def middle(since):
    "A state in the middle of a training."
    state = new_state(new())
    state.since = since.clone()
    return state


def counted(step):
    "What `step` returns, and the bytes of each sum over ranks that it takes."
    sent, real = [], dist.all_reduce
    dist.all_reduce = lambda t, *a, **k: sent.append(t.numel()*t.element_size()) or real(t, *a, **k)
    out = step()
    dist.all_reduce = real
    return out, sent


def a_step(mesh):
    "One step in the middle of a training: gradients against one process, bytes against `traffic`."
    _, P, r, R = parallel.place(mesh)
    cc, options = new(), replace(OPTIONS, lr=1e-3, dead_after=3000, aux_latents=16)
    x = cc.normalise(next(stream(0)))
    for w in (cc.W_enc, cc.W_dec): w.data[::2] *= .05 # these win nothing,
    since = torch.arange(64)*100                      # and the last of them have not for long
    mine, state, one = parallel.slice_of(cc, mesh), middle(since), middle(since)
    opt = torch.optim.Adam(mine.parameters(), fused=True)
    sums, sent = counted(lambda: step_ranks(mine, opt, x, state, options, mesh=mesh))
    want = train_step(cc, torch.optim.Adam(cc.parameters(), fused=True), x, one, options)
    whole = dict(cc.named_parameters())
    grads = [far(q.grad, parallel.part_of(whole[n].grad, n, r, R)) for n, q in mine.named_parameters()]
    paper = traffic(128, 2, 16, 64, 16, P, R)[["sums", "bytes"]].sum()
    return dict(grads=max(grads), sums=far(sums, want), threshold=state.threshold/one.threshold - 1,
                since=bool((state.since == one.since).all()), dead=int((one.since >= 3000).sum()),
                aux=float(want[-1]), sent=[len(sent), sum(sent)], paper=paper.tolist())


def ties(mesh):
    "All latents alike: every token's scores tie, and tokens 2i and 2i+1 are alike."
    p, P, r, R = parallel.place(mesh)
    cc = new()
    for w in (cc.W_enc, cc.W_dec): w.data[:] = w.data[0].clone()
    x = cc.normalise(next(stream(0))[:30]).repeat_interleave(2, 0)
    codes, last = select_ranks(parallel.slice_of(cc, mesh), x.chunk(P)[p], mesh, per_token=5)
    mine = (codes.row + p*len(x)//P)*64 + codes.latent + r*64//R
    got = sorted(sum(parallel.everyone(mine.tolist(), mesh), []))
    score = (x.flatten(1) @ cc.W_enc.detach().flatten(1).T)[:, 0]   # one column: the others are equal
    order = sorted(range(60*64), key=lambda i: (-score[i//64].item(), i))
    return dict(got=got, want=sorted(order[:5*60]))


def other_code(mesh):
    try: parallel.check_same(dict(code="new" if dist.get_rank() == 1 else "old", store="s"), mesh)
    except UserError as e: return str(e)


def harvested(folder):
    def harvest(part):
        rank, world = part
        time.sleep(.3*rank)
        for s in range(rank, 7, world): (folder/f"shard{s}").write_text(str(rank))
    folder.mkdir(exist_ok=True)
    return parallel.harvest_ranks(harvest, lambda: {f.name: f.read_text() for f in sorted(folder.iterdir())})


def train_until(stop, file, mesh):
    "Train over the ranks, checkpoint after checkpoint, until the stream breaks off."
    kit = Kit(file, "a", every=0)
    try: parallel.train_ranks(lambda s: stream(s, stop), new(), N_STEPS, OPTIONS, kit, n_log=40, mesh=mesh)
    except KeyboardInterrupt: pass


def worker(folder):
    folder, out = Path(folder), {}
    parallel.meet()
    n, rank = dist.get_world_size(), dist.get_rank()
    meshes = {f"{n//R}x{R}": parallel.meet(R) for R in (1, 2, 4) if n % R == 0}
    for name, mesh in meshes.items():
        out[name] = dict(check=parallel.self_check(mesh), step=a_step(mesh), ties=ties(mesh))
    out["same"], out["harvest"] = other_code(mesh), harvested(folder/f"harvest{n}")
    train_until(40 if n == 4 else 80, folder/"checkpoint.safetensors", meshes["2x2" if n == 4 else "1x2"])
    (folder/f"{n}_{rank}.json").write_text(json.dumps(out))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    "What 4 ranks, and after them 2, have found; and the checkpoint that they left."
    d, out = tmp_path_factory.mktemp("ranks"), {}
    for n in (4, 2):
        r = subprocess.run(torchrun(n, __file__, d), env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr[-3000:]
        for i in range(n): out[n, i] = json.loads((d/f"{n}_{i}.json").read_text())
    return d, out


LAYOUTS = [(2, "1x2"), (2, "2x1"), (4, "2x2"), (4, "1x4"), (4, "4x1")]
layouts = pytest.mark.parametrize("n,layout", LAYOUTS)


# ---- the same as in one process

@layouts
def test_trajectory_is_that_of_one_process(worlds, n, layout):
    """80 steps in float32, AuxK at work: losses to 1e-5;
    weights, which a single score within rounding of the threshold can move, to 1e-3 of the largest."""
    c = worlds[1][n, 0][layout]["check"]
    assert c["dead"] > .01 and c["aux"] > 0 and c["loss_last"] < .5*c["loss_first"]
    assert c["loss"] < 1e-5 and c["weights"] < 1e-3, c


@layouts
def test_gradients_of_a_step(worlds, n, layout):
    for rank in range(n):
        s = worlds[1][n, rank][layout]["step"]
        assert s["grads"] < 1e-5 and s["sums"] < 1e-5 and abs(s["threshold"]) < 1e-6, s
        assert s["since"] and s["dead"] > 16 and s["aux"] > 0      # more dead than AuxK helps


@layouts
def test_traffic_on_paper_is_what_a_step_sends(worlds, n, layout):
    s = worlds[1][n, 0][layout]["step"]
    assert s["sent"] == s["paper"]


@layouts
def test_ties_go_to_the_first_tokens_then_latents(worlds, n, layout):
    t = worlds[1][n, 0][layout]["ties"]
    assert len(t["want"]) == 5*60 and t["got"] == t["want"]


def test_nth_largest():
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3000, generator=g)*10.**torch.randint(-30, 30, (3000,), generator=g)
    for s in (wide, torch.randint(-3, 9, (500,), generator=g).float()):
        up = s[s > 0].sort(descending=True).values
        for n in (1, 2, 77, len(up)//2, len(up)):
            last = up[n-1]
            assert nth_largest(s, n) == (last.item(), n - int((up > last).sum()), int((up == last).sum()))
        assert nth_largest(s, len(up)+1) == (0., 0, 0)
    assert nth_largest(torch.empty(0), 1) == (0., 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_selects_as_before(dtype):
    cc = new()
    x = cc.normalise(next(stream(0)))
    for guess in (0., 1., 50.):
        a, b = select(cc, x, guess, dtype), select_ranks(cc, x, None, guess, dtype)
        assert a[1] == b[1] and all(torch.equal(u, v) for u, v in zip(a[0], b[0]))


# ---- checkpoints

def test_four_ranks_then_two_then_one(worlds):
    "Begun on 2 x 2 ranks, gone on with 1 x 2, ended in one process."
    whole, cc, steps = new(), new(), []
    log = train(stream, whole, N_STEPS, OPTIONS, n_log=40)
    kit = Kit(worlds[0]/"checkpoint.safetensors", "a")
    got = train(lambda s: steps.append(s) or stream(s), cc, N_STEPS, OPTIONS, kit, n_log=40)
    assert 70 < steps[0] <= 80 and list(got.step) == list(log.step)
    assert (got.loss/log.loss-1).abs().max() < 1e-5 and (got.dead-log.dead).abs().max() < .02
    for a, b in zip(cc.parameters(), whole.parameters()): assert (a-b).abs().max() < 1e-3*b.abs().max()


PRESET = dict(pairs=[["pt", "it"]], n_latents=64, k=4, batch=256, train_tokens=100_000, lr=3e-3, dead_after=4000,
              k_aux=8, aux_latents=16)
WORDS = [f"{k}={json.dumps(v)}" for k, v in PRESET.items()]


def command(runs):
    changed = [w for s in WORDS for w in ("-p", s)]
    return torchrun(2, "-m", "llmdiff.scale.parallel", "--preset", "tiny", "--runs", runs, "--every", 0, *changed)


def run(cmd): return subprocess.run(cmd, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=240)


def killed_rank(cmd, checkpoint): # -> status, what was said
    "Start ranks, and kill one of them when there is a checkpoint."
    p = subprocess.Popen(cmd, env=ENV, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while p.poll() is None and not checkpoint.exists(): time.sleep(.01)
    for c in psutil.Process(p.pid).children(recursive=True):
        if c.environ().get("RANK") == "1": c.send_signal(signal.SIGKILL)
    _, err = p.communicate(timeout=100)                                # bounded: the others do not wait for the dead
    return p.returncode, err


def test_a_rank_is_killed_and_the_job_goes_on(tmp_path, monkeypatch):
    from test_training import small_store
    for d in ("whole", "cut"):
        (tmp_path/d/"tiny").mkdir(parents=True)
        store = small_store(tmp_path/d/"tiny/store")
    r = run(command(tmp_path/"whole"))
    assert r.returncode == 0 and "pt-it: trained on 2 ranks, 1 x 2 (data x latents)" in r.stdout, r.stderr[-3000:]
    cut, whole = (tmp_path/d/"tiny/crosscoder/pt-it" for d in ("cut", "whole"))
    status, err = killed_rank(command(tmp_path/"cut"), cut/"checkpoint.safetensors")
    assert status not in (0, None) and not (cut/"model.safetensors").exists()
    assert [s for s in err.splitlines() if s.startswith("llmdiff:")] == [f"llmdiff: rank 0 stops: {LOST}"], err
    assert [f.name for f in cut.iterdir()] == ["checkpoint.safetensors"]
    with safe_open(cut/"checkpoint.safetensors", "pt") as f: assert 0 < int(f.metadata()["step"]) < 390
    r = run(command(tmp_path/"cut"))
    assert r.returncode == 0 and "starts anew" not in r.stdout, r.stderr[-3000:]
    for f in ("model.safetensors", "config.json", "log.parquet"):
        assert (cut/f).read_bytes() == (whole/f).read_bytes(), f
    # the chain finds it finished, as its own
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained again"))
    train_pair(store, ["pt", "it"], cut, parallel.pair_options("tiny", WORDS)[1])


# ---- what is refused

def test_layouts_that_cannot_be():
    check_layout(12, 12, 6, 3)
    with pytest.raises(UserError, match="6 ranks cannot be grouped in slices of 4"): check_layout(12, 12, 6, 4)
    words = "13 latents cannot be divided over 3 ranks: set n_latents to a multiple of 3"
    with pytest.raises(UserError, match=words):
        check_layout(13, 12, 6, 3)
    with pytest.raises(UserError, match="a batch of 13 tokens cannot be divided over 2 replicas"):
        check_layout(12, 13, 6, 3)


@pytest.mark.parametrize("world,args,words", [
    (None, [], "torchrun starts this"),
    (3, ["-p", "n_latents=512"], "512 latents cannot be divided over 3 ranks"),
    (2, ["-p", "n_latent=512"], "did you mean 'n_latents'"),
    (2, ["-p", "512"], "-p takes key=value, not '512'"),
    (2, [], "manifest.json is missing: run step caching first"),
    (2, ["--preset", "huge"], "unknown preset 'huge'")])
def test_one_sentence_before_the_ranks_meet(tmp_path, monkeypatch, capsys, world, args, words):
    monkeypatch.setenv("WORLD_SIZE", str(world)) if world else monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(parallel, "meet", lambda *a: pytest.fail("joined"))
    assert parallel.main(["--preset", "tiny", "--runs", str(tmp_path), *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("llmdiff: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("local,cause,lines", [("0", None, 1), ("3", None, 0), ("3", "memory", 1)])
def test_who_says_it(monkeypatch, capsys, local, cause, lines):
    "What all ranks find is said once; what one rank alone has met, by that rank."
    def work(a):
        try: 1/(0 if cause else 1)
        except ZeroDivisionError: raise UserError("too large") from None
        raise UserError("too large")
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(parallel, "work", work)
    assert parallel.main([]) == 1 and capsys.readouterr().err == "llmdiff: too large\n"*lines


def test_memory_that_runs_out_is_the_rank_s_own_error():
    "The advice of `training` still shows what caused it, so that the rank that met it says it."
    with pytest.raises(UserError) as e, pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cuda, "get_device_properties", lambda dev: type("Device", (), {"total_memory": 80e9}))
        with training.memory_watched(new(), 128): raise torch.OutOfMemoryError
    assert isinstance(e.value.__context__, torch.OutOfMemoryError)


@pytest.mark.parametrize("first", ["signal", "connection"])
def test_a_lost_rank_is_said_once(monkeypatch, capsys, first):
    "By torchrun's SIGTERM or by the closed connection, whichever comes first."
    def work(a):
        try: signal.raise_signal(signal.SIGTERM) if first == "signal" else None
        finally: raise RuntimeError("Connection closed by peer")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(parallel, "work", work)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e: parallel.main([])
    assert e.value.code == 1 and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == f"llmdiff: rank 1 stops: {LOST}\n"


def test_a_rank_with_other_code_is_named(worlds):
    for (n, rank), out in worlds[1].items():
        assert out["same"] == ("rank 1 has another code than rank 0: start all ranks with the same command, "
                               "from the same code and the same store")


def test_the_hash_of_the_code_sees_every_folder_of_the_package(tmp_path, monkeypatch):
    store = type("Store", (), {"hash": "s"})
    monkeypatch.setattr(parallel, "root", lambda: tmp_path)
    (tmp_path/"llmdiff/engine").mkdir(parents=True)
    (tmp_path/"llmdiff/engine/store.py").write_text("old")
    before = parallel.hashes(store, "settings")
    (tmp_path/"llmdiff/engine/store.py").write_text("new")
    after = parallel.hashes(store, "settings")
    assert [name for name in before if before[name] != after[name]] == ["code"]


# ---- harvest, cost

def test_rank_0_joins_when_all_have_harvested(worlds):
    for n in (2, 4):
        assert worlds[1][n, 0]["harvest"] == {f"shard{i}": str(i % n) for i in range(7)}
        assert worlds[1][n, 1]["harvest"] is None


def test_cost_follows_from_its_constants():
    a = cluster_cost().set_index("replicas x slices")
    b = cluster_cost(machine=Machine(disk=1e15, reader=1e15)).set_index("replicas x slices")
    one, node, grid, wide = (a.loc[name] for name in ("1 x 1", "1 x 8", "8 x 8", "1 x 64"))
    assert one["network, ms a step"] == one["sent, MB a step"] == 0
    assert one["store, TB"] == pytest.approx(2e8*2*3584*2/1e12)
    assert one["harvest, h"] == pytest.approx(2e8*2*8.3e9/(.5*790e12)/3600)
    assert one["harvest, h"] == pytest.approx(8*node["harvest, h"])
    assert one["encoder, ms a step"] == pytest.approx(64*grid["encoder, ms a step"])
    assert one["encoder, ms a step"] == pytest.approx(1e3*2*7168*114_688*4096/(.5*790e12))
    assert (b["training, h"] <= a["training, h"]).all() and (b["training, h"] < a["training, h"]).any()
    assert "reading" in set(a.limit) - set(b.limit)
    assert grid["sent, MB a step"] > wide["sent, MB a step"]
    t = traffic(4096, 2, 3584, 114_688, 256, 1, 8).set_index("what")
    residual = t.loc["reconstruction"]
    assert residual.bytes == 4096*7168*4 and residual.sent == 2*7*residual.bytes//8
    assert t.loc["gradients of the slice", "bytes"] == 0


if __name__ == "__main__": worker(sys.argv[1])
