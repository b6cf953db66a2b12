"The live stream: the interface of the store, always new text, exact resume, held-out documents never read."
import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import harvests
from harvests import save_toy, toy_harvest
from llmdiff.core import UserError
from llmdiff.scale import live as module
from llmdiff.scale.live import Live, plan_chunks, plan_mixes, storage_errors, stored
from llmdiff.training import PairOptions, train_pair

one_thread = harvests.one_thread
docs = harvests.docs
family = harvests.family

TOY = dict(dtype="float32", batch_tokens=64, chunk_tokens=40, width=3, sample_tokens=10**6)
AB = ["A", "B"]


def toy(family, docs, **kw): return Live(family, docs, 1, **{**TOY, **kw})


def numbered(n, length=5):
    "A stream without models, whose rows say which document they come from; and the documents it was asked to read."
    s, asked = Live.__new__(Live), []
    s.models, s.d_model = ["A", "B"], 3
    s.docs = pd.DataFrame(dict(doc=range(n), ids=[[0]*length]*n, keep=[[True]*length]*n))
    s.kept, s.doc_end, s.n_tokens = np.full(n, length), n, n*length
    s.chunk_tokens, s.width = 100, 4

    def read(at, pair=None):
        asked.extend(at.tolist())
        rows = torch.from_numpy(np.repeat(at, s.kept[at])).float()
        return rows[:, None, None].expand(-1, 2, 3).contiguous()

    s.read = read
    return s, asked


def doc(x): return x[:, 0, 0].long().tolist()


def all_equal(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the plan

@pytest.mark.parametrize("width", [1, 2, 7])
def test_every_row_of_an_epoch_leaves_once(width):
    kept = np.random.default_rng(0).integers(0, 9, 300)
    sizes = [len(c) for c in itertools.islice(plan_chunks(kept, 50, 0), 99)]
    n = int(np.flatnonzero(np.cumsum(sizes) == (kept > 0).sum())[0]) + 1      # chunks of an epoch
    seen = []
    for mix in itertools.islice(plan_mixes(kept, 50, width, 0), n + width):
        seen += [np.repeat(d, kept[d])[rows] for c, d, rows in mix if c < n]
    assert np.array_equal(np.bincount(np.concatenate(seen), minlength=300), kept)


def test_epochs_differ_and_orders_depend_on_the_seed():
    kept = np.full(100, 3)
    a, b = ([c.tolist() for c in itertools.islice(plan_chunks(kept, 60, s), 10)] for s in (0, 1))
    assert a != b and a[:5] != a[5:]
    assert sorted(sum(a[:5], [])) == sorted(sum(a[5:], [])) == list(range(100))


def test_the_stream_keeps_reading_new_text_to_the_end():
    s, asked = numbered(400)
    seen, new = set(), []
    for x in s.batches(AB, 50, s.n_tokens, 0):
        new.append(len(set(doc(x)) - seen))
        seen |= set(doc(x))
    # a buffer filled once would end at chunk_tokens*width/5 = 80 documents
    assert len(seen) > .95*400 and len(set(asked)) == 400
    third = len(new)//3
    assert sum(new[third:2*third]) > 50 and sum(new[2*third:]) > 50      # in the middle and at the end too
    two = [d for x in s.batches(AB, 50, 2*s.n_tokens, 0) for d in doc(x)]
    times = np.bincount(two)
    # at the ends an epoch overlaps the next
    assert len(set(two)) == 400 and times.max() <= 15 and np.median(times) == 10


def test_the_rows_of_a_batch_come_from_far_apart():
    s, _ = numbered(2000)
    different, apart = [], []
    for x in s.batches(AB, 50, 5000, 0):
        d = doc(x)
        different.append(len(set(d)))
        apart.append(np.median(np.abs(np.diff(d))))
    # neighbours in the corpus would have 10 documents, distance 0
    assert np.mean(different) > 30 and np.mean(apart) > .2*2000
    chunks = [len({i//20 for i in doc(x)}) for x in s.batches(AB, 50, 500, 0)]
    assert min(chunks) > 20                                     # from the first batch on


def test_memory_is_bounded():
    s, _ = numbered(1000)
    held = []
    it = s.batches(AB, 50, 2*s.n_tokens, 0)
    for _ in it:
        acts = it.gi_frame.f_locals["acts"]
        held.append(sum(len(v) for v in acts.values()))
    assert max(held) <= 4*105


@pytest.mark.parametrize("batch", [7, 50, 333])
def test_a_run_that_continues_reads_only_what_it_needs(batch):
    s, asked = numbered(300)
    def batches(**kw): return s.batches(AB, batch, 4000, 5, docs=(0, 270), **kw)
    a = list(batches())
    assert len(a) == 4000//batch
    for start in (1, len(a)//2, len(a) - 1):
        asked.clear()
        x = next(batches(start=start))
        assert torch.equal(x, a[start]) and len(asked) <= 20*(4 + -(-batch//100))
        assert all_equal(a[start:], batches(start=start))
    assert list(s.batches(AB, batch, 4000, 5, start=len(a))) == []


def test_held_documents_are_never_read():
    s, asked = numbered(200)
    train, held = s.split(.2)
    assert (train, held) == ((0, 160), (160, 200))
    list(s.batches(AB, 50, 3000, 0, docs=train))
    assert set(asked) == set(range(160))
    assert sum(b - a for _, a, b in s.spans(train)) == 800 and sum(b - a for _, a, b in s.spans()) == 1000


# ---- with models

def test_numbers_are_those_of_the_store(family, docs, tmp_path):
    s, t = toy(family, docs), toy_harvest(family, docs, tmp_path/"store")
    assert (s.models, s.d_model, s.n_tokens, s.n_docs) == (t.models, t.d_model, t.n_tokens, t.n_docs)
    assert s.split() == t.split() and s.index(["C", "A"]) == t.index(["C", "A"])
    for d in (None, (3, 9)):
        keys = ("acts", "token", "pos", "doc")
        a, b = ({k: torch.cat([r[k] for r in x.rows(["C", "A"], docs=d)]) for k in keys} for x in (s, t))
        for k in keys[1:]: assert torch.equal(a[k], b[k])
        assert torch.allclose(a["acts"], b["acts"], atol=.02*float(b["acts"].abs().max()))
    assert np.allclose(s.mean, t.mean, atol=1e-3) and np.allclose(s.var, t.var, rtol=1e-2)
    assert s.mean.dtype == s.var.dtype == np.float64


def test_batches_are_rows_of_the_store(family, docs, tmp_path):
    s, t = toy(family, docs), toy_harvest(family, docs, tmp_path/"store")
    one = torch.cat(list(itertools.islice(s.batches(AB, 1, 10**6, 0), 200)))
    rows = torch.cat([r["acts"] for r in t.rows(AB)])
    nearest = torch.cdist(one.flatten(1), rows.flatten(1)).min(1).values
    assert nearest.max() < .02*float(rows.norm(dim=2).max())


def test_continued_with_models_bit_for_bit(family, docs):
    args = (["A", "C"], 16, 1200, 0, (0, 25))
    a = list(toy(family, docs).batches(*args))
    assert len(a) == 75 and a[0].shape == (16, 2, 32) and a[0].dtype == torch.float32
    for start in (5, 40): assert all_equal(a[start:], toy(family, docs).batches(*args, start=start))


def test_the_hash_is_of_content(family, docs, tmp_path):
    h = toy(family, docs).hash
    other = {**family, "C": save_toy(tmp_path/"c", seed=8)}
    changed = [toy(family, docs[:20]), toy(family, docs, chunk_tokens=41), toy(other, docs)]
    assert h == toy(family, docs.copy()).hash and len({h, *(s.hash for s in changed)}) == 4


def test_no_model_is_loaded_before_it_is_needed(family, docs, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *a: pytest.fail("loaded a model"))
    s = toy(family, docs)
    assert s.hash and s.split() and s.spans() and s.index(["A"]) == [0] and repr(s)
    with pytest.raises(UserError, match="no model 'D'.*A, B, C"): next(s.batches(["A", "D"], 4, 8, 0))
    with pytest.raises(UserError, match="no token in documents"): next(s.batches(AB, 4, 8, 0, docs=(90, 99)))
    with pytest.raises(UserError, match="corpus is empty"): toy(family, docs[:0])
    with pytest.raises(UserError, match="layer 4 is out of range"): Live(family, docs, 4)
    with pytest.raises(UserError, match="must be positive"): toy(family, docs, width=0)


def test_nan_names_model_and_document(family, docs, tmp_path):
    word = int(docs.ids[21][-1])

    def edit(m): m.model.embed_tokens.weight[word] = torch.nan

    s = toy({"A": family["A"], "X": save_toy(tmp_path/"x", edit)}, docs)
    says = "model X, live, document [0-9]+: the activations hold NaN"
    with pytest.raises(UserError, match=says): list(s.batches(["A", "X"], 16, 600, 0))


# ---- storage

def test_storage_errors_are_those_of_a_round_trip():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3000, 64, generator=g)
    x = torch.stack([a, a + .15*torch.randn(3000, 64, generator=g)], 1)
    t = storage_errors(x, AB, lambda y: [float(y[:, m].mean()) for m in (0, 1)]).set_index("format")
    assert torch.equal(stored(x, "float32"), x) and (t.loc["float32"].filter(like="error") == 0).all()
    assert t.loc["int8", "error B - A"] < t.loc["bfloat16", "error B - A"] < .03
    assert t.loc["bfloat16", "error A"] < .005
    assert t.loc["int8", "bytes"] < .55*t.loc["bfloat16", "bytes"]*1.05
    assert t.loc["float32", "FVE B"] == float(x[:, 1].mean())


def test_train_pair_takes_a_live_stream(family, docs, tmp_path):
    options = PairOptions(n_latents=32, k=4, batch=32, train_tokens=2000, lr=1e-3, held=.2)
    r = train_pair(toy(family, docs), ["A", "C"], tmp_path/"cc", options)[2]
    assert r["train_tokens"] == 1984 and r["tokens"] > 0
