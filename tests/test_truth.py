"The synthetic world is what it says; matching, scoring and coverage find what was put there."
import numpy as np
import pandas as pd
import pytest
import torch

from llmdiff.closer import truth as T
from llmdiff.core import UserError
from llmdiff.crosscoder import Codes
from llmdiff.worlds.synthetic import (
    easy_world, known_crosscoder, known_latents, KnownStore, match_concepts, occurrences, World, WORLD_PARTS,
    WorldStore)

AB = ["A", "B"]
C = 60   # concepts of the world below


@pytest.fixture(scope="module")
def world(): return World(24, C, seed=3)


@pytest.fixture(scope="module")
def store(world): return WorldStore(world, 60_000)


def docs_in(rows): return {int(d) for r in rows for d in r["doc"]}


def is_kind(world, *kinds): return world.truth.kind.isin(kinds).to_numpy()


# ---- the world

def test_kinds_are_what_they_say(world, store):
    on = np.concatenate([r["a"].toarray().reshape(-1, 2, C) for r in store.rows()]) > 0
    cos = (world.u[:, 0]*world.u[:, 1]).sum(1)
    assert np.allclose(np.linalg.norm(world.u, axis=2), 1)
    assert not on[:, 0, is_kind(world, "B-only")].any()
    assert not on[:, 1, is_kind(world, "A-only")].any()
    assert np.allclose(cos[is_kind(world, "shrunk", "decoupled", "A-only")], 1)
    assert (cos[is_kind(world, "shared")] > .9).all()
    assert (abs(cos[is_kind(world, "rotated")]) < .8).all()
    for kind in ("shared", "shrunk", "rotated"):
        where = is_kind(world, kind)
        assert (on[:, 0, where] == on[:, 1, where]).all()
    t = world.truth
    weak = (t.strength_A/t.strength_B)[is_kind(world, "shrunk")]
    assert np.minimum(weak, 1/weak).between(.25, .5).all()


def test_decoupled_concepts_share_tokens_but_no_amplitude(world, store):
    a = np.concatenate([r["a"].toarray().reshape(-1, 2, C) for r in store.rows()])
    on = a > 0
    often = on[:, 1].sum(0) > 500
    for c in np.flatnonzero(is_kind(world, "decoupled") & often):
        assert abs(on[on[:, 1, c], 0, c].mean() - world.truth.overlap[c]) < .1
        both = on[:, :, c].all(1)
        assert abs(np.corrcoef(np.log(a[both][:, :, c]).T)[0, 1]) < .15


def test_frequencies_span_three_decades(world, store):
    f, rate = occurrences(store)/store.n_tokens, world.truth.rate
    assert f.max()/np.median(f) > 10 and rate.max()/rate.min() == pytest.approx(1000)
    often = rate > .01
    assert np.median(f[often]/rate[often]) == pytest.approx(1, abs=.25)


def test_any_page_alone_and_parts_apart(world):
    page, again = world.page(5), World(24, C, seed=3).page(5)
    assert torch.equal(page["acts"], again["acts"]) and (page["a"] != again["a"]).nnz == 0
    assert not torch.equal(page["acts"][:50], World(24, C, seed=4).page(5)["acts"][:50])
    docs = {part: docs_in(WorldStore(world, 9000, part).rows()) for part in WORLD_PARTS}
    assert not docs["train"] & docs["fresh"]
    assert not docs["train"] & docs["population"]
    assert not docs["fresh"] & docs["population"]


def test_store_has_what_training_asks(world, store):
    train, held = store.split(.1)
    assert train[1] == held[0] and docs_in(store.rows(docs=held)) == set(range(*held))
    middle = sum(held)//2     # a range that cuts a page
    assert docs_in(store.rows(docs=(held[0], middle))) == set(range(held[0], middle))
    every = list(store.batches(AB, 500, 10_000, 1, docs=train))
    later = list(store.batches(AB, 500, 10_000, 1, docs=train, start=7))
    assert len(every) == 10_000//500 and len(later) == len(every) - 7
    for a, b in zip(every[7:], later): assert torch.equal(a, b)
    turned, plain = next(iter(store.rows(["B", "A"]))), next(iter(store.rows()))
    assert torch.equal(turned["acts"], plain["acts"][:, [1, 0]])


def test_no_cache_gives_the_same(world):
    a, b = (torch.cat([r["acts"] for r in WorldStore(world, 9000, keep=k).rows()]) for k in (0, 1e9))
    assert torch.equal(a, b)


def test_tokens_on_call(world):
    assert world(300).shape == (300, 2, 24) and world(300).dtype == torch.float32
    assert torch.equal(world(300, 1), world(300, 1)) and not torch.equal(world(300, 1), world(300, 2))
    x = world(20_000).double()
    pages = torch.cat([world.page(i)["acts"] for i in range(8)]).double()
    assert (x.mean(0) - pages.mean(0)).abs().max() < .3*pages.std(0).max()     # the same law


def test_an_easy_world_is_its_decoder(store):
    "Without noise an activation is the sum of the rows of the concepts that are on."
    w = easy_world(48, 40)
    assert set(w.truth.kind) == {"shared", "A-only", "B-only"} and (w.truth.partner == -1).all()
    page = w.page(0)
    a = page["a"].toarray().reshape(-1, 2, 40)/w.truth[["strength_A", "strength_B"]].T.to_numpy().clip(1e-9)
    x = np.einsum("nmc,cmd->nmd", a, w.decoder.numpy()) + w.mu
    assert (page["acts"].numpy() - x).std() < .05


def test_directions_are_not_the_first_weights_of_a_crosscoder():
    "Equal seeds must not start a crosscoder at the answer."
    from llmdiff.crosscoder import Crosscoder
    start = Crosscoder(64, 64, 4, AB, seed=0).W_dec.detach()[:, 0].numpy()
    cos = easy_world(64, 64, seed=0).u[:, 0] @ (start/np.linalg.norm(start, axis=1, keepdims=True)).T
    assert abs(cos).max() < .7


def test_known_latents_and_their_crosscoder():
    x, f, dec, _ = known_latents(500)
    assert (x - torch.einsum("nj,jmd->nmd", f, dec))[:, 1].std() < .03            # B's rows are right
    cc, order = known_crosscoder(), np.arange(9)[::-1].copy()
    codes = cc.dense_codes(next(KnownStore().rows(AB))["acts"].float())
    turned = known_crosscoder(order).dense_codes(next(KnownStore().rows(AB))["acts"].float())
    assert torch.equal(codes[:, order], turned) and not codes[:, 7].any()


# ---- what the benchmark finds

class Oracle:
    "A dictionary that reads the answer: latent j is concept j as B has it (or A); the last one is noise."
    def __init__(self, store): self.pages, self.n_latents = iter(list(store.rows())), C + 1

    def normalise(self, x): return x

    def encode(self, x):
        a = next(self.pages)["a"].toarray()
        f = np.where(a[:, C:] > 0, a[:, C:], a[:, :C])
        noise = np.random.default_rng(0).random(len(f)) < .1
        f = np.c_[f, noise]
        i, j = np.nonzero(f)
        return Codes(torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(f[i, j].astype(np.float32)))


def test_match_finds_the_concept_and_its_share(world, store):
    m, t = match_concepts(Oracle(store), store, AB), world.truth
    seen = occurrences(store) > 20
    plain = seen & ~is_kind(world, "decoupled")
    assert (m.concept[:C][plain] == np.arange(C)[plain]).all() and (m["corr"][:C][plain] > .999).all()
    assert m.concept[C] == -1
    held = m.held_A[:C]
    assert np.allclose(held[seen & is_kind(world, "B-only")], 0)
    shrunk = seen & is_kind(world, "shrunk")
    assert np.allclose(held[shrunk], (t.strength_A/t.strength_B)[shrunk], rtol=1e-3)


def test_scores_count_claims_and_concepts():
    t = pd.DataFrame(dict(
        latent=range(6), concept=[0, 0, 1, 2, 3, -1],
        kind=["A-only", "A-only", "B-only", "decoupled", "rotated", "none"],
        held_A=[9, 9, 0, .1, 0, 0], held_B=[0, 0, 9, 0, 0, 0],
        verdict=["unique-A", "other", "unique-A", "unique-B", "rotated", "unique-B"], norm_verdict=["shared"]*6))
    truth = pd.DataFrame(dict(concept=range(5), kind=["A-only", "B-only", "decoupled", "rotated", "B-only"],
                              occurrences=[200, 300, 400, 500, 199]))
    s = T.scores(t, truth).set_index(["rule", "verdict"])
    u = s.loc[("verdict", "unique")]
    assert (u.claims, u.precision, u.sought, u.recall) == (4, .25, 2, .5)
    assert u.here == .5       # the decoupled one is right at its tokens
    assert s.loc[("verdict", "rotated"), "precision"] == 1
    assert s.loc[("norm", "shared"), "precision"] == pytest.approx(1/6)
    assert "point" not in s.index.get_level_values(0)
    assert "point" in T.scores(t.assign(verdict_point=t.verdict), truth).rule.values


def test_scores_of_nothing_are_nan():
    t = pd.DataFrame(dict(latent=[0], concept=[-1], kind=["none"], held_A=[0.], held_B=[0.], verdict=["dead"],
                          norm_verdict=["none"]))
    truth = pd.DataFrame(dict(concept=[0], kind=["A-only"], occurrences=[1]))
    s = T.scores(t, truth)
    assert set(s.rule) == {"verdict"} and not s.claims.any() and not s.sought.any()
    assert s[["precision", "here", "recall"]].isna().all(axis=None)


def test_coverage_knows_the_side_and_leaves_out_what_has_no_interval():
    t = pd.DataFrame(dict(latent=range(4), count=50, alive=[True, True, True, False], nu_x=0.,
                          nu_x_lo=[-1, -1, np.nan, -1], nu_x_hi=1.))
    c = T.covered(t, pd.DataFrame(dict(nu_x=[.5, 3., 0, 0])), 1, 10**9)
    assert c.covered.tolist() == [True, False] and c.side.tolist() == [0, 1]
    assert T.covered(t, pd.DataFrame(dict(nu_x=[.5, 1.3, 0, 0])), 1, 1).covered.all()              # arms times sqrt 2


def test_over_seeds():
    assert T.over_seeds([.5, np.nan])[0] == .5 and np.isnan(T.over_seeds([.5])[1])
    assert np.isnan(T.over_seeds([np.nan])).all() and T.over_seeds([.9, 1., 1.])[2] == 1
    mean, lo, hi = T.over_seeds([.4, .5, .6])
    assert (mean, hi - mean) == (pytest.approx(.5), pytest.approx(4.302653*.1/3**.5, rel=1e-4))


def test_the_whole_at_its_smallest():
    r = T.measure_worlds("tiny", 1, ["batchtopk-sum", "l1"], say=lambda s: None, train_tokens=30_000)
    t = T.truth_table(r)
    assert set(t.method) == {"batchtopk-sum", "l1"} and "all" in set(t.verdict)
    assert t.coverage.dropna().between(0, 1).all()
    assert len(T.truth_view(t)) == len(t) and "asked" in T.goal_notes(t)[-1]
    note = T.artefact_note(T.artefacts(r["latents"]))
    assert note.startswith("L1: of") and T.truth_notes(r)[-1] == note
    for figure in T.FIGURES.values(): assert figure(r).axes


def test_bad_input():
    for kw, message in ((dict(size="huge"), "no size 'huge'"), (dict(methods=["topk"]), "no method 'topk'"),
                        (dict(seeds=0), "measure nothing")):
        with pytest.raises(UserError, match=message): T.measure_worlds(**kw)
