"Marks of planted behaviours, shares of activation on them, and the test against latents of the same activity."
import numpy as np, pandas as pd
from llmdiff import planted as pl
from llmdiff.core import root
from llmdiff.corpus import chat_part
from llmdiff.models import load_tokenizer
from llmdiff.scaling import planted
from llmdiff.crosscoder import Crosscoder

NAMES = list(pl.BEHAVIOURS)


def chat_docs(*answers):
    tok = load_tokenizer({"pt": str(root()/"data/tiny/pt")}); rows = []
    for d, a in enumerate(answers):
        _, ids, keep = chat_part([dict(role="user", content="hello"), dict(role="assistant", content=a)], tok, 128)
        rows.append(dict(doc=d, kind="chat", ids=ids, keep=keep))
    return pd.DataFrame(rows), tok


def marked_text(docs, tok, m, d, behaviour):
    return tok.decode(np.asarray(docs.ids[d])[m[d][:, NAMES.index(behaviour)]])


def test_marks_are_on_the_tokens_of_the_match():
    docs, tok = chat_docs("Sure, two things:\n- bread\n- salt", "I'm sorry, but I can't help with that.", "As an AI I like it.", "bread")
    m = pl.marks(docs, tok)
    assert "Sure" in marked_text(docs, tok, m, 0, "filler opening") and "bread" not in marked_text(docs, tok, m, 0, "filler opening")
    assert "-" in marked_text(docs, tok, m, 0, "structure") and "two" not in marked_text(docs, tok, m, 0, "structure")
    assert "sorry" in marked_text(docs, tok, m, 1, "refusal") and not m[0][:, NAMES.index("refusal")].any()
    assert "AI" in marked_text(docs, tok, m, 2, "talk of being an AI") and not m[3][:, :4].any()
    assert "hello" not in marked_text(docs, tok, m, 0, "any answer") and "salt" in marked_text(docs, tok, m, 0, "any answer")


def test_documents_without_an_answer_have_no_marks():
    docs, tok = chat_docs("Sure.")
    assert pl.marks(docs.assign(kind="prose"), tok) == {}


def test_shares_are_those_of_the_dense_codes():
    x, f, dec, enc = planted(); doc = np.arange(len(x))//20
    cc = Crosscoder(32, 9, 2, ["A", "B"]); cc.W_dec.data, cc.W_enc.data = dec.float(), enc.float(); cc.theta.fill_(.3)
    class Toy:
        def rows(self, pair): yield {"acts": x.float(), "token": doc, "pos": np.arange(len(x)) % 20, "doc": doc}
    marked = {d: np.random.default_rng(d).random((20, len(NAMES))) < .3 for d in range(0, 100, 2)}
    share, n, N = pl.marked_share(Toy(), cc, ["A", "B"], marked)
    F = cc.dense_codes(cc.normalise(x.float())).double().detach().numpy()
    M = np.concatenate([marked.get(d, np.zeros((20, len(NAMES)), bool)) for d in range(100)])
    want = (F.T @ M)/np.maximum(F.sum(0), 1e-30)[:, None]
    np.testing.assert_allclose(share, want, atol=1e-6); assert (n == M.sum(0)).all() and N == 2000 and (share[7] == 0).all()


def table(D=300, unique=()):
    g = np.random.default_rng(1)
    return pd.DataFrame({"latent": range(D), "alive": True, "count": g.integers(20, 9000, D), "verdict": ["unique-B" if j in unique else "shared" for j in range(D)]})


def test_chance_is_not_found_and_a_planted_latent_is():
    g, p = np.random.default_rng(0), []
    for i in range(60):
        s = g.beta(1, 20, (300, len(NAMES))); p += [r["p"] for r in pl.found(s, table(unique=(3, 40, 77))) if r["unique"]]
    assert 0.01 < np.mean(np.array(p) < .05) < .1                     # as often as chance says
    s[40, 2] = .9
    r = next(r for r in pl.found(s, table(unique=(3, 40, 77))) if r["behaviour"] == NAMES[2] and r["side"] == "B")
    assert r["best"] == 40 and r["p"] < .02


def test_no_unique_latent_is_a_result():
    rows = pd.DataFrame(pl.found(np.zeros((300, len(NAMES))), table()))
    assert (rows.unique == 0).all() and rows.p.isna().all()
    assert "No pair has a unique latent" in pl.planted_finding(rows.assign(q=np.nan))
