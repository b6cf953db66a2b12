"Weighted tables, tables as HTML, and the pictures of the published Elo scores."
import re

import numpy as np
import pandas as pd
import pytest

from llmdiff import paper as pp, tables as tb
from llmdiff.annotation import finish, load_taxonomy

TAX = load_taxonomy()


def latents(codes, **columns):
    d = finish([dict(latent=i, category=c, annotator="offline MiniLM", label="x", answer="ok") for i, c in enumerate(codes)], TAX)
    return d.assign(**{"freq": .01, "kl_recovered": np.nan, **columns})


def random_latents(n, seed, codes=("A.1", "B.7", "G.24", "")):
    g = np.random.default_rng(seed)
    return latents(g.choice(codes, n), freq=g.lognormal(-5, 1, n))


@pytest.mark.parametrize("by, make", [("class", tb.class_table), ("category", tb.category_table)])
def test_equal_weights_are_counts_exactly(by, make):
    A, B = random_latents(37, 0).assign(freq=.3), random_latents(23, 1).assign(freq=.3)
    w, c = tb.weighted_table(A, B, "freq", TAX, by, n=200), make(A, B, TAX)
    same = [x for x in c if x in w and x not in ("low_A", "high_A", "low_B", "high_B", "diff_low", "diff_high", "p", "q")]
    pd.testing.assert_frame_equal(w[same], c[same], check_exact=True)
    assert {"count_A", "n_A", "share_A", "share_B", "diff", "change"} <= set(same) and np.allclose(w[["n_eff_A", "n_eff_B"]], [37, 23])


def test_one_heavy_latent_carries_the_table_and_it_is_said():
    A, B = latents(["G.24"]*20), latents(["A.1"] + ["G.24"]*19, freq=[.5] + [.0001]*19)
    t = tb.weighted_table(A, B, "freq", TAX, n=500); s = t.set_index("class").loc["Safety & Content Moderation"]
    assert s.share_B > 99 and s.n_eff_B < 1.02 and s.n_eff_A == pytest.approx(20)
    assert (s.count_B, s.n_B) == (1, 20) and .01 < s.p < .05 < t.q.min()         # that the heavy one of forty is the odd one happens once in forty
    assert "effective number 1.0" in tb.finding(t, "it", "SimPO") and "effective 1.0" in tb.gt_html(tb.gt_table(t, "it", "SimPO"))


def test_shares_by_hand():
    A = latents(["A.1", "G.24", ""], freq=[.1, .2, .1]); B = latents(["A.1", "A.2"], freq=[.05, .15])
    t = tb.weighted_table(A, B, "freq", TAX, "category", n=50).set_index("code")
    assert np.allclose(t.share_A[["A.1", "G.24", tb.UNASSIGNED]], [25, 50, 25]) and np.allclose(t.share_B[["A.1", "A.2"]], [25, 75])
    assert t.change["A.1"] == pytest.approx(0) and t.change["A.2"] == np.inf and t["class"]["A.2"] == "Safety & Content Moderation"
    assert t.n_eff_A.iloc[0] == pytest.approx(.16/.06)


def test_only_measured_latents_enter_and_negative_effects_are_counted():
    A = latents(["A.1", "G.24", "G.24", "B.7"], kl_recovered=[.2, -.1, .2, np.nan]); B = latents(["A.1", "B.7"], kl_recovered=[.1, .3])
    t = tb.weighted_table(A, B, "kl_recovered", TAX, n=100); r = t.iloc[0]
    assert (r.n_A, r.of_A, r.clipped_A, r.n_B, r.of_B, r.clipped_B) == (3, 4, 1, 2, 2, 0)
    assert t.set_index("class").share_A["Safety & Content Moderation"] == pytest.approx(50)
    says = tb.weighing(t, "it", "SimPO")
    assert "it 3 of 4 latents measured" in says and "1 with a negative effect counted as 0" in says and says in tb.gt_html(tb.gt_table(t, "it", "SimPO"))


@pytest.mark.parametrize("A, B", [([], []), (["A.1"], []), (["A.1", "B.7"], ["A.1"])])
def test_no_latents_or_no_weight_is_a_sentence(A, B, recwarn):
    "Without latents, without one measured, with negative effects only."
    for side in (latents(B), latents(B, kl_recovered=-.1)):
        for by in ("class", "category"):
            t = tb.weighted_table(latents(A, kl_recovered=.1), side, "kl_recovered", TAX, by, n=50)
            assert t.p.isna().all() and t.q.isna().all() and "nothing to compare" in tb.finding(t, "it", "SimPO")
            text = tb.bars({"by count": t, "by effect": t}, "it", "SimPO").axes[1].texts
            assert text and "nothing to compare" in text[0].get_text()
            tb.gt_html(tb.gt_table(t, "it", "SimPO"))
    assert not recwarn.list


def test_whole_table_needs_assigned_latents_on_both_sides():
    t = tb.weighted_table(latents(["", ""]), latents(["A.1", ""]), "freq", TAX, n=50)
    assert t.p_table.isna().all() and "no latent of one side is assigned" in tb.finding(t, "it", "SimPO")


def test_p_is_uniform_where_nothing_differs():
    t = [tb.weighted_table(random_latents(30, 2*s), random_latents(20, 2*s + 1), "freq", TAX, n=200, seed=s) for s in range(150)]
    for p in (np.array([x.set_index("class").p["Safety & Content Moderation"] for x in t]), np.array([x.p_table[0] for x in t])):
        assert .005 < (p <= .05).mean() < .12 and .4 < p.mean() < .6


def test_weights_that_differ_between_the_models_are_no_change_of_classes():
    "One heavy latent in every B, and weights ten times as large: the tests still reject as rarely as they say."
    p = []
    for s in range(150):
        A, B = random_latents(20, 2*s), random_latents(30, 2*s + 1)
        B = B.assign(freq=10*B.freq*np.where(B.latent == 0, 50, 1)); t = tb.weighted_table(A, B, "freq", TAX, n=200, seed=s)
        p.append([t.set_index("class").p["Safety & Content Moderation"], t.p_table[0]])
    assert ((np.array(p) <= .05).mean(0) < .11).all()


def test_a_real_change_is_found_and_repeats():
    g = np.random.default_rng(0); A, B = latents(["G.24"]*30 + ["A.1"]*5, freq=g.lognormal(-5, .5, 35)), latents(["A.1"]*30 + ["G.24"]*5, freq=g.lognormal(-5, .5, 35))
    t = tb.weighted_table(A, B, "freq", TAX, n=1000, seed=3); s = t.set_index("class").loc["Safety & Content Moderation"]
    assert s.q < .05 and 0 < s.diff_low < s["diff"] < s.diff_high < 100 and "2 of 7 classes changed" in tb.finding(t, "it", "SimPO")
    pd.testing.assert_frame_equal(t, tb.weighted_table(A, B, "freq", TAX, n=1000, seed=3), check_exact=True)
    assert not t.low_A.equals(tb.weighted_table(A, B, "freq", TAX, n=1000, seed=4).low_A)


def test_bootstrap_covers_in_the_usual_case():
    "The interval of a share holds the true one (2/4 of lognormal weights) about as often as it says."
    t = [tb.weighted_table(random_latents(80, s, ("A.1", "B.7")), random_latents(80, 999 + s, ("A.1", "B.7")), "freq", TAX, n=200, seed=s).set_index("class").loc["Linguistic Capabilities"] for s in range(80)]
    assert np.mean([r.low_A < 50 < r.high_A for r in t]) > .85 and np.mean([r.diff_low < 0 < r.diff_high for r in t]) > .85


# ---------------------------------------------------------------- pictures

def test_panels_share_the_rows_and_carry_shares():
    A, B = random_latents(30, 5), random_latents(30, 6)
    c, w = tb.class_table(A, B, TAX), tb.weighted_table(A, B, "freq", TAX, n=100)
    fig = tb.bars({"by count": c, "by frequency": w}, "it", "SimPO", "it against SimPO")
    names = [x.get_text() for x in fig.axes[0].get_yticklabels()]; by = w.set_index("class")
    assert [p.get_width() for p in fig.axes[1].patches] == pytest.approx(list(by["diff"][names]))
    assert [x.get_text() for x in fig.axes[1].texts] == [f"{by.share_A[n]:.0f} → {by.share_B[n]:.0f} %" for n in names]


def test_a_published_table_is_drawn_whole():
    "It has no line of unassigned latents: all ten rows are bars."
    t = tb.published_categories()
    assert len(tb.bars(t, "it", "SimPO").axes[0].patches) == len(t) == 10


# ---------------------------------------------------------------- HTML

def table(by="category"):
    A, B = random_latents(12, 7), random_latents(9, 8)
    return (tb.category_table if by == "category" else tb.class_table)(A, B, TAX)


def test_html_repeats_is_small_and_reaches_nothing_else(tmp_path):
    h = [tb.gt_html(tb.gt_table(table(), "it", "SimPO", "caption")) for _ in "ab"]
    assert h[0] == h[1] and h[0] != tb.gt_html(tb.gt_table(table(), "it", "SimPO", "another"))
    assert len(h[0]) < 6000
    own = re.search(r'<div id="(\w+)"', h[0])[1]; css = re.search(r"<style>(.*)</style>", h[0], re.S)[1]
    assert all(rule.strip().startswith(f"#{own} ") for rule in re.findall(r"([^{}]+)\{[^}]*\}", css))
    pages = []
    for _ in "ab":
        tb.save_html(tb.gt_table(table(), "it", "SimPO", "caption"), "x", tmp_path); pages.append((tmp_path/"tables"/"x.html").read_bytes())
    assert pages[0] == pages[1] and pages[0].count(b"<table") == 1 and b'charset="utf-8"' in pages[0]


def test_html_has_spanners_groups_counts_and_what_is_left_out():
    t = table(); h = tb.gt_html(tb.gt_table(t, "it", "SimPO", "Table 4"))
    for words in ("it (N = 12)", "SimPO (N = 9)", "Safety &amp; Content Moderation", "Table 4", "27 rows without a latent are not shown", "Fisher p", "BH q"): assert words in h, words
    r = t[t.code == "A.1"].iloc[0]
    assert f">{r.count_A}<" in h and f"{r.share_A:.2f} [{r.low_A:.1f}, {r.high_A:.1f}]" in h


def test_html_escapes_names_and_captions():
    bad = '<script>alert(1)</script>" id="z'; t = table().assign(category=bad); t["class"] = bad
    h = tb.gt_html(tb.gt_table(t, "it<b>", bad, bad), page=True)
    assert "<script" not in h and "<b>" not in h and "&lt;script&gt;" in h and 'id="z' not in h
    assert "id=&quot;z" in h                                                    # the text itself is whole


# ---------------------------------------------------------------- Elo

@pytest.mark.parametrize("version, columns", [(2, ["raw_it", "raw_SimPO", "style_it", "style_SimPO"]), (1, ["it", "SimPO"])])
def test_elo_pictures_and_tables_carry_each_printed_number(version, columns):
    printed = pd.read_csv(tb.path("data/paper")/("elo.csv" if version == 2 else "elo_v1.csv")).set_index("category")
    signed = [c for c in printed if "delta" in c or c == "diff"]
    fig = pp.elo_picture(version); rows = [x.get_text() for x in fig.axes[0].get_yticklabels()]
    assert sorted(rows) == sorted(printed.index)
    at = {c: set() for c in rows}                                              # what stands on each category's line, panel by panel
    for k, ax in enumerate(fig.axes):
        for x in ax.texts: at[rows[int(x.xy[1])]].add((k, x.get_text()))
    for c, r in printed.iterrows():
        want = {(k, str(r[x])) for k, pair in enumerate(zip(columns[::2], columns[1::2])) for x in pair} | {(k, f"{r[x]:+d}") for k, x in enumerate(signed)}
        assert want == at[c], c
    h = tb.gt_html(pp.elo_table(version)).replace("−", "-")
    for c, r in printed.iterrows():
        line = re.findall(r"<td[^>]*>([^<]*)</td>", re.search(rf"<td>{c}</td>.*?</tr>", h, re.S)[0])
        assert sorted(line[1:]) == sorted([*(str(r[x]) for x in columns), *(f"{r[x]:+d}" for x in signed)]), c
    assert "no intervals" in h and "no intervals" in fig.get_suptitle()
