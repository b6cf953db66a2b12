"The planted world is what it says; matching, scoring and coverage find what was put there."

import numpy as np, pandas as pd, pytest, torch
from llmdiff import truth as T
from llmdiff.core import UserError
from llmdiff.crosscoder import Codes


@pytest.fixture(scope="module")
def world(): return T.World(24, 60, seed=3)


@pytest.fixture(scope="module")
def store(world): return T.WorldStore(world, 60_000)


def test_kinds_are_what_they_say(world, store):
    t, C = world.truth, 60; a = np.concatenate([r["a"].toarray().reshape(-1, 2, C) for r in store.rows()])
    on, cos = a > 0, (world.u[:, 0]*world.u[:, 1]).sum(1); is_ = lambda k: (t.kind == k).to_numpy()
    assert np.allclose(np.linalg.norm(world.u, axis=2), 1)
    assert not on[:, 0, is_("B-only")].any() and not on[:, 1, is_("A-only")].any()
    assert np.allclose(cos[is_("shrunk") | is_("decoupled") | is_("A-only")], 1) and (cos[is_("shared")] > .9).all() and (abs(cos[is_("rotated")]) < .8).all()
    for k in ("shared", "shrunk", "rotated"): assert (on[:, 0, is_(k)] == on[:, 1, is_(k)]).all()
    weak = (t.strength_A/t.strength_B)[is_("shrunk")]; weak = np.minimum(weak, 1/weak); assert weak.between(.25, .5).all()
    for c in np.flatnonzero(is_("decoupled") & (on[:, 1].sum(0) > 500)):
        assert abs(on[on[:, 1, c], 0, c].mean() - t.overlap[c]) < .1
        both = on[:, :, c].all(1); assert abs(np.corrcoef(np.log(a[both][:, :, c]).T)[0, 1]) < .15     # independent amplitudes


def test_frequencies_span_three_decades(world, store):
    f = T.occurrences(store)/store.n_tokens
    assert f.max()/np.median(f) > 10 and world.truth.rate.max()/world.truth.rate.min() == pytest.approx(1000)
    often = world.truth.rate > .01
    assert np.median(f[often]/world.truth.rate[often]) == pytest.approx(1, abs=.25)


def test_any_page_alone_and_parts_apart(world):
    p, q = world.page(5), T.World(24, 60, seed=3).page(5)
    assert torch.equal(p["acts"], q["acts"]) and (p["a"] != q["a"]).nnz == 0
    assert not torch.equal(p["acts"][:50], T.World(24, 60, seed=4).page(5)["acts"][:50])
    docs = {n: {int(d) for r in T.WorldStore(world, 9000, n).rows() for d in r["doc"]} for n in T.PARTS}
    assert not (docs["train"] & docs["fresh"] or docs["train"] & docs["population"] or docs["fresh"] & docs["population"])


def test_store_has_what_training_asks(world, store):
    train, held = store.split(.1)
    assert train[1] == held[0] and {int(d) for r in store.rows(docs=held) for d in r["doc"]} == set(range(*held))
    mid = sum(held)//2; assert {int(d) for r in store.rows(docs=(held[0], mid)) for d in r["doc"]} == set(range(held[0], mid))     # a range that cuts a page
    all_ = list(store.batches(["A", "B"], 500, 10_000, 1, docs=train)); some = list(store.batches(["A", "B"], 500, 10_000, 1, docs=train, start=7))
    assert len(all_) == 10_000//500 and all(torch.equal(a, b) for a, b in zip(all_[7:], some))
    assert torch.equal(next(iter(store.rows(["B", "A"])))["acts"], next(iter(store.rows()))["acts"][:, [1, 0]])


def test_no_cache_gives_the_same(world):
    a, b = (torch.cat([r["acts"] for r in T.WorldStore(world, 9000, keep=k).rows()]) for k in (0, 1e9))
    assert torch.equal(a, b)


class Oracle: # a "dictionary" that reads the answer: latent j is concept j as B has it; the last one is noise
    def __init__(self, store): self.pages, self.n_latents = iter(list(store.rows())), 61
    def normalise(self, x): return x
    def encode(self, x):
        r = next(self.pages); C = 60; a = r["a"].toarray(); f = np.where(a[:, C:] > 0, a[:, C:], a[:, :C]); f = np.c_[f, np.random.default_rng(0).random(len(f)) < .1]
        i, j = np.nonzero(f); return Codes(torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(f[i, j].astype(np.float32)))


def test_match_finds_the_concept_and_its_share(world, store):
    m, seen = T.match(Oracle(store), store, ["A", "B"]), T.occurrences(store) > 20; t = world.truth
    plain = seen & (t.kind != "decoupled").to_numpy()
    assert (m.concept[:60][plain] == np.arange(60)[plain]).all() and (m["corr"][:60][plain] > .999).all()
    assert m.concept[60] == -1
    assert np.allclose(m.held_A[:60][seen & (t.kind == "B-only")], 0)
    s = seen & (t.kind == "shrunk"); assert np.allclose(m.held_A[:60][s], (t.strength_A/t.strength_B)[s], rtol=1e-3)


def test_scores_count_claims_and_concepts():
    t = pd.DataFrame(dict(latent=range(6), concept=[0, 0, 1, 2, 3, -1], kind=["A-only", "A-only", "B-only", "decoupled", "rotated", "none"], held_A=[9, 9, 0, .1, 0, 0], held_B=[0, 0, 9, 0, 0, 0],
                          verdict=["unique-A", "other", "unique-A", "unique-B", "rotated", "unique-B"], norm_verdict=["shared"]*6))
    truth = pd.DataFrame(dict(concept=range(5), kind=["A-only", "B-only", "decoupled", "rotated", "B-only"], occurrences=[200, 300, 400, 500, 199]))
    s = T.scores(t, truth).set_index(["rule", "verdict"]); u = s.loc[("verdict", "unique")]
    assert (u.claims, u.precision, u.sought, u.recall) == (4, .25, 2, .5) and u.here == .5       # the decoupled one is right at its tokens
    assert s.loc[("verdict", "rotated"), "precision"] == 1 and s.loc[("norm", "shared"), "precision"] == pytest.approx(1/6)
    assert "point" not in s.index.get_level_values(0)
    assert "point" in T.scores(t.assign(point=t.verdict), truth).rule.values


def test_coverage_knows_the_side_and_leaves_out_what_has_no_interval():
    t = pd.DataFrame(dict(latent=range(4), count=50, alive=[True, True, True, False], nu_x=0., nu_x_lo=[-1, -1, np.nan, -1], nu_x_hi=1.))
    c = T.covered(t, pd.DataFrame(dict(nu_x=[.5, 3., 0, 0])), 1, 10**9)
    assert c.covered.tolist() == [True, False] and c.side.tolist() == [0, 1]
    assert T.covered(t, pd.DataFrame(dict(nu_x=[.5, 1.3, 0, 0])), 1, 1).covered.all()              # arms times sqrt 2


def test_over_seeds():
    assert T.over_seeds([.5, np.nan])[0] == .5 and np.isnan(T.over_seeds([.5])[1]) and T.over_seeds([.9, 1., 1.])[2] == 1
    m, lo, hi = T.over_seeds([.4, .5, .6]); assert (m, hi - m) == (pytest.approx(.5), pytest.approx(4.302653*.1/3**.5, rel=1e-4))


def test_the_whole_at_its_smallest():
    r = T.measure_worlds("tiny", 1, ["batchtopk-sum", "l1"], say=lambda s: None, train_tokens=30_000); t = T.truth_table(r)
    assert set(t.method) == {"batchtopk-sum", "l1"} and "all" in set(t.verdict) and t.coverage.dropna().between(0, 1).all()
    assert len(T.readable(t)) == len(t) and "asked" in T.goal_notes(t)[-1] and T.artefact_note(T.artefacts(r["latents"])).startswith("L1: of")
    for f in T.FIGURES.values(): assert f(r).axes


def test_bad_input():
    for kw, message in ((dict(size="huge"), "no size 'huge'"), (dict(methods=["topk"]), "no method 'topk'"), (dict(seeds=0), "measure nothing")):
        with pytest.raises(UserError, match=message): T.measure_worlds(**kw)
