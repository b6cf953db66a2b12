"Matching of dictionaries, replication over seeds: on planted truth, against brute force, and what is refused."
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from llmdiff.annotation import load_taxonomy
from llmdiff.engine.progress import finish_store
from llmdiff.closer import seeds as cs
from llmdiff.closer.seeds import Matching
from llmdiff.core import save_latents, UserError
from llmdiff.crosscoder import Crosscoder
from llmdiff.engine.store import moments, write_tensors
from llmdiff.scaling import accumulate, scaling_table
from llmdiff.training import PairOptions, train_pair
from llmdiff.verdicts import judge
from llmdiff.worlds.synthetic import known_crosscoder, KNOWN_VERDICTS, KnownStore

AB = ["A", "B"]
SETTINGS = dict(n_latents=64, k=4, batch=256, train_tokens=12_000, lr=3e-3,
                dead_after=4000, k_aux=8, aux_latents=16)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


class Memory:
    "Activations [n, n_models, d] of named models behind `rows`, 20 tokens a document."
    def __init__(self, x, names=AB):
        self.x, self.names, self.doc = x, list(names), np.arange(len(x))//20

    def rows(self, names):
        at = [self.names.index(m) for m in names]
        yield {"acts": self.x[:, at], "token": self.doc, "pos": self.doc, "doc": self.doc}


def dictionary(directions, # [D, M, d]
               names=AB, theta=.3):
    "A crosscoder that reads and writes these directions."
    D, M, d = directions.shape
    cc = Crosscoder(d, D, 2, names)
    length2 = (directions**2).sum((1, 2), keepdim=True).clamp_min(1e-9)
    cc.W_dec.data = directions.float()
    cc.W_enc.data = directions.float()/length2.float()
    cc.theta.fill_(theta)
    return cc


def world(D=60, d=64, n=4000, M=2, names=AB, seed=0):
    "Sparse concepts with nearly orthogonal directions, the same in all models; a dictionary that has them."
    g = torch.Generator().manual_seed(seed)
    W = F.normalize(torch.randn(D, d, generator=g), dim=1)
    f = (torch.rand(n, D, generator=g) + 1)*(torch.rand(n, D, generator=g) < .03)
    W = W[:, None].repeat(1, M, 1)
    return Memory(torch.einsum("nj,jmd->nmd", f, W), names), W


def both_views(n): return np.ones((n, 2), bool)


def find(store, one, other, rows, view, one_to_one=True):
    "The match table against one other dictionary."
    rule = Matching() if one_to_one else Matching(full_up_to=0)
    return cs.find_matches(store, one, [other], rows, view, rule)[0]


def sparse(f):
    row, latent = f.nonzero(as_tuple=True)
    return row, latent, f[row, latent]


# ---- matching

@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("one_to_one", [True, False])
def test_a_planted_permutation_is_recovered_through_noise(seed, one_to_one):
    store, W = world(seed=seed)
    g = torch.Generator().manual_seed(seed + 9)
    order = torch.randperm(len(W), generator=g)
    noise = .05*torch.randn(W.shape, generator=g)
    one, two = dictionary(W), dictionary((W + noise)[order])
    rows = np.random.default_rng(seed).choice(len(W), 40, replace=False)
    m = find(store, one, two, rows, both_views(40), one_to_one=one_to_one)
    assert (order.numpy()[m.match] == rows).all() and m.matched.all() and (m.latent == rows).all()


def test_other_directions_or_other_tokens_are_no_match():
    "Either condition alone fails: the right rows with the wrong codes, and the right codes with the wrong rows."
    store, W = world()
    one, rows, view = dictionary(W), np.arange(60), both_views(60)
    wrong = dictionary(W)
    wrong.W_enc.data = wrong.W_enc.data.flip(0)
    assert not find(store, one, wrong, rows, view).best_matched.any()
    wrong = dictionary(W)
    wrong.W_dec.data = wrong.W_dec.data.roll(1, 2)
    assert not find(store, one, wrong, rows, view).best_matched.any()


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
def test_assignment_against_brute_force(shape):
    R, D = shape
    for seed in range(20):
        cos, corr = np.random.default_rng(seed).uniform(-1, 1, (2, R, D))
        s = np.minimum(cos/.7, corr/.5)
        m = cs.match_latents(cos, corr)
        got = sum(s[i, j] for i, j in enumerate(m.match) if j >= 0)
        orders = itertools.permutations(range(max(shape)), min(shape))
        if R <= D: best = max(sum(s[i, j] for i, j in enumerate(p)) for p in orders)
        else: best = max(sum(s[i, j] for j, i in enumerate(p)) for p in orders)
        assert got == pytest.approx(best) and m.match[m.match >= 0].is_unique
        assert (m.match >= 0).sum() == min(R, D)
        left = m[m.match < 0]
        assert left[["cos", "corr"]].isna().all().all() and not left.matched.any()
        assert (cs.match_latents(cos, corr, one_to_one=False).match == s.argmax(1)).all()


def test_best_match_is_found_exactly_if_some_latent_reaches_both_cuts():
    for seed in range(50):
        cos, corr = np.random.default_rng(seed).uniform(0, 1, (2, 8, 12))
        m = cs.match_latents(cos, corr, Matching(.8, .6), one_to_one=False)
        assert (m.matched == ((cos >= .8) & (corr >= .6)).any(1)).all() and (m.matched == m.best_matched).all()


def test_two_halves_of_a_split_concept_share_one_partner():
    s = np.array([[.9, 0], [.8, .05]])
    assert cs.match_latents(s, s, one_to_one=False).matched.tolist() == [True, True]
    m = cs.match_latents(s, s)
    assert m.matched.tolist() == [True, False] and m.best_matched.all()


def test_whole_dictionaries_are_matched_one_to_one_up_to_a_size():
    store, W = world()
    W = W[[0, *range(59)]]      # the first concept twice
    one, two = dictionary(W), dictionary(W[1:])
    rows, view = np.arange(3), both_views(3)
    assert find(store, one, two, rows, view).matched.sum() == 2
    assert find(store, one, two, rows, view, one_to_one=False).matched.all()


def test_unique_latents_are_looked_for_by_their_own_row():
    g = torch.Generator().manual_seed(0)
    P, Q = torch.randn(2, 3, 2, 20, generator=g)
    Q[:, 1] = 2*P[:, 1]
    v = cs.views(["unique-B", "unique-A", "shared"])
    assert v.tolist() == [[False, True], [True, False], [True, True]]
    c = cs.row_cosine(P, Q, v)
    cos = lambda a, b: float(F.cosine_similarity(a.flatten(), b.flatten(), 0))
    assert c[0, 0] == pytest.approx(1, abs=1e-6)
    assert c[1, 1] == pytest.approx(cos(P[1, 0], Q[1, 0]), abs=1e-6)
    assert c[2, 2] == pytest.approx(cos(P[2], Q[2]), abs=1e-6)
    Q[0] = 0
    assert (cs.row_cosine(P, Q, v)[:, 0] == 0).all()                # a row of zeros is like nothing


# ---- correlation

@pytest.mark.parametrize("step", [7, 100, 1000])
def test_streamed_correlation_is_the_dense_one(step):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1000, d, generator=g).clamp_min(.8) - .8 for d in (9, 12))
    b[:, 3] = a[:, 2] + b[:, 3]
    b[:, 7] = 0
    a[:, 5] = 0
    rows, sums = np.array([2, 8, 5, 0]), cs.new_pairs(4, 12)
    for i in range(0, 1000, step):
        x, y = a[i:i+step], b[i:i+step]
        cs.add_pairs(sums, len(x), sparse(x), sparse(y), rows)
    got, alive = cs.pearson(sums), [j for j in range(12) if j != 7]
    want = np.corrcoef(a[:, [2, 8, 0]].double().T.numpy(), b[:, alive].double().T.numpy())[:3, 3:]
    np.testing.assert_allclose(got[[0, 1, 3]][:, alive], want, atol=1e-12)
    assert (got[2] == 0).all() and (got[:, 7] == 0).all() and sums["n"] == 1000


def test_no_candidates_and_no_codes():
    none = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    sums = cs.new_pairs(0, 5)
    cs.add_pairs(sums, 10, none, none, np.zeros(0, int))
    assert cs.pearson(sums).shape == (0, 5)
    assert len(cs.match_latents(np.zeros((0, 5)), np.zeros((0, 5)))) == 0
    sums = cs.new_pairs(2, 5)
    cs.add_pairs(sums, 10, none, none, np.array([0, 3]))
    assert (cs.pearson(sums) == 0).all()


def test_models_of_each_dictionary_are_taken_by_name():
    store, W = world(M=3, names=["A", "B", "C"])
    store.x[:, 1] = 0               # B holds nothing
    cc = {n: dictionary(W[:, :len(n)], list(n)) for n in ("CA", "AB", "ABC")}
    n = {k: sum(len(codes[0][0]) for _, codes in cs.both_codes(store, [v])) for k, v in cc.items()}
    assert n["AB"] < n["CA"]
    assert len(store.doc) == sum(tokens for tokens, _ in cs.both_codes(store, [cc["CA"]]))
    both = [codes for _, codes in cs.both_codes(store, [cc["AB"], cc["CA"]])][0]
    assert [len(codes[0]) for codes in both] == [n["AB"], n["CA"]]     # in any company a dictionary's own codes


# ---- chance

def test_floor_is_near_zero_where_the_truth_is_found():
    store, W = world(D=300, n=6000)
    one, rows, view = dictionary(W), np.arange(300), both_views(300)
    assert find(store, one, one, rows, view).matched.mean() == 1
    z = cs.find_matches(store, one, [one], rows, view, chance=3)[1]
    assert z.best_matched.sum() == 0 and z.cos.max() < .6 and z["corr"].max() < .2


def test_random_rows_keep_norms_and_shuffling_keeps_codes():
    W = torch.randn(10, 3, 8)
    R = cs.random_rows(W, 1)
    torch.testing.assert_close(R.norm(dim=2), W.norm(dim=2))
    assert torch.equal(R, cs.random_rows(W, 1)) and not torch.equal(R, cs.random_rows(W, 2))
    f = (torch.arange(50)[:, None] % 7 == torch.arange(3)).float()*torch.rand(50, 3)
    row, latent, value = cs.shuffled(sparse(f), 50, torch.Generator().manual_seed(0))
    g = torch.zeros(50, 3)
    g[row, latent] = value
    assert not torch.equal(g, f) and torch.equal(g.sort(0).values, f.sort(0).values)
    assert {tuple(x.tolist()) for x in g} == {tuple(x.tolist()) for x in f}


# ---- replication

def judged(n=4, verdict="shared"):
    return pd.DataFrame(dict(latent=range(n), count=99, alive=True, verdict=verdict, verdict_point=verdict))


def test_replicated_asks_for_the_match_and_the_verdict():
    def matches(match, matched, cos):
        t = pd.DataFrame(dict(latent=[4, 7, 9], match=match, matched=matched, cos=cos))
        return t.assign(best_matched=t.matched, corr=t.cos)

    def table(verdict, point=None):
        return pd.DataFrame(dict(latent=range(3), verdict=verdict, verdict_point=point or verdict))

    found = [matches([1, 0, -1], [True, True, False], [.9, .8, np.nan]),
             matches([2, 2, 0], [True, False, True], [.7, .2, .9])]
    mine = table(["unique-B", "shared", "dead"], ["unique-B", "unique-B", "dead"]).assign(latent=[4, 7, 9])
    others = [table(["shared", "unique-B", "other"], ["unique-B"]*3), table(["unique-A", "x", "unique-B"])]
    t = cs.replication_columns(mine, found, others)
    assert t.replicated_point.tolist() == [1, .5, 0] and t.latent.tolist() == [4, 7, 9]
    assert t.match_verdicts.tolist() == ["unique-B, unique-B", "shared, –", "–, unique-A"]
    assert t.replicated.tolist() == [1, .5, 0] and t.matched.tolist() == [1, .5, .5]
    assert (t.replicated <= t.matched).all()


def test_rates_count_each_latent_once():
    cols = pd.DataFrame(dict(
        verdict=["unique-B"]*4 + ["shared"], matched=[1, .5, .5, 0, 1], replicated=[.5, .5, 0, 0, 1],
        replicated_point=1., best_matched=1., match_cos=.9, match_corr=.8))
    cols["verdict_point"] = cols.verdict
    tables = [cols[["verdict", "verdict_point"]]]*3
    t = cs.replication_rows("A-B", cols, cols.assign(best_matched=False), tables, 1000)
    t = t.set_index(["rule", "verdict"])
    assert t.loc["verdict_point", "unique-B"].replicated == 1
    t = t.loc["verdict"]
    r = t.loc["unique-B"]
    assert (r.looked_for, r.matched, r.replicated, r.floor, r.per_seed, r.seeds) == (4, .5, .25, 0, "4, 4, 4", 3)
    assert [r.matched_lo, r.matched_hi] == pytest.approx([.15, .85], abs=.01)     # Wilson, 2 of 4
    assert t.loc["unique-A"].looked_for == 0 and np.isnan(t.loc["unique-A"].matched)


def test_finding_tells_what_was_lost():
    row = dict(pair="A-B", looked_for=10, floor=0., seeds=3, tokens=1000)
    cases = [("verdict_point", "unique-B", .8, .2), ("verdict_point", "unique-A", 0., 0.),
             ("verdict", "shared", 1., 1.)]
    t = pd.DataFrame([row | dict(rule=by, verdict=v, matched=m, replicated=r) for by, v, m, r in cases])
    s = cs.replication_finding(t)
    assert "67% of the cases lack a match, and 33% have one with another verdict" in s and "nan" not in s
    assert "Of 10 shared latents, 100% have" in s and "less often than shared ones: 40 %" in s
    assert "as far as these numbers tell" in cs.replication_finding(t.assign(matched=.5))
    assert "Every unique latent replicates." in cs.replication_finding(t.assign(replicated=1., matched=1.))


def test_finding_where_nothing_is_unique():
    row = dict(pair="A-B", seeds=3, tokens=1000)
    kinds = [("verdict_point", "unique-B"), ("verdict_point", "unique-A"), ("verdict", "shared")]
    t = pd.DataFrame([row | dict(rule=by, verdict=v) for by, v in kinds])
    none = t.assign(looked_for=[0, 0, 5], matched=[np.nan, np.nan, 1], replicated=[np.nan, np.nan, 1],
                    floor=[np.nan, np.nan, 0])
    s = cs.replication_finding(none)
    assert "0 of 0 unique-B latents by the published rule" in s and "nan" not in s
    assert "There is no unique latent to replicate." in s


def test_large_dictionaries_look_for_the_unique_and_some_shared():
    t = judged(100)
    t.loc[:4, "verdict_point"] = "unique-B"
    t.loc[5:6, ["verdict", "verdict_point"]] = "unique-A"
    t.loc[:4, "verdict"] = "undecided"
    t.loc[7, "alive"] = False
    assert cs.candidates(t).tolist() == [j for j in range(100) if j != 7]
    rule = Matching(full_up_to=50, n_shared=10)
    few = cs.candidates(t, rule)
    assert len(few) == 17 and set(range(7)) <= set(few) and 7 not in few
    assert (few == cs.candidates(t, rule)).all()


def known_table(): # the judged table of the known world
    cc = known_crosscoder()
    return judge(scaling_table(accumulate(KnownStore(), cc, AB), cc.W_dec.detach()), AB)


def test_a_pair_against_itself_and_against_a_blind_judge():
    t, order = known_table(), np.random.default_rng(0).permutation(9)
    one, two, three = known_crosscoder(), known_crosscoder(order), known_crosscoder(order[::-1].copy())
    cols, chance, tables = cs.replicate_pair(KnownStore(), [one, two, three], t, n_boot=20)
    assert (cols.replicated == 1).all() and (cols.match_cos > .99).all() and not chance.best_matched.any()
    assert cols.verdict.tolist() == np.array(KNOWN_VERDICTS)[cols.latent].tolist()
    blind = dict(n_boot=20, nu_eps_cut=0.)                        # nothing is unique to this judge
    cols, _, _ = cs.replicate_pair(KnownStore(), [one, two], t, **blind)
    unique = cols.verdict.str.startswith("unique")
    assert (cols.matched == 1).all() and unique.sum() == 2
    assert (cols.loc[unique, ["replicated", "replicated_point"]] == 0).all().all()


# ---- training the seeds

def small_store(folder, n=6000, d=24, docs=60, names=("pt", "it")):
    "A real store on disk, in two shards, with planted concepts."
    folder.mkdir()
    shards = {}
    for i in range(2):
        acts = world(D=40, d=d, n=n//2, seed=i)[0].x.bfloat16()
        doc = (torch.arange(len(acts))*(docs//2)//len(acts) + i*docs//2).int()
        _, mean, q = moments(acts)
        file = f"shard_{i:05d}.safetensors"
        tensors = dict(acts=acts, token=doc*0, pos=doc*0, doc=doc, mean=mean, q=q)
        shards[file] = dict(file=file, rows=len(acts), docs=docs//2, doc_first=int(doc[0]), doc_end=int(doc[-1]) + 1,
                            **write_tensors(folder/file, tensors))
    state = dict(format=1, models={m: m for m in names}, names=list(names), layer=1, corpus="c", tokenizer=None,
                 dtype="float32", n_docs=docs, shard_tokens=n//2, shards=shards, parts={})
    return finish_store(folder, state, {m: m for m in names}, d)


def run_with(tmp_path, pair=("pt", "it"), **settings):
    store = small_store(tmp_path/"store")
    train_pair(store, list(pair), tmp_path/"crosscoder"/"-".join(pair), PairOptions(**{**SETTINGS, **settings}))
    return store


def times(folder): return {p: p.stat().st_mtime_ns for p in folder.rglob("*.*") if p.is_file()}


def test_seeds_lie_beside_the_first_and_are_not_trained_twice(tmp_path):
    run_with(tmp_path)
    folder = tmp_path/"crosscoder"
    _, ccs = cs.train_seeds(tmp_path, ["pt", "it"], 3, **SETTINGS)
    assert sorted(p.name for p in folder.iterdir()) == ["pt-it", "pt-it@1", "pt-it@2"]
    a, b, c = (x.W_dec for x in ccs)
    assert not torch.equal(a, b) and not torch.equal(b, c)
    files = times(folder)
    again = cs.train_seeds(tmp_path, ["pt", "it"], 3, **SETTINGS)[1]
    assert files == times(folder)
    assert all(torch.equal(x.W_dec, y.W_dec) for x, y in zip(ccs, again))


def test_a_first_seed_of_other_settings_is_refused_and_left_alone(tmp_path):
    run_with(tmp_path, k=5)
    weights = tmp_path/"crosscoder/pt-it/model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(UserError, match=r"crosscoder/pt-it was trained with k = 5 \(here 4\)"):
        cs.train_seeds(tmp_path, ["pt", "it"], 2, **SETTINGS)
    with pytest.raises(UserError, match=r"seed = 0 \(here 7\)"):
        cs.train_seeds(tmp_path, ["pt", "it"], 2, seed=7, **{**SETTINGS, "k": 5})
    assert before == weights.read_bytes() and len(list((tmp_path/"crosscoder").iterdir())) == 1


def test_a_checkpoint_of_another_store_is_refused(tmp_path):
    run_with(tmp_path)
    (tmp_path/"store").rename(tmp_path/"old")
    small_store(tmp_path/"store", n=4000)
    with pytest.raises(UserError, match="trained on another store"):
        cs.train_seeds(tmp_path, ["pt", "it"], 2, **SETTINGS)


@pytest.mark.parametrize("seeds", [1, 0, -2, "3", 2.5])
def test_fewer_than_two_seeds_are_refused(tmp_path, seeds):
    with pytest.raises(UserError, match="at least 2 seeds"): cs.train_seeds(tmp_path, AB, seeds)


def test_verdicts_of_other_cuts_are_refused(tmp_path):
    save_latents(known_table(), "A-B", "scaling", tmp_path)
    assert cs.first_verdicts(tmp_path, AB).verdict.tolist() == KNOWN_VERDICTS
    with pytest.raises(UserError, match="other cuts.*step verdicts"): cs.first_verdicts(tmp_path, AB, nu_eps_cut=0.)
    with pytest.raises(UserError, match="step scaling"): cs.first_verdicts(tmp_path, ["A", "C"])


# ---- pictures

def test_a_figure_of_nothing():
    cols = pd.DataFrame(dict(latent=[0, 1], verdict_point=["shared", "unique-A"]))
    cols = cols.assign(match_cos=np.nan, match_corr=np.nan)
    chance = cols.rename(columns=dict(match_cos="cos", match_corr="corr"))
    fig = cs.match_figure([("A-B", cols, chance)], 0, 2)
    assert "0 unique-B, 1 unique-A, 1 shared" in fig.axes[0].get_title()


# ---- tables of replicated latents

def annotated(folder, pair, classes, replicated):
    t = pd.DataFrame(dict(latent=range(len(classes)), verdict="unique-B", label="x", category="", category_name="",
                          annotator="rules", **{"class": classes}))
    save_latents(t, pair, "scaling", folder)
    if replicated is not None: save_latents(t[["latent"]].assign(replicated=replicated), pair, "seeds", folder)


def test_class_tables_keep_replicated_latents_only(tmp_path):
    tax = load_taxonomy()
    one, two = tax["class"].unique()[:2]
    annotated(tmp_path, "pt-it", [one]*3 + [two], [1, .5, 0, 1])
    annotated(tmp_path, "pt-SimPO", [two]*2, [0, .4])
    t, said = cs.restricted("it", "SimPO", tmp_path, "pt", tax, .5, n=100)
    assert t.set_index("class").loc[[one, two], "count_A"].tolist() == [2, 1] and t.n_A[0] == 3 and t.n_B[0] == 0
    assert "3 of 4 annotated latents unique to it and 0 of 2 annotated latents unique to SimPO replicate" in said
    assert "nothing to compare" in said
    annotated(tmp_path, "pt-DPO", [one], None)
    with pytest.raises(UserError, match="step seeds"): cs.restricted("it", "DPO", tmp_path, "pt", tax)
