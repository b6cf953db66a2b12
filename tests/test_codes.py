"The pass over a store: whole documents, the codes of some latents, the best documents and a sample in one pass."
import numpy as np
import pandas as pd
import pytest

from llmdiff.codes import active_codes, CAND, doc_maxima, keep_best, Kept, narrow, tiles
from llmdiff.core import mix
from toy_documents import AB, D, World


def test_tiles_hold_whole_documents_in_order():
    w = World()
    for rows in (1, 50, 10**6):
        got = list(tiles(w, AB, rows))
        np.testing.assert_array_equal(np.concatenate([t["doc"] for t in got]), w.doc)
        assert not any(a["doc"][-1] == b["doc"][0] for a, b in zip(got, got[1:]))
        assert len(got) == {1: len(w.docs), 10**6: 3}.get(rows, len(got))       # three shards


def test_a_narrow_crosscoder_has_the_same_codes():
    w = World()
    latents = [0, 3, 7, 12]
    f = narrow(w.cc, latents).dense_codes(w.cc.normalise(w.x)).numpy()
    np.testing.assert_array_equal(f, w.dense()[:, latents])


@pytest.mark.parametrize("rows", [10, 10**6])
def test_active_codes_are_the_dense_ones_of_the_latents_asked_for(rows):
    "Whatever their order."
    w = World()
    latents = [12, 3, 7]
    seen = np.zeros((len(w.doc), 3), np.float32)
    at = {key: i for i, key in enumerate(zip(w.doc, w.pos))}
    for codes in active_codes(w, w.cc, AB, latents, rows):
        row = [at[key] for key in zip(codes["doc"], codes["pos"])]
        seen[row, codes["lat"]] = codes["act"]
    np.testing.assert_array_equal(seen, w.dense()[:, latents])


@pytest.mark.parametrize("n", [0, 1, 4, 100])
@pytest.mark.parametrize("docs_a_call", [1, 7, 90])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_merging_is_a_full_sort(n, docs_a_call, levels):
    """Whatever the tiles, and with many equal scores: score down, then document up, then the first place.

    Latents that fire once or never are no exception."""
    r = np.random.default_rng(levels + docs_a_call)
    N = 3000
    lat = r.zipf(1.5, N) % 50
    doc = np.sort(r.integers(10**5, 10**5 + 90, N))
    act = (r.integers(1, levels, N)/7).astype("f4")
    pos = r.permutation(N)                                   # positions need not ascend, and no two are equal
    best = np.empty(0, CAND)
    for lo in range(10**5, 10**5 + 90, docs_a_call):
        i, j = np.searchsorted(doc, [lo, lo + docs_a_call])
        best = keep_best(best, doc_maxima(lat[i:j], doc[i:j], pos[i:j], act[i:j]), n)
        assert best.tolist() == keep_best(best, best[:0], n).tolist()  # nothing new changes nothing
    t = pd.DataFrame(dict(lat=lat, doc=doc, pos=pos, act=act))
    t = t.sort_values(["lat", "act", "doc", "pos"], ascending=[True, False, True, True])
    want = t.drop_duplicates(["lat", "doc"]).groupby("lat").head(n)
    assert best[["lat", "doc", "pos", "act"]].tolist() == [tuple(x) for x in want.itertuples(index=False)]


def peaks(w, source):
    "Latent, source, document and largest activation, wherever there is any."
    f = w.dense()
    rows = []
    for doc in source.index:
        most = f[w.doc == doc].max(0)
        rows += [(j, source[doc], doc, most[j]) for j in np.flatnonzero(most)]
    return pd.DataFrame(rows, columns=["lat", "source", "doc", "act"])


@pytest.mark.parametrize("rows", [10, 10**6])
def test_what_a_pass_keeps(rows):
    "The best of each latent and source, a sample by hash, all their activations; only documents that have a source."
    w = World()
    source = pd.Series(np.arange(len(w.docs)) % 2, w.docs.doc)[5:]
    kept = Kept(np.arange(D), source, n_top=3, n_sample=4, seed=7)
    for codes in active_codes(w, w.cc, AB, np.arange(D), rows):
        kept.add(codes)
    found = kept.found()

    t = peaks(w, source)
    t["draw"] = mix(7, t.lat, t.doc) >> np.uint64(32)
    for name, by, n in (("top", "act", 3), ("sample", "draw", 4)):
        want = t.sort_values(["lat", "source", by, "doc"], ascending=[True, True, False, True])
        want = want.groupby(["lat", "source"]).head(n)
        columns = ["lat", "doc", "act"]
        assert found[name][columns].tolist() == list(want[columns].itertuples(index=False, name=None))

    f = w.dense()
    pairs = {*zip(found["top"]["lat"], found["top"]["doc"]), *zip(found["sample"]["lat"], found["sample"]["doc"])}
    assert set(zip(found["acts"]["lat"], found["acts"]["doc"])) == pairs
    assert len(found["acts"]["act"]) == sum((f[w.doc == doc, lat] > 0).sum() for lat, doc in pairs)


def test_without_a_seed_the_sample_is_the_first_documents():
    w = World()
    source = pd.Series(0, w.docs.doc)
    kept = Kept(np.arange(D), source, n_top=0, n_sample=4)
    for codes in active_codes(w, w.cc, AB, np.arange(D), 50):
        kept.add(codes)
    want = peaks(w, source).sort_values(["lat", "doc"]).groupby("lat").head(4)
    sample = kept.found()["sample"]
    assert sample[["lat", "doc"]].tolist() == list(want[["lat", "doc"]].itertuples(index=False, name=None))
    assert len(kept.top) == 0
