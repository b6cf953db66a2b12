"Verdicts that need certainty: on planted truth, at the cuts, with undefined ratios; counts, figures and sentences."
import numpy as np
import pandas as pd
import pytest

from llmdiff import scaling, verdicts as vd
from llmdiff.core import latents
from llmdiff.verdicts import Cuts
from llmdiff.worlds.synthetic import KNOWN_VERDICTS
from test_scaling import AB, FakeStore, table_of, toy


def judged(x, doc, cc):
    "The judged table of a toy."
    return vd.judge(table_of(x, doc, cc), AB)


def low_columns(**nu):
    "A table of one latent per value: estimates with arms."
    n = len(next(iter(nu.values())))
    t = pd.DataFrame({"latent": range(n), "count": 99, "delta_norm": .95, "cos": 0.})
    for name in vd.RATIOS:
        v = np.array(nu.get(name, [(1., 1., 1.)]*n), float)
        t = t.assign(**{name: v[:, 0], name + "_lo": v[:, 1], name + "_hi": v[:, 2]})
    return t


# ---- planted truth

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_latents_get_their_verdicts(seed):
    t = judged(*toy(seed))
    assert t.verdict.tolist() == KNOWN_VERDICTS
    assert t.alive.tolist() == [True]*7 + [False]*2
    assert t.nu_eps_B[3] > 0.9 and abs(t.nu_r_B[4] - 1) < 0.1               # what shrinkage and decoupling look like
    assert t.nu_eps_B_lo[0] <= t.nu_eps_B[0] <= t.nu_eps_B_hi[0]


def test_swapping_the_models_mirrors_everything():
    x, doc, cc = toy()
    t = judged(x, doc, cc)
    for p in (cc.W_dec, cc.W_enc): p.data = p.data.flip(1).contiguous()
    s = judged(x.flip(1), doc, cc)
    np.testing.assert_allclose(s.delta_norm, 1 - t.delta_norm)
    for n in ("nu_eps", "nu_r"):
        for end in ("", "_lo", "_hi"):
            np.testing.assert_allclose(s[f"{n}_A{end}"], t[f"{n}_B{end}"], rtol=1e-4, atol=1e-4)
    swap = {"unique-A": "unique-B", "unique-B": "unique-A"}
    assert (s.partners[1:6] == t.partners[1:6]).all() and t.partners[4] == "5:1.00"
    assert s.verdict.tolist() == [swap.get(v, v) for v in t.verdict]


def test_dead_and_rare_latents_are_flagged_and_never_judged():
    t = judged(*toy())
    assert t.verdict[7] == "dead" and t.reason[7] == "never active in the store"
    assert t.verdict[8] == "rare" and "too rare" in t.reason[8] and t["count"][8] == 3
    assert t.verdict.notna().all() and t.reason.str.len().gt(0).all() and not t.reason.str.contains("nan").any()
    assert not t.isna().any().any()                                          # flagged, never NaN
    betas = [c for c in t if c.startswith("beta_")]
    assert np.isinf(t.loc[7, list(vd.RATIOS)].astype(float)).all() and (t.loc[7, betas] == 0).all()
    assert not vd.flags(t).loc[7:].any().any()
    again = vd.judge(t, AB, Cuts(min_count=1))
    assert (again.verdict_point[8], again.verdict[7]) == ("shared", "dead")


def test_all_latents_dead():
    x, doc, cc = toy()
    cc.theta.fill_(1e9)
    t = judged(x, doc, cc)
    r = vd.count_row(t, AB)
    assert (t.verdict == "dead").all() and r["alive"] == r["unique-B"] == 0
    c = pd.DataFrame([r | {"pair": "it-SimPO"}])
    assert "nan" not in vd.verdict_finding(c, ["it-SimPO"])
    assert "nan" not in vd.verdict_words(r, t, "B") and "stay under none" in vd.verdict_words(r, t, "B")
    vd.delta_figure(t, AB, 1)                                                # empty figures, no error
    vd.plane_figure(t, AB, 1)
    vd.cut_figure(t, AB, 1)


# ---- cuts

def test_the_published_cuts_are_the_defaults():
    assert vars(Cuts()) == dict(nu_eps_cut=.2, nu_r_cut=.5, delta_cut=.1, shared_band=.1, min_count=10)
    assert (Cuts().of("nu_eps_B"), Cuts().of("nu_r_A")) == (.2, .5)


def test_undefined_ratios_pass_no_cut():
    t = pd.DataFrame({"latent": [0, 1], "count": [99, 99], "delta_norm": [0.95, 0.05], "cos": [0., 0]})
    for n in vd.RATIOS: t[n] = np.inf
    t = vd.judge(t, AB)
    assert t.verdict.tolist() == ["shrunk", "shrunk"] and t.reason.str.contains("undefined").all()


def test_cuts_are_parameters_and_signs_count():
    t = pd.DataFrame({"latent": range(4), "count": 99, "delta_norm": [0.7, 0.7, 0.95, 0.95], "cos": 0.,
                      "nu_eps_B": [0.15, -0.9, 0.3, 0.1], "nu_r_B": [0.4, 0., 0.1, 0.6],
                      "nu_eps_A": 1., "nu_r_A": 1.})
    strict, mild = Cuts(nu_eps_cut=0.1), Cuts(nu_eps_cut=0.35, nu_r_cut=0.7)
    assert vd.judge(t, AB).verdict.tolist() == ["unique-B", "other", "shrunk", "decoupled"]
    assert vd.judge(t, AB, strict).verdict.tolist() == ["other", "other", "shrunk", "shrunk"]
    assert vd.judge(t, AB, mild).verdict.tolist() == ["unique-B", "other", "unique-B", "unique-B"]
    r = vd.count_row(vd.judge(t, AB), AB)
    assert (r["delta_norm_B"], r["low_nu_B"], r["all_three_B"], r["unique-B"]) == (2, 1, 0, 1)
    assert r["share_B"] == 0.25
    assert r["share_B_lo"] == pytest.approx(0.0456, abs=1e-3) and r["share_B_hi"] == pytest.approx(0.6994, abs=1e-3)


def test_undecided_only_where_it_matters():
    eps = [(.1, .05, .15), (.1, .05, .25), (.3, .15, .5), (.3, .25, .5), (.1, .05, .15), (.1, -.3, .15)]
    r = [(.2, .1, .3), (.2, .1, .3), (.2, .1, .3), (.6, .4, .8), (.49, .4, .6), (.2, .1, .3)]
    j = vd.judge(low_columns(nu_eps_B=eps, nu_r_B=r), AB)
    assert j.verdict_point.tolist() == ["unique-B", "unique-B", "shrunk", "shrunk", "unique-B", "unique-B"]
    assert j.verdict.tolist() == ["unique-B", "undecided", "undecided", "shrunk", "undecided", "undecided"]
    assert j.reason[1].startswith("unique-B by its estimates, but an interval crosses a cut")
    assert (vd.count_row(j, AB)["unique-B"], vd.count_row(j, AB)["undecided_B"]) == (1, 3)


def test_a_faint_row_is_no_latent_of_its_model():
    "The norm says B only: that A's faint row points where B holds nothing does not make the latent A's."
    t = low_columns(nu_eps_A=[(.1, .05, .15)], nu_r_A=[(.1, 0, .2)], nu_eps_B=[(.9, .8, 1)])
    assert vd.judge(t, AB).verdict.tolist() == ["shrunk"]
    assert vd.judge(t.assign(delta_norm=.6), AB).verdict.tolist() == ["unique-A"]


def test_counts_by_cut_hold_their_order():
    t = judged(*toy())
    n = vd.counts_by_cut(t, "B", np.linspace(.01, 2, 30), [.5]*30)
    assert (n.surely <= n.point).all() and (n.point <= n.possibly).all()
    for answer in (n.point, n.surely, n.possibly): assert answer.is_monotonic_increasing
    vd.cut_figure(t, AB, 1)


# ---- what is written and said

def test_finding_says_what_came_out():
    row = {"pair": "it-SimPO", "alive": 100, "delta_norm_A": 0, "delta_norm_B": 0,
           "unique-B": 1, "share_B": 0.01, "share_B_lo": 0., "share_B_hi": 0.05}
    base = row | {"pair": "pt-it", "unique-B": 30, "share_B": 0.3}
    s = vd.verdict_finding(pd.DataFrame([row, base]), ["it-SimPO", "pt-SimPO", "pt-it"])
    assert "none of 100 latents passes" in s and "30 of 100 unique to it" in s
    assert "As in the paper" in s and "113 of 114,688" in s
    other = pd.DataFrame([row | {"delta_norm_B": 4}, base | {"unique-B": 0, "share_B": 0.}])
    s = vd.verdict_finding(other, ["it-SimPO", "pt-it"])
    assert "Unlike in the paper" in s and s.count("4 of 100") == 1


def test_scaling_and_verdicts_write_the_latents_table(tmp_path, monkeypatch):
    x, doc, cc = toy()
    monkeypatch.setattr(scaling, "open_pair", lambda run, pair: (FakeStore(x, doc), cc))
    file = tmp_path/"latents"/"A-B"/"scaling.parquet"
    t, n = scaling.scale_pair(tmp_path, AB, n_boot=20)
    first = file.read_bytes()
    scaling.scale_pair(tmp_path, AB, n_boot=20)
    assert first == file.read_bytes()

    assert vd.judge_pair(tmp_path, AB)[1] == n == len(x)
    got = latents("A-B", tmp_path)
    assert got.verdict.tolist() == KNOWN_VERDICTS
    need = ("latent norm_A norm_B delta_norm cos count freq max_act n_docs C nu_eps_B nu_r_B nu_eps_A nu_r_A "
            "beta_eps_A_pB beta_r_B_pA nu_eps_B_lo nu_r_B_hi verdict reason alive")
    assert set(need.split()) <= set(got.columns)
