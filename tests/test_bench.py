"The benchmarks: what they report, what they find when something is wrong, and the command."
import importlib.metadata, io, json, math

import numpy as np, pytest, torch

from llmdiff import bench as B, scaling
from llmdiff.crosscoder import Codes, select, sparse_grads
from llmdiff.run import main

TOY = B.sized(16, 64, 4, 128)
KEYS = {"name", "sizes", "ours", "peer", "ratio", "unit"}


@pytest.fixture(autouse=True)
def one_thread():
    "Small products gain nothing from a second thread, and on a busy machine they lose."
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def no_peers(monkeypatch):
    "As if no other trainer were installed, whatever is."
    monkeypatch.setattr(B, "PEERS", {"no-such-trainer": {}})


# ---- what is reported

@pytest.mark.parametrize("name", B.SPEED)
def test_each_benchmark_gives_a_table(name, no_peers, tmp_path):
    (_, t), = B.measure([name], "small", 1, run=str(tmp_path), say=lambda s: None)
    assert KEYS <= set(t.columns) and len(t) and t.ratio.map(math.isfinite).all() and not t.assign(sizes=t.sizes.map(B.in_words)).duplicated(["name", "sizes"]).any()
    assert (t.met.notna() == (t.goal != "")).all() and t.sizes.map(len).all()
    exact = t[t.goal.isin(["<= 0", "<= 1e-5", "<= 1.002", "<= 0.05"])]      # goals that no load on the machine can miss
    assert exact.met.astype(bool).all(), B.verdict(exact)
    assert len(exact) == {"step": 8, "scaling": 1}.get(name, 0)
    B.readable(t)


def test_goals_belong_to_their_sizes():
    full, other = B.sized(576, 4608, 32, 4096), B.sized(576, 4608, 32, 2048)
    here = "" if torch.cuda.is_available() else ">= 10"
    assert B.step_goal(full, "bf16", "plain dense trainer") == here
    assert B.step_goal(other, "bf16", "plain dense trainer") == B.step_goal(full, "bf16", "dense reference") == ""


def test_verdict_is_computed():
    rows = [B.row("a / b", TOY, 8, 1, "tokens/s", ">= 10"), B.row("c", TOY, 4, 1, "s, less is better", "<= 3"), B.row("d / e", TOY, 1, 0, "s", ">= 1"), B.row("f", TOY, 1, 1, "s")]
    said = B.verdict(B.table(rows))
    assert said.startswith("0 of 3 goals are met") and "20% short" in said and "33% over" in said and "d / e (2x16, D 64, k 4, B 128) is nan" in said and "; f" not in said
    assert B.verdict(B.table(rows[:1] + [B.row("g", TOY, 3, 1, "s", "<= 3")])).startswith("1 of 2")


def test_race_goes_round():
    order = []
    times = B.race({"a": lambda i: order.append("a"), "b": lambda i: order.append("b")}, repeats=3, warm=2)
    assert "".join(order) == "ab"*5 and [len(t) for t in times.values()] == [3, 3]


# ---- what they find when something is wrong

def test_wrong_gradients_are_found(monkeypatch):
    def wrong(cc, x, codes): e = sparse_grads(cc, x, codes); cc.b_enc.grad[0] += .1; return e
    monkeypatch.setattr(B, "sparse_grads", wrong)
    rows = B.same_answer(TOY)
    assert rows[0]["met"] and not rows[1]["met"]


def test_a_wrong_selection_is_found(monkeypatch):
    def wrong(cc, x, *a):
        codes, threshold = select(cc, x, *a)
        return Codes(*(c[1:] for c in codes)), threshold            # one entry is lost
    monkeypatch.setattr(B, "select", wrong)
    assert [r["met"] for r in B.same_answer(TOY)] == [False, True]


def test_memory_of_a_dense_array_is_found():
    s = B.sized(8, 8192, 4, 512)   # a batch of at least one tile
    assert B.bytes_a_score(B.dense_trainer, s) > 4 and abs(B.bytes_a_score(B.sparse_trainer, s)) < .5


def test_peak_counts_what_is_alive_at_once():
    def f(): a = torch.empty(1000); del a; b, c = torch.empty(300), torch.empty(300); return b, c
    if not torch.cuda.is_available(): assert B.peak_bytes(f) == 4000


def test_missing_and_broken_peers_are_named(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda d: "1.0" if d == "broken" else real(d))
    def fails(n, s): raise ImportError("no module named 'x'\nand more")
    steps, notes = B.open_peers(TOY, B.world(TOY)(0), {"no-such-trainer": {"a": None}, "broken": {"a": fails, "b": fails}})
    assert steps == {} and notes == ["no-such-trainer is not installed, so it was not measured.",
                                     "broken 1.0 a is installed and fails, so it was not measured: ImportError: no module named 'x'"]


# ---- the yardsticks compute what they stand for

def test_trainers_agree():
    draw = B.world(TOY); steps = [make(TOY)[1] for make in (B.sparse_trainer, B.dense_trainer, B.plain_trainer)]
    for i in range(5):
        losses = [float(step(draw(i))) for step in steps]
        np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


def test_closed_form_is_the_direct_fit():
    x, f, W, _ = scaling.planted(200); xhat = torch.einsum("nj,jmd->nmd", f, W)
    for m, p in ((0, 1), (1, 1), (0, 0)):
        want = [scaling.beta_direct(x, xhat, f, W, j, m, p, "eps") for j in (0, 1, 3)]
        np.testing.assert_allclose(B.closed_form(x, xhat, f[:, [0, 1, 3]], W, [0, 1, 3], m, p), want)


def test_all_ways_find_the_same_contexts():
    cc, _, x = B.trained(TOY, 640); codes = cc.encode(x); at = np.arange(640); doc, pos = at//32, at % 32
    ours, heaps, (best, which) = B.top_ours(codes, doc, pos, 3, rows=96), B.top_heaps(codes, doc, 64, 3), B.top_loop(codes, doc, 64, 3)
    theirs = sorted((j, -d, a, p) for j, h in enumerate(heaps) for a, d, p in h)
    assert sorted((int(o["lat"]), int(o["doc"]), float(o["act"]), int(o["pos"])) for o in ours) == theirs and len(theirs) > 30
    assert sorted((j, d, a) for j in range(64) for d, a in zip(which[j].tolist(), best[j].tolist()) if a > 0) == [t[:3] for t in theirs]


def test_random_store_is_a_store(tmp_path):
    s = B.random_store(tmp_path, 1000, 8, n_models=3, shard_tokens=300)
    assert (s.n_tokens, s.models, s.d_model) == (1000, ["0", "1", "2"], 8) and sum(len(r["doc"]) for r in s.rows()) == 1000
    one = B.PerToken(s)
    assert len(one) == 1000 and torch.equal(one[299], s.shard(0)["acts"][299]) and torch.equal(one[300], s.shard(1)["acts"][0])


# ---- the command

def test_command_json(capsys):
    assert main(["bench", "reader", "--size", "small", "--repeats", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(l) for l in out.splitlines()]
    assert len(lines) == 3 and all(KEYS <= set(l) and l["ours"] > 0 and isinstance(l["sizes"], dict) for l in lines)
    assert err.startswith("reader: 8,192 tokens")


def test_command_words(capsys):
    assert main(["bench", "harvest", "--size", "small", "--repeats", "1"]) == 0
    out, _ = capsys.readouterr()
    assert "full forward pass with logits" in out and "goals are met" in out


@pytest.mark.parametrize("words, said", [(["stp"], "there is no benchmark 'stp': choose from step, harvest, reader, scaling"), (["step", "--size", "huge"], "there is no size 'huge'"),
                                         (["step", "--repeats", "0"], "repeats = 0"), (["harvest", "--size", "small", "--layer", "99"], "has no layer 99: its layers are 0 to 3")])
def test_bad_input_is_one_sentence(words, said, capsys):
    assert main(["bench", *words]) == 1
    err = capsys.readouterr().err.splitlines()
    assert said in err[-1] and "Traceback" not in "".join(err)


def test_not_a_number_is_null():
    B.BENCHES["none"] = lambda **_: B.table([B.row("a / b", TOY, 1, 0, "s")])
    try: B.bench(["none"], as_json=True, file=(out := io.StringIO()))
    finally: del B.BENCHES["none"]
    assert json.loads(out.getvalue())["ratio"] is None
