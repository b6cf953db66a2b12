"Top contexts: against brute force, over tiles; windows, duplicates, sources, parts of the models, escaping, empty sets."
import re
from html.parser import HTMLParser

import numpy as np, pandas as pd, pytest, torch
import pyarrow.parquet as pq
from llmdiff import examples as ex
from llmdiff.core import UserError, save_latents
from llmdiff.crosscoder import Crosscoder, save
from llmdiff.scaling import encode_tile

AB, BOS, D = ["A", "B"], 1, 20


class Tok:
    "Token i is a word; 0 and 1 are special."
    words = ["<turn>", "<s>", *(f"w{i}" for i in range(2, 40))]
    def decode(self, ids, **_): return "".join(" " + self.words[i] for i in ids)
    def convert_ids_to_tokens(self, i): return self.words[i]


class World:
    "Documents of random tokens, activations in memory, a random crosscoder; `rows` yields kept tokens only, in shards."
    def __init__(self, n_docs=60, seed=0, d=8, levels=None, shards=3, names=AB):
        r = np.random.default_rng(seed)
        ids, keep = [], []
        for _ in range(n_docs):
            n = int(r.integers(6, 30)); w = r.integers(2, 40, n); w[0] = BOS; turn = r.random(n) < 0.1; w[turn & (np.arange(n) > 0)] = 0
            ids.append(w.astype(np.int32)); keep.append((np.arange(n) > 0) & (w > 1))
        self.docs = pd.DataFrame({"doc": np.arange(n_docs), "source": r.choice(["x", "y"], n_docs), "ids": ids, "keep": keep, "text": [f"document {i}" for i in range(n_docs)]})
        self.docs = self.docs[[k.any() for k in keep]]
        self.names, self.cc = names, Crosscoder(d, D, 3, names, seed=seed)
        self.cc.theta.fill_(0.9)
        g = torch.Generator().manual_seed(seed)
        parts = [(np.full(k.sum(), i), np.flatnonzero(k), w[k]) for i, w, k in zip(self.docs.doc, self.docs.ids, self.docs.keep)]
        self.doc, self.pos, self.token = (np.concatenate(c) for c in zip(*parts))
        self.x = torch.randn(len(self.doc), len(names), d, generator=g)
        if levels: self.x = self.x.sign()                                  # many equal activations
        ends = np.flatnonzero(np.diff(self.doc)) + 1
        self.cuts = [0, *(ends[len(ends)*i//shards] for i in range(1, shards)), len(self.doc)]

    def rows(self, pair=None, docs=None):
        for a, b in zip(self.cuts, self.cuts[1:]):
            if docs: a, b = a + np.searchsorted(self.doc[a:b], docs)
            if b > a: yield {"acts": self.x[a:b], "token": self.token[a:b], "pos": self.pos[a:b], "doc": self.doc[a:b]}

    def dense(self):
        row, lat, val = encode_tile(self.cc, {"acts": self.x})[1]
        f = torch.zeros(len(self.x), D); f[row, lat] = val
        return f.numpy()

    def run(self, latents, **kw): return ex.top_contexts(self, self.cc, self.names, self.docs, Tok(), latents, **kw)


def brute(w, j, n, left=24, right=8):
    "The n best contexts of latent j, by a full sort of all documents; each text once."
    f, out, seen, texts = w.dense()[:, j], [], set(), set()
    best = []
    for t, i in zip(ex.same_text(w.docs.text), w.docs.doc):
        at = np.flatnonzero((w.doc == i) & (f > 0))
        if t in texts: continue
        texts.add(t)
        if len(at): m = at[np.argmax(f[at])]; best.append((-f[m], i, w.pos[m]))
    for a, i, p in sorted(best):
        ids = w.docs.set_index("doc").ids[i]
        text = Tok().decode(ids[max(0, p-left):p+right+1])
        if text not in seen and len(out) < n: seen.add(text); out.append((i, p, np.float32(-a)))
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


@pytest.mark.parametrize("n", [0, 1, 4, 100])
@pytest.mark.parametrize("docs_a_call", [1, 7, 90])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_merging_is_a_full_sort(n, docs_a_call, levels):
    "Whatever the tiles, and with many equal scores: score down, then document up, then the first place; latents that fire once or never are no exception."
    r = np.random.default_rng(levels + docs_a_call); N = 3000
    lat, doc, act = r.zipf(1.5, N) % 50, np.sort(r.integers(10**5, 10**5 + 90, N)), (r.integers(1, levels, N)/7).astype("f4")
    pos = r.permutation(N)                                                # positions need not ascend, and no two are equal
    best = np.empty(0, ex.CAND)
    for lo in range(10**5, 10**5 + 90, docs_a_call):
        i, j = np.searchsorted(doc, [lo, lo + docs_a_call])
        best = ex.keep_best(best, ex.doc_maxima(lat[i:j], doc[i:j], pos[i:j], act[i:j]), n)
        assert best.tolist() == ex.keep_best(best, best[:0], n).tolist()  # nothing new changes nothing
    t = pd.DataFrame(dict(lat=lat, doc=doc, pos=pos, act=act)).sort_values(["lat", "act", "doc", "pos"], ascending=[True, False, True, True])
    want = t.drop_duplicates(["lat", "doc"]).groupby("lat").head(n)
    assert best[["lat", "doc", "pos", "act"]].tolist() == [tuple(x) for x in want.itertuples(index=False)]


def test_activations_stand_beside_their_tokens():
    w = World(); f = w.dense(); e = w.run([0, 3, 7], left=5, right=2)
    by = w.docs.set_index("doc")
    for r in e.itertuples():
        ids = by.ids[r.doc]; lo, hi = max(0, r.pos-5), min(len(ids), r.pos+3)
        a = np.zeros(len(ids), np.float32); here = w.doc == r.doc; a[w.pos[here]] = f[here, r.latent]
        np.testing.assert_array_equal(np.array(r.acts, np.float32), a[lo:hi])
        assert list(r.tokens) == [" " + Tok.words[i] for i in ids[lo:hi]] and r.text == "".join(r.tokens)
        assert r.source == by.source[r.doc]


@pytest.mark.parametrize("names", [AB, ["A", "B", "C"]])
def test_parts_and_bias_sum_to_the_activation(names):
    "Against a dense encode, one model at a time, of a crosscoder with a bias, a normalisation and encoders that differ."
    w = World(names=names, seed=4); g = torch.Generator().manual_seed(1); cc = w.cc
    cc.W_enc.data += torch.randn(cc.W_enc.shape, generator=g)*.3; cc.b_enc.data += torch.randn(D, generator=g)*.2
    cc.mean += .3; cc.scale *= torch.linspace(1, 2, len(names)).double(); cc.b_dec.data += 5   # b_dec has no part in the encoder
    e = w.run(list(range(D)), left=5, right=2, n_zero=2); x = cc.normalise(w.x).double(); seen = 0
    dense = np.stack([(x[:, m] @ cc.W_enc[:, m].detach().double().T).numpy() for m in range(len(names))])   # [n_models, rows, D]
    for r in e.itertuples():
        p, a = np.stack(r.parts), np.asarray(r.acts); on = a > 0; seen += on.sum()
        assert p.shape == (len(names), len(a)) and not p[:, ~on].any()
        row = [np.flatnonzero((w.doc == r.doc) & (w.pos == max(0, r.pos - 5) + t))[0] for t in np.flatnonzero(on)]
        np.testing.assert_allclose(p[:, on], dense[:, row, r.latent], atol=2e-6, rtol=1e-5)
        np.testing.assert_allclose(p[:, on].sum(0) + float(cc.b_enc.data[r.latent]), a[on], atol=5e-6)
    assert seen > 500 and e[e.kind == "zero"].parts.map(lambda p: not np.stack(p).any()).all() and (e.kind == "zero").any()


def test_parts_need_only_the_documents_shown_one_at_a_time():
    w = World(); asked, rows = [], w.rows
    def spy(pair, docs=None): asked.append(docs); return rows(pair, docs)
    w.rows = spy; e = w.run([2, 5], n_top=3, n_quantile=1)
    assert asked[0] is None and asked.count(None) == 1 and asked[1:] == [(d, d + 1) for d in sorted(set(e.doc[e.kind != "zero"]))]


def test_parts_change_no_other_column_and_no_choice(monkeypatch):
    w = World(); e = w.run(list(range(D)))
    monkeypatch.setattr(ex, "model_parts", lambda rows, *_: [np.zeros((2, len(r["acts"]))) for r in rows])
    pd.testing.assert_frame_equal(e.drop(columns="parts"), w.run(list(range(D))).drop(columns="parts"))


def test_a_latent_that_reads_one_model_only_gets_all_from_it():
    w = World(); w.cc.W_enc.data[3, 1] = 0; e = w.run([3])
    share, n = ex.shares(e)
    np.testing.assert_allclose(share, [1, 0], atol=1e-6); assert n == sum((np.asarray(a) > 0).sum() for a in e.acts)
    assert ex.shares(e[e.kind == "zero"]) == (None, 0) and ex.shares(e.drop(columns="parts")) == (None, 0)


# ---------------------------------------------------------------- balance, duplicates, short corpora

def test_balanced_contexts_are_the_best_of_each_source():
    w = World(n_docs=150, seed=2); f, of = w.dense(), w.docs.set_index("doc").source
    w.docs["source"] = np.where(np.arange(len(w.docs)) % 10 == 0, "rare", "common"); of = w.docs.set_index("doc").source
    kw = dict(n_top=6, n_zero=10); plain, e = w.run(list(range(D)), **kw), w.run(list(range(D)), **kw, rows=99, balanced=True)
    some = 0
    for j in range(D):
        best = {s: sorted((-f[w.doc == i, j].max(), i) for i in of.index[of == s] if f[w.doc == i, j].max() > 0) for s in ("rare", "common")}
        k = min(3, len(best["rare"])); n = min(6 - k, len(best["common"])); want = sorted(best["rare"][:k] + best["common"][:n])
        got = e[(e.latent == j) & (e.kind == "top")]
        assert got.doc.tolist() == [i for _, i in want] and got["rank"].tolist() == list(range(len(want))) and (np.diff(got.act) <= 0).all()
        some += k == 3
        quiet = pd.Series([of[i] for i in of.index if not f[w.doc == i, j].any()]).value_counts().reindex(["rare", "common"], fill_value=0)
        rare = (e[(e.latent == j) & (e.kind == "zero")].source == "rare").sum()
        assert rare == min(quiet["rare"], max(5, 10 - quiet["common"]))
    count = lambda t: int((t.source[t.kind == "top"] == "rare").sum())
    assert some > 5 and count(e) > 1.5*count(plain)
    assert not any(f[w.doc == r.doc, r.latent].any() for r in e[e.kind == "zero"].itertuples()) and e[e.kind == "quantile"].groupby("latent").act.apply(lambda a: (np.diff(a) <= 0).all()).all()
    pd.testing.assert_frame_equal(e, w.run(list(range(D)), **kw, balanced=True))


def test_one_source_is_balanced_already():
    w = World(); w.docs["source"] = "x"
    pd.testing.assert_frame_equal(w.run([0, 1, 5]), w.run([0, 1, 5], balanced=True))


def test_distinct_takes_one_part_of_a_long_document_and_no_near_duplicate():
    "Documents 2i and 2i + 1 are cut from one; half of all texts differ in one word."
    w = World(n_docs=40, seed=1); w.docs["id"] = [f"x{d//2}#{d % 2}" for d in w.docs.doc]; of = w.docs.set_index("doc").id.str.split("#").str[0]
    plain, e = w.run(list(range(D))), w.run(list(range(D)), distinct=True)
    parts = lambda t: t.assign(o=of[t.doc].to_numpy()).duplicated(["latent", "o"]).any()
    assert parts(plain) and not parts(e) and (e.groupby("latent").size() > 3).all()
    from llmdiff.scoring import near, shingles
    close = lambda t: sum(near(a, b) for _, g in t.groupby("latent") for s in [list(map(shingles, g.text))] for i, a in enumerate(s) for b in s[:i])
    w = World(n_docs=24); twin = w.docs.ids.iloc[0]
    for c in ("ids", "keep"): w.docs[c] = [w.docs[c].iloc[0]]*len(w.docs)
    w.docs["ids"] = [np.r_[twin[:-1], 2 + i].astype(np.int32) for i in range(len(w.docs))]   # the same but for the last word
    n, k = int(w.docs.keep.iloc[0].sum()), len(w.docs)
    w.doc, w.pos = np.repeat(w.docs.doc.to_numpy(), n), np.tile(np.flatnonzero(w.docs.keep.iloc[0]), k)
    w.x, w.token, w.cuts = torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(0)).repeat(k, 1, 1), w.pos, [0, n*k]
    assert close(w.run(list(range(D)))) > 50 and close(w.run(list(range(D)), distinct=True)) == 0


@pytest.mark.parametrize("kw", [{}, dict(balanced=True), dict(distinct=True)])
def test_fewer_documents_than_contexts_give_what_there_is(kw):
    w = World(n_docs=3); f = w.dense(); e = w.run(list(range(D)), n_top=12, n_quantile=5, n_zero=8, **kw)
    for j in range(D):
        active = [i for i in w.docs.doc if f[w.doc == i, j].any()]
        assert (e[e.latent == j].kind == "top").sum() == len(active) and (e[e.latent == j].kind == "zero").sum() == len(w.docs) - len(active)
    assert not (e.kind == "quantile").any()


@pytest.mark.parametrize("kw", [dict(n_top=0), dict(n_zero=-1), dict(left=-3)])
def test_counts_that_make_no_sense_are_refused_before_the_store_is_read(kw):
    w = World(); w.rows = None
    with pytest.raises(UserError, match=f"{next(iter(kw))} = "): w.run([0], **kw)


def test_a_document_longer_than_the_window_is_cut_around_its_maximum():
    "Also at its ends."
    w = World(n_docs=2); n = 4000; ids = np.r_[BOS, np.random.default_rng(0).integers(2, 40, n - 1)].astype(np.int32)
    w.docs = pd.DataFrame({"doc": [0], "source": "x", "ids": [ids], "keep": [np.arange(n) > 0], "text": "t"})
    w.doc, w.pos, w.token, w.cuts = np.zeros(n - 1, int), np.arange(1, n), ids[1:], [0, n - 1]
    for peak in (1, 2000, n - 1):
        w.x = torch.zeros(n - 1, 2, 8); w.x[peak - 1] = 9*w.cc.W_enc.data[0]; e = w.run([0]); r = e.iloc[0]
        assert len(e) == 1 and r.pos == peak and len(r.tokens) == min(peak, 24) + 1 + min(8, n - 1 - peak)
        assert len(r.acts) == len(r.tokens) == len(r.parts[0]) and np.argmax(r.acts) == min(peak, 24)
        np.testing.assert_allclose(np.stack(r.parts).sum(0), r.acts, atol=1e-5)


def test_the_maximum_is_never_a_special_token():
    w = World(); e = w.run(list(range(D))); by = w.docs.set_index("doc")
    assert all(by.keep[r.doc][r.pos] for r in e.itertuples())
    assert all(r.act == max(r.acts) for r in e[e.kind != "zero"].itertuples() if r.kind == "top")
    assert e.text.str.contains("<turn>").any()                              # but they are shown


def test_silent_contexts_are_silent_in_the_whole_document():
    w = World(); f = w.dense(); e = w.run(list(range(D)), n_zero=6)
    z = e[e.kind == "zero"]
    assert len(z) > 60 and (z.act == 0).all()
    for r in z.itertuples(): assert not (f[w.doc == r.doc, r.latent] > 0).any() and not np.any(r.acts)


def test_each_document_and_each_text_once_a_latent():
    w = World(); e = w.run(list(range(D)))
    assert not e.duplicated(["latent", "doc"]).any() and not e.duplicated(["latent", "text"]).any()


def test_near_duplicates_count_once():
    w = World(n_docs=30)
    twin = w.docs.doc.iloc[10]
    w.docs.loc[w.docs.doc == twin, "text"] = "Document\n  9"               # equal to document 9 but for case and space
    assert twin not in ex.first_of_text(w.docs) and len(ex.first_of_text(w.docs)) == len(w.docs) - 1
    e = w.run(list(range(D)), rows=50)
    assert twin not in set(e.doc)
    for j in range(D): assert e[(e.latent == j) & (e.kind == "top")].doc.tolist() == [i for i, *_ in brute(w, j, 12)]


def test_equal_windows_keep_the_best():
    w = World(n_docs=12)
    for c in ("ids", "keep"): w.docs[c] = [w.docs[c].iloc[0]]*len(w.docs)   # different documents by number, the same tokens
    n = int(w.docs.keep.iloc[0].sum()); k = len(w.docs)
    w.doc, w.pos = np.repeat(w.docs.doc.to_numpy(), n), np.tile(np.flatnonzero(w.docs.keep.iloc[0]), k)
    w.x, w.token, w.cuts = torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(0)).repeat(k, 1, 1), w.pos, [0, n*k]
    e = w.run(list(range(D)))
    assert len(e) and (e.groupby("latent").size() == 1).all()


def test_quantiles_lie_below_the_top_and_spread():
    w = World(n_docs=200, seed=3); e = w.run([0, 1, 2], n_top=3, n_quantile=4)
    f = w.dense()
    for j in (0, 1, 2):
        q, t = (e[(e.latent == j) & (e.kind == k)].act.to_numpy() for k in ("quantile", "top"))
        peaks = np.array([f[w.doc == i, j].max() for i in w.docs.doc]); peaks = np.sort(peaks[peaks > 0])
        assert len(q) == 4 and (np.diff(q) <= 0).all() and q[0] <= t[-1]
        rank = np.searchsorted(peaks, q)/len(peaks)
        assert rank[0] > 0.5 > rank[-1]


def test_same_seed_same_table_and_another_seed_other_silence(tmp_path):
    w = World(); a, b, c = w.run([0, 1, 5]), w.run([0, 1, 5], rows=33), w.run([0, 1, 5], seed=1)
    pd.testing.assert_frame_equal(a, b)
    pd.testing.assert_frame_equal(a[a.kind == "top"], c[c.kind == "top"])
    assert a[a.kind == "zero"].doc.tolist() != c[c.kind == "zero"].doc.tolist()


def test_no_latents_gives_an_empty_table_with_the_right_columns():
    e = World().run([])
    assert len(e) == 0 and list(e.columns) == ex.FIELDS.names and e.act.dtype == np.float32


def test_a_latent_that_never_fires_has_only_silent_contexts():
    w = World(); w.cc.b_enc.data[4] = -1e6
    e = w.run([4], n_zero=3)
    assert e.kind.tolist() == ["zero"]*3


def test_choice_of_latents():
    t = pd.DataFrame({"latent": range(8), "C": [1, 7, 7, 3, 9, 2, 4, 8.], "verdict": ["unique-B"]*3 + ["unique-A"] + ["shared"]*4})
    assert ex.choose_latents(t, 2, 0).tolist() == [1, 2, 3]                 # ties by number
    got = ex.choose_latents(t, 2, 2, seed=5)
    assert set(got[3:]) <= {4, 5, 6, 7} and len(got) == 5 and got.tolist() == ex.choose_latents(t.sample(frac=1, random_state=0), 2, 2, seed=5).tolist()
    assert len(ex.choose_latents(t[t.verdict == "shared"], 2, 2)) == 0


@pytest.fixture(scope="module")
def bpe():
    "A byte-level tokenizer that cuts most characters outside ASCII into several tokens."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE()); t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False); t.decoder = decoders.ByteLevel()
    t.train_from_iterator(["a few plain words and nothing else"], trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>")


@pytest.mark.parametrize("text", ["<s>a few words", "naïve 日本語 текст", "שלום עולם", "مرحبا 👩‍👩‍👧 x", "tabs\tand\nlines  ", "\ufffd already"])
def test_pieces_join_to_the_text(bpe, text):
    ids = bpe(text, add_special_tokens=False).input_ids
    p = ex.pieces(bpe, ids)
    assert len(p) == len(ids) and "".join(p) == text


def test_a_window_that_cuts_a_character_harms_only_that_character(bpe):
    ids = bpe("日本 word", add_special_tokens=False).input_ids[1:]
    assert "".join(ex.pieces(bpe, ids)).endswith("本 word")


class Strict(HTMLParser):
    "Collects tags and text; a page that is not well formed leaves tags open."
    def __init__(self, s): super().__init__(); self.open, self.tags, self.words = [], [], ""; self.feed(s); self.close()
    def handle_starttag(self, tag, attrs): self.open.append(tag); self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, d): self.words += d


NASTY_NAMES = ["<script>A", "B\"><img src=x onerror=y>"]
NASTY = ["<script>alert(1)</script>", "</span></div>", "<img src=x onerror=y>", "&amp; \" '", "$x$ \x00\x1b[0m\n", "\u202eevil", "שלום"]


def row(**kw):
    r = {"latent": 3, "verdict": "unique-B", "reason": "A does not hold B's direction", "norm_A": .2, "norm_B": 1., "delta_norm": .9, "cos": .1, "count": 4, "freq": .07, "n_docs": 4}
    return pd.Series(r | {f"nu_{t}_{P}{s}": .1 for t in ("eps", "r") for P in "AB" for s in ("", "_lo", "_hi")} | kw)


def contexts(tokens, kind="top"):
    return pd.DataFrame({"latent": 3, "kind": kind, "rank": [0], "doc": 7, "source": "<b>src</b>", "pos": 2, "act": 2., "tokens": [tokens], "acts": [[2.]*len(tokens)], "text": "".join(tokens)})


def test_card_escapes_everything():
    c = ex.card(row(label="<b>label</b>", reason="<i>why</i>"), contexts(NASTY), ["<A>", "B"])
    h = c._repr_html_(); s = Strict(h)
    assert s.open == [] and {t for t, _ in s.tags} <= {"style", "div", "p", "span", "b"}
    assert all(set(a) <= {"class", "style", "title", "dir"} for _, a in s.tags)
    assert "<b>label</b>" in s.words and "<script>" in s.words and "<b>src</b>" in s.words and "\x00" not in h and "\x1b" not in h
    assert not re.search(r"https?:|url\(|@import|<script|<img|javascript", h)
    assert "mathjax_ignore" in h and "script" not in repr(c)


def with_parts(e, share=(.25, .5)):
    return e.assign(parts=[[[v*a for a in x] for v in share] for x in e.acts])


def test_card_shows_each_models_part_escaped():
    h = ex.card(row(), with_parts(contexts(NASTY)), NASTY_NAMES)._repr_html_(); s = Strict(h)
    assert s.open == [] and {t for t, _ in s.tags} <= {"style", "div", "p", "span", "b"} and all(set(a) <= {"class", "style", "title", "dir"} for _, a in s.tags)
    said = [a["title"] for _, a in s.tags if "title" in a]
    assert len(said) == len(NASTY) and set(said) == {f"2: {NASTY_NAMES[0]} 0.5, {NASTY_NAMES[1]} 1, bias 0.5"}
    assert h.count("#029e73 33%") == len(NASTY) + 1 and not re.search(r"https?:|url\(|@import|<script|<img|javascript", h)
    assert f"share of the activation: {NASTY_NAMES[0]} 25%, {NASTY_NAMES[1]} 50%, bias 25% (of its sum over the {len(NASTY)} shaded tokens)" in s.words


@pytest.mark.parametrize("share, strip", [((1.5, -.5), "100%"), ((-.5, 1.5), "0%"), ((.4, .4), "50%"), ((-1, -1), None)])
def test_the_strip_is_divided_by_the_parts_that_speak_for_the_latent(share, strip):
    h = ex.card(row(), with_parts(contexts(["word"]), share), AB)._repr_html_()
    assert h.count("linear-gradient") == (2 if strip else 0) and (not strip or f"#029e73 {strip}" in h)
    assert f"title=\"2: A {2*share[0]:.3g}, B {2*share[1]:.3g}, bias {2 - 2*sum(share):.3g}\"" in h


def test_silent_tokens_and_contexts_have_no_parts_on_the_card():
    e = with_parts(contexts([" a", " b"])); e.at[0, "acts"], e.at[0, "parts"] = [2., 0.], [[1., 0.], [.5, 0.]]
    z = contexts([" c"], "zero").assign(act=0., acts=[[0.]], parts=[[[0.], [0.]]])
    h = ex.card(row(), pd.concat([e, z], ignore_index=True), AB)._repr_html_()
    assert h.count("title=") == 1 and "over the 1 shaded tokens" in h


@pytest.mark.parametrize("none", [None, np.nan])
def test_card_of_a_table_without_parts(none):
    for e in (contexts([" a"]), contexts([" a"]).assign(parts=[none])):
        h = ex.card(row(), e, AB)._repr_html_()
        assert 'title="2"' in h and "share of the activation" not in h and "gradient" not in h


def test_card_of_right_to_left_text_keeps_its_own_direction():
    s = Strict(ex.card(row(), contexts(["שלום", " עולם"]), AB)._repr_html_())
    assert any(t == "p" and a.get("dir") == "auto" for t, a in s.tags) and "unicode-bidi:isolate" in ex.CSS


@pytest.mark.parametrize("tokens", [["\u202eevil"], ["שלום", " hello", " 世界"], ["مرحبا", " x"]])
def test_text_of_mixed_scripts_does_not_turn_what_stands_beside_it(tokens):
    "The text and the source stand in spans of their own, isolated from each other: an override that is never closed ends there."
    h = ex.card(row(), contexts(tokens), AB)._repr_html_()
    p = re.search(r"<p dir='auto'>(.*?)</p>", h)[1]
    assert re.fullmatch(r"<span class='ld-x'>.*</span> <span class='ld-s ld-x'>[^<]* 7, 2</span>", p) and re.search(r"\.ld-x\{unicode-bidi:isolate\}", ex.CSS)
    assert Strict(p).open == [] and "".join(tokens) in Strict(p).words


def test_card_without_label_ratio_or_contexts():
    c = ex.card(row(label=np.nan, nu_eps_B=np.nan), contexts([]).iloc[:0], AB)
    h = c._repr_html_()
    assert "no label yet" in h and "undefined" in h and "no contexts" in h and "nan" not in h


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run folder with a crosscoder and verdicts; the store is in memory."
    w = World(); save(w.cc, tmp_path/"crosscoder"/"A-B")
    monkeypatch.setattr(ex, "open_pair", lambda run, pair: (w, w.cc))
    def verdicts(v):
        f = w.dense(); t = pd.DataFrame([row(latent=j, verdict=v[j % len(v)], C=float((f[:, j]**2).sum())) for j in range(D)]).astype({"latent": int})
        save_latents(t, "A-B", "06_scaling", tmp_path)
    return w, tmp_path, verdicts


def test_pair_examples_and_card_of_a_run(run):
    w, R, verdicts = run; verdicts(["unique-B", "shared", "shared", "unique-A"])
    e = ex.pair_examples(R, AB, w.docs, Tok(), max_latents=3, n_shared=2)
    assert e.latent.nunique() == 8
    first = (R/"examples"/"A-B.parquet").read_bytes()
    ex.pair_examples(R, AB, w.docs, Tok(), max_latents=3, n_shared=2)
    assert first == (R/"examples"/"A-B.parquet").read_bytes()
    assert pq.read_schema(R/"examples"/"A-B.parquet").equals(ex.FIELDS, check_metadata=False)
    j = int(e.latent[0]); c = ex.viewer("A-B", R)(j)
    assert f"latent {j} of A-B" in repr(c) and Strict(c._repr_html_()).open == []
    with pytest.raises(UserError, match="no latent 99"): ex.viewer("A-B", R)(99)


def test_a_viewer_collects_the_contexts_of_any_latent(run, monkeypatch):
    w, R, verdicts = run; verdicts(["unique-B", "shared"])
    e = ex.pair_examples(R, AB, w.docs, Tok(), max_latents=1, n_shared=0)
    from llmdiff import corpus, models
    monkeypatch.setattr(corpus, "load_corpus", lambda run: w.docs); monkeypatch.setattr(models, "load_tokenizer", lambda m: Tok())
    j = next(j for j in range(D) if j not in set(e.latent) and w.dense()[:, j].any())
    assert "no contexts" in ex.viewer("A-B", R)(j)._repr_html_()
    assert "strongest" in ex.viewer("A-B", R, {"A": "a"})(j)._repr_html_()


def test_a_pair_with_nothing_unique_is_a_result(run):
    w, R, verdicts = run; verdicts(["shared"])
    e = ex.pair_examples(R, AB, w.docs, Tok())
    got = ex.load_examples("A-B", R)
    assert len(e) == len(got) == 0 and list(got.columns) == ex.FIELDS.names
    assert "no contexts" in ex.viewer("A-B", R)(0)._repr_html_()


def test_missing_examples_name_the_step(tmp_path):
    with pytest.raises(UserError, match="08_examples"): ex.load_examples("A-B", tmp_path)
