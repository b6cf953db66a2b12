"Matching of dictionaries, replication over seeds: on planted truth, against brute force, and what is refused."
import itertools

import numpy as np, pandas as pd, pytest, torch

import test_training
from llmdiff import replication as rp, scaling as sc
from llmdiff.core import UserError, save_latents
from llmdiff.crosscoder import Crosscoder
from llmdiff.training import PairOptions, train_pair

AB, small_store = ["A", "B"], test_training.small_store
SETTINGS = {**test_training.ARGS, "train_tokens": 12_000}


class Memory:
    "Activations [n, n_models, d] of named models behind `rows`."
    def __init__(self, x, names=AB, per_doc=20): self.x, self.names, self.doc = x, list(names), np.arange(len(x))//per_doc
    def rows(self, names):
        at = [self.names.index(m) for m in names]
        yield {"acts": self.x[:, at], "token": self.doc, "pos": self.doc, "doc": self.doc}


def dictionary(directions, # [D, M, d]
               names=AB, theta=.3):
    "A crosscoder that reads and writes these directions."
    D, M, d = directions.shape; cc = Crosscoder(d, D, 2, names)
    cc.W_dec.data, cc.W_enc.data = directions.float(), directions.float()/(directions**2).sum((1, 2), keepdim=True).clamp_min(1e-9).float()
    cc.theta.fill_(theta)
    return cc


def world(D=60, d=64, n=4000, M=2, names=AB, seed=0):
    "Sparse concepts with nearly orthogonal directions, the same in all models; a dictionary that has them."
    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(D, d, generator=g), dim=1)
    f = (torch.rand(n, D, generator=g) + 1)*(torch.rand(n, D, generator=g) < .03)
    W = W[:, None].repeat(1, M, 1)
    return Memory(torch.einsum("nj,jmd->nmd", f, W), names), W


def find(store, one, other, rows, view, **kw): return rp.find_matches(store, one, [other], rows, view, **kw)[0]


def sparse(f): r, l = f.nonzero(as_tuple=True); return r, l, f[r, l]


# ---- matching

@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("one_to_one", [True, False])
def test_a_planted_permutation_is_recovered_through_noise(seed, one_to_one):
    store, W = world(seed=seed); g = torch.Generator().manual_seed(seed + 9)
    order = torch.randperm(len(W), generator=g); noise = .05*torch.randn(W.shape, generator=g)
    one, two = dictionary(W), dictionary((W + noise)[order])
    rows = np.random.default_rng(seed).choice(len(W), 40, replace=False)
    m = find(store, one, two, rows, np.ones((40, 2), bool), one_to_one=one_to_one)
    assert (order.numpy()[m.match] == rows).all() and m.matched.all() and (m.latent == rows).all()


def test_other_directions_or_other_tokens_are_no_match():
    "Either condition alone fails: the right rows with the wrong codes, and the right codes with the wrong rows."
    store, W = world(); one, rows, view = dictionary(W), np.arange(60), np.ones((60, 2), bool)
    wrong = dictionary(W); wrong.W_enc.data = wrong.W_enc.data.flip(0)
    m = find(store, one, wrong, rows, view); assert not m.best_matched.any()
    wrong = dictionary(W); wrong.W_dec.data = wrong.W_dec.data.roll(1, 2)
    m = find(store, one, wrong, rows, view); assert not m.best_matched.any()


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
def test_assignment_against_brute_force(shape):
    R, D = shape
    for seed in range(20):
        cos, corr = np.random.default_rng(seed).uniform(-1, 1, (2, R, D)); s = np.minimum(cos/.7, corr/.5)
        m = rp.match(cos, corr); got = sum(s[i, j] for i, j in enumerate(m.match) if j >= 0)
        if R <= D: best = max(sum(s[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(D), R))
        else: best = max(sum(s[i, j] for j, i in enumerate(p)) for p in itertools.permutations(range(R), D))
        assert got == pytest.approx(best) and m.match[m.match >= 0].is_unique and (m.match >= 0).sum() == min(R, D)
        left = m[m.match < 0]; assert left[["cos", "corr"]].isna().all().all() and not left.matched.any()
        assert (rp.match(cos, corr, one_to_one=False).match == s.argmax(1)).all()


def test_best_match_is_found_exactly_if_some_latent_reaches_both_cuts():
    for seed in range(50):
        cos, corr = np.random.default_rng(seed).uniform(0, 1, (2, 8, 12))
        m = rp.match(cos, corr, .8, .6, one_to_one=False)
        assert (m.matched == ((cos >= .8) & (corr >= .6)).any(1)).all() and (m.matched == m.best_matched).all()


def test_two_halves_of_a_split_concept_share_one_partner():
    s = np.array([[.9, 0], [.8, .05]])
    assert rp.match(s, s, one_to_one=False).matched.tolist() == [True, True]
    m = rp.match(s, s); assert m.matched.tolist() == [True, False] and m.best_matched.all()


def test_unique_latents_are_looked_for_by_their_own_row():
    g = torch.Generator().manual_seed(0); P, Q = (torch.randn(3, 2, 20, generator=g) for _ in range(2)); Q[:, 1] = 2*P[:, 1]
    v = rp.views(["unique-B", "unique-A", "shared"])
    assert v.tolist() == [[False, True], [True, False], [True, True]]
    c = rp.row_cosine(P, Q, v)
    cos = lambda a, b: float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0))
    assert c[0, 0] == pytest.approx(1, abs=1e-6) and c[1, 1] == pytest.approx(cos(P[1, 0], Q[1, 0]), abs=1e-6) and c[2, 2] == pytest.approx(cos(P[2], Q[2]), abs=1e-6)
    Q[0] = 0; assert (rp.row_cosine(P, Q, v)[:, 0] == 0).all()                # a row of zeros is like nothing


# ---- correlation

@pytest.mark.parametrize("step", [7, 100, 1000])
def test_streamed_correlation_is_the_dense_one(step):
    g = torch.Generator().manual_seed(0); a, b = (torch.randn(1000, d, generator=g).clamp_min(.8) - .8 for d in (9, 12))
    b[:, 3] = a[:, 2] + b[:, 3]; b[:, 7] = 0; a[:, 5] = 0
    rows = np.array([2, 8, 5, 0]); G = rp.new_pairs(4, 12)
    for i in range(0, 1000, step): rp.add_pairs(G, len(a[i:i+step]), sparse(a[i:i+step]), sparse(b[i:i+step]), rows)
    got = rp.pearson(G); alive = [j for j in range(12) if j != 7]
    want = np.corrcoef(a[:, [2, 8, 0]].double().T.numpy(), b[:, alive].double().T.numpy())[:3, 3:]
    np.testing.assert_allclose(got[[0, 1, 3]][:, alive], want, atol=1e-12)
    assert (got[2] == 0).all() and (got[:, 7] == 0).all() and G["n"] == 1000


def test_no_candidates_and_no_codes():
    G, none = rp.new_pairs(0, 5), (torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    rp.add_pairs(G, 10, none, none, np.zeros(0, int)); assert rp.pearson(G).shape == (0, 5)
    m = rp.match(np.zeros((0, 5)), np.zeros((0, 5))); assert len(m) == 0
    G = rp.new_pairs(2, 5); rp.add_pairs(G, 10, none, none, np.array([0, 3])); assert (rp.pearson(G) == 0).all()


def test_models_of_each_dictionary_are_taken_by_name():
    store, W = world(M=3, names=["A", "B", "C"]); store.x[:, 1] = 0               # B holds nothing
    cc = {n: dictionary(W[:, :len(n)], list(n)) for n in ("CA", "AB", "ABC")}
    n = {k: sum(len(c[0][0]) for _, c in rp.codes_of(store, [v])) for k, v in cc.items()}
    assert n["AB"] < n["CA"] and len(store.doc) == sum(k for k, _ in rp.codes_of(store, [cc["CA"]]))
    both = [c for _, c in rp.codes_of(store, [cc["AB"], cc["CA"]])][0]
    assert [len(c[0]) for c in both] == [n["AB"], n["CA"]]                        # in any company a dictionary gives its own codes


# ---- chance

def test_floor_is_near_zero_where_the_truth_is_found():
    store, W = world(D=300, n=6000); one = dictionary(W); rows, view = np.arange(300), np.ones((300, 2), bool)
    assert find(store, one, one, rows, view).matched.mean() == 1
    z = rp.find_matches(store, one, [one], rows, view, chance=3)[1]
    assert z.best_matched.sum() == 0 and z.cos.max() < .6 and z["corr"].max() < .2


def test_random_rows_keep_norms_and_shuffling_keeps_codes():
    W = torch.randn(10, 3, 8); R = rp.random_rows(W, 1)
    torch.testing.assert_close(R.norm(dim=2), W.norm(dim=2)); assert torch.equal(R, rp.random_rows(W, 1)) and not torch.equal(R, rp.random_rows(W, 2))
    f = (torch.arange(50)[:, None] % 7 == torch.arange(3)).float()*torch.rand(50, 3); r, l, v = rp.shuffled(sparse(f), 50, torch.Generator().manual_seed(0))
    g = torch.zeros(50, 3); g[r, l] = v
    assert not torch.equal(g, f) and torch.equal(g.sort(0).values, f.sort(0).values) and {tuple(x.tolist()) for x in g} == {tuple(x.tolist()) for x in f}


# ---- replication

def judged(n=4, verdict="shared"): return pd.DataFrame(dict(latent=range(n), count=99, alive=True, verdict=verdict, point=verdict))


def test_replicated_asks_for_the_match_and_the_verdict():
    found = [pd.DataFrame(dict(latent=[4, 7, 9], match=m, matched=k, best_matched=k, cos=c, corr=c)) for m, k, c in
             (([1, 0, -1], [True, True, False], [.9, .8, np.nan]), ([2, 2, 0], [True, False, True], [.7, .2, .9]))]
    table = lambda v, p=None: pd.DataFrame(dict(latent=range(3), verdict=v, point=p or v))
    t = rp.replication_columns(table(["unique-B", "shared", "dead"], ["unique-B", "unique-B", "dead"]).assign(latent=[4, 7, 9]), found,
                               [table(["shared", "unique-B", "other"], ["unique-B"]*3), table(["unique-A", "x", "unique-B"])])
    assert t.replicated_point.tolist() == [1, .5, 0] and t.latent.tolist() == [4, 7, 9]
    assert t.match_verdicts.tolist() == ["unique-B, unique-B", "shared, –", "–, unique-A"]
    assert t.replicated.tolist() == [1, .5, 0] and t.matched.tolist() == [1, .5, .5] and (t.replicated <= t.matched).all()


def test_rates_count_each_latent_once():
    cols = pd.DataFrame(dict(verdict=["unique-B"]*4 + ["shared"], matched=[1, .5, .5, 0, 1], replicated=[.5, .5, 0, 0, 1], replicated_point=1., best_matched=1., match_cos=.9, match_corr=.8))
    cols["point"] = cols.verdict
    t = rp.replication_rows("A-B", cols, cols.assign(best_matched=False), [cols[["verdict", "point"]]]*3, 1000).set_index(["rule", "verdict"])
    assert t.loc["point", "unique-B"].replicated == 1
    t = t.loc["verdict"]; r = t.loc["unique-B"]; assert (r.looked_for, r.matched, r.replicated, r.floor, r.per_seed, r.seeds) == (4, .5, .25, 0, "4, 4, 4", 3)
    assert r.matched_lo == pytest.approx(.15, abs=.01) and r.matched_hi == pytest.approx(.85, abs=.01)      # Wilson, 2 of 4
    assert t.loc["unique-A"].looked_for == 0 and np.isnan(t.loc["unique-A"].matched)


def test_finding_tells_what_was_lost():
    row = dict(pair="A-B", looked_for=10, floor=0., seeds=3, tokens=1000)
    t = pd.DataFrame([row | dict(rule=b, verdict=v, matched=m, replicated=r) for b, v, m, r in (("point", "unique-B", .8, .2), ("point", "unique-A", 0., 0.), ("verdict", "shared", 1., 1.))])
    s = rp.replication_finding(t); assert "67% of the cases lack a match, and 33% have one with another verdict" in s and "nan" not in s and "Of 10 shared latents, 100% have" in s and "less often than shared ones: 40 %" in s
    assert "as far as these numbers tell" in rp.replication_finding(t.assign(matched=.5))
    assert "Every unique latent replicates." in rp.replication_finding(t.assign(replicated=1., matched=1.))
    none = t.assign(looked_for=[0, 0, 5], matched=[np.nan, np.nan, 1], replicated=[np.nan, np.nan, 1], floor=[np.nan, np.nan, 0])
    s = rp.replication_finding(none); assert "0 of 0 unique-B latents by the published rule" in s and "There is no unique latent to replicate." in s and "nan" not in s


def test_large_dictionaries_look_for_the_unique_and_some_shared():
    t = judged(100); t.loc[:4, "point"] = "unique-B"; t.loc[5:6, ["verdict", "point"]] = "unique-A"; t.loc[:4, "verdict"] = "undecided"; t.loc[7, "alive"] = False
    assert rp.candidates(t).tolist() == [j for j in range(100) if j != 7]
    few = rp.candidates(t, full_up_to=50, n_shared=10); assert len(few) == 17 and set(range(7)) <= set(few) and 7 not in few and (few == rp.candidates(t, 50, 10)).all()


def test_a_pair_against_itself_and_against_a_blind_judge():
    x, f, dec, enc = sc.planted(); order = np.random.default_rng(0).permutation(9)
    def cc(o): c = Crosscoder(32, 9, 2, AB); c.W_dec.data, c.W_enc.data = dec[o].float(), enc[o].float(); c.theta.fill_(.3); return c
    t = sc.judge(sc.scaling_table(sc.scan(Memory(x), cc(np.arange(9)), AB), dec), AB)
    cols, chance, tables = rp.replicate_pair(Memory(x), [cc(np.arange(9)), cc(order), cc(order[::-1].copy())], t, n_boot=20)
    assert (cols.replicated == 1).all() and (cols.match_cos > .99).all() and cols.verdict.tolist() == np.array(sc.KINDS)[cols.latent].tolist() and not chance.best_matched.any()
    cols, _, _ = rp.replicate_pair(Memory(x), [cc(np.arange(9)), cc(order)], t, n_boot=20, nu_eps_cut=0.)   # nothing is unique to this judge
    unique = cols.verdict.str.startswith("unique"); assert (cols.matched == 1).all() and (cols.loc[unique, ["replicated", "replicated_point"]] == 0).all().all() and unique.sum() == 2


# ---- training the seeds

def run_with(tmp_path, pair=("pt", "it"), **settings):
    store = small_store(tmp_path/"store", names=("pt", "it"))
    train_pair(store, list(pair), tmp_path/"crosscoder"/"-".join(pair), PairOptions(**{**SETTINGS, **settings}))
    return store


def test_seeds_lie_beside_the_first_and_are_not_trained_twice(tmp_path):
    run_with(tmp_path); _, ccs = rp.train_seeds(tmp_path, ["pt", "it"], 3, **SETTINGS)
    assert sorted(p.name for p in (tmp_path/"crosscoder").iterdir()) == ["pt-it", "pt-it@1", "pt-it@2"]
    a, b, c = (x.W_dec for x in ccs); assert not torch.equal(a, b) and not torch.equal(b, c)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path/"crosscoder").rglob("*.*") if p.is_file()}
    again = rp.train_seeds(tmp_path, ["pt", "it"], 3, **SETTINGS)[1]
    assert files == {p: p.stat().st_mtime_ns for p in files} and all(torch.equal(x.W_dec, y.W_dec) for x, y in zip(ccs, again))


def test_a_first_seed_of_other_settings_is_refused_and_left_alone(tmp_path):
    run_with(tmp_path, k=5); before = (tmp_path/"crosscoder/pt-it/model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"crosscoder/pt-it was trained with k = 5 \(here 4\)"): rp.train_seeds(tmp_path, ["pt", "it"], 2, **SETTINGS)
    with pytest.raises(UserError, match=r"seed = 0 \(here 7\)"): rp.train_seeds(tmp_path, ["pt", "it"], 2, seed=7, **{**SETTINGS, "k": 5})
    assert before == (tmp_path/"crosscoder/pt-it/model.safetensors").read_bytes() and len(list((tmp_path/"crosscoder").iterdir())) == 1


def test_a_checkpoint_of_another_store_is_refused(tmp_path):
    run_with(tmp_path); (tmp_path/"store").rename(tmp_path/"old"); small_store(tmp_path/"store", n=4000)
    with pytest.raises(UserError, match="trained on another store"): rp.train_seeds(tmp_path, ["pt", "it"], 2, **SETTINGS)


@pytest.mark.parametrize("seeds", [1, 0, -2, "3", 2.5])
def test_fewer_than_two_seeds_are_refused(tmp_path, seeds):
    with pytest.raises(UserError, match="at least 2 seeds"): rp.train_seeds(tmp_path, AB, seeds)


def test_verdicts_of_other_cuts_are_refused(tmp_path):
    x, *_ , dec, enc = sc.planted(); cc = Crosscoder(32, 9, 2, AB); cc.W_dec.data, cc.W_enc.data = dec.float(), enc.float(); cc.theta.fill_(.3)
    t = sc.judge(sc.scaling_table(sc.scan(Memory(x), cc, AB), dec), AB); save_latents(t, "A-B", "06_scaling", tmp_path)
    assert rp.first_verdicts(tmp_path, AB).verdict.tolist() == sc.KINDS
    with pytest.raises(UserError, match="other cuts.*06_scaling"): rp.first_verdicts(tmp_path, AB, nu_eps_cut=0.)
    with pytest.raises(UserError, match="06_scaling"): rp.first_verdicts(tmp_path, ["A", "C"])


# ---- tables of replicated latents

def annotated(folder, pair, classes, replicated):
    n = len(classes)
    save_latents(pd.DataFrame(dict(latent=range(n), verdict="unique-B", label="x", category="", category_name="", annotator="rules", **{"class": classes})), pair, "06_scaling", folder)
    if replicated is not None: save_latents(pd.DataFrame(dict(latent=range(n), replicated=replicated)), pair, "80_replication", folder)


def test_class_tables_keep_replicated_latents_only(tmp_path):
    from llmdiff.annotation import load_taxonomy
    tax = load_taxonomy(); one, two = tax["class"].unique()[:2]
    annotated(tmp_path, "pt-it", [one]*3 + [two], [1, .5, 0, 1]); annotated(tmp_path, "pt-SimPO", [two]*2, [0, .4])
    t, said = rp.restricted("it", "SimPO", tmp_path, "pt", tax, .5, n=100)
    assert t.set_index("class").loc[[one, two], "count_A"].tolist() == [2, 1] and t.n_A[0] == 3 and t.n_B[0] == 0
    assert "3 of 4 annotated latents unique to it and 0 of 2 annotated latents unique to SimPO replicate" in said and "nothing to compare" in said
    annotated(tmp_path, "pt-DPO", [one], None)
    with pytest.raises(UserError, match="80_replication"): rp.restricted("it", "DPO", tmp_path, "pt", tax)
