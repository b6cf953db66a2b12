"Many models in one dictionary: sets of models on planted truth, agreement with pairs, labels, and what is refused."
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from llmdiff.closer import joint as jt, seeds
from llmdiff.closer.joint import Look
from llmdiff.core import UserError
from llmdiff.crosscoder import calibrate, Crosscoder, set_normalisation
from llmdiff.engine.store import Store
from llmdiff.examples import latent_card
from llmdiff.scaling import accumulate, scaling_table
from llmdiff.training import Options, train
from llmdiff.verdicts import Cuts, judge
from test_examples import Tok, World
from test_scaling import AB, FakeStore, toy

NAMES = ["A", "B", "C"]


class Memory:
    "Activations [n, n_models, d] of named models behind `rows`, 20 tokens a document."
    def __init__(self, x, names):
        self.x, self.names, self.doc = x, list(names), np.arange(len(x))//20

    def rows(self, names):
        at = [self.names.index(m) for m in names]
        yield {"acts": self.x[:, at], "token": self.doc, "pos": self.doc, "doc": self.doc}


def dictionary(directions, # [D, M, d]
               names=AB):
    "A crosscoder that reads and writes these directions."
    D, M, d = directions.shape
    cc = Crosscoder(d, D, 2, names)
    length2 = (directions**2).sum((1, 2), keepdim=True).clamp_min(1e-9)
    cc.W_dec.data, cc.W_enc.data = directions.float(), directions.float()/length2.float()
    cc.theta.fill_(.3)
    return cc


def owned(d=48, per=4, n=6000, seed=0):
    "Concepts of every set of three models: activations, directions [D, 3, d], owners [D, 3]."
    g = torch.Generator().manual_seed(seed)
    sets = [s for s in itertools.product([0, 1], repeat=3) if sum(s)]
    own = torch.tensor(sets).repeat_interleave(per, 0).float()
    D = len(own)
    W = torch.linalg.qr(torch.randn(d, d, generator=g))[0][:D, None]*own[..., None]
    f = (torch.rand(n, D, generator=g) + .5)*(torch.rand(n, D, generator=g) < .06)
    return Memory(torch.einsum("nj,jmd->nmd", f, W) + .01*torch.randn(n, 3, d, generator=g), NAMES), W, own


def set_of(row): # bool or 0/1, one a model
    "The name of a set of models."
    return "+".join(m for m, o in zip(NAMES, row) if o)


def holders_in(store, W):
    "The sets of models of a dictionary with the directions W."
    cc = dictionary(W, NAMES)
    return jt.holders(accumulate(store, cc, NAMES), cc.W_dec.detach(), NAMES)


# ---- sets of models

def three(n=4000, seed=0):
    "Three models in one dictionary: latents of all, of two, of one, one that the third has in its own direction."
    g = torch.Generator().manual_seed(seed)
    u = torch.eye(20)
    W = torch.zeros(5, 3, 20)
    W[0], W[1, 1:], W[2, 2], W[3, 0], W[4, :2], W[4, 2] = u[0], u[1], u[2], u[3], u[4], u[5]
    cc = Crosscoder(20, 5, 2, ["P", "Q", "R"])
    cc.W_dec.data, cc.W_enc.data = W.clone(), W.clone()
    cc.theta.fill_(.3)
    f = (torch.rand(n, 5, generator=g).log().neg() + .5)*(torch.rand(n, 5, generator=g) < .2)
    return torch.einsum("nj,jmd->nmd", f, W) + .02*torch.randn(n, 3, 20, generator=g), np.arange(n)//25, cc


def test_the_set_of_models_that_have_a_latent():
    x, doc, cc = three()
    h = jt.holders(accumulate(FakeStore(x, doc), cc, cc.names), cc.W_dec.detach(), cc.names)
    assert h.models.tolist() == ["P+Q+R", "Q+R", "R", "P", "P+Q+R"]
    assert h.rotated.tolist() == [False]*4 + [True] and not h.undecided.any() and not h.isna().any().any()


def test_two_models_are_judged_as_a_pair_is():
    x, doc, cc = toy()
    S, W = accumulate(FakeStore(x, doc), cc, AB), cc.W_dec.detach()
    h, t = jt.holders(S, W, AB, n_boot=50), judge(scaling_table(S, W, 50), AB)
    assert [m == "A" for m in h.models] == [v == "unique-A" for v in t.verdict]
    assert [m == "B" for m in h.models] == [v == "unique-B" for v in t.verdict]


def test_sets_of_models_are_the_planted_ones():
    store, W, own = owned()
    h = holders_in(store, W)
    assert h.models.tolist() == [set_of(row) for row in own] and not h.undecided.any()
    c = jt.set_counts(h, NAMES)
    assert c.latents.tolist() == [4]*7 and c.share.sum() == pytest.approx(1) and set(c.n_models) == {1, 2, 3}
    assert jt.in_set(h, ["B"], ["A"]).tolist() == [bool(b and not a) for a, b, _ in own.tolist()]
    assert jt.in_set(h, ["C"]).sum() == 16
    jt.set_figure(c, NAMES)


def test_sets_of_models_are_found_by_training():
    store, W, own = owned(n=20_000)
    x = store.x
    mean, var = x.double().mean(0), x.double().var(0, unbiased=False).sum(1)
    cc = set_normalisation(Crosscoder(48, 40, 2, NAMES, seed=1), mean, var)

    def batches(start):
        for i in itertools.count(start):
            yield x[torch.randint(len(x), (256,), generator=torch.Generator().manual_seed(i))]

    train(batches, cc, 700, Options(lr=5e-3, dead_after=4000, k_aux=8))
    calibrate(cc, [cc.normalise(x[:4000])])
    h = jt.holders(accumulate(store, cc, NAMES), cc.W_dec.detach(), NAMES)
    rows = normalize(cc.W_dec.detach().flatten(1), dim=1)
    cos = rows @ normalize((W*cc.scale.float()[:, None]).flatten(1), dim=1).T
    hit = cos.max(1)
    clear = (hit.values > .9).numpy() & (h["count"] >= 10).to_numpy()
    want = np.array([set_of(own[j]) for j in hit.indices])
    assert len(set(hit.indices[clear].tolist())) >= 22 and (h.models[clear] == want[clear]).mean() > .9

    # what a pair without C would call unique to B
    pair, lone = dictionary(W[:, [0, 1]], AB), (own[:, 1] - own[:, 0] == 1).numpy()
    live = np.flatnonzero(own[:, :2].sum(1) > 0)
    m = jt.matches_by_model(store, pair, [cc], live, "B", Look())[0]
    a = jt.design_agreement(m, lone[live], jt.in_set(h, ["B"], ["A"]), live < 0, np.zeros(40, bool))
    assert a["unique_pair"] == 8 and a["both"] >= 6 and a["only_pair"] == 0 and a["kappa"] > .7


# ---- agreement with pairs

def test_joint_rows_compare_every_seed_with_the_joint_dictionary():
    store, W, own = owned()
    joint, h = dictionary(W, NAMES), holders_in(store, W)
    alive = own[:, :2].sum(1) > 0
    order = torch.randperm(int(alive.sum()), generator=torch.Generator().manual_seed(0))
    base = W[alive][:, :2]
    ccs = [dictionary(base), dictionary(base[order])]
    tables = [judge(scaling_table(accumulate(store, c, AB), c.W_dec.detach(), 20), AB) for c in ccs]
    t = pd.DataFrame(jt.joint_rows(store, AB, ccs, tables, joint, h, "B"))
    want = [[0, "joint: B, not A"], [0, "joint: B only"], [0, "joint, published rule"], [0, "seed 1"],
            [1, "joint: B, not A"], [1, "joint: B only"]]
    assert t[["seed", "against"]].values.tolist() == want
    assert (t.unique_pair == 8).all() and t.both.tolist() == [8, 4, 8, 8, 8, 4]
    assert t.kappa[[0, 2, 3, 4]].eq(1).all() and t.only_pair.tolist() == [0, 4, 0, 0, 0, 4]

    s = jt.joint_finding(t, "B")
    assert "8 have a match in the joint dictionary, 8 of these are decided in both" in s
    assert "and 8 are so there too (kappa 1.00" in s and "8 of 8" in s

    look = Look(cuts=Cuts(min_count=10**6))                                  # nothing can be judged
    unknown = tables[0].assign(verdict_point="shared")
    none = jt.joint_rows(store, AB, ccs[:1], [unknown], joint, h, "B", look)
    assert none[0]["unique_pair"] == 0 and np.isnan(none[0]["kappa"])
    assert "nothing to look for" in jt.joint_finding(pd.DataFrame(none), "B")


def test_agreement_leaves_out_the_undecided_and_the_unmatched():
    m = pd.DataFrame(dict(match=[3, 1, 0, -1, 2], matched=[True, True, True, False, True]))
    here, there = np.array([1, 1, 0, 1, 0], bool), np.array([0, 1, 0, 1], bool)
    a = jt.design_agreement(m, here, there, np.zeros(5, bool), np.array([1, 0, 0, 0], bool))
    assert (a["unique_pair"], a["unique_other"], a["matched"], a["undecided"]) == (3, 2, 2, 0)
    assert (a["compared"], a["both"], a["only_pair"], a["only_other"]) == (3, 2, 0, 0)
    for one, other in (([1, 0, 0, 0, 0], [0]*4), ([0]*5, [0, 0, 0, 1])):      # undecided here, or there
        a = jt.design_agreement(m, here, there, np.array(one, bool), np.array(other, bool))
        assert a["matched"] == 2 and a["undecided"] == 1 and a["both"] == 1 and a["compared"] == 3


def test_kappa_by_hand_and_where_it_is_undefined():
    u = np.array([1]*6 + [0]*14, bool)
    v = np.array([1]*4 + [0]*2 + [1]*2 + [0]*12, bool)
    a = jt.alike(u, v)
    po, pe = 16/20, .3*.3 + .7*.7
    assert a["kappa"] == pytest.approx((po - pe)/(1 - pe)) and a["jaccard"] == .5
    assert a["kappa_lo"] < a["kappa"] < a["kappa_hi"] and a["jaccard_lo"] < .5 < a["jaccard_hi"]
    for x, y in ((u, u & False), (u & False, v), (u[:0], v[:0])): assert np.isnan(jt.alike(x, y)["kappa"])


def test_figures_of_nothing():
    cols = pd.DataFrame(dict(latent=[0, 1], verdict_point=["shared", "unique-A"],
                             match_cos=[np.nan, np.nan], match_corr=[np.nan, np.nan]))
    chance = cols.rename(columns=dict(match_cos="cos", match_corr="corr"))
    seeds.match_figure([("A-B", cols, chance)], 0, 2)
    h = pd.DataFrame(dict(latent=[0], count=[0], models=[""], undecided=[False]))
    c = jt.set_counts(h, NAMES)
    assert len(c) == 0
    jt.set_figure(c, NAMES)


# ---- labels

def test_what_one_model_lacks():
    store, W, own = owned()
    h = holders_in(store, W)
    only = np.flatnonzero((own[:, 1] > own[:, 0]).numpy())
    got = jt.lacked(h, "B", "A")
    assert set(got) == set(only) and (np.diff(h["count"].to_numpy()[got]) <= 0).all()
    assert len(jt.lacked(h.assign(undecided=True), "B", "A")) == 0


def test_what_one_model_lacks_gets_contexts(tmp_path):
    w = World()
    t = pd.DataFrame(dict(latent=range(6), count=[9, 8, 7, 6, 5, 4], has_A=[False]*3 + [True]*3,
                          has_B=[True]*3 + [False]*3, undecided=[True] + [False]*5))
    chosen = jt.lacked_in(t, [["A", "B"]], max_latents=2)
    assert chosen.tolist() == [1, 2, 3, 4]
    e = jt.joint_examples(tmp_path, w, w.cc, chosen, w.docs, Tok())
    assert set(e.latent) == {1, 2, 3, 4} and e.equals(w.run([1, 2, 3, 4]))
    assert not (tmp_path/"examples").exists()                                # two models: the pair's own table stays

    w.cc.names = ("A", "B", "C")
    w.x = torch.cat([w.x, w.x[:, :1]], 1)
    w.cc = dictionary(torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0)), NAMES)
    e = jt.joint_examples(tmp_path, w, w.cc, chosen, w.docs, Tok())
    assert set(e.latent) <= {1, 2, 3, 4} and len(e)
    assert pd.read_parquet(tmp_path/"examples/A-B-C.parquet").equals(e)
    assert len(jt.joint_examples(tmp_path, w, w.cc, jt.lacked_in(t, []), w.docs, Tok())) == 0


def test_a_joint_latent_has_a_card():
    store, W, own = owned()
    h = holders_in(store, W)
    j = int(np.flatnonzero((own == torch.tensor([0., 1., 1.])).all(1).numpy())[0])
    e = pd.DataFrame([dict(latent=j, kind="top", rank=0, doc=3, source="<x>", pos=0, act=2., tokens=["<i>", "b"],
                           acts=[2., 0.], parts=[[.1, 0], [1., 0], [.8, 0]], text="<i>b")])
    c = latent_card(h.assign(label="<b>").iloc[j], e, NAMES)
    page = c._repr_html_()
    assert "<b>B+C</b>" in page and "<i>" not in page and "A 5%, B 50%, C 40%, bias 5%" in page
    assert repr(c) == f"latent {j} of A-B-C: <b> (B+C)"
    assert all(f"{m}: decoder norm" in page for m in NAMES)


# ---- what is refused

class Named:
    "A store that only knows its models."
    folder, models, index = "store", ["pt", "it"], Store.index


@pytest.mark.parametrize("joint, compare, words", [
    (["pt", "it", "DPO"], None, "no model 'DPO': it holds pt, it"),
    (["pt"], None, "two or more"),
    (["pt", "it", "pt"], None, "two or more"),
    (["pt", "it"], "SimPO", "'SimPO' is not one of")])
def test_joint_models_that_cannot_be(joint, compare, words):
    with pytest.raises(UserError, match=words): jt.check_joint(joint, Named(), compare)
