"The methods behind the crosscoder's interface: forbidden rows, thresholds, the difference, the L1 price, bad input."
import numpy as np
import pytest
import torch

from llmdiff.closer import methods
from llmdiff.closer.methods import (
    as_pair, difference_table, fit_method, judge_difference, L1Kit, load_fit, measured, METHODS, new_dictionary,
    Partitioned, PartitionedKit, save_fit, scan_difference)
from llmdiff.core import UserError
from llmdiff.crosscoder import calibrate, Crosscoder
from llmdiff.training import new_state, Options, PairOptions
from llmdiff.worlds.synthetic import World, WorldStore

ARGS = dict(n_latents=48, k=4, batch=256, train_tokens=25_000, lr=5e-3)
PAIR = ["A", "B"]


@pytest.fixture(scope="module")
def store(): return WorldStore(World(16, 24, doc_tokens=32), 12_000)


def fit(method, store, **changed): return fit_method(method, store, PAIR, PairOptions(**{**ARGS, **changed}))


@pytest.fixture(scope="module")
def fits(store): return {m: fit(m, store) for m in METHODS}


def test_one_interface(store, fits):
    x = store.page(0)["acts"][:64]
    for m, (cc, log, q) in fits.items():
        c = cc.encode(cc.normalise(x))
        y = cc.decode(*c, len(x))
        assert y.shape == x.shape and cc.W_dec.shape == (48, 2, 16) and (c.value > 0).all(), m
        assert (np.diff(c.row*48 + c.latent) > 0).all(), m                    # row order
        t = measured(cc, store, PAIR, n_boot=20)
        assert len(t) == 48 and {"verdict", "norm_verdict", "alive", "count"} <= set(t), m
        assert (log is None) == (m == "random") and 0 < q["l0"] < 48
    assert fits["batchtopk-sum"][2]["fve_A"] > fits["random"][2]["fve_A"] + .3


def test_thresholds_give_k(fits):
    for m in ("batchtopk-sum", "batchtopk-l2", "partitioned", "diff-sae", "random"):
        assert abs(fits[m][2]["l0"] - 4) < 1.5, m
    assert fits["l1"][0].theta == 0


def test_forbidden_rows_never_move_and_parts_have_their_k(store, fits):
    cc = fits["partitioned"][0]
    for W in (cc.W_dec, cc.W_enc):
        assert not W[(cc.allowed == 0).expand_as(W)].any() and W[(cc.allowed == 1).expand_as(W)].all()

    new = new_dictionary("partitioned", store, PAIR, 48, 10)
    opt = torch.optim.Adam(new.parameters(), lr=1e-2, fused=True)
    x = new.normalise(store.page(0)["acts"][:100])
    options = Options(dead_after=0, select="float32")                         # all count as dead, so AuxK runs too
    s = PartitionedKit().step(new, opt, x, new_state(new), options)
    assert s[4] == 10*100 and s[5] > 0
    assert not new.W_dec[(new.allowed == 0).expand_as(new.W_dec)].any()

    new.calibrate([x])
    latent = new.encode(x).latent
    per = [int(((latent >= a) & (latent < b)).sum())/100 for a, b, _ in new.bounds]
    assert per == pytest.approx([1, 1, 8], abs=.02)


def test_partitions_need_room():
    with pytest.raises(UserError, match="leaves a part of the dictionary empty"): Partitioned(8, 40, 2, PAIR)


def test_the_folded_difference_is_the_autoencoder():
    g = torch.Generator().manual_seed(0)
    sae = Crosscoder(8, 20, 3, ["difference"], seed=1)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(1, 8, generator=g))
        sae.b_enc.copy_(.1*torch.randn(20, generator=g))
        sae.W_dec *= torch.rand(20, 1, 1, generator=g) + .5
    x, c = torch.randn(60, 2, 8, generator=g), 2.5
    z = c*(x[:, 1:] - x[:, :1])
    pair = as_pair(sae, Crosscoder(8, 20, 3, PAIR), c)
    calibrate(sae, [z])
    calibrate(pair, [x])
    a, b = sae.encode(z), pair.encode(x)
    assert torch.equal(a.row, b.row) and torch.equal(a.latent, b.latent)
    assert torch.allclose(a.value, b.value, atol=1e-5)
    y = pair.decode(*b, 60)
    assert torch.allclose(c*(y[:, 1] - y[:, 0]), sae.decode(*a, 60)[:, 0], atol=1e-4)


def l1_step(cc, x, kit, step):
    "One step that sets gradients and changes no weight."
    state = new_state(cc)
    state.step = step
    return kit.step(cc, torch.optim.SGD(cc.parameters(), lr=0.), x, state, Options())


def test_l1_step_is_the_gradient_of_its_loss_and_steers(monkeypatch):
    monkeypatch.setattr(methods, "clipped_update", lambda cc, opt: opt.step())   # the whole gradient
    g = torch.Generator().manual_seed(0)
    cc, x = Crosscoder(8, 20, 3, PAIR), torch.randn(50, 2, 8, generator=g)
    W_enc = cc.W_enc.detach().clone()
    kit = L1Kit(100, price=.5)
    s = l1_step(cc, x, kit, 50)
    f = torch.relu(x.flatten(1) @ W_enc.flatten(1).T)
    price = .5*(f @ cc.W_dec.detach().norm(dim=2).sum(1)).sum()
    assert s[4] == (f > 0).sum() and s[5] == pytest.approx(float(price), rel=1e-5)
    w = cc.W_dec.detach().clone().requires_grad_()
    error = (torch.einsum("nj,jmd->nmd", f, w) - x).pow(2).sum()
    loss = (error + .5*(f @ w.norm(dim=2).sum(1)).sum())/50
    assert torch.allclose(torch.autograd.grad(loss, w)[0], cc.W_dec.grad, atol=1e-5)
    assert kit.price > .5                                                     # L0 is above k: the price rises
    late = L1Kit(100, price=.5)
    l1_step(cc, x, late, 90)
    assert late.price == .5                                                   # late in training it is held


def test_activation_target_agrees_with_the_direct_fit(store, fits):
    cc = fits["diff-sae"][0]
    S = scan_difference(store, cc, PAIR)
    t = difference_table(S, cc.W_dec.detach(), n_boot=20)
    j, num, n_codes = int(t["count"].idxmax()), np.zeros(2), 0
    d = cc.W_dec[j, 1].detach().double()
    for r in store.rows():
        x = cc.normalise(r["acts"])
        row, lat, val = cc.encode(x)
        on = lat == j
        num += [float((val[on].double() @ x[row[on], m].double()) @ d) for m in (0, 1)]
        n_codes += len(row)
    assert S["by_block"].sum(0)[j, 1:] == pytest.approx(num, rel=1e-5)
    for P, (a, b) in dict(B=(num[0], num[1]), A=(-num[1], -num[0])).items():
        nu = t[f"nu_act_{P}"][j]
        assert nu == pytest.approx(a/b, rel=1e-5) if b > 0 else np.isinf(nu)
    assert S["count"].sum() == n_codes


def test_difference_verdicts_have_the_right_side():
    by = np.array([[[4., 0, 4], [4, -4, 0], [4, 2, 4], [0, 0, 0]]]*4)
    sums = dict(by_block=by, count=np.array([50, 50, 50, 0]), n_docs=np.ones(4), max_act=np.ones(4), n_tokens=100)
    t = judge_difference(difference_table(sums, torch.ones(4, 2, 3), 20))
    assert t.verdict.tolist() == ["unique-B", "unique-A", "other", "dead"]


def test_saved_and_loaded_whatever_the_method(fits, tmp_path, store):
    x = store.page(0)["acts"][:50]
    for m, (cc, _, q) in fits.items():
        save_fit(cc, tmp_path/m, q)
        same = load_fit(tmp_path/m)
        a, b = same.encode(same.normalise(x)), cc.encode(cc.normalise(x))
        assert same.method == m and all(torch.equal(u, v) for u, v in zip(a, b))
    with pytest.raises(UserError, match="holds no dictionary"): load_fit(tmp_path/"nothing")


def test_the_same_seed_gives_the_same_dictionary(store, fits):
    assert torch.equal(fit("partitioned", store)[0].W_dec, fits["partitioned"][0].W_dec)


def test_bad_input(store):
    with pytest.raises(UserError, match="no method 'topk': choose from batchtopk-sum"): fit("topk", store)
    with pytest.raises(UserError, match="k = 50 does not fit"): fit("l1", store, k=50)
