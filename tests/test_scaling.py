"Latent Scaling: against the direct fit, on planted truth, over tiles and blocks, for any number of models."
import numpy as np
import pandas as pd
import pytest
import torch

from llmdiff import scaling as sc
from llmdiff.codes import encode_tile, tiles
from llmdiff.core import mix, UserError
from llmdiff.crosscoder import Crosscoder
from llmdiff.worlds.synthetic import known_latents

AB = ["A", "B"]
RATIOS = ("nu_eps_A", "nu_r_A", "nu_eps_B", "nu_r_B")


class FakeStore:
    "Activations in memory behind `rows`, in shards of whole documents."
    def __init__(self, x, doc, shards=1):
        self.x, self.doc = x, doc
        ends = np.flatnonzero(np.diff(doc)) + 1
        inner = [ends[len(ends)*i//shards] for i in range(1, shards)]
        self.cuts = [0, *inner, len(doc)]

    def rows(self, pair=None):
        for a, b in zip(self.cuts, self.cuts[1:]):
            yield {"acts": self.x[a:b], "token": np.zeros(b-a, int), "pos": np.arange(a, b), "doc": self.doc[a:b]}


class Split(FakeStore):
    "The same, with its last documents held out."
    def split(self, held):
        n = self.doc[-1] + 1
        cut = n - round(held*n)
        return (0, cut), (cut, n)


def toy(seed=0, n=3000):
    "The known world, 25 tokens a document, and its crosscoder."
    x, f, dec, enc = known_latents(n, seed=seed)
    cc = Crosscoder(32, 9, 2, AB)
    cc.W_dec.data, cc.W_enc.data = dec.float(), enc.float()
    cc.theta.fill_(0.3)
    return x.float(), np.arange(n)//25, cc


def random_case(seed=0, n=400, d=10, D=24):
    "A crosscoder with nothing planted: random rows, correlated activations, biases."
    g = torch.Generator().manual_seed(seed)
    cc = Crosscoder(d, D, 3, AB, seed=seed)
    for p in (cc.W_dec, cc.W_enc, cc.b_enc, cc.b_dec):
        p.data = torch.randn(p.shape, generator=g)*0.4
    cc.theta.fill_(0.5)
    cc.scale.copy_(torch.tensor([0.7, 1.3]))
    cc.mean.copy_(torch.randn(2, d, generator=g))
    x = torch.randn(n, 2, d, generator=g)
    x[:, 1] = 0.8*x[:, 0] + 0.6*x[:, 1]
    return x, np.arange(n)//7, cc


def dense(cc, x):
    "Normalised activations, codes as triples and as a dense array: those that the pass itself sees."
    xn, codes = encode_tile(cc, {"acts": x})
    f = torch.zeros(len(x), cc.n_latents)
    f[codes[0], codes[1]] = codes[2]
    return xn, codes, f


def direct_case(cc, x):
    "What `beta_direct` asks for, in float64: activations, reconstructions, codes, decoder rows."
    xn, codes, f = dense(cc, x)
    xhat = cc.decode(*codes, len(x)).detach()
    return xn.double(), xhat.double(), f.double(), cc.W_dec.detach().double()


def table_of(x, doc, cc, n_boot=500, **kw):
    "The scaling table after one pass."
    S = sc.accumulate(FakeStore(x, doc), cc, AB, **kw)
    return sc.scaling_table(S, cc.W_dec.detach(), n_boot)


def least_squares(Y, a):
    "The factor b that brings b*a closest to Y, by a library."
    return np.linalg.lstsq(a.reshape(-1, 1).numpy(), Y.reshape(-1).numpy(), rcond=None)[0][0]


# ---- the fit

def test_orientation_of_delta_norm():
    "0 = A only, 1 = B only: public code often stores the opposite."
    W = torch.tensor([[[3., 0], [0, 0]], [[0, 0], [0, 1]], [[0, 2], [2, 0]], [[0, 1], [0, 4]]])
    t = sc.decoder_table(W)
    assert t.delta_norm.tolist() == [0, 1, 0.5, 0.875]
    assert t.cos.tolist() == [0, 0, 0, 1]
    assert (t.norm_A.tolist(), t.norm_B.tolist()) == ([3, 0, 2, 1], [0, 1, 2, 4])


@pytest.mark.parametrize("seed", [0, 1])
def test_one_pass_equals_direct_fit(seed):
    "All latents, both models, both probes, both targets: 1e-9 in float64; the same codes, by least squares."
    x, doc, cc = random_case(seed)
    S = sc.accumulate(FakeStore(x, doc, 3), cc, AB, n_blocks=6, rows=50, dtype=torch.float64)
    t = sc.scaling_table(S, cc.W_dec.detach(), n_boot=5)
    X, R, F, W = direct_case(cc, x)
    assert (F > 0).any(0).sum() > 15
    for j in np.flatnonzero(t["count"]):
        for m, p, target in [(m, p, target) for m in (0, 1) for p in (0, 1) for target in ("eps", "r")]:
            Y = R[:, m] if target == "r" else X[:, m] - R[:, m] + F[:, j, None]*W[j, m]
            fit = least_squares(Y, F[:, j, None]*W[j, p])
            name = f"beta_{target}_{AB[m]}_p{AB[p]}"
            assert sc.beta_direct(X, R, F, W, j, m, p, target) == pytest.approx(fit, rel=1e-9, abs=1e-12)
            assert t[name][j] == pytest.approx(fit, rel=1e-9, abs=1e-12)
        for target in ("eps", "r"):
            for P, other in ("AB", "BA"):
                own = t[f"beta_{target}_{P}_p{P}"][j]
                nu = t[f"beta_{target}_{other}_p{P}"][j]/own
                if own > 0: assert t[f"nu_{target}_{P}"][j] == pytest.approx(nu, rel=1e-9)


def minimise(loss):
    "The number that makes a loss smallest, by autograd and LBFGS."
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([b], line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        opt.zero_grad()
        v = loss(b)
        v.backward()
        return v

    for _ in range(5): opt.step(closure)
    return b.item()


def test_a_minimiser_finds_the_same_beta():
    x, doc, cc = random_case()
    S = sc.accumulate(FakeStore(x, doc), cc, AB, dtype=torch.float64)
    X, R, F, W = direct_case(cc, x)
    b = sc.betas(S.by_block.sum(0), sc.gram(cc.W_dec.detach()))
    for j in np.flatnonzero(S.count > 5)[:5]:
        Y = X[:, 0] - R[:, 0] + F[:, j, None]*W[j, 0]
        d = F[:, j, None]*W[j, 1]
        found = minimise(lambda b, Y=Y, d=d: (Y - b*d).pow(2).sum())
        assert found == pytest.approx(b["beta_eps_A_pB"][j], rel=1e-6, abs=1e-9)


def test_planted_latents_have_their_ratios():
    "What shrinkage and decoupling look like."
    for seed in (0, 1, 2):
        t = table_of(*toy(seed))
        assert t.nu_eps_B[3] > 0.9 and abs(t.nu_r_B[4] - 1) < 0.1
        assert t.nu_eps_B_lo[0] <= t.nu_eps_B[0] <= t.nu_eps_B_hi[0]


# ---- the pass

def test_default_precision_is_close():
    x, doc, cc = random_case()
    a, b = (sc.accumulate(FakeStore(x, doc), cc, AB, dtype=dtype) for dtype in (torch.float32, torch.float64))
    np.testing.assert_allclose(a.by_block, b.by_block, atol=1e-6*np.abs(b.by_block).max())


def test_counts_are_those_of_the_dense_codes():
    x, doc, cc = random_case()
    S = sc.accumulate(FakeStore(x, doc, 2), cc, AB, rows=30)
    f = dense(cc, x)[2].numpy()
    n_docs = [len(np.unique(doc[f[:, j] > 0])) for j in range(f.shape[1])]
    np.testing.assert_array_equal(S.count, (f > 0).sum(0))
    np.testing.assert_array_equal(S.n_docs, n_docs)
    np.testing.assert_allclose(S.max_act, f.max(0))
    np.testing.assert_allclose(S.by_block[:, :, 0].sum(0), (f.astype(float)**2).sum(0), rtol=1e-12)
    assert S.n_tokens == len(x)


def test_tiles_and_shards_do_not_matter():
    x, doc, cc = random_case()
    found = []
    for shards, rows in ((1, 10**6), (5, 20), (3, 77)):
        S = sc.accumulate(FakeStore(x, doc, shards), cc, AB, rows=rows, dtype=torch.float64)
        found.append(sc.scaling_table(S, cc.W_dec.detach(), 50))
    for other in found[1:]: pd.testing.assert_frame_equal(found[0], other, rtol=1e-7, atol=1e-9)


def test_tiles_hold_whole_documents_in_order():
    doc = np.repeat([0, 1, 4, 5, 9], [3, 50, 1, 7, 9])
    st = FakeStore(torch.arange(70.)[:, None, None].expand(-1, 2, 1), doc, 2)
    got = list(tiles(st, AB, rows=8))
    first = [t["acts"][0, 0, 0].item() for t in got]
    np.testing.assert_array_equal(np.concatenate([t["doc"] for t in got]), doc)
    assert first == sorted(first)
    assert not any(a["doc"][-1] == b["doc"][0] for a, b in zip(got, got[1:]))
    st.doc = doc[::-1].copy()
    with pytest.raises(UserError, match="out of order"): list(tiles(st, AB))


def test_held_documents_are_measured_apart_in_the_same_pass():
    x, doc, cc = toy(n=5000)
    S = sc.accumulate(Split(x, doc), cc, AB, held=.2)
    t = sc.scaling_table(S, cc.W_dec.detach(), 20)
    assert len(S.by_block) - S.n_blocks == 10

    held = doc >= 160
    alone = table_of(x[held], doc[held], cc, 20)
    for name in RATIOS: np.testing.assert_allclose(t[f"{name}_held"], alone[name], rtol=1e-5)
    C = dense(cc, x[held])[2].double().pow(2).sum()
    assert S.by_block[S.n_blocks:, :, 0].sum() == pytest.approx(float(C), rel=1e-6)


def test_block_of_a_document_is_even_and_fixed():
    b = mix(0, np.arange(20000)) % np.uint64(20)
    n = np.bincount(b.astype(int), minlength=20)
    assert n.min() > 850 and n.max() < 1150
    assert (mix(0, np.arange(9)) != mix(1, np.arange(9))).all()
    assert mix(0, [3], [5])[0] != mix(0, [5], [3])[0]


def test_a_missing_step_is_named(tmp_path):
    with pytest.raises(UserError, match="run step caching"): sc.scale_pair(tmp_path, AB)


# ---- intervals

def ratios_of_documents(g):
    "Ratios .3 of 25 latents, each in 100 documents of very different size: [40 blocks, 25, 2]."
    blocks = np.zeros((40, 25, 2))
    k = g.integers(0, 40, (25, 100))
    for j in range(25):
        b = g.lognormal(0, 1, 100)
        np.add.at(blocks[:, j, 1], k[j], b)
        np.add.at(blocks[:, j, 0], k[j], .3*b + .1*b*g.standard_normal(100))
    return blocks


def test_stretched_intervals_cover():
    "The plain percentile interval covers too rarely, the stretched one holds."
    g = np.random.default_rng(0)
    hits, plain, n = 0, 0, 0
    for _ in range(40):
        blocks = ratios_of_documents(g)
        iv = sc.intervals(blocks, lambda s, sl: {"v": (s[..., 0], s[..., 1])}, 200)
        hits += ((iv["v_lo"] <= .3) & (.3 <= iv["v_hi"])).sum()
        n += 25
        w = g.multinomial(40, np.full(40, 1/40), 200)
        drawn = np.einsum("bk,kj->bj", w, blocks[..., 0])/np.einsum("bk,kj->bj", w, blocks[..., 1])
        q = np.quantile(drawn, [.025, .975], axis=0)
        plain += ((q[0] <= .3) & (.3 <= q[1])).sum()
    assert .93 < hits/n < .98 and plain/n < .925


def test_intervals_widen_with_fewer_documents_and_repeat():
    g = torch.Generator().manual_seed(1)
    x, doc, cc = toy(n=4000)
    effect = torch.randn(len(doc)//25, 1, 1, generator=g)[np.arange(len(doc))//25]   # of a document, along latent 1
    x = x + 0.5*effect*cc.W_dec.detach()[1, 1]
    width = {}
    for n in (500, 4000):
        t = table_of(x[:n], doc[:n], cc, 200)
        u = table_of(x[:n], doc[:n], cc, 200)
        pd.testing.assert_frame_equal(t, u, check_exact=True)
        width[n] = t.nu_eps_B_hi[1] - t.nu_eps_B_lo[1]
    assert width[500] > 1.3*width[4000] > 0


# ---- chance and partners

def test_partners_are_the_sum_of_the_reconstruction():
    "What the partners, the latent's own row and the bias add to nu_r is nu_r."
    x, doc, cc = random_case()
    with torch.no_grad(): cc.W_dec[:8, 0] *= .01
    S = sc.accumulate(FakeStore(x, doc), cc, AB, dtype=torch.float64)
    W, total = cc.W_dec.detach().double(), S.by_block.sum(0)
    f = dense(cc, x)[2].double()
    assert S.unequal.tolist() == list(range(8))
    np.testing.assert_allclose(S.together, (f[:, :8].T @ f).numpy(), rtol=1e-9)

    named = sc.partners(S.together, S.unequal, W, total, least=-9)
    for i, j in enumerate(S.unequal):
        adds = S.together[i]*(W[:, 0] @ W[j, 1]).numpy() + 0
        bias = float(f[:, j].sum()*(cc.b_dec.detach().double()[0] @ W[j, 1]))
        # the target is A's reconstruction, the probe B's row
        assert adds.sum() + bias == pytest.approx(total[j, 5 + 1], rel=1e-5)
        for k, v in (p.split(":") for p in named[j].split()):
            if int(k) != j and total[j, 8] > 0: assert float(v) == pytest.approx(adds[int(k)]/total[j, 8], abs=.006)


def test_null_directions_are_the_same_fit():
    x, doc, cc = random_case()
    S = sc.accumulate(FakeStore(x, doc), cc, AB, dtype=torch.float64)
    X, R, F, W64 = direct_case(cc, x)
    W, total = cc.W_dec.detach(), S.by_block.sum(0)
    null, g = S.null.reshape(24, 2, 2, -1), sc.gram(W)
    u3, u5 = (torch.from_numpy(S.directions[:, i]).double() for i in (3, 5))
    for j in np.flatnonzero(S.count > 5)[:4]:
        error = float((F[:, j]*((X - R)[:, 1] @ u3)).sum())
        reconstruction = float((F[:, j]*(R[:, 0] @ u5)).sum())
        np.testing.assert_allclose(null[j, 0, 1, 3], error, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(null[j, 1, 0, 5], reconstruction, rtol=1e-5, atol=1e-6)

        length = g[j, 1, 1]**.5
        V = W64.clone()                      # the random direction as the probe, by the definition
        V[j, 1] = torch.from_numpy(S.directions[:, 3])*length
        one = sc.beta_direct(X, R, F, torch.stack([W64[:, 0], V[:, 1]], 1), j, 0, 1, "eps")
        own = total[j, 0]*float(W64[j, 0] @ u3)
        assert one == pytest.approx((null[j, 0, 0, 3] + own)/(total[j, 0]*length), rel=1e-5)


# ---- words

def test_words_of_a_pair_without_active_latents():
    x, doc, cc = toy(n=500)
    cc.theta.fill_(1e9)
    assert sc.scaling_words("A-B", table_of(x, doc, cc, 20)) == "A-B: none of 9 latents is active."
