"The activation store: what is on disk, what reading gives, the order of batches, and what is refused."
import itertools
import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch

import harvests
from llmdiff.caching import norm_table
from llmdiff.core import UserError
from llmdiff.engine import store as module
from llmdiff.engine.progress import disk_width
from llmdiff.engine.store import (
    copy_rows, pack, pack_models, plan_pools, read_tensors, shard_rows, Store, write_tensors)

one_thread = harvests.one_thread
docs = harvests.docs
family = harvests.family
folder = harvests.folder
make = harvests.make
whole = harvests.whole
whole8 = harvests.whole8


def all_rows(store, pair=None, key="acts", **kw): return torch.cat([r[key] for r in store.rows(pair, **kw)])


def as_tuples(rows): return [tuple(r.tolist()) for r in rows.flatten(1)]


def relative_error(got, want): return (got - want).norm()/(want - want.mean(0)).norm()


# ---- what reading gives

def test_tokens_positions_and_documents_are_those_of_the_corpus(whole, docs):
    s = Store(whole)
    assert s.models == ["A", "B", "C"] and s.n_docs == 30 and s.d_model == 32
    assert s.n_tokens == sum(k.sum() for k in docs.keep)
    assert len(list(s.rows())) > 2
    acts = all_rows(s)
    assert acts.shape == (s.n_tokens, 3, 32) and acts.dtype == torch.float32
    assert all_rows(s, key="doc").tolist() == [d for d, k in zip(docs.doc, docs.keep) for _ in range(k.sum())]
    assert all_rows(s, key="token").tolist() == [int(t) for i, k in zip(docs.ids, docs.keep) for t in i[k]]
    assert all_rows(s, key="pos").tolist() == [int(p) for k in docs.keep for p in np.flatnonzero(k)]


def test_mean_and_variance_are_those_of_the_stored_values(whole):
    s = Store(whole)
    x = all_rows(s).double()
    assert np.allclose(s.mean, x.mean(0), atol=1e-12) and s.mean.dtype == np.float64
    assert np.allclose(s.var, x.var(0, correction=0).sum(1), rtol=1e-12) and s.var.shape == (3,)


def test_a_pair_is_its_two_models_in_the_order_asked(whole):
    s = Store(whole)
    a, b = next(iter(s.rows()))["acts"], next(iter(s.rows(["C", "A"])))["acts"]
    assert torch.equal(a[:, [2, 0]], b)
    with pytest.raises(UserError, match="no model 'D'.*A, B, C"): list(s.rows(["A", "D"]))


# ---- int8

def test_int8_keeps_models_and_difference(whole, whole8):
    a, b = all_rows(Store(whole)), all_rows(Store(whole8))
    assert a.shape == b.shape and b.dtype == torch.float32
    for m in range(3): assert relative_error(b[:, m], a[:, m]) < .02
    assert relative_error(b[:, 2] - b[:, 0], a[:, 2] - a[:, 0]) < .02


def test_int8_has_the_moments_of_what_reading_gives(whole, whole8):
    s = Store(whole8)
    b = all_rows(s)
    x = b.double()
    assert np.allclose(s.mean, x.mean(0), atol=1e-12)
    assert np.allclose(s.var, x.var(0, correction=0).sum(1), rtol=1e-12)
    assert torch.equal(all_rows(s, ["C", "A"]), b[:, [2, 0]])
    assert ["int8" in repr(Store(d)) for d in (whole, whole8)] == [False, True]
    assert len(norm_table(s)) == len(norm_table(Store(whole)))


def test_int8_with_large_dimensions_and_with_none_that_varies():
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    x[:, :3] = 1000 + 60*x[:, :3]
    x[:, 5] = 7.
    x[:, 6] = 0.
    y = shard_rows(pack_models(pack(x), []), 0, 500)[:, 0]
    assert (y - x)[:, 7:].norm()/x[:, 7:].norm() < .02 and (y - x)[:, :3].abs().max() < 4
    assert torch.allclose(y[:, 5:7], x[:, 5:7], atol=1e-5)
    assert torch.equal(shard_rows(pack_models(pack(x[:1]), []), 0, 1)[:, 0], x[:1])
    assert shard_rows(pack_models(pack(x[:0]), []), 0, 0).shape == (0, 1, 40)


def test_int8_takes_half_the_disk(whole, whole8):
    def size(d):
        s = Store(d)
        shards = [s.shard(i) for i in range(len(s.manifest["shards"]))]
        return sum(t.numel()*t.element_size() for x in shards for k, t in x.items() if k in ("acts", "scale"))
    assert size(whole8)/size(whole) == pytest.approx((32 + 4)/64)
    widths = [disk_width(2, 3584, kind, torch.bfloat16) for kind in ("int8", "bfloat16")]
    assert widths[0]/widths[1] < .51


# ---- what is refused

def test_formats_are_told_apart(make, folder, whole, whole8):
    shutil.copytree(whole8, folder)
    with pytest.raises(UserError, match="store_dtype int8, and bfloat16 is asked"): make()
    with pytest.raises(UserError, match="store_dtype 'fp8' is unknown: bfloat16 or int8"): make(store_dtype="fp8")
    file = folder/"manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["format"] == 2 and json.loads((whole/"manifest.json").read_text())["format"] == 1
    file.write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(UserError, match="format 3, this version reads 1, 2"): Store(folder)


def test_check_compares_the_corpus(make):
    s = make(corpus=dict(hash="h1", tokenizer="t", ctx=128))
    s.check(corpus_hash="h1")
    with pytest.raises(UserError, match="another corpus"): s.check(corpus_hash="h2")
    assert s.manifest["ctx"] == 128 and s.manifest["tokenizer"] == "t"


def test_a_store_that_is_not_there_names_the_step(tmp_path):
    with pytest.raises(UserError, match="run step caching first"): Store(tmp_path)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_nan_on_disk_names_shard_and_row(whole, whole8, tmp_path, kind):
    d = shutil.copytree(whole8 if kind == "int8" else whole, tmp_path/"s")
    file = d/"shard_00001.safetensors"
    tensors = {k: v.clone() for k, v in read_tensors(file).items()}
    tensors["acts" if kind == "bfloat16" else "scale"][7, 2] = torch.nan
    write_tensors(file, tensors)
    s = Store(d)
    where = "shard_00001.safetensors, row 7: the activations hold NaN"
    with pytest.raises(UserError, match=where): list(s.rows())
    with pytest.raises(UserError, match=where): batches(s)
    list(s.rows(["A", "B"]))                                    # the other models are well


FINE = [0x7f7f, 0xff7f, 0x8000, 0x0001]      # the largest finite numbers, minus zero, the smallest number
BAD = [0x7f80, 0xff80, 0x7fc0, 0xffff]       # Inf and NaN of both signs


@pytest.mark.parametrize("bits", FINE + BAD)
def test_nan_and_inf_are_known_by_their_bits(bits):
    x = torch.randn(7, 3, 5).bfloat16()
    x.view(torch.int16)[3, 2, 1] = int(np.uint16(bits).astype(np.int16))
    out = torch.empty(7, 2, 5, dtype=torch.bfloat16)
    fine = bits in FINE
    assert x[3, 2, 1].isfinite() == fine == bool(copy_rows(dict(acts=x), 0, 7, [2, 0], out))
    assert copy_rows(dict(acts=x), 0, 7, [0, 1], out) and torch.equal(out, x[:, :2])


# ---- batches

SMALL = dict(block=8, pool=64)


def batches(s, seed=0, **kw): return list(s.batches(["A", "C"], 32, 1000, seed, **{**SMALL, **kw}))


def all_equal(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_are_deterministic_and_continue(whole):
    s = Store(whole)
    a = batches(s)
    assert len(a) == 1000//32 and all(x.shape == (32, 2, 32) and x.dtype == torch.float32 for x in a)
    assert all_equal(a, batches(Store(whole)))
    assert not torch.equal(a[0], next(s.batches(["A", "C"], 32, 1000, 1, **SMALL)))
    for start in (1, 7, 20, 30): assert all_equal(a[start:], batches(s, start=start))
    assert batches(s, start=31) == []


def test_every_row_once_an_epoch_and_far_from_its_neighbours(whole):
    s = Store(whole)
    n = s.n_tokens
    number = {row: i for i, row in enumerate(as_tuples(all_rows(s, ["A", "C"])))}
    two = [number[row] for x in s.batches(["A", "C"], 1, 2*n, 0, **SMALL) for row in as_tuples(x)]
    assert sorted(two[:n]) == sorted(two[n:]) == list(range(n)) and two[:n] != two[n:]
    assert np.mean(np.abs(np.diff(two[:n])) < 3) < .2


def test_held_documents_are_never_trained_on(whole):
    s = Store(whole)
    train, held = s.split(.2)
    assert train == (0, 24) and held == (24, 30)
    rows = set(as_tuples(all_rows(s, ["A", "C"], docs=held)))
    seen = {row for x in batches(s, docs=train) for row in as_tuples(x)}
    assert rows and not rows & seen
    assert sum(len(x["doc"]) for d in (train, held) for x in s.rows(docs=d)) == s.n_tokens
    with pytest.raises(UserError, match="no token in documents"): batches(s, docs=(30, 40))


def test_batches_larger_than_the_store_are_filled_from_several_epochs(whole):
    s = Store(whole)
    n = 3*s.n_tokens
    x = next(s.batches(["A", "B"], n, n, 0))
    assert torch.allclose(x.sum(0), 3*all_rows(s, ["A", "B"]).sum(0), atol=1e-2)


@pytest.mark.parametrize("size, start, held", [(32, 0, False), (32, 13, True), (5, 100, False), (700, 1, False)])
def test_batches_are_those_of_the_plain_reading(whole, size, start, held):
    "No thread, no buffer: every pool read whole, its rows permuted, one row after the other."
    s = Store(whole)
    docs = s.split()[0] if held else None

    def rows():
        for blocks, key in plan_pools(s, docs, 3, 8, 64):
            x = torch.cat([s.shard(i)["acts"][a:b, [2, 1]] for i, a, b in blocks]).float()
            yield from x[torch.from_numpy(np.random.default_rng(key).permutation(len(x)))]

    want = torch.stack(list(itertools.islice(rows(), start*size, 2100//size*size)))
    got = s.batches(["C", "B"], size, 2100, 3, start=start, docs=docs, **SMALL)
    assert torch.equal(torch.cat(list(got)), want)


def test_int8_batches_are_the_rows_in_the_same_order(whole, whole8):
    a, b = batches(Store(whole)), batches(Store(whole8))
    assert all(x.dtype == torch.float32 and (x - y).norm() < .03*x.norm() for x, y in zip(a, b, strict=True))
    rows = set(as_tuples(all_rows(Store(whole8), ["A", "C"])))
    assert {row for x in b for row in as_tuples(x)} <= rows


# ---- the thread that reads ahead

def test_one_pool_is_read_ahead_and_no_more(whole, monkeypatch):
    real, read = module.read_blocks, []

    def noted(*a):
        read.append(threading.current_thread())
        return real(*a)

    monkeypatch.setattr(module, "read_blocks", noted)
    it = Store(whole).batches(["A", "C"], 32, 1000, 0, **SMALL)
    next(it)
    time.sleep(.2)
    assert len(read) == 2 and threading.main_thread() not in read
    it.close()
    assert not any(t.is_alive() for t in read)
    list(Store(whole).batches(["A", "C"], 32, 64, 0, **SMALL))
    assert len(read) <= 5               # 64 rows are in two pools or three: none is read for nothing


def test_an_error_of_the_thread_is_the_callers(whole, monkeypatch):
    real, threads = module.read_blocks, []

    def broken(*a):
        threads.append(threading.current_thread())
        if len(threads) == 3: raise OSError("disk gone")
        return real(*a)

    monkeypatch.setattr(module, "read_blocks", broken)
    got = []
    with pytest.raises(OSError, match="disk gone"):
        for x in Store(whole).batches(["A", "C"], 32, 1000, 0, **SMALL): got.append(x.clone())
    monkeypatch.setattr(module, "read_blocks", real)
    assert len(got) >= 2 and all_equal(got, batches(Store(whole))[:len(got)])
    assert not any(t.is_alive() for t in threads)
