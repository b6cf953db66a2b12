"Planted behaviours found again: marks on tokens, activation on them, latents of the same activity, categories."
import numpy as np
import pandas as pd

from llmdiff.closer import recovered as rc
from llmdiff.core import root
from llmdiff.corpus import chat_part
from llmdiff.models import load_tokenizer
from llmdiff.worlds.synthetic import known_crosscoder, known_latents
from test_tables import latents

NAMES = list(rc.BEHAVIOURS)


# ---- marks

def chat_docs(*answers):
    "Chats with these answers, as the corpus holds them."
    tok, rows = load_tokenizer({"pt": str(root()/"data/tiny/pt")}), []
    for d, answer in enumerate(answers):
        chat = [dict(role="user", content="hello"), dict(role="assistant", content=answer)]
        _, ids, keep = chat_part(chat, tok, 128)
        rows.append(dict(doc=d, kind="chat", ids=ids, keep=keep))
    return pd.DataFrame(rows), tok


def test_marks_are_on_the_tokens_of_the_match():
    docs, tok = chat_docs("Sure, two things:\n- bread\n- salt", "I'm sorry, but I can't help with that.",
                          "As an AI I like it.", "bread")
    m = rc.marks(docs, tok)

    def marked(d, behaviour): return tok.decode(np.asarray(docs.ids[d])[m[d][:, NAMES.index(behaviour)]])

    assert "Sure" in marked(0, "filler opening") and "bread" not in marked(0, "filler opening")
    assert "-" in marked(0, "structure") and "two" not in marked(0, "structure")
    assert "sorry" in marked(1, "refusal") and not m[0][:, NAMES.index("refusal")].any()
    assert "AI" in marked(2, "talk of being an AI") and not m[3][:, :4].any()
    assert "hello" not in marked(0, "any answer") and "salt" in marked(0, "any answer")


def test_documents_without_an_answer_have_no_marks():
    docs, tok = chat_docs("Sure.")
    assert rc.marks(docs.assign(kind="prose"), tok) == {}


# ---- shares of activation on marked tokens

class Toy:
    "The known world as a store, 20 tokens a document."
    x = known_latents()[0]

    def rows(self, pair):
        at = np.arange(len(self.x))
        yield {"acts": self.x.float(), "token": at//20, "pos": at % 20, "doc": at//20}


def test_shares_are_those_of_the_dense_codes():
    store, cc = Toy(), known_crosscoder()
    marked = {d: np.random.default_rng(d).random((20, len(NAMES))) < .3 for d in range(0, 100, 2)}
    share, n, N = rc.marked_share(store, cc, ["A", "B"], marked)
    codes = cc.dense_codes(cc.normalise(store.x.float())).double().detach().numpy()
    M = np.concatenate([marked.get(d, np.zeros((20, len(NAMES)), bool)) for d in range(100)])
    want = (codes.T @ M)/np.maximum(codes.sum(0), 1e-30)[:, None]
    np.testing.assert_allclose(share, want, atol=1e-6)
    assert (n == M.sum(0)).all() and N == 2000 and (share[7] == 0).all()


# ---- the test against latents of the same activity

def table(D=300, unique=()):
    g = np.random.default_rng(1)
    verdicts = ["unique-B" if j in unique else "shared" for j in range(D)]
    return pd.DataFrame({"latent": range(D), "alive": True, "count": g.integers(20, 9000, D), "verdict": verdicts})


def test_chance_is_not_found_and_a_planted_latent_is():
    g, p, t = np.random.default_rng(0), [], table(unique=(3, 40, 77))
    for i in range(60):
        share = g.beta(1, 20, (300, len(NAMES)))
        p += [r["p"] for r in rc.found(share, t) if r["unique"]]
    assert 0.01 < np.mean(np.array(p) < .05) < .1                     # as often as chance says
    share[40, 2] = .9
    r = next(r for r in rc.found(share, t) if r["behaviour"] == NAMES[2] and r["side"] == "B")
    assert r["best"] == 40 and r["p"] < .02


def test_no_unique_latent_is_a_result():
    rows = pd.DataFrame(rc.found(np.zeros((300, len(NAMES))), table()))
    assert (rows.unique == 0).all() and rows.p.isna().all()
    assert "No pair has a unique latent" in rc.recovered_finding(rows.assign(q=np.nan))


# ---- planted changes in the categories

def test_planted_changes_that_are_there_are_found_and_absent_ones_are_not():
    it = latents(G_30=15, D_17=15, E_18=1, A_2=1, G_24=8)
    simpo = latents(G_30=1, D_17=1, E_18=14, A_1=8, A_2=8, G_24=8)
    t = rc.planted_changes({"it": it, "SimPO": simpo, "DPO": it})
    s = t[t.model == "SimPO"].set_index("behaviour").seen
    language = "the language of the question"
    assert (s.drop(language) == "as planted").all() and s[language] == "no difference"
    assert (t[t.model == "DPO"].seen == "no difference").all()
    says = rc.planted_changes_finding(t)
    assert "4 show in the categories at q < 0.05" in says and "refusing harmful requests in SimPO" in says


def test_planted_the_other_way_is_said():
    t = rc.planted_changes({"it": latents(E_18=20, none=5), "SimPO": latents(none=25)})
    assert t.seen[0] == "the other way" and "1 show the other way" in rc.planted_changes_finding(t)


def test_planted_without_latents():
    t = rc.planted_changes({"it": latents(), "SimPO": latents(), "DPO": latents(E_18=1)})
    assert set(t.seen) == {"nothing to compare"} and "0 show in the categories" in rc.planted_changes_finding(t)
