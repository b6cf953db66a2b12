"Training over ranks: the same as in one process, real processes over gloo; one of them killed; the layout changed on the way."
import itertools, json, os, signal, subprocess, sys, time
from pathlib import Path

import psutil, pytest, torch
import torch.distributed as dist

from llmdiff import parallel, training
from llmdiff.core import UserError
from llmdiff.crosscoder import Crosscoder, Planted, select, set_normalisation
from llmdiff.parallel import check_layout, cluster_cost, nth_largest, select_ranks, step_ranks, traffic
from llmdiff.training import train, train_pair, train_step

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT/'tests'}"}
KW = dict(n_steps=120, lr=3e-3, select="float32", dead_after=1500, k_aux=8, aux_latents=64, n_log=40)


def torchrun(n, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *map(str, args)]


# ---- what the ranks do: this file run by torchrun

WORLD = Planted(16, 40, 6, 3, seed=1)


def new():
    x = WORLD(5000, seed=10**6).double()
    return set_normalisation(Crosscoder(16, 64, 4, ["A", "B"], seed=3), x.mean(0), x.var(0, unbiased=False).sum(1))


def stream(start, stop=10**9):
    for i in itertools.count(start):
        if i == stop: raise KeyboardInterrupt
        yield WORLD(128, seed=i)


def a_step(mesh):
    "One step in the middle of a training: gradients against one process, bytes against `traffic`."
    p, P, r, R = parallel.place(mesh); cc = new(); x = cc.normalise(next(stream(0))); sent = []
    for w in (cc.W_enc, cc.W_dec): w.data[::2] *= .05 # these win nothing,
    since = torch.arange(64)*100                      # and the last of them have not for long
    mine = parallel.slice_of(cc, mesh); kw = dict(dead_after=3000, k_aux=8, aux_latents=16)
    real = dist.all_reduce
    dist.all_reduce = lambda t, *a, **k: sent.append(t.numel()*t.element_size()) or real(t, *a, **k)
    state = dict(threshold=0., since=since.clone())
    sums = step_ranks(mine, torch.optim.Adam(mine.parameters(), fused=True), x, state, **kw, mesh=mesh)
    dist.all_reduce = real
    one = dict(threshold=0., since=since.clone())
    want = train_step(cc, torch.optim.Adam(cc.parameters(), fused=True), x, one, **kw)
    far = lambda a, b: float((a-b).abs().max()/b.abs().max())
    cut = lambda n, t: t.chunk(R)[r] if n in parallel.SPLIT else t
    return dict(grads=max(far(q.grad, cut(n, dict(cc.named_parameters())[n].grad)) for n, q in mine.named_parameters()), sums=far(sums, want), threshold=state["threshold"]/one["threshold"]-1,
                since=bool((state["since"] == one["since"]).all()), dead=int((one["since"] >= 3000).sum()), aux=float(want[-1]), sent=[len(sent), sum(sent)], paper=traffic(128, 2, 16, 64, 16, P, R)[["sums", "bytes"]].sum().tolist())


def ties(mesh):
    "All latents alike: every token's scores tie, and tokens 2i and 2i+1 are alike."
    p, P, r, R = parallel.place(mesh); cc = new()
    for w in (cc.W_enc, cc.W_dec): w.data[:] = w.data[0].clone()
    x = cc.normalise(next(stream(0))[:30]).repeat_interleave(2, 0)
    codes, last = select_ranks(parallel.slice_of(cc, mesh), x.chunk(P)[p], mesh, per_token=5)
    got = sorted(sum(parallel.everyone((((codes.row + p*len(x)//P)*64 + codes.latent + r*64//R)).tolist(), mesh), []))
    score = (x.flatten(1) @ cc.W_enc.detach().flatten(1).T)
    order = sorted(range(score.numel()), key=lambda i: (-score[i//64, 0].item(), i))[:5*60]   # one column: the others are equal
    return dict(got=got, want=sorted(order))


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


def worker(folder):
    folder, out = Path(folder), {}
    parallel.meet(); n, rank = dist.get_world_size(), dist.get_rank()
    meshes = {f"{n//R}x{R}": parallel.meet(R) for R in (1, 2, 4) if n % R == 0}
    for name, mesh in meshes.items(): out[name] = dict(check=parallel.self_check(mesh), step=a_step(mesh), ties=ties(mesh))
    out["same"], out["harvest"] = other_code(mesh), harvested(folder/f"harvest{n}")
    try: parallel.train_ranks(lambda s: stream(s, 40 if n == 4 else 80), new(), checkpoint=folder/"checkpoint.safetensors", key="a", every=0, mesh=meshes["2x2" if n == 4 else "1x2"], **KW)
    except KeyboardInterrupt: pass
    (folder/f"{n}_{rank}.json").write_text(json.dumps(out))
    dist.barrier(); dist.destroy_process_group()


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
    "80 steps in float32, AuxK at work: losses to 1e-5; weights, which a single score within rounding of the threshold can move, to 1e-3 of the largest."
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
    for s in (torch.randn(3000, generator=g)*10.**torch.randint(-30, 30, (3000,), generator=g), torch.randint(-3, 9, (500,), generator=g).float()):
        up = s[s > 0].sort(descending=True).values
        for n in (1, 2, 77, len(up)//2, len(up)):
            value, room, equal = nth_largest(s, n)
            assert (value, room, equal) == (up[n-1].item(), n - int((up > value).sum()), int((up == value).sum()))
        assert nth_largest(s, len(up)+1) == (0., 0, 0)
    assert nth_largest(torch.empty(0), 1) == (0., 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_selects_as_before(dtype):
    cc = new(); x = cc.normalise(next(stream(0)))
    for guess in (0., 1., 50.):
        a, b = select(cc, x, guess, dtype), select_ranks(cc, x, None, guess, dtype)
        assert a[1] == b[1] and all(torch.equal(u, v) for u, v in zip(a[0], b[0]))


# ---- checkpoints

def test_four_ranks_then_two_then_one(worlds):
    "Begun on 2 x 2 ranks, gone on with 1 x 2, ended in one process."
    f = worlds[0]/"checkpoint.safetensors"; whole, cc, steps = new(), new(), []
    log = train(stream, whole, **KW)
    got = train(lambda s: steps.append(s) or stream(s), cc, checkpoint=f, key="a", **KW)
    assert 70 < steps[0] <= 80 and list(got.step) == list(log.step)
    assert (got.loss/log.loss-1).abs().max() < 1e-5 and (got.dead-log.dead).abs().max() < .02
    for a, b in zip(cc.parameters(), whole.parameters()): assert (a-b).abs().max() < 1e-3*b.abs().max()


PRESET = dict(pairs=[["pt", "it"]], n_latents=64, k=4, batch=256, train_tokens=100_000, lr=3e-3, dead_after=4000, k_aux=8, aux_latents=16)


def words(settings): return [f"{k}={json.dumps(v)}" for k, v in settings.items()]


def command(runs):
    return torchrun(2, "-m", "llmdiff.parallel", "--preset", "tiny", "--runs", runs, "--every", 0, *(w for s in words(PRESET) for w in ("-p", s)))


def run(cmd): return subprocess.run(cmd, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_a_rank_is_killed_and_the_job_goes_on(tmp_path, monkeypatch):
    from test_crosscoder import small_store
    for d in ("whole", "cut"): (tmp_path/d/"tiny").mkdir(parents=True); store = small_store(tmp_path/d/"tiny/store")
    r = run(command(tmp_path/"whole"))
    assert r.returncode == 0 and "pt-it: trained on 2 ranks, 1 x 2 (data x latents)" in r.stdout, r.stderr[-3000:]
    cut, whole = (tmp_path/d/"tiny/crosscoder/pt-it" for d in ("cut", "whole"))
    p = subprocess.Popen(command(tmp_path/"cut"), env=ENV, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while p.poll() is None and not (cut/"checkpoint.safetensors").exists(): time.sleep(.01)
    for c in psutil.Process(p.pid).children(recursive=True):
        if c.environ().get("RANK") == "1": c.send_signal(signal.SIGKILL)
    _, err = p.communicate(timeout=100)                                # bounded: the others do not wait for the dead
    assert p.returncode not in (0, None) and not (cut/"model.safetensors").exists()
    said = [s for s in err.splitlines() if s.startswith("llmdiff:")]
    assert said == ["llmdiff: rank 0 stops: another rank has died or hangs, or the job was cancelled: run the same command again, training goes on from the last checkpoint"], err
    assert [f.name for f in cut.iterdir()] == ["checkpoint.safetensors"]
    with training.safe_open(cut/"checkpoint.safetensors", "pt") as f: assert 0 < int(f.metadata()["step"]) < 390
    r = run(command(tmp_path/"cut"))
    assert r.returncode == 0 and "starts anew" not in r.stdout, r.stderr[-3000:]
    for f in ("model.safetensors", "config.json", "log.parquet"): assert (cut/f).read_bytes() == (whole/f).read_bytes(), f
    # the chain finds it finished, as its own
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained again"))
    s = parallel.settings_of("05_training", "tiny", words(PRESET)); s["select"] = s.pop("select_dtype")
    train_pair(store, ["pt", "it"], cut, **{k: v for k, v in s.items() if k not in ("pairs", "run")})


# ---- what is refused

def test_layouts_that_cannot_be():
    check_layout(12, 12, 6, 3)
    with pytest.raises(UserError, match="6 ranks cannot be grouped in slices of 4"): check_layout(12, 12, 6, 4)
    with pytest.raises(UserError, match="13 latents cannot be divided over 3 ranks: set n_latents to a multiple of 3"): check_layout(13, 12, 6, 3)
    with pytest.raises(UserError, match="a batch of 13 tokens cannot be divided over 2 replicas"): check_layout(12, 13, 6, 3)


@pytest.mark.parametrize("world,args,words", [
    (None, [], "torchrun starts this"), (3, ["-p", "n_latents=512"], "512 latents cannot be divided over 3 ranks"), (2, ["-p", "n_latent=512"], "did you mean 'n_latents'"), (2, ["-p", "512"], "-p takes KEY=VALUE, not '512'"),
    (2, [], "manifest.json is missing: run notebook 03_caching first"), (2, ["--preset", "huge"], "unknown preset 'huge'")])
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
    monkeypatch.setenv("LOCAL_RANK", local); monkeypatch.setattr(parallel, "work", work)
    assert parallel.main([]) == 1 and capsys.readouterr().err == "llmdiff: too large\n"*lines


@pytest.mark.parametrize("first", ["signal", "connection"])
def test_a_lost_rank_is_said_once(monkeypatch, capsys, first):
    "By torchrun's SIGTERM or by the closed connection, whichever comes first."
    def work(a):
        try: signal.raise_signal(signal.SIGTERM) if first == "signal" else None
        finally: raise RuntimeError("Connection closed by peer")
    monkeypatch.setenv("RANK", "1"); monkeypatch.setenv("LOCAL_RANK", "1"); monkeypatch.setattr(parallel, "work", work)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e: parallel.main([])
    assert e.value.code == 1 and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "llmdiff: rank 1 stops: another rank has died or hangs, or the job was cancelled: run the same command again, training goes on from the last checkpoint\n"


def test_a_rank_with_other_code_is_named(worlds):
    for (n, rank), out in worlds[1].items():
        assert out["same"] == "rank 1 has another code than rank 0: start all ranks with the same command, from the same code and the same store"


# ---- harvest, cost

def test_rank_0_joins_when_all_have_harvested(worlds):
    for n in (2, 4):
        assert worlds[1][n, 0]["harvest"] == {f"shard{i}": str(i % n) for i in range(7)}
        assert worlds[1][n, 1]["harvest"] is None


def test_cost_follows_from_its_constants():
    a = cluster_cost().set_index("replicas x slices"); b = cluster_cost(disk=1e15, reader=1e15).set_index("replicas x slices")
    assert a.loc["1 x 1", "network, ms a step"] == a.loc["1 x 1", "sent, MB a step"] == 0
    assert a.loc["1 x 1", "store, TB"] == pytest.approx(2e8*2*3584*2/1e12)
    assert a.loc["1 x 1", "harvest, h"] == pytest.approx(2e8*2*8.3e9/(.5*790e12)/3600)
    assert a.loc["1 x 1", "harvest, h"] == pytest.approx(8*a.loc["1 x 8", "harvest, h"])
    assert a.loc["1 x 1", "encoder, ms a step"] == pytest.approx(64*a.loc["8 x 8", "encoder, ms a step"]) == pytest.approx(1e3*2*7168*114_688*4096/(.5*790e12))
    assert (b["training, h"] <= a["training, h"]).all() and (b["training, h"] < a["training, h"]).any() and "reading" in set(a.limit) - set(b.limit)
    assert a.loc["8 x 8", "sent, MB a step"] > a.loc["1 x 64", "sent, MB a step"]
    t = traffic(4096, 2, 3584, 114_688, 256, 1, 8).set_index("what")
    assert t.loc["reconstruction", "bytes"] == 4096*7168*4 and t.loc["reconstruction", "sent"] == 2*7*t.loc["reconstruction", "bytes"]//8 and t.loc["gradients of the slice", "bytes"] == 0


if __name__ == "__main__": worker(sys.argv[1])
