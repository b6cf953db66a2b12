"Latent Scaling: against the direct fit, on planted truth, over tiles and blocks; verdicts that need certainty; any number of models."
import numpy as np, pandas as pd, pytest, torch
from llmdiff import scaling as sc
from llmdiff.core import UserError, latents
from llmdiff.crosscoder import Crosscoder

AB = ["A", "B"]


class FakeStore:
    "Activations in memory behind `rows`, in shards of whole documents."
    def __init__(self, x, doc, shards=1):
        self.x, self.doc = x, doc
        ends = np.flatnonzero(np.diff(doc)) + 1
        self.cuts = [0, *(ends[len(ends)*i//shards] for i in range(1, shards)), len(doc)]

    def rows(self, pair=None):
        for a, b in zip(self.cuts, self.cuts[1:]):
            yield {"acts": self.x[a:b], "token": np.zeros(b-a, int), "pos": np.arange(a, b), "doc": self.doc[a:b]}


def toy(seed=0, n=3000):
    x, f, dec, enc = sc.planted(n, seed=seed)
    cc = Crosscoder(32, 9, 2, AB)
    cc.W_dec.data, cc.W_enc.data = dec.float(), enc.float()
    cc.theta.fill_(0.3)
    return x.float(), np.arange(n)//25, cc


def random_case(seed=0, n=400, d=10, D=24):
    "A crosscoder with nothing planted: random rows, correlated activations, biases."
    g = torch.Generator().manual_seed(seed)
    cc = Crosscoder(d, D, 3, AB, seed=seed)
    for p in (cc.W_dec, cc.W_enc, cc.b_enc, cc.b_dec): p.data = torch.randn(p.shape, generator=g)*0.4
    cc.theta.fill_(0.5)
    cc.scale.copy_(torch.tensor([0.7, 1.3])); cc.mean.copy_(torch.randn(2, d, generator=g))
    x = torch.randn(n, 2, d, generator=g)
    x[:, 1] = 0.8*x[:, 0] + 0.6*x[:, 1]
    return x, np.arange(n)//7, cc


def dense(cc, x):
    "Normalised activations, codes as triples and as a dense array: those that the pass itself sees."
    xn, codes = sc.encode_tile(cc, {"acts": x})
    f = torch.zeros(len(x), cc.n_latents); f[codes[0], codes[1]] = codes[2]
    return xn, codes, f


def test_orientation_of_delta_norm():
    "0 = A only, 1 = B only: public code often stores the opposite."
    t = sc.decoder_table(torch.tensor([[[3., 0], [0, 0]], [[0, 0], [0, 1]], [[0, 2], [2, 0]], [[0, 1], [0, 4]]]))
    assert t.delta_norm.tolist() == [0, 1, 0.5, 0.875]
    assert t.cos.tolist() == [0, 0, 0, 1]
    assert (t.norm_A.tolist(), t.norm_B.tolist()) == ([3, 0, 2, 1], [0, 1, 2, 4])


@pytest.mark.parametrize("seed", [0, 1])
def test_one_pass_equals_direct_fit(seed):
    "All latents, both models, both probes, both targets: 1e-9 in float64; the same codes, one latent at a time by least squares."
    x, doc, cc = random_case(seed)
    S = sc.scan(FakeStore(x, doc, 3), cc, AB, n_blocks=6, rows=50, dtype=torch.float64)
    t = sc.scaling_table(S, cc.W_dec.detach(), n_boot=5)
    xn, codes, f = dense(cc, x)
    X, R, F, W = (a.double() for a in (xn, cc.decode(*codes, len(x)).detach(), f, cc.W_dec.detach()))
    assert (F > 0).any(0).sum() > 15
    for j in np.flatnonzero(t["count"]):
        for m, M in enumerate(AB):
            for p, P in enumerate(AB):
                for target in ("eps", "r"):
                    Y = R[:, m] if target == "r" else X[:, m] - R[:, m] + F[:, j, None]*W[j, m]
                    fit = np.linalg.lstsq((F[:, j, None]*W[j, p]).reshape(-1, 1).numpy(), Y.reshape(-1).numpy(), rcond=None)[0][0]
                    assert sc.beta_direct(X, R, F, W, j, m, p, target) == pytest.approx(fit, rel=1e-9, abs=1e-12)
                    assert t[f"beta_{target}_{M}_p{P}"][j] == pytest.approx(fit, rel=1e-9, abs=1e-12)
        for target in ("eps", "r"):
            if t[f"beta_{target}_B_pB"][j] > 0:
                assert t[f"nu_{target}_B"][j] == pytest.approx(t[f"beta_{target}_A_pB"][j]/t[f"beta_{target}_B_pB"][j], rel=1e-9)
            if t[f"beta_{target}_A_pA"][j] > 0:
                assert t[f"nu_{target}_A"][j] == pytest.approx(t[f"beta_{target}_B_pA"][j]/t[f"beta_{target}_A_pA"][j], rel=1e-9)


def test_default_precision_is_close():
    x, doc, cc = random_case()
    a, b = (sc.scan(FakeStore(x, doc), cc, AB, dtype=dt) for dt in (torch.float32, torch.float64))
    scale = np.abs(b["by_block"]).max()
    np.testing.assert_allclose(a["by_block"], b["by_block"], atol=1e-6*scale)


def test_counts_are_those_of_the_dense_codes():
    x, doc, cc = random_case()
    S = sc.scan(FakeStore(x, doc, 2), cc, AB, rows=30)
    f = dense(cc, x)[2].numpy()
    np.testing.assert_array_equal(S["count"], (f > 0).sum(0))
    np.testing.assert_array_equal(S["n_docs"], [len(np.unique(doc[f[:, j] > 0])) for j in range(f.shape[1])])
    np.testing.assert_allclose(S["max_act"], f.max(0)); np.testing.assert_allclose(S["by_block"][:, :, 0].sum(0), (f.astype(float)**2).sum(0), rtol=1e-12)
    assert S["n_tokens"] == len(x)


def test_tiles_and_shards_do_not_matter():
    x, doc, cc = random_case()
    t = [sc.scaling_table(sc.scan(FakeStore(x, doc, s), cc, AB, rows=r, dtype=torch.float64), cc.W_dec.detach(), 50) for s, r in ((1, 10**6), (5, 20), (3, 77))]
    for other in t[1:]: pd.testing.assert_frame_equal(t[0], other, rtol=1e-7, atol=1e-9)


def test_tiles_hold_whole_documents_in_order():
    doc = np.repeat([0, 1, 4, 5, 9], [3, 50, 1, 7, 9])
    st = FakeStore(torch.arange(70.)[:, None, None].expand(-1, 2, 1), doc, 2)
    got = list(sc.tiles(st, AB, rows=8))
    np.testing.assert_array_equal(np.concatenate([t["doc"] for t in got]), doc)
    assert [t["acts"][0, 0, 0].item() for t in got] == sorted(t["acts"][0, 0, 0].item() for t in got)
    assert not any(a["doc"][-1] == b["doc"][0] for a, b in zip(got, got[1:]))
    st.doc = doc[::-1].copy()
    with pytest.raises(UserError, match="out of order"): list(sc.tiles(st, AB))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_latents_get_their_verdicts(seed):
    x, doc, cc = toy(seed)
    t = sc.judge(sc.scaling_table(sc.scan(FakeStore(x, doc), cc, AB), cc.W_dec.detach()), AB)
    assert t.verdict.tolist() == sc.KINDS
    assert t.alive.tolist() == [True]*7 + [False]*2
    assert t.nu_eps_B[3] > 0.9 and abs(t.nu_r_B[4] - 1) < 0.1               # what shrinkage and decoupling look like
    assert t.nu_eps_B_lo[0] <= t.nu_eps_B[0] <= t.nu_eps_B_hi[0]


def test_swapping_the_models_mirrors_everything():
    x, doc, cc = toy()
    t = sc.judge(sc.scaling_table(sc.scan(FakeStore(x, doc), cc, AB), cc.W_dec.detach()), AB)
    for p in (cc.W_dec, cc.W_enc): p.data = p.data.flip(1).contiguous()
    s = sc.judge(sc.scaling_table(sc.scan(FakeStore(x.flip(1), doc), cc, AB), cc.W_dec.detach()), AB)
    np.testing.assert_allclose(s.delta_norm, 1 - t.delta_norm)
    for n in ("nu_eps", "nu_r"):
        for end in ("", "_lo", "_hi"):
            np.testing.assert_allclose(s[f"{n}_A{end}"], t[f"{n}_B{end}"], rtol=1e-4, atol=1e-4)
    swap = {"unique-A": "unique-B", "unique-B": "unique-A"}
    assert (s.partners[1:6] == t.partners[1:6]).all() and t.partners[4] == "5:1.00"
    assert s.verdict.tolist() == [swap.get(v, v) for v in t.verdict]


def test_dead_and_rare_latents_are_flagged_and_never_judged():
    x, doc, cc = toy()
    t = sc.judge(sc.scaling_table(sc.scan(FakeStore(x, doc), cc, AB), cc.W_dec.detach()), AB)
    assert t.verdict[7] == "dead" and t.reason[7] == "never active in the store"
    assert t.verdict[8] == "rare" and "too rare" in t.reason[8] and t["count"][8] == 3
    assert t.verdict.notna().all() and t.reason.str.len().gt(0).all() and not t.reason.str.contains("nan").any()
    assert not t.isna().any().any()                                          # flagged, never NaN
    assert np.isinf(t.loc[7, list(sc.RATIOS)].astype(float)).all() and (t.loc[7, [c for c in t if c.startswith("beta_")]] == 0).all()
    assert not sc.flags(t).loc[7:].any().any()
    assert (sc.judge(t, AB, min_count=1).point[8], sc.judge(t, AB, min_count=1).verdict[7]) == ("shared", "dead")


def test_all_latents_dead():
    x, doc, cc = toy(); cc.theta.fill_(1e9)
    t = sc.judge(sc.scaling_table(sc.scan(FakeStore(x, doc), cc, AB), cc.W_dec.detach()), AB)
    r = sc.count_row(t, AB)
    assert (t.verdict == "dead").all() and r["alive"] == r["unique-B"] == 0
    c = pd.DataFrame([r | {"pair": "it-SimPO"}])
    assert "nan" not in sc.finding(c, ["it-SimPO"])
    sc.delta_figure(t, AB, 1); sc.plane_figure(t, AB, 1)                    # empty figures, no error


def test_undefined_ratios_pass_no_cut():
    t = pd.DataFrame({"latent": [0, 1], "count": [99, 99], "delta_norm": [0.95, 0.05], "cos": [0., 0]})
    for n in sc.RATIOS: t[n] = np.inf
    t = sc.judge(t, AB)
    assert t.verdict.tolist() == ["shrunk", "shrunk"] and t.reason.str.contains("undefined").all()


def test_cuts_are_parameters_and_signs_count():
    t = pd.DataFrame({"latent": range(4), "count": 99, "delta_norm": [0.7, 0.7, 0.95, 0.95], "cos": 0.,
                      "nu_eps_B": [0.15, -0.9, 0.3, 0.1], "nu_r_B": [0.4, 0., 0.1, 0.6], "nu_eps_A": 1., "nu_r_A": 1.})
    assert sc.judge(t, AB).verdict.tolist() == ["unique-B", "other", "shrunk", "decoupled"]
    assert sc.judge(t, AB, nu_eps_cut=0.1).verdict.tolist() == ["other", "other", "shrunk", "shrunk"]
    assert sc.judge(t, AB, nu_eps_cut=0.35, nu_r_cut=0.7).verdict.tolist() == ["unique-B", "other", "unique-B", "unique-B"]
    r = sc.count_row(sc.judge(t, AB), AB)
    assert (r["delta_norm_B"], r["low_nu_B"], r["all_three_B"], r["unique-B"]) == (2, 1, 0, 1)
    assert r["share_B"] == 0.25 and r["share_B_lo"] == pytest.approx(0.0456, abs=1e-3) and r["share_B_hi"] == pytest.approx(0.6994, abs=1e-3)


def low_columns(**nu):
    "A table of one latent per value: estimates with arms."
    n = len(next(iter(nu.values())))
    t = pd.DataFrame({"latent": range(n), "count": 99, "delta_norm": .95, "cos": 0.})
    for name in sc.RATIOS:
        v = np.array(nu.get(name, [(1., 1., 1.)]*n), float)
        t = t.assign(**{name: v[:, 0], name + "_lo": v[:, 1], name + "_hi": v[:, 2]})
    return t


def test_undecided_only_where_it_matters():
    t = low_columns(nu_eps_B=[(.1, .05, .15), (.1, .05, .25), (.3, .15, .5), (.3, .25, .5), (.1, .05, .15), (.1, -.3, .15)],
                    nu_r_B=[(.2, .1, .3), (.2, .1, .3), (.2, .1, .3), (.6, .4, .8), (.49, .4, .6), (.2, .1, .3)])
    j = sc.judge(t, AB)
    assert j.point.tolist() == ["unique-B", "unique-B", "shrunk", "shrunk", "unique-B", "unique-B"]
    assert j.verdict.tolist() == ["unique-B", "undecided", "undecided", "shrunk", "undecided", "undecided"]
    assert j.reason[1].startswith("unique-B by its estimates, but an interval crosses a cut")
    assert (sc.count_row(j, AB)["unique-B"], sc.count_row(j, AB)["undecided_B"]) == (1, 3)


def test_a_faint_row_is_no_latent_of_its_model():
    "The norm says B only: that A's faint row points where B holds nothing does not make the latent A's."
    t = low_columns(nu_eps_A=[(.1, .05, .15)], nu_r_A=[(.1, 0, .2)], nu_eps_B=[(.9, .8, 1)])
    assert sc.judge(t, AB).verdict.tolist() == ["shrunk"]
    assert sc.judge(t.assign(delta_norm=.6), AB).verdict.tolist() == ["unique-A"]


def test_counts_by_cut_hold_their_order():
    x, doc, cc = toy()
    t = sc.judge(sc.scaling_table(sc.scan(FakeStore(x, doc), cc, AB), cc.W_dec.detach()), AB)
    n = sc.counts_by_cut(t, "B", np.linspace(.01, 2, 30), [.5]*30)
    assert (n.surely <= n.point).all() and (n.point <= n.possibly).all()
    assert n.point.is_monotonic_increasing and n.surely.is_monotonic_increasing and n.possibly.is_monotonic_increasing
    sc.cut_figure(t, AB, 1)


def test_partners_are_the_sum_of_the_reconstruction():
    "What the partners, the latent's own row and the bias add to nu_r is nu_r."
    x, doc, cc = random_case()
    with torch.no_grad(): cc.W_dec[:8, 0] *= .01
    S = sc.scan(FakeStore(x, doc), cc, AB, dtype=torch.float64); W = cc.W_dec.detach().double()
    assert S["unequal"].tolist() == list(range(8))
    f = dense(cc, x)[2].double(); total = S["by_block"].sum(0)
    np.testing.assert_allclose(S["together"], (f[:, :8].T @ f).numpy(), rtol=1e-9)
    for i, j in enumerate(S["unequal"]):
        adds = S["together"][i]*(W[:, 0] @ W[j, 1]).numpy() + 0
        bias = float(f[:, j].sum()*(cc.b_dec.detach().double()[0] @ W[j, 1]))
        assert adds.sum() + bias == pytest.approx(total[j, 5 + 1], rel=1e-5)      # the target is A's reconstruction, the probe B's row
        got = dict(p.split(":") for p in sc.partners(S["together"], S["unequal"], W, total, least=-9)[j].split())
        for k, v in got.items():
            if int(k) != j and total[j, 8] > 0: assert float(v) == pytest.approx(adds[int(k)]/total[j, 8], abs=.006)


def test_null_directions_are_the_same_fit():
    x, doc, cc = random_case()
    S = sc.scan(FakeStore(x, doc), cc, AB, dtype=torch.float64); W = cc.W_dec.detach()
    xn, codes, f = dense(cc, x); X, R, F = xn.double(), cc.decode(*codes, len(x)).detach().double(), f.double()
    null, u, g = S["null"].reshape(24, 2, 2, -1), S["directions"], sc.gram(W)
    for j in np.flatnonzero(S["count"] > 5)[:4]:
        np.testing.assert_allclose(null[j, 0, 1, 3], float((F[:, j] * ((X - R)[:, 1] @ torch.from_numpy(u[:, 3]).double())).sum()), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(null[j, 1, 0, 5], float((F[:, j] * (R[:, 0] @ torch.from_numpy(u[:, 5]).double())).sum()), rtol=1e-5, atol=1e-6)
        V = W.clone().double(); V[j, 1] = torch.from_numpy(u[:, 3])*g[j, 1, 1]**.5                  # the random direction as the probe, by the definition
        one = sc.beta_direct(X, R, F, torch.stack([W[:, 0].double(), V[:, 1]], 1), j, 0, 1, "eps")
        fit = (null[j, 0, 0, 3] + S["by_block"].sum(0)[j, 0]*float(W[j, 0].double() @ torch.from_numpy(u[:, 3]).double()))/(S["by_block"].sum(0)[j, 0]*g[j, 1, 1]**.5)
        assert one == pytest.approx(fit, rel=1e-5)


def minimise(loss):
    "The number that makes a loss smallest, by autograd and LBFGS."
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True); opt = torch.optim.LBFGS([b], line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16)
    def closure():
        opt.zero_grad(); v = loss(b); v.backward()
        return v
    for _ in range(5): opt.step(closure)
    return b.item()


def test_a_minimiser_finds_the_same_beta():
    x, doc, cc = random_case()
    S = sc.scan(FakeStore(x, doc), cc, AB, dtype=torch.float64); W = cc.W_dec.detach().double()
    xn, codes, f = dense(cc, x); X, R, F = xn.double(), cc.decode(*codes, len(x)).detach().double(), f.double()
    b = sc.betas(S["by_block"].sum(0), sc.gram(cc.W_dec.detach()))
    for j in np.flatnonzero(S["count"] > 5)[:5]:
        Y, d = X[:, 0] - R[:, 0] + F[:, j, None]*W[j, 0], F[:, j, None]*W[j, 1]
        assert minimise(lambda b, Y=Y, d=d: (Y - b*d).pow(2).sum()) == pytest.approx(b["beta_eps_A_pB"][j], rel=1e-6, abs=1e-9)


class Split(FakeStore):
    "The same, with its last documents held out."
    def split(self, held): n = self.doc[-1] + 1; cut = n - round(held*n); return (0, cut), (cut, n)


def test_held_documents_are_measured_apart_in_the_same_pass():
    x, doc, cc = toy(n=5000)
    S = sc.scan(Split(x, doc), cc, AB, held=.2); t = sc.scaling_table(S, cc.W_dec.detach(), 20)
    assert len(S["by_block"]) - S["n_blocks"] == 10
    alone = sc.scaling_table(sc.scan(FakeStore(x[doc >= 160], doc[doc >= 160]), cc, AB), cc.W_dec.detach(), 20)
    for n in sc.RATIOS: np.testing.assert_allclose(t[f"{n}_held"], alone[n], rtol=1e-5)
    assert S["by_block"][S["n_blocks"]:, :, 0].sum() == pytest.approx(float(dense(cc, x[doc >= 160])[2].double().pow(2).sum()), rel=1e-6)


def test_stretched_intervals_cover():
    "Ratios of sums over documents whose size varies a lot: the plain percentile interval covers too rarely, the stretched one holds."
    g, hits, plain, n = np.random.default_rng(0), 0, 0, 0
    for _ in range(40):
        blocks = np.zeros((40, 25, 2)); k = g.integers(0, 40, (25, 100))
        for j in range(25):
            b = g.lognormal(0, 1, 100); np.add.at(blocks[:, j, 1], k[j], b); np.add.at(blocks[:, j, 0], k[j], .3*b + .1*b*g.standard_normal(100))
        iv = sc.intervals(blocks, lambda s, sl: {"v": (s[..., 0], s[..., 1])}, 200)
        hits += ((iv["v_lo"] <= .3) & (.3 <= iv["v_hi"])).sum(); n += 25
        w = g.multinomial(40, np.full(40, 1/40), 200); q = np.quantile((np.einsum("bk,kj->bj", w, blocks[..., 0])/np.einsum("bk,kj->bj", w, blocks[..., 1])), [.025, .975], axis=0)
        plain += ((q[0] <= .3) & (.3 <= q[1])).sum()
    assert .93 < hits/n < .98 and plain/n < .925


def three(n=4000, seed=0):
    "Three models in one dictionary: latents of all, of two, of one, one that the third has in its own direction."
    g = torch.Generator().manual_seed(seed); u = torch.eye(20)
    W = torch.zeros(5, 3, 20); W[0] = u[0]; W[1, 1:] = u[1]; W[2, 2] = u[2]; W[3, 0] = u[3]; W[4, :2] = u[4]; W[4, 2] = u[5]
    cc = Crosscoder(20, 5, 2, ["P", "Q", "R"]); cc.W_dec.data, cc.W_enc.data = W.clone(), W.clone(); cc.theta.fill_(.3)
    f = (torch.rand(n, 5, generator=g).log().neg() + .5)*(torch.rand(n, 5, generator=g) < .2)
    return torch.einsum("nj,jmd->nmd", f, W) + .02*torch.randn(n, 3, 20, generator=g), np.arange(n)//25, cc


def test_the_set_of_models_that_have_a_latent():
    x, doc, cc = three()
    h = sc.holders(sc.scan(FakeStore(x, doc), cc, cc.names), cc.W_dec.detach(), cc.names)
    assert h.models.tolist() == ["P+Q+R", "Q+R", "R", "P", "P+Q+R"]
    assert h.rotated.tolist() == [False]*4 + [True] and not h.undecided.any() and not h.isna().any().any()
    two = toy(); S = sc.scan(FakeStore(*two[:2]), two[2], AB); W = two[2].W_dec.detach()
    a, b = sc.holders(S, W, AB, n_boot=50), sc.judge(sc.scaling_table(S, W, 50), AB)
    assert [(m == "A") for m in a.models] == [(v == "unique-A") for v in b.verdict] and [(m == "B") for m in a.models] == [(v == "unique-B") for v in b.verdict]


def test_intervals_widen_with_fewer_documents_and_repeat():
    g = torch.Generator().manual_seed(1)
    x, doc, cc = toy(n=4000)
    x = x + 0.5*torch.randn(len(doc)//25, 1, 1, generator=g)[np.arange(len(doc))//25]*cc.W_dec.detach()[1, 1]   # a document effect along latent 1
    wide, narrow = [], []
    for n, out in ((500, wide), (4000, narrow)):
        t = sc.scaling_table(sc.scan(FakeStore(x[:n], doc[:n]), cc, AB), cc.W_dec.detach(), 200)
        u = sc.scaling_table(sc.scan(FakeStore(x[:n], doc[:n]), cc, AB), cc.W_dec.detach(), 200)
        pd.testing.assert_frame_equal(t, u, check_exact=True)
        out.append(t.nu_eps_B_hi[1] - t.nu_eps_B_lo[1])
    assert wide[0] > 1.3*narrow[0] > 0


def test_block_of_a_document_is_even_and_fixed():
    b = sc.mix(0, np.arange(20000)) % np.uint64(20)
    n = np.bincount(b.astype(int), minlength=20)
    assert n.min() > 850 and n.max() < 1150
    assert (sc.mix(0, np.arange(9)) != sc.mix(1, np.arange(9))).all()
    assert sc.mix(0, [3], [5])[0] != sc.mix(0, [5], [3])[0]


def test_finding_says_what_came_out():
    row = {"pair": "it-SimPO", "alive": 100, "delta_norm_A": 0, "delta_norm_B": 0, "unique-B": 1, "share_B": 0.01, "share_B_lo": 0., "share_B_hi": 0.05}
    base = row | {"pair": "pt-it", "unique-B": 30, "share_B": 0.3}
    s = sc.finding(pd.DataFrame([row, base]), ["it-SimPO", "pt-SimPO", "pt-it"])
    assert "none of 100 latents passes" in s and "30 of 100 unique to it" in s and "As in the paper" in s and "113 of 114,688" in s
    s = sc.finding(pd.DataFrame([row | {"delta_norm_B": 4}, base | {"unique-B": 0, "share_B": 0.}]), ["it-SimPO", "pt-it"])
    assert "Unlike in the paper" in s and s.count("4 of 100") == 1


def test_scale_pair_writes_the_latents_table(tmp_path, monkeypatch):
    x, doc, cc = toy()
    monkeypatch.setattr(sc, "open_pair", lambda run, pair: (FakeStore(x, doc), cc))
    t, n = sc.scale_pair(tmp_path, AB, n_boot=20)
    first = (tmp_path/"latents"/"A-B"/"06_scaling.parquet").read_bytes()
    sc.scale_pair(tmp_path, AB, n_boot=20)
    assert first == (tmp_path/"latents"/"A-B"/"06_scaling.parquet").read_bytes()
    got = latents("A-B", tmp_path)
    assert n == len(x) and got.verdict.tolist() == sc.KINDS
    need = "latent norm_A norm_B delta_norm cos count freq max_act n_docs C nu_eps_B nu_r_B nu_eps_A nu_r_A beta_eps_A_pB beta_r_B_pA nu_eps_B_lo nu_r_B_hi verdict reason alive"
    assert set(need.split()) <= set(got.columns)


def test_a_missing_step_is_named(tmp_path):
    with pytest.raises(UserError, match="03_caching"): sc.scale_pair(tmp_path, AB)
