"The benchmarks: what they report, what they find when something is wrong, and the command."
import importlib.metadata
import io
import json
import math

import numpy as np
import pytest
import torch

from llmdiff.crosscoder import Codes, select, sparse_grads
from llmdiff.driver.commands import main
from llmdiff.scale import bench, bench_data, bench_scaling, bench_step, measure, trainers
from llmdiff.scale.measure import bench_row, bench_table, BenchOptions, goal_words
from llmdiff.scale.trainers import sized
from llmdiff.scaling import beta_direct
from llmdiff.worlds.synthetic import known_latents

TOY = sized(16, 64, 4, 128)
KEYS = {"name", "sizes", "ours", "peer", "ratio", "unit"}


@pytest.fixture(autouse=True)
def one_thread():
    "Small products gain nothing from a second thread, and on a busy machine they lose."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def no_peers(monkeypatch):
    "As if no other trainer were installed, whatever is."
    monkeypatch.setattr(trainers, "PEERS", {"no-such-trainer": {}})


# ---- what is reported

@pytest.mark.parametrize("name", bench.SPEED)
def test_each_benchmark_gives_a_table(name, no_peers, tmp_path):
    options = BenchOptions("small", 1, run=str(tmp_path), say=lambda s: None)
    (_, t), = bench.run_benchmarks([name], options)
    assert KEYS <= set(t.columns) and len(t) and t.ratio.map(math.isfinite).all()
    assert not t.assign(sizes=t.sizes.map(measure.size_words)).duplicated(["name", "sizes"]).any()
    assert (t.met.notna() == (t.goal != "")).all() and t.sizes.map(len).all()
    exact = t[t.goal.isin(["<= 0", "<= 1e-5", "<= 1.002", "<= 0.05"])]   # no load on the machine can miss these
    assert exact.met.astype(bool).all(), goal_words(exact)
    assert len(exact) == {"step": 8, "scaling": 1}.get(name, 0)
    measure.bench_view(t)


def test_goals_belong_to_their_sizes():
    full, other = sized(576, 4608, 32, 4096), sized(576, 4608, 32, 2048)
    here = "" if torch.cuda.is_available() else ">= 10"
    assert bench_step.step_goal(full, "bf16", "plain dense trainer") == here
    assert bench_step.step_goal(other, "bf16", "plain dense trainer") == ""
    assert bench_step.step_goal(full, "bf16", "dense reference") == ""


def test_verdict_is_computed():
    rows = [bench_row("a / b", TOY, 8, 1, "tokens/s", ">= 10"),
            bench_row("c", TOY, 4, 1, "s, less is better", "<= 3"),
            bench_row("d / e", TOY, 1, 0, "s", ">= 1"),
            bench_row("f", TOY, 1, 1, "s")]
    said = goal_words(bench_table(rows))
    assert said.startswith("0 of 3 goals are met") and "20% short" in said and "33% over" in said
    assert "d / e (2x16, D 64, k 4, B 128) is nan" in said and "; f" not in said
    one_met = bench_table(rows[:1] + [bench_row("g", TOY, 3, 1, "s", "<= 3")])
    assert goal_words(one_met).startswith("1 of 2")


def test_race_goes_round():
    order = []
    ways = {"a": lambda i: order.append("a"), "b": lambda i: order.append("b")}
    times = measure.race(ways, repeats=3, warm=2)
    assert "".join(order) == "ab"*5 and [len(t) for t in times.values()] == [3, 3]


# ---- what they find when something is wrong

def test_wrong_gradients_are_found(monkeypatch):
    def wrong(cc, x, codes):
        e = sparse_grads(cc, x, codes)
        cc.b_enc.grad[0] += .1
        return e

    monkeypatch.setattr(bench_step, "sparse_grads", wrong)
    rows = bench_step.same_answer(TOY)
    assert rows[0]["met"] and not rows[1]["met"]


def test_a_wrong_selection_is_found(monkeypatch):
    def wrong(cc, x, *a):
        codes, threshold = select(cc, x, *a)
        return Codes(*(c[1:] for c in codes)), threshold            # one entry is lost

    monkeypatch.setattr(bench_step, "select", wrong)
    assert [r["met"] for r in bench_step.same_answer(TOY)] == [False, True]


def test_memory_of_a_dense_array_is_found():
    s = sized(8, 8192, 4, 512)   # a batch of at least one tile
    assert bench_scaling.bytes_a_score(trainers.dense_trainer, s) > 4
    assert abs(bench_scaling.bytes_a_score(trainers.sparse_trainer, s)) < .5


def test_peak_counts_what_is_alive_at_once():
    def f():
        a = torch.empty(1000)
        del a
        return torch.empty(300), torch.empty(300)

    if not torch.cuda.is_available():
        assert bench_scaling.peak_bytes(f) == 4000


def test_missing_and_broken_peers_are_named(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda d: "1.0" if d == "broken" else real(d))

    def fails(n, s):
        raise ImportError("no module named 'x'\nand more")

    peers = {"no-such-trainer": {"a": None}, "broken": {"a": fails, "b": fails}}
    steps, notes = trainers.open_peers(TOY, trainers.planted_stream(TOY)(0), peers)
    assert steps == {} and notes == [
        "no-such-trainer is not installed, so it was not measured.",
        "broken 1.0 a is installed and fails, so it was not measured: ImportError: no module named 'x'"]


# ---- the yardsticks compute what they stand for

def test_trainers_agree():
    draw = trainers.planted_stream(TOY)
    makers = trainers.sparse_trainer, trainers.dense_trainer, trainers.plain_trainer
    steps = [make(TOY)[1] for make in makers]
    for i in range(5):
        losses = [float(step(draw(i))) for step in steps]
        np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


def test_closed_form_is_the_direct_fit():
    x, f, W, _ = known_latents(200)
    xhat = torch.einsum("nj,jmd->nmd", f, W)
    some = [0, 1, 3]
    for m, p in ((0, 1), (1, 1), (0, 0)):
        want = [beta_direct(x, xhat, f, W, j, m, p, "eps") for j in some]
        np.testing.assert_allclose(bench_scaling.closed_form(x, xhat, f[:, some], W, some, m, p), want)


def test_all_ways_find_the_same_contexts():
    cc, _, x = bench_scaling.trained(TOY, 640)
    codes, at = cc.encode(x), np.arange(640)
    doc, pos = at//32, at % 32
    ours = bench_scaling.top_ours(codes, doc, pos, 3, rows=96)
    heaps = bench_scaling.top_heaps(codes, doc, 64, 3)
    best, which = bench_scaling.top_loop(codes, doc, 64, 3)

    theirs = sorted((j, -d, a, p) for j, h in enumerate(heaps) for a, d, p in h)
    found = sorted((int(o["lat"]), int(o["doc"]), float(o["act"]), int(o["pos"])) for o in ours)
    assert found == theirs and len(theirs) > 30
    looped = []
    for j in range(64):
        looped += [(j, d, a) for d, a in zip(which[j].tolist(), best[j].tolist()) if a > 0]
    assert sorted(looped) == [t[:3] for t in theirs]


def test_random_store_is_a_store(tmp_path):
    s = bench_data.random_store(tmp_path, 1000, 8, n_models=3, shard_tokens=300)
    assert (s.n_tokens, s.models, s.d_model) == (1000, ["0", "1", "2"], 8)
    assert sum(len(r["doc"]) for r in s.rows()) == 1000
    one = bench_data.PerToken(s)
    assert len(one) == 1000
    assert torch.equal(one[299], s.shard(0)["acts"][299]) and torch.equal(one[300], s.shard(1)["acts"][0])


# ---- the command

def test_command_json(capsys):
    assert main(["bench", "reader", "--size", "small", "--repeats", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 3
    assert all(KEYS <= set(d) and d["ours"] > 0 and isinstance(d["sizes"], dict) for d in lines)
    assert err.startswith("reader: 8,192 tokens")


def test_command_words(capsys):
    assert main(["bench", "harvest", "--size", "small", "--repeats", "1"]) == 0
    out, _ = capsys.readouterr()
    assert "full forward pass with logits" in out and "goals are met" in out


@pytest.mark.parametrize("words, said", [
    (["stp"], "there is no benchmark 'stp': choose from step, harvest, reader, scaling"),
    (["step", "--size", "huge"], "there is no size 'huge'"),
    (["step", "--repeats", "0"], "repeats = 0"),
    (["harvest", "--size", "small", "--layer", "99"], "has no layer 99: its layers are 0 to 3")])
def test_bad_input_is_one_sentence(words, said, capsys):
    assert main(["bench", *words]) == 1
    err = capsys.readouterr().err.splitlines()
    assert said in err[-1] and "Traceback" not in "".join(err)


def test_not_a_number_is_null(monkeypatch):
    one_row = bench_table([bench_row("a / b", TOY, 1, 0, "s")])
    monkeypatch.setitem(bench.BENCHES, "none", lambda options: one_row)
    out = io.StringIO()
    bench.bench(["none"], as_json=True, file=out)
    assert json.loads(out.getvalue())["ratio"] is None
