"Top contexts: against brute force, over tiles; windows, duplicates, escaping, empty sets."
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
    def __init__(self, n_docs=60, seed=0, d=8, levels=None, shards=3):
        r = np.random.default_rng(seed)
        ids, keep = [], []
        for _ in range(n_docs):
            n = int(r.integers(6, 30)); w = r.integers(2, 40, n); w[0] = BOS; turn = r.random(n) < 0.1; w[turn & (np.arange(n) > 0)] = 0
            ids.append(w.astype(np.int32)); keep.append((np.arange(n) > 0) & (w > 1))
        self.docs = pd.DataFrame({"doc": np.arange(n_docs), "source": r.choice(["x", "y"], n_docs), "ids": ids, "keep": keep, "text": [f"document {i}" for i in range(n_docs)]})
        self.docs = self.docs[[k.any() for k in keep]]
        self.cc = Crosscoder(d, D, 3, AB, seed=seed)
        self.cc.theta.fill_(0.9)
        g = torch.Generator().manual_seed(seed)
        parts = [(np.full(k.sum(), i), np.flatnonzero(k), w[k]) for i, w, k in zip(self.docs.doc, self.docs.ids, self.docs.keep)]
        self.doc, self.pos, self.token = (np.concatenate(c) for c in zip(*parts))
        self.x = torch.randn(len(self.doc), 2, d, generator=g)
        if levels: self.x = self.x.sign()                                  # many equal activations
        ends = np.flatnonzero(np.diff(self.doc)) + 1
        self.cuts = [0, *(ends[len(ends)*i//shards] for i in range(1, shards)), len(self.doc)]

    def rows(self, pair=None):
        for a, b in zip(self.cuts, self.cuts[1:]): yield {"acts": self.x[a:b], "token": self.token[a:b], "pos": self.pos[a:b], "doc": self.doc[a:b]}

    def dense(self):
        row, lat, val = encode_tile(self.cc, {"acts": self.x})[1]
        f = torch.zeros(len(self.x), D); f[row, lat] = val
        return f.numpy()

    def run(self, latents, **kw): return ex.top_contexts(self, self.cc, AB, self.docs, Tok(), latents, **kw)


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


def test_card_of_right_to_left_text_keeps_its_own_direction():
    s = Strict(ex.card(row(), contexts(["שלום", " עולם"]), AB)._repr_html_())
    assert any(t == "p" and a.get("dir") == "auto" for t, a in s.tags) and "unicode-bidi:isolate" in ex.CSS


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
    j = int(e.latent[0]); c = ex.latent_card(j, "A-B", R)
    assert f"latent {j} of A-B" in repr(c) and Strict(c._repr_html_()).open == []
    with pytest.raises(UserError, match="no latent 99"): ex.latent_card(99, "A-B", R)


def test_a_pair_with_nothing_unique_is_a_result(run):
    w, R, verdicts = run; verdicts(["shared"])
    e = ex.pair_examples(R, AB, w.docs, Tok())
    got = ex.load_examples("A-B", R)
    assert len(e) == len(got) == 0 and list(got.columns) == ex.FIELDS.names
    assert "no contexts" in ex.latent_card(0, "A-B", R)._repr_html_()


def test_missing_examples_name_the_step(tmp_path):
    with pytest.raises(UserError, match="08_examples"): ex.load_examples("A-B", tmp_path)
