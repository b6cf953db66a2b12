"Tables in which each latent counts by its weight, tables as HTML, and panels side by side."
import re

import numpy as np
import pandas as pd
import pytest

from llmdiff import tables as tb
from llmdiff.annotation import annotation_frame, load_taxonomy
from llmdiff.engine.show import gt_html, save_html

TAX = load_taxonomy()
SAFETY, LANGUAGE = "Safety & Content Moderation", "Linguistic Capabilities"


def latents(codes, **columns):
    same = dict(annotator="offline MiniLM", label="x", answer="ok")
    rows = [dict(latent=i, category=c, **same) for i, c in enumerate(codes)]
    return annotation_frame(rows, TAX).assign(**{"freq": .01, "kl_recovered": np.nan, **columns})


def random_latents(n, seed, codes=("A.1", "B.7", "G.24", "")):
    g = np.random.default_rng(seed)
    return latents(g.choice(codes, n), freq=g.lognormal(-5, 1, n))


def by_freq(A, B, **how): return tb.weighted_table(A, B, "freq", TAX, **how)


@pytest.mark.parametrize("by, make", [("class", tb.class_table), ("category", tb.category_table)])
def test_equal_weights_are_counts_exactly(by, make):
    A, B = random_latents(37, 0).assign(freq=.3), random_latents(23, 1).assign(freq=.3)
    w, c = by_freq(A, B, by=by, n=200), make(A, B, TAX)
    intervals = ("low_A", "high_A", "low_B", "high_B", "diff_low", "diff_high", "p", "q")
    same = [x for x in c if x in w and x not in intervals]
    pd.testing.assert_frame_equal(w[same], c[same], check_exact=True)
    assert {"count_A", "n_A", "share_A", "share_B", "diff", "change"} <= set(same)
    assert np.allclose(w[["n_eff_A", "n_eff_B"]], [37, 23])


def test_one_heavy_latent_carries_the_table_and_it_is_said():
    A, B = latents(["G.24"]*20), latents(["A.1"] + ["G.24"]*19, freq=[.5] + [.0001]*19)
    t = by_freq(A, B, n=500)
    s = t.set_index("class").loc[SAFETY]
    assert s.share_B > 99 and s.n_eff_B < 1.02 and s.n_eff_A == pytest.approx(20)
    assert (s.count_B, s.n_B) == (1, 20)
    assert .01 < s.p < .05 < t.q.min()         # that the heavy one of forty is the odd one happens once in forty
    assert "effective number 1.0" in tb.table_finding(t, "it", "SimPO")
    assert "effective 1.0" in gt_html(tb.gt_table(t, "it", "SimPO"))


def test_shares_by_hand():
    A, B = latents(["A.1", "G.24", ""], freq=[.1, .2, .1]), latents(["A.1", "A.2"], freq=[.05, .15])
    t = by_freq(A, B, by="category", n=50).set_index("code")
    assert np.allclose(t.share_A[["A.1", "G.24", tb.UNASSIGNED]], [25, 50, 25])
    assert np.allclose(t.share_B[["A.1", "A.2"]], [25, 75])
    assert t.change["A.1"] == pytest.approx(0) and t.change["A.2"] == np.inf and t["class"]["A.2"] == SAFETY
    assert t.n_eff_A.iloc[0] == pytest.approx(.16/.06)


def test_only_measured_latents_enter_and_negative_effects_are_counted():
    A = latents(["A.1", "G.24", "G.24", "B.7"], kl_recovered=[.2, -.1, .2, np.nan])
    B = latents(["A.1", "B.7"], kl_recovered=[.1, .3])
    t = tb.weighted_table(A, B, "kl_recovered", TAX, n=100)
    r = t.iloc[0]
    assert (r.n_A, r.of_A, r.clipped_A, r.n_B, r.of_B, r.clipped_B) == (3, 4, 1, 2, 2, 0)
    assert t.set_index("class").share_A[SAFETY] == pytest.approx(50)
    says = tb.weighing(t, "it", "SimPO")
    assert "it 3 of 4 latents measured" in says and "1 with a negative effect counted as 0" in says
    assert says in gt_html(tb.gt_table(t, "it", "SimPO"))


@pytest.mark.parametrize("A, B", [([], []), (["A.1"], []), (["A.1", "B.7"], ["A.1"])])
def test_no_latents_or_no_weight_is_a_sentence(A, B, recwarn):
    "Without latents, without one measured, with negative effects only."
    for side in (latents(B), latents(B, kl_recovered=-.1)):
        for by in ("class", "category"):
            t = tb.weighted_table(latents(A, kl_recovered=.1), side, "kl_recovered", TAX, by, n=50)
            assert t.p.isna().all() and t.q.isna().all()
            assert "nothing to compare" in tb.table_finding(t, "it", "SimPO")
            text = tb.bars({"by count": t, "by effect": t}, "it", "SimPO").axes[1].texts
            assert text and "nothing to compare" in text[0].get_text()
            gt_html(tb.gt_table(t, "it", "SimPO"))
    assert not recwarn.list


def test_whole_table_needs_assigned_latents_on_both_sides():
    t = by_freq(latents(["", ""]), latents(["A.1", ""]), n=50)
    assert t.p_table.isna().all()
    assert "no latent of one side is assigned" in tb.table_finding(t, "it", "SimPO")


def p_values(A, B, seed): # -> of the safety row, of the whole table
    t = by_freq(A, B, n=200, seed=seed)
    return t.set_index("class").p[SAFETY], t.p_table[0]


def test_p_is_uniform_where_nothing_differs():
    p = np.array([p_values(random_latents(30, 2*s), random_latents(20, 2*s + 1), s) for s in range(150)])
    for column in p.T: assert .005 < (column <= .05).mean() < .12 and .4 < column.mean() < .6


def test_weights_that_differ_between_the_models_are_no_change_of_classes():
    "One heavy latent in every B, and weights ten times as large: the tests still reject as rarely as they say."
    p = []
    for s in range(150):
        A, B = random_latents(20, 2*s), random_latents(30, 2*s + 1)
        heavy = np.where(B.latent == 0, 50, 1)
        p.append(p_values(A, B.assign(freq=10*B.freq*heavy), s))
    assert ((np.array(p) <= .05).mean(0) < .11).all()


def test_a_real_change_is_found_and_repeats():
    g = np.random.default_rng(0)
    A = latents(["G.24"]*30 + ["A.1"]*5, freq=g.lognormal(-5, .5, 35))
    B = latents(["A.1"]*30 + ["G.24"]*5, freq=g.lognormal(-5, .5, 35))
    t = by_freq(A, B, n=1000, seed=3)
    s = t.set_index("class").loc[SAFETY]
    assert s.q < .05 and 0 < s.diff_low < s["diff"] < s.diff_high < 100
    assert "2 of 7 classes changed" in tb.table_finding(t, "it", "SimPO")
    pd.testing.assert_frame_equal(t, by_freq(A, B, n=1000, seed=3), check_exact=True)
    assert not t.low_A.equals(by_freq(A, B, n=1000, seed=4).low_A)


def test_bootstrap_covers_in_the_usual_case():
    "The interval of a share holds the true one (2/4 of lognormal weights) about as often as it says."
    rows, codes = [], ("A.1", "B.7")
    for s in range(80):
        t = by_freq(random_latents(80, s, codes), random_latents(80, 999 + s, codes), n=200, seed=s)
        rows.append(t.set_index("class").loc[LANGUAGE])
    assert np.mean([r.low_A < 50 < r.high_A for r in rows]) > .85
    assert np.mean([r.diff_low < 0 < r.diff_high for r in rows]) > .85


# ---- pictures

def test_panels_share_the_rows_and_carry_shares():
    A, B = random_latents(30, 5), random_latents(30, 6)
    c, w = tb.class_table(A, B, TAX), by_freq(A, B, n=100)
    fig = tb.bars({"by count": c, "by frequency": w}, "it", "SimPO", "it against SimPO")
    names, by = [x.get_text() for x in fig.axes[0].get_yticklabels()], w.set_index("class")
    assert [p.get_width() for p in fig.axes[1].patches] == pytest.approx(list(by["diff"][names]))
    want = [f"{by.share_A[n]:.0f} → {by.share_B[n]:.0f} %" for n in names]
    assert [x.get_text() for x in fig.axes[1].texts] == want


# ---- HTML

def table(by="category"):
    A, B = random_latents(12, 7), random_latents(9, 8)
    return (tb.category_table if by == "category" else tb.class_table)(A, B, TAX)


def html(caption): return gt_html(tb.gt_table(table(), "it", "SimPO", caption))


def test_html_repeats_is_small_and_reaches_nothing_else(tmp_path):
    h = html("caption")
    assert h == html("caption") and h != html("another") and len(h) < 6000
    own, css = re.search(r'<div id="(\w+)"', h)[1], re.search(r"<style>(.*)</style>", h, re.S)[1]
    assert all(rule.strip().startswith(f"#{own} ") for rule in re.findall(r"([^{}]+)\{[^}]*\}", css))
    pages = []
    for _ in "ab":
        save_html(tb.gt_table(table(), "it", "SimPO", "caption"), "x", tmp_path)
        pages.append((tmp_path/"tables"/"x.html").read_bytes())
    assert pages[0] == pages[1] and pages[0].count(b"<table") == 1 and b'charset="utf-8"' in pages[0]


def test_html_has_spanners_groups_counts_and_what_is_left_out():
    t, h = table(), html("Table 4")
    for words in ("it (N = 12)", "SimPO (N = 9)", "Safety &amp; Content Moderation", "Table 4",
                  "27 rows without a latent are not shown", "Fisher p", "BH q"): assert words in h, words
    r = t[t.code == "A.1"].iloc[0]
    assert f">{r.count_A}<" in h and f"{r.share_A:.2f} [{r.low_A:.1f}, {r.high_A:.1f}]" in h


def test_html_escapes_names_and_captions():
    bad = '<script>alert(1)</script>" id="z'
    t = table().assign(**{"category": bad, "class": bad})
    h = gt_html(tb.gt_table(t, "it<b>", bad, bad), page=True)
    assert "<script" not in h and "<b>" not in h and "&lt;script&gt;" in h and 'id="z' not in h
    assert "id=&quot;z" in h                                                    # the text itself is whole
