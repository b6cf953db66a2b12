"Many models in one dictionary: sets of models on planted truth, agreement with pairs, labels, and what is refused."
import itertools

import numpy as np, pandas as pd, pytest, torch

from llmdiff import joint as jt, replication as rp, scaling as sc
from llmdiff.core import UserError
from llmdiff.examples import card
from llmdiff.crosscoder import Crosscoder, calibrate, set_normalisation
from llmdiff.training import Options, train
from test_examples import Tok, World
from test_replication import AB, Memory, dictionary, find, small_store

NAMES = ["A", "B", "C"]

def owned(d=48, per=4, n=6000, seed=0):
    "Concepts of every set of three models: activations, directions [D, 3, d], owners [D, 3]."
    g = torch.Generator().manual_seed(seed); sets = [s for s in itertools.product([0, 1], repeat=3) if sum(s)]
    own = torch.tensor(sets).repeat_interleave(per, 0).float(); D = len(own)
    W = torch.linalg.qr(torch.randn(d, d, generator=g))[0][:D, None]*own[..., None]
    f = (torch.rand(n, D, generator=g) + .5)*(torch.rand(n, D, generator=g) < .06)
    return Memory(torch.einsum("nj,jmd->nmd", f, W) + .01*torch.randn(n, 3, d, generator=g), NAMES), W, own


def test_sets_of_models_are_the_planted_ones():
    store, W, own = owned(); cc = dictionary(W, NAMES)
    h = sc.holders(sc.scan(store, cc, NAMES), cc.W_dec.detach(), NAMES)
    want = ["+".join(m for m, o in zip(NAMES, row) if o) for row in own]
    assert h.models.tolist() == want and not h.undecided.any()
    c = jt.set_counts(h, NAMES); assert c.latents.tolist() == [4]*7 and c.share.sum() == pytest.approx(1) and set(c.n_models) == {1, 2, 3}
    assert jt.in_set(h, ["B"], ["A"]).tolist() == [bool(b and not a) for a, b, _ in own.tolist()] and jt.in_set(h, ["C"]).sum() == 16
    jt.set_figure(c, NAMES)


def test_sets_of_models_are_found_by_training():
    store, W, own = owned(n=20_000); x = store.x
    cc = set_normalisation(Crosscoder(48, 40, 2, NAMES, seed=1), x.double().mean(0), x.double().var(0, unbiased=False).sum(1))
    def batches(start):
        for i in itertools.count(start): yield x[torch.randint(len(x), (256,), generator=torch.Generator().manual_seed(i))]
    train(batches, cc, 700, Options(lr=5e-3, dead_after=4000, k_aux=8)); calibrate(cc, [cc.normalise(x[:4000])])
    h = sc.holders(sc.scan(store, cc, NAMES), cc.W_dec.detach(), NAMES)
    cos = torch.nn.functional.normalize(cc.W_dec.detach().flatten(1), dim=1) @ torch.nn.functional.normalize((W*cc.scale.float()[:, None]).flatten(1), dim=1).T
    hit = cos.max(1); clear = (hit.values > .9).numpy() & (h["count"] >= 10).to_numpy()
    want = np.array(["+".join(m for m, o in zip(NAMES, own[j]) if o) for j in hit.indices])
    assert len(set(hit.indices[clear].tolist())) >= 22 and (h.models[clear] == want[clear]).mean() > .9
    pair, lone = dictionary(W[:, [0, 1]], ["A", "B"]), (own[:, 1] - own[:, 0] == 1).numpy()      # what a pair without C would call unique to B
    live = np.flatnonzero(own[:, :2].sum(1) > 0); m = find(store, pair, cc, live, np.ones((len(live), 1), bool), names=["B"])
    a = jt.agreement(m, lone[live], jt.in_set(h, ["B"], ["A"]), live < 0, np.zeros(40, bool))
    assert a["unique_pair"] == 8 and a["both"] >= 6 and a["only_pair"] == 0 and a["kappa"] > .7


def test_joint_rows_compare_every_seed_with_the_joint_dictionary():
    store, W, own = owned(); joint = dictionary(W, NAMES); h = sc.holders(sc.scan(store, joint, NAMES), joint.W_dec.detach(), NAMES)
    alive = own[:, :2].sum(1) > 0; D = int(alive.sum()); order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
    base = W[alive][:, :2]; ccs = [dictionary(base), dictionary(base[order])]
    tables = [sc.judge(sc.scaling_table(sc.scan(store, c, AB), c.W_dec.detach(), 20), AB) for c in ccs]
    t = pd.DataFrame(jt.joint_rows(store, AB, ccs, tables, joint, h, "B"))
    assert t[["seed", "against"]].values.tolist() == [[0, "joint: B, not A"], [0, "joint: B only"], [0, "joint, published rule"], [0, "seed 1"], [1, "joint: B, not A"], [1, "joint: B only"]]
    assert (t.unique_pair == 8).all() and t.both.tolist() == [8, 4, 8, 8, 8, 4] and t.kappa[[0, 2, 3, 4]].eq(1).all() and t.only_pair.tolist() == [0, 4, 0, 0, 0, 4]
    s = jt.joint_finding(t, "B"); assert "8 have a match in the joint dictionary, 8 of these are decided in both, and 8 are so there too (kappa 1.00" in s and "8 of 8" in s
    none = jt.joint_rows(store, AB, ccs[:1], [tables[0].assign(point="shared")], joint, h, "B", min_count=10**6)             # nothing can be judged
    assert none[0]["unique_pair"] == 0 and np.isnan(none[0]["kappa"]) and "nothing to look for" in jt.joint_finding(pd.DataFrame(none), "B")


def test_what_one_model_lacks_is_labelled(tmp_path):
    store, W, own = owned(); h = sc.holders(sc.scan(store, dictionary(W, NAMES), NAMES), W, NAMES)
    only = np.flatnonzero((own[:, 1] > own[:, 0]).numpy()); got = jt.lacked(h, "B", "A")
    assert set(got) == set(only) and (np.diff(h["count"].to_numpy()[got]) <= 0).all()
    assert len(jt.lacked(h.assign(undecided=True), "B", "A")) == 0
    w = World(); t = pd.DataFrame(dict(latent=range(6), count=[9, 8, 7, 6, 5, 4], has_A=[False]*3 + [True]*3, has_B=[True]*3 + [False]*3, undecided=[True] + [False]*5))
    e = jt.joint_examples(tmp_path, w, w.cc, t, w.docs, Tok(), [["A", "B"]], max_latents=2)
    assert set(e.latent) == {1, 2, 3, 4} and e.equals(w.run([1, 2, 3, 4])) and not (tmp_path/"examples").exists()        # two models: the pair's own table stays
    w.cc.names = ("A", "B", "C"); w.x = torch.cat([w.x, w.x[:, :1]], 1); w.cc = dictionary(torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0)), NAMES)
    e = jt.joint_examples(tmp_path, w, w.cc, t, w.docs, Tok(), [["A", "B"]], max_latents=2)
    assert set(e.latent) <= {1, 2, 3, 4} and len(e) and pd.read_parquet(tmp_path/"examples/A-B-C.parquet").equals(e)
    assert len(jt.joint_examples(tmp_path, w, w.cc, t, w.docs, Tok(), [])) == 0


def test_a_joint_latent_has_a_card():
    store, W, own = owned(); h = sc.holders(sc.scan(store, dictionary(W, NAMES), NAMES), W, NAMES); j = int(np.flatnonzero((own == torch.tensor([0., 1., 1.])).all(1).numpy())[0])
    e = pd.DataFrame([dict(latent=j, kind="top", rank=0, doc=3, source="<x>", pos=0, act=2., tokens=["<i>", "b"], acts=[2., 0.], parts=[[.1, 0], [1., 0], [.8, 0]], text="<i>b")])
    c = card(h.assign(label="<b>").iloc[j], e, NAMES); page = c._repr_html_()
    assert "<b>B+C</b>" in page and repr(c) == f"latent {j} of A-B-C: <b> (B+C)" and "<i>" not in page and "A 5%, B 50%, C 40%, bias 5%" in page and all(f"{m}: decoder norm" in page for m in NAMES)


def test_agreement_leaves_out_the_undecided_and_the_unmatched():
    m = pd.DataFrame(dict(match=[3, 1, 0, -1, 2], matched=[True, True, True, False, True]))
    a = jt.agreement(m, np.array([1, 1, 0, 1, 0], bool), np.array([0, 1, 0, 1], bool), np.zeros(5, bool), np.array([1, 0, 0, 0], bool))
    assert (a["unique_pair"], a["unique_other"], a["matched"], a["undecided"], a["compared"], a["both"], a["only_pair"], a["only_other"]) == (3, 2, 2, 0, 3, 2, 0, 0)
    for one, other in (([1, 0, 0, 0, 0], [0]*4), ([0]*5, [0, 0, 0, 1])):              # undecided here, or there
        a = jt.agreement(m, np.array([1, 1, 0, 1, 0], bool), np.array([0, 1, 0, 1], bool), np.array(one, bool), np.array(other, bool))
        assert a["matched"] == 2 and a["undecided"] == 1 and a["both"] == 1 and a["compared"] == 3


def test_figures_of_nothing(tmp_path):
    cols = pd.DataFrame(dict(latent=[0, 1], point=["shared", "unique-A"], match_cos=[np.nan, np.nan], match_corr=[np.nan, np.nan]))
    rp.match_figure([("A-B", cols, cols.rename(columns=dict(match_cos="cos", match_corr="corr")))], 0, 2)
    h = pd.DataFrame(dict(latent=[0], count=[0], models=[""], undecided=[False]))
    c = jt.set_counts(h, NAMES); assert len(c) == 0; jt.set_figure(c, NAMES)


def test_kappa_by_hand_and_where_it_is_undefined():
    u, v = np.array([1]*6 + [0]*14, bool), np.array([1]*4 + [0]*2 + [1]*2 + [0]*12, bool)
    a = jt.alike(u, v); po, pe = 16/20, .3*.3 + .7*.7
    assert a["kappa"] == pytest.approx((po - pe)/(1 - pe)) and a["jaccard"] == .5 and a["kappa_lo"] < a["kappa"] < a["kappa_hi"] and a["jaccard_lo"] < .5 < a["jaccard_hi"]
    for x, y in ((u, u & False), (u & False, v), (u[:0], v[:0])): assert np.isnan(jt.alike(x, y)["kappa"])


@pytest.mark.parametrize("joint, compare, words", [(["pt", "it", "DPO"], None, "no model 'DPO': it holds pt, it"), (["pt"], None, "two or more"), (["pt", "it", "pt"], None, "two or more"), (["pt", "it"], "SimPO", "'SimPO' is not one of")])
def test_joint_models_that_cannot_be(tmp_path, joint, compare, words):
    with pytest.raises(UserError, match=words): jt.check_joint(joint, small_store(tmp_path/"store", names=("pt", "it")), compare)
