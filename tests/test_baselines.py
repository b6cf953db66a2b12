"The methods behind the crosscoder's interface: forbidden rows, thresholds, the folded difference, the L1 price, replication, bad input."

import numpy as np, pytest, torch
from llmdiff import baselines as B
from llmdiff.core import UserError
from llmdiff.crosscoder import Crosscoder, calibrate
from llmdiff.truth import World, WorldStore

ARGS = dict(n_latents=48, k=4, batch=256, train_tokens=25_000, lr=5e-3)


@pytest.fixture(scope="module")
def store(): return WorldStore(World(16, 24, doc_tokens=32), 12_000)


@pytest.fixture(scope="module")
def fits(store): return {m: B.fit(m, store, ["A", "B"], **ARGS) for m in B.METHODS}


def test_one_interface(store, fits):
    x = store.page(0)["acts"][:64]
    for m, (cc, log, q) in fits.items():
        c = cc.encode(cc.normalise(x)); y = cc.decode(*c, len(x))
        assert y.shape == x.shape and cc.W_dec.shape == (48, 2, 16) and (c.value > 0).all(), m
        assert (np.diff(c.row*48 + c.latent) > 0).all(), m                    # row order
        t = B.measured(cc, store, ["A", "B"], n_boot=20)
        assert len(t) == 48 and {"verdict", "norm_verdict", "alive", "count"} <= set(t), m
        assert (log is None) == (m == "random") and 0 < q["l0"] < 48
    assert fits["batchtopk-sum"][2]["fve_A"] > fits["random"][2]["fve_A"] + .3


def test_thresholds_give_k(fits):
    for m in ("batchtopk-sum", "batchtopk-l2", "partitioned", "diff-sae", "random"): assert abs(fits[m][2]["l0"] - 4) < 1.5, m
    assert fits["l1"][0].theta == 0


def test_forbidden_rows_never_move_and_parts_have_their_k(store, fits):
    cc = fits["partitioned"][0]
    for W in (cc.W_dec, cc.W_enc): assert not W[(cc.allowed == 0).expand_as(W)].any() and W[(cc.allowed == 1).expand_as(W)].all()
    new = B.new_dictionary("partitioned", store, ["A", "B"], 48, 10); opt = torch.optim.Adam(new.parameters(), lr=1e-2, fused=True)
    x = new.normalise(store.page(0)["acts"][:100]); state = dict(threshold=0., step=0, since=torch.zeros(48, dtype=torch.long))
    s = B.partitioned_step(new, opt, x, state, dead_after=0); assert s[4] == 10*100 and s[5] > 0   # all count as dead, so AuxK runs too
    assert not new.W_dec[(new.allowed == 0).expand_as(new.W_dec)].any()
    new.calibrate([x]); per = [len(new.encode(x).row[(new.encode(x).latent >= a) & (new.encode(x).latent < b)])/100 for a, b, _ in new.bounds]
    assert per == pytest.approx([1, 1, 8], abs=.02)


def test_partitions_need_room():
    with pytest.raises(UserError, match="leaves a part of the dictionary empty"): B.Partitioned(8, 40, 2, ["A", "B"])


def test_the_folded_difference_is_the_autoencoder():
    g = torch.Generator().manual_seed(0); sae = Crosscoder(8, 20, 3, ["difference"], seed=1)
    with torch.no_grad(): sae.b_dec.copy_(torch.randn(1, 8, generator=g)); sae.b_enc.copy_(.1*torch.randn(20, generator=g)); sae.W_dec *= torch.rand(20, 1, 1, generator=g) + .5
    x, c = torch.randn(60, 2, 8, generator=g), 2.5
    z = c*(x[:, 1:] - x[:, :1]); pair = B.as_pair(sae, Crosscoder(8, 20, 3, ["A", "B"]), c)
    calibrate(sae, [z]); calibrate(pair, [x])
    a, b = sae.encode(z), pair.encode(x)
    assert torch.equal(a.row, b.row) and torch.equal(a.latent, b.latent) and torch.allclose(a.value, b.value, atol=1e-5)
    y = pair.decode(*b, 60); assert torch.allclose(c*(y[:, 1] - y[:, 0]), sae.decode(*a, 60)[:, 0], atol=1e-4)


def test_l1_step_is_the_gradient_of_its_loss_and_steers():
    g = torch.Generator().manual_seed(0); cc = Crosscoder(8, 20, 3, ["A", "B"]); x = torch.randn(50, 2, 8, generator=g)
    state = dict(step=50, since=torch.zeros(20, dtype=torch.long), threshold=0.); before = [p.detach().clone() for p in cc.parameters()]
    s = B.l1_step(cc, torch.optim.SGD(cc.parameters(), lr=0.), x, state, n_steps=100, lam=.5, clip=1e9)
    f = torch.relu(x.flatten(1) @ before[0].flatten(1).T) if before[0].shape == (20, 2, 8) else None
    assert f is not None and s[4] == (f > 0).sum() and s[5] == pytest.approx(float(.5*(f @ cc.W_dec.detach().norm(dim=2).sum(1)).sum()), rel=1e-5)
    w = cc.W_dec.detach().clone().requires_grad_(); loss = ((torch.einsum("nj,jmd->nmd", f, w) - x).pow(2).sum() + .5*(f @ w.norm(dim=2).sum(1)).sum())/50
    assert torch.allclose(torch.autograd.grad(loss, w)[0], cc.W_dec.grad, atol=1e-5)
    assert state["lam"] > .5                                                    # L0 is above k: the price rises
    held = dict(step=90, since=torch.zeros(20, dtype=torch.long), threshold=0., lam=.5)
    B.l1_step(cc, torch.optim.SGD(cc.parameters(), lr=0.), x, held, n_steps=100); assert held["lam"] == .5   # late in training it is held


def test_activation_target_agrees_with_the_direct_fit(store, fits):
    cc = fits["diff-sae"][0]; S = B.scan_difference(store, cc, ["A", "B"])
    t = B.difference_table(S, cc.W_dec.detach(), n_boot=20); j = int(t["count"].idxmax()); num = np.zeros(2)
    for r in store.rows():
        x = cc.normalise(r["acts"]); row, lat, val = cc.encode(x); on = lat == j
        num += [float((val[on].double() @ x[row[on], m].double()) @ cc.W_dec[j, 1].detach().double()) for m in (0, 1)]
    assert S["by_block"].sum(0)[j, 1:] == pytest.approx(num, rel=1e-5)
    for P, (a, b) in dict(B=(num[0], num[1]), A=(-num[1], -num[0])).items(): assert t[f"nu_act_{P}"][j] == pytest.approx(a/b, rel=1e-5) if b > 0 else np.isinf(t[f"nu_act_{P}"][j])
    assert S["count"].sum() == sum(len(cc.encode(cc.normalise(r["acts"])).row) for r in store.rows())


def test_difference_verdicts_have_the_right_side():
    by = np.array([[[4., 0, 4], [4, -4, 0], [4, 2, 4], [0, 0, 0]]]*4); W = torch.ones(4, 2, 3)
    t = B.judge_difference(B.difference_table(dict(by_block=by, count=np.array([50, 50, 50, 0]), n_docs=np.ones(4), max_act=np.ones(4), n_tokens=100), W, 20))
    assert t.verdict.tolist() == ["unique-B", "unique-A", "other", "dead"]


def test_saved_and_loaded_whatever_the_method(fits, tmp_path, store):
    x = store.page(0)["acts"][:50]
    for m, (cc, _, q) in fits.items():
        B.save_fit(cc, tmp_path/m, q); same = B.load_fit(tmp_path/m)
        assert same.method == m and all(torch.equal(a, b) for a, b in zip(same.encode(same.normalise(x)), cc.encode(cc.normalise(x))))
    with pytest.raises(UserError, match="holds no dictionary"): B.load_fit(tmp_path/"nothing")


def test_the_same_seed_gives_the_same_dictionary(store, fits):
    cc = B.fit("partitioned", store, ["A", "B"], **ARGS)[0]
    assert torch.equal(cc.W_dec, fits["partitioned"][0].W_dec)


def test_bad_input(store):
    with pytest.raises(UserError, match="no method 'topk': choose from batchtopk-sum"): B.fit("topk", store, ["A", "B"], **ARGS)
    with pytest.raises(UserError, match="k = 50 does not fit"): B.fit("l1", store, ["A", "B"], **{**ARGS, "k": 50})
