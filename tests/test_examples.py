"Contexts of latents: against brute force, over tiles; windows, duplicates, sources, parts of the models, empty sets."
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from llmdiff import examples as ex
from llmdiff.core import save_latents, UserError
from llmdiff.corpus import first_of_text, near, pieces, same_text, shingles
from llmdiff.crosscoder import save
from llmdiff.engine.cards import shares
from test_cards import Strict
from toy_documents import AB, BOS, D, row, Tok, World


def brute(w, j, n, left=24, right=8):
    "The n best contexts of latent j, by a full sort of all documents; each text once."
    f = w.dense()[:, j]
    best, texts = [], set()
    for t, i in zip(same_text(w.docs.text), w.docs.doc):
        at = np.flatnonzero((w.doc == i) & (f > 0))
        if t in texts:
            continue
        texts.add(t)
        if len(at):
            m = at[np.argmax(f[at])]
            best.append((-f[m], i, w.pos[m]))
    out, seen = [], set()
    for a, i, p in sorted(best):
        ids = w.docs.set_index("doc").ids[i]
        text = Tok().decode(ids[max(0, p-left):p+right+1])
        if text not in seen and len(out) < n:
            seen.add(text)
            out.append((i, p, np.float32(-a)))
    return out


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("rows", [10, 200, 10**6])
def test_top_contexts_equal_brute_force(rows, levels):
    w = World(levels=levels)
    e = w.run(list(range(D)), n_top=5, rows=rows)
    some = 0
    for j in range(D):
        got = e[(e.latent == j) & (e.kind == "top")]
        want = brute(w, j, 5)
        assert [(r.doc, r.pos, np.float32(r.act)) for r in got.itertuples()] == want
        assert got["rank"].tolist() == list(range(len(want)))
        some += len(want)
    assert some > 60


def test_activations_stand_beside_their_tokens():
    w = World()
    f = w.dense()
    e = w.run([0, 3, 7], left=5, right=2)
    by = w.docs.set_index("doc")
    for r in e.itertuples():
        ids = by.ids[r.doc]
        lo, hi = max(0, r.pos-5), min(len(ids), r.pos+3)
        a = np.zeros(len(ids), np.float32)
        here = w.doc == r.doc
        a[w.pos[here]] = f[here, r.latent]
        np.testing.assert_array_equal(np.array(r.acts, np.float32), a[lo:hi])
        assert list(r.tokens) == [" " + Tok.words[i] for i in ids[lo:hi]] and r.text == "".join(r.tokens)
        assert r.source == by.source[r.doc]


@pytest.mark.parametrize("names", [AB, ["A", "B", "C"]])
def test_parts_and_bias_sum_to_the_activation(names):
    "Against a dense encode, one model at a time; with a bias, a normalisation and encoders that differ."
    w = World(names=names, seed=4)
    g = torch.Generator().manual_seed(1)
    cc = w.cc
    cc.W_enc.data += torch.randn(cc.W_enc.shape, generator=g)*.3
    cc.b_enc.data += torch.randn(D, generator=g)*.2
    cc.mean += .3
    cc.scale *= torch.linspace(1, 2, len(names)).double()
    cc.b_dec.data += 5   # b_dec has no part in the encoder
    e = w.run(list(range(D)), left=5, right=2, n_zero=2)
    x = cc.normalise(w.x).double()
    seen = 0
    W = cc.W_enc.detach().double()
    dense = np.stack([(x[:, m] @ W[:, m].T).numpy() for m in range(len(names))])   # [n_models, rows, D]
    for r in e.itertuples():
        p, a = np.stack(r.parts), np.asarray(r.acts)
        on = a > 0
        seen += on.sum()
        assert p.shape == (len(names), len(a)) and not p[:, ~on].any()
        at = max(0, r.pos - 5) + np.flatnonzero(on)
        rows = [np.flatnonzero((w.doc == r.doc) & (w.pos == p))[0] for p in at]
        np.testing.assert_allclose(p[:, on], dense[:, rows, r.latent], atol=2e-6, rtol=1e-5)
        np.testing.assert_allclose(p[:, on].sum(0) + float(cc.b_enc.data[r.latent]), a[on], atol=5e-6)
    silent = e[e.kind == "zero"]
    assert seen > 500 and len(silent)
    assert silent.parts.map(lambda p: not np.stack(p).any()).all()


def test_parts_need_only_the_documents_shown_one_at_a_time():
    w = World()
    asked, rows = [], w.rows

    def spy(pair, docs=None):
        asked.append(docs)
        return rows(pair, docs)

    w.rows = spy
    e = w.run([2, 5], n_top=3, n_quantile=1)
    shown = sorted(set(e.doc[e.kind != "zero"]))
    assert asked[0] is None and asked.count(None) == 1
    assert asked[1:] == [(d, d + 1) for d in shown]


def test_parts_change_no_other_column_and_no_choice(monkeypatch):
    w = World()
    e = w.run(list(range(D)))
    monkeypatch.setattr(ex, "model_parts", lambda rows, *_: [np.zeros((2, len(r["acts"]))) for r in rows])
    pd.testing.assert_frame_equal(e.drop(columns="parts"), w.run(list(range(D))).drop(columns="parts"))


def test_a_latent_that_reads_one_model_only_gets_all_from_it():
    w = World()
    w.cc.W_enc.data[3, 1] = 0
    e = w.run([3])
    share, n = shares(e)
    np.testing.assert_allclose(share, [1, 0], atol=1e-6)
    assert n == sum((np.asarray(a) > 0).sum() for a in e.acts)
    assert shares(e[e.kind == "zero"]) == (None, 0) and shares(e.drop(columns="parts")) == (None, 0)


# ---- balance, duplicates, short corpora

def test_balanced_contexts_are_the_best_of_each_source():
    w = World(n_docs=150, seed=2)
    f = w.dense()
    w.docs["source"] = np.where(np.arange(len(w.docs)) % 10 == 0, "rare", "common")
    of = w.docs.set_index("doc").source
    kw = dict(n_top=6, n_zero=10)
    plain = w.run(list(range(D)), **kw)
    e = w.run(list(range(D)), **kw, rows=99, balanced=True)
    some = 0
    for j in range(D):
        peak = {i: f[w.doc == i, j].max() for i in of.index}
        best = {s: sorted((-peak[i], i) for i in of.index[of == s] if peak[i] > 0) for s in ("rare", "common")}
        k = min(3, len(best["rare"]))
        n = min(6 - k, len(best["common"]))
        want = sorted(best["rare"][:k] + best["common"][:n])
        got = e[(e.latent == j) & (e.kind == "top")]
        assert got.doc.tolist() == [i for _, i in want]
        assert got["rank"].tolist() == list(range(len(want))) and (np.diff(got.act) <= 0).all()
        some += k == 3
        quiet = pd.Series([of[i] for i in of.index if not peak[i] > 0]).value_counts()
        quiet = quiet.reindex(["rare", "common"], fill_value=0)
        rare = (e[(e.latent == j) & (e.kind == "zero")].source == "rare").sum()
        assert rare == min(quiet["rare"], max(5, 10 - quiet["common"]))
    count = lambda t: int((t.source[t.kind == "top"] == "rare").sum())
    assert some > 5 and count(e) > 1.5*count(plain)
    assert not any(f[w.doc == r.doc, r.latent].any() for r in e[e.kind == "zero"].itertuples())
    levels = e[e.kind == "quantile"].groupby("latent").act
    assert levels.apply(lambda a: (np.diff(a) <= 0).all()).all()
    pd.testing.assert_frame_equal(e, w.run(list(range(D)), **kw, balanced=True))


def test_one_source_is_balanced_already():
    w = World()
    w.docs["source"] = "x"
    pd.testing.assert_frame_equal(w.run([0, 1, 5]), w.run([0, 1, 5], balanced=True))


def near_pairs(e):
    "How many pairs of contexts of one latent are near each other."
    n = 0
    for _, g in e.groupby("latent"):
        s = list(map(shingles, g.text))
        n += sum(near(a, b) for i, a in enumerate(s) for b in s[:i])
    return n


def test_distinct_takes_one_part_of_a_long_document():
    "Documents 2i and 2i + 1 are cut from one."
    w = World(n_docs=40, seed=1)
    w.docs["id"] = [f"x{d//2}#{d % 2}" for d in w.docs.doc]
    of = w.docs.set_index("doc").id.str.split("#").str[0]
    plain, e = w.run(list(range(D))), w.run(list(range(D)), distinct=True)
    parts = lambda t: t.assign(o=of[t.doc].to_numpy()).duplicated(["latent", "o"]).any()
    assert parts(plain) and not parts(e) and (e.groupby("latent").size() > 3).all()


def test_distinct_takes_no_near_duplicate():
    "All texts are the same but for the last word."
    w = World(n_docs=24)
    twin = w.docs.ids.iloc[0]
    w.one_text()
    w.docs["ids"] = [np.r_[twin[:-1], 2 + i].astype(np.int32) for i in range(len(w.docs))]
    assert near_pairs(w.run(list(range(D)))) > 50
    assert near_pairs(w.run(list(range(D)), distinct=True)) == 0


@pytest.mark.parametrize("kw", [{}, dict(balanced=True), dict(distinct=True)])
def test_fewer_documents_than_contexts_give_what_there_is(kw):
    w = World(n_docs=3)
    f = w.dense()
    e = w.run(list(range(D)), n_top=12, n_quantile=5, n_zero=8, **kw)
    for j in range(D):
        active = [i for i in w.docs.doc if f[w.doc == i, j].any()]
        kind = e[e.latent == j].kind
        assert (kind == "top").sum() == len(active) and (kind == "zero").sum() == len(w.docs) - len(active)
    assert not (e.kind == "quantile").any()


@pytest.mark.parametrize("kw", [dict(n_top=0), dict(n_zero=-1), dict(left=-3)])
def test_counts_that_make_no_sense_are_refused_before_the_store_is_read(kw):
    w = World()
    w.rows = None
    with pytest.raises(UserError, match=f"{next(iter(kw))} = "):
        w.run([0], **kw)


def test_a_document_longer_than_the_window_is_cut_around_its_maximum():
    "Also at its ends."
    w = World(n_docs=2)
    n = 4000
    ids = np.r_[BOS, np.random.default_rng(0).integers(2, 40, n - 1)].astype(np.int32)
    w.docs = pd.DataFrame({"doc": [0], "source": "x", "ids": [ids], "keep": [np.arange(n) > 0], "text": "t"})
    w.doc, w.pos = np.zeros(n - 1, int), np.arange(1, n)
    w.token, w.cuts = ids[1:], [0, n - 1]
    for peak in (1, 2000, n - 1):
        w.x = torch.zeros(n - 1, 2, 8)
        w.x[peak - 1] = 9*w.cc.W_enc.data[0]
        e = w.run([0])
        r = e.iloc[0]
        assert len(e) == 1 and r.pos == peak and len(r.tokens) == min(peak, 24) + 1 + min(8, n - 1 - peak)
        assert len(r.acts) == len(r.tokens) == len(r.parts[0]) and np.argmax(r.acts) == min(peak, 24)
        np.testing.assert_allclose(np.stack(r.parts).sum(0), r.acts, atol=1e-5)


def test_the_maximum_is_never_a_special_token():
    w = World()
    e = w.run(list(range(D)))
    by = w.docs.set_index("doc")
    assert all(by.keep[r.doc][r.pos] for r in e.itertuples())
    assert all(r.act == max(r.acts) for r in e[e.kind != "zero"].itertuples() if r.kind == "top")
    assert e.text.str.contains("<turn>").any()                              # but they are shown


def test_silent_contexts_are_silent_in_the_whole_document():
    w = World()
    f = w.dense()
    e = w.run(list(range(D)), n_zero=6)
    z = e[e.kind == "zero"]
    assert len(z) > 60 and (z.act == 0).all()
    for r in z.itertuples():
        assert not (f[w.doc == r.doc, r.latent] > 0).any() and not np.any(r.acts)


def test_each_document_and_each_text_once_a_latent():
    w = World()
    e = w.run(list(range(D)))
    assert not e.duplicated(["latent", "doc"]).any() and not e.duplicated(["latent", "text"]).any()


def test_near_duplicates_count_once():
    w = World(n_docs=30)
    twin = w.docs.doc.iloc[10]
    w.docs.loc[w.docs.doc == twin, "text"] = "Document\n  9"     # equal to document 9 but for case and space
    assert twin not in first_of_text(w.docs) and len(first_of_text(w.docs)) == len(w.docs) - 1
    e = w.run(list(range(D)), rows=50)
    assert twin not in set(e.doc)
    for j in range(D):
        assert e[(e.latent == j) & (e.kind == "top")].doc.tolist() == [i for i, *_ in brute(w, j, 12)]


def test_equal_windows_keep_the_best():
    w = World(n_docs=12)
    w.one_text()
    e = w.run(list(range(D)))
    assert len(e) and (e.groupby("latent").size() == 1).all()


def test_quantiles_lie_below_the_top_and_spread():
    w = World(n_docs=200, seed=3)
    e = w.run([0, 1, 2], n_top=3, n_quantile=4)
    f = w.dense()
    for j in (0, 1, 2):
        q, t = (e[(e.latent == j) & (e.kind == k)].act.to_numpy() for k in ("quantile", "top"))
        peaks = np.array([f[w.doc == i, j].max() for i in w.docs.doc])
        peaks = np.sort(peaks[peaks > 0])
        assert len(q) == 4 and (np.diff(q) <= 0).all() and q[0] <= t[-1]
        rank = np.searchsorted(peaks, q)/len(peaks)
        assert rank[0] > 0.5 > rank[-1]


def test_same_seed_same_table_and_another_seed_other_silence(tmp_path):
    w = World()
    a, b, c = w.run([0, 1, 5]), w.run([0, 1, 5], rows=33), w.run([0, 1, 5], seed=1)
    pd.testing.assert_frame_equal(a, b)
    pd.testing.assert_frame_equal(a[a.kind == "top"], c[c.kind == "top"])
    assert a[a.kind == "zero"].doc.tolist() != c[c.kind == "zero"].doc.tolist()


def test_no_latents_gives_an_empty_table_with_the_right_columns():
    e = World().run([])
    assert len(e) == 0 and list(e.columns) == ex.FIELDS.names and e.act.dtype == np.float32


def test_a_latent_that_never_fires_has_only_silent_contexts():
    w = World()
    w.cc.b_enc.data[4] = -1e6
    e = w.run([4], n_zero=3)
    assert e.kind.tolist() == ["zero"]*3


def test_choice_of_latents():
    verdict = ["unique-B"]*3 + ["unique-A"] + ["shared"]*4
    t = pd.DataFrame({"latent": range(8), "C": [1, 7, 7, 3, 9, 2, 4, 8.], "verdict": verdict})
    assert ex.choose_latents(t, 2, 0).tolist() == [1, 2, 3]                 # ties by number
    got = ex.choose_latents(t, 2, 2, seed=5)
    assert set(got[3:]) <= {4, 5, 6, 7} and len(got) == 5
    assert got.tolist() == ex.choose_latents(t.sample(frac=1, random_state=0), 2, 2, seed=5).tolist()
    assert len(ex.choose_latents(t[t.verdict == "shared"], 2, 2)) == 0


@pytest.fixture(scope="module")
def bpe():
    "A byte-level tokenizer that cuts most characters outside ASCII into several tokens."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>"], initial_alphabet=alphabet)
    t.train_from_iterator(["a few plain words and nothing else"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>")


TEXTS = ["<s>a few words", "naïve 日本語 текст", "שלום עולם",
         "مرحبا 👩‍👩‍👧 x", "tabs\tand\nlines  ", "\ufffd already"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(bpe, text):
    ids = bpe(text, add_special_tokens=False).input_ids
    p = pieces(bpe, ids)
    assert len(p) == len(ids) and "".join(p) == text


def test_a_window_that_cuts_a_character_harms_only_that_character(bpe):
    ids = bpe("日本 word", add_special_tokens=False).input_ids[1:]
    assert "".join(pieces(bpe, ids)).endswith("本 word")


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run folder with a crosscoder and verdicts; the store is in memory."
    w = World()
    save(w.cc, tmp_path/"crosscoder"/"A-B")
    monkeypatch.setattr(ex, "open_pair", lambda run, pair: (w, w.cc))

    def verdicts(v):
        C = (w.dense()**2).sum(0)
        rows = [row(latent=j, verdict=v[j % len(v)], C=float(C[j])) for j in range(D)]
        save_latents(pd.DataFrame(rows).astype({"latent": int}), "A-B", "scaling", tmp_path)

    return w, tmp_path, verdicts


def test_pair_examples_and_card_of_a_run(run):
    w, R, verdicts = run
    verdicts(["unique-B", "shared", "shared", "unique-A"])
    e = ex.pair_examples(R, AB, w.docs, Tok(), max_latents=3, n_shared=2)
    assert e.latent.nunique() == 8
    first = (R/"examples"/"A-B.parquet").read_bytes()
    ex.pair_examples(R, AB, w.docs, Tok(), max_latents=3, n_shared=2)
    assert first == (R/"examples"/"A-B.parquet").read_bytes()
    assert pq.read_schema(R/"examples"/"A-B.parquet").equals(ex.FIELDS, check_metadata=False)
    j = int(e.latent[0])
    c = ex.viewer("A-B", R)(j)
    assert f"latent {j} of A-B" in repr(c) and Strict(c._repr_html_()).open == []
    with pytest.raises(UserError, match="no latent 99"):
        ex.viewer("A-B", R)(99)


def test_a_viewer_collects_the_contexts_of_any_latent(run, monkeypatch):
    w, R, verdicts = run
    verdicts(["unique-B", "shared"])
    e = ex.pair_examples(R, AB, w.docs, Tok(), max_latents=1, n_shared=0)
    monkeypatch.setattr(ex, "load_corpus", lambda run: w.docs)
    monkeypatch.setattr(ex, "load_tokenizer", lambda m: Tok())
    j = next(j for j in range(D) if j not in set(e.latent) and w.dense()[:, j].any())
    assert "no contexts" in ex.viewer("A-B", R)(j)._repr_html_()
    assert "strongest" in ex.viewer("A-B", R, {"A": "a"})(j)._repr_html_()


def test_a_pair_with_nothing_unique_is_a_result(run):
    w, R, verdicts = run
    verdicts(["shared"])
    e = ex.pair_examples(R, AB, w.docs, Tok())
    got = ex.load_examples("A-B", R)
    assert len(e) == len(got) == 0 and list(got.columns) == ex.FIELDS.names
    assert "no contexts" in ex.viewer("A-B", R)(0)._repr_html_()


def test_missing_examples_name_the_step(tmp_path):
    with pytest.raises(UserError, match="step examples"):
        ex.load_examples("A-B", tmp_path)
