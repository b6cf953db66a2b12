"""The causal check: the patch equation, many architectures, controls, intervals, planted answers, ablation."""
import numpy as np
import pandas as pd
import pytest
import torch

from llmdiff import causal
from llmdiff.caching import residual, tap
from llmdiff.causal import (
    against, answer_positions, before_head, by_energy, causal_pair, causal_words, chat_codes, check_logits,
    choose_chats, control_sets, energies, folded, kl_rows, latent_sets, latent_steps, logits, patch_kl,
    recovered, shift, single_effects, stand_in, streams, variants)
from llmdiff.core import latents, save_latents, UserError
from llmdiff.models import layers_of
from toy_chats import (
    ARCHS, chats, D, one_thread, planted, random_crosscoder, random_docs, replaced, table, toy, VOCAB)  # noqa: F401

AB = ["A", "B"]


# ---- the equation


def test_latents_and_constant_are_the_difference_of_reconstructions_in_residual_units():
    cc = random_crosscoder()
    x = torch.randn(30, 2, D)*torch.tensor([1., 2.])[:, None]
    codes, (steps, const) = cc.encode(cc.normalise(x)), latent_steps(cc)
    hat = cc.denormalise(cc.decode(*codes, 30)).detach()
    every = torch.ones(48, dtype=bool)
    assert torch.allclose(shift(codes, 30, steps, every) + const, hat[:, 1] - hat[:, 0], atol=1e-4)
    f = cc.dense_codes(cc.normalise(x))
    some = torch.arange(48) % 3 == 0
    by_hand = (f*some) @ (cc.W_dec[:, 1]/cc.scale[1].float() - cc.W_dec[:, 0]/cc.scale[0].float()).detach()
    assert torch.allclose(shift(codes, 30, steps, some), by_hand, atol=1e-4)
    # subtracting first is another thing
    wrong = (f*some) @ (cc.W_dec[:, 1] - cc.W_dec[:, 0]).detach()/cc.scale[1].float()
    assert (wrong - by_hand).abs().max() > .1


def test_a_perfect_crosscoder_turns_A_into_B_at_kept_tokens_and_back():
    cc, k = random_crosscoder(), np.arange(10) > 0
    h_A, h_B = torch.randn(10, D)*3, torch.randn(10, D)*3
    v, w = variants(h_A, h_B, k, cc, latent_sets(table())), variants(h_A, h_B, k, cc, latent_sets(table()), "ablate")
    codes = chat_codes(cc, h_A, h_B, k)
    hat = cc.denormalise(cc.decode(*codes, 9)).detach()
    assert torch.allclose(v["all latents and constant"][1:] - h_A[1:], hat[:, 1] - hat[:, 0], atol=1e-4)
    for n in ("unique-B", "shared", "constant", "random 2"):
        assert torch.allclose(v[n] - h_A, h_B - w[n], atol=1e-4)
    for n, s in v.items():
        assert n == "h_B everywhere" or torch.equal(s[0], h_A[0])
    for n, s in w.items():
        assert n == "h_A everywhere" or torch.equal(s[0], h_B[0])


# ---- the machinery


@pytest.mark.parametrize("arch", ARCHS)
def test_patching_agrees_with_a_hook_on_the_whole_model(arch):
    a, b = toy(arch, 0), toy(arch, 1)
    ids = torch.randint(10, VOCAB, (14,))
    ran = []
    net, layers = tap(b)
    h = residual(*(lambda t: (t[0], t[1][2]))(tap(a)), ids[None], torch.ones(1, 14, dtype=int))
    with torch.no_grad():
        want, plain = replaced(b, 2, h, ids)[0], b(input_ids=ids[None]).logits[0]
    stand_in(net, layers[2], h)                                  # has looked once at what the layers return
    for i, l in enumerate(layers_of(b)):
        for m in l.children():
            m.register_forward_hook(lambda *x, i=i: ran.append(i))
    got = logits(b, before_head(net, layers, 2, ids, h)[0])
    assert set(ran) == {3}                                       # layers below the patch do not run
    assert torch.allclose(got, want, atol=1e-4) and (plain - want).abs().max() > .02
    assert torch.allclose(logits(b, before_head(net, layers, 2, ids, None)[0]), plain, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_full_replacement_recovers_everything_and_no_patch_nothing(arch):
    c, a, b = chats(), toy(arch, 0), toy(arch, 1)
    r = causal_pair(AB, b, 1, c, streams(a, 1, c), random_crosscoder(), table(), n_random=3).set_index("patch")
    assert abs(r.recovered["h_B everywhere"] - 1) < 1e-4 and r.kl["h_B everywhere"] < 1e-5
    assert r.recovered["none"] == 0 and r.kl["none"] > 1e-4
    own = {"none": 0, "constant": 0, "unique-B": 4, "shared": 30, "all latents": 48, "all latents and constant": 48}
    controls = {f"{k}{i}": 4 for k in ("random", "matched") for i in ("", " 1", " 2", " 3")}
    assert r.latents.dropna().to_dict() == own | controls
    assert (r.lo <= r.recovered + 1e-12).all() and (r.recovered <= r.hi + 1e-12).all() and (r.kl >= 0).all()
    assert (r.docs == 6).all() and (r.tokens == sum(len(x["at"]) for x in c)).all()
    assert r.moved["none"] == 0 and np.isclose(r.moved["h_B at kept tokens"], 1)
    assert np.isclose(r.moved["random"], r.moved[["random 1", "random 2", "random 3"]].mean())


def test_a_model_with_other_logits_is_refused():
    c, b = chats(2), toy()
    b.register_forward_hook(lambda m, x, out: out.__setitem__("logits", out.logits*.5))
    with pytest.raises(UserError, match="makes its logits in a way"):
        check_logits(b, tap(b), 1, c[0])


@pytest.mark.parametrize("arch", ["Llama", "Gemma2"])
def test_kl_is_the_definition_and_copied_tokens_are_what_would_be_computed(arch):
    "Variants that fire late or never: the same KL as the whole model with a hook, and a silent variant is not run."
    c, a, b = chats(2)[0], toy(arch, 0), toy(arch, 1)
    n, at = len(c["ids"]), c["at"] - 1
    h = streams(a, 1, [c])[0]
    late = torch.arange(n)[:, None] >= at[len(at)//2]
    s = {"none": h, "zero": torch.zeros_like(h), "late": h + late*torch.randn(D),
         "silent": h.clone(), "early": h + 1.}
    ran = []
    layers_of(b)[3].register_forward_pre_hook(lambda m, args: ran.append(len(args[0])))
    kl = patch_kl(b, tap(b), 1, c, s, rows=5, batch_tokens=2*n)
    assert sum(ran) == 5 and max(ran) == 2   # none, zero, late and early, two at a time, and B as it is
    with torch.no_grad():
        p = b(input_ids=torch.tensor(c["ids"])[None]).logits[0].log_softmax(-1)
    q = replaced(b, 1, torch.stack(list(s.values())), c["ids"]).log_softmax(-1)
    want = (p[at].exp()*(p[at] - q[:, at])).sum(-1)
    got = kl.pivot(index="at", columns="patch", values="kl")[list(s)]
    assert np.allclose(got.to_numpy().T, want, atol=2e-5) and list(got.index) == list(c["at"])
    assert (got.silent == got.none).all() and (got.late == got.none)[:len(at)//2].all()
    assert (got.late != got.none)[len(at)//2:].all()


@pytest.mark.parametrize("arch", ["GPT2", "Gemma2", "Cohere", "Phi"])       # tied, bounded, scaled, with a bias
def test_the_head_in_blocks_is_the_head(arch):
    b = toy(arch)
    z, own, of = torch.randn(7, D), logits(b, torch.randn(3, D)), torch.tensor([0, 0, 1, 2, 2, 1, 0])
    want = (own[of].softmax(-1)*(own[of].log_softmax(-1) - logits(b, z).log_softmax(-1))).sum(-1)
    for block in (5, 64, 100):
        assert torch.allclose(kl_rows(b, z, own, of, block).float(), want, atol=1e-5)
    assert kl_rows(b, z[:0], own, of[:0]).shape == (0,)


def test_equal_models_have_nothing_to_recover():
    c, a = chats(2), toy()
    with pytest.raises(UserError, match="A and B predict the same"):
        causal_pair(AB, a, 1, c, streams(a, 1, c), random_crosscoder(), table())


# ---- planted answers


def test_a_planted_latent_is_the_whole_effect():
    """The latent that holds the difference recovers what can be recovered.

    Taken out of B it loses as much as can be lost; any other does nothing."""
    a, b, cc, _ = planted()
    c = chats()
    h_A = streams(a, 1, c)
    r, l = (causal_pair(AB, b, 1, c, h_A, cc, table(unique=1), n_random=19, way=way, n_single=5)
            for way in ("patch", "ablate"))
    v, w = r.set_index("patch"), l.set_index("patch")
    assert v.kl["none"] > .05 and v.recovered["unique-B"] > .3 and w.lost["unique-B"] > .3
    assert np.isclose(v.recovered["unique-B"], v.recovered["h_B at kept tokens"], atol=1e-3)
    assert np.isclose(w.lost["unique-B"], w.lost["h_A at kept tokens"], atol=1e-3)
    assert np.isclose(v.kl["none"], w.kl["h_A everywhere"], rtol=1e-4)
    assert np.isclose(v.moved["unique-B"], 1, atol=1e-4)
    for x in (r, l):
        assert {t["control"]: t["sets"] for t in x.attrs["against"]} == {"matched": 19, "random": 19}
        for t in x.attrs["against"]:
            assert t["p"] == 1/20 and abs(t["mean"]) < 1e-5
            assert np.isclose(t["difference"], t["unique"], atol=1e-5) and t["lo"] > 0
    one = single_effects(r, 48)
    assert list(one.latent) == list(range(48)) and one.kl_recovered.notna().sum() == 1
    assert one.kl_recovered[0] == v.recovered["unique-B"] and one.kl_recovered_lo[0] == v.lo["unique-B"]
    assert "1 unique latent recovers" in causal_words(folded(r), pd.DataFrame(r.attrs["against"]), "patch")
    lost = causal_words(folded(l), pd.DataFrame(l.attrs["against"]), "ablate")
    assert "without its 1 unique latent B loses" in lost


def test_a_unique_set_that_does_nothing_beats_no_control():
    a, b, cc, _ = planted()
    c = chats(3)
    t = table(unique=2)
    t.loc[0, "verdict"], t.loc[5, "verdict"] = "shared", "unique-B"
    r = causal_pair(AB, b, 1, c, streams(a, 1, c), cc, t, n_random=9)
    for x in r.attrs["against"]:
        assert x["p"] == 1 and x["lo"] <= 0


def test_the_mean_row_of_a_control_is_the_mean_of_its_sets():
    c, a, b = chats(4), toy(seed=0), toy(seed=1)
    for way, share in (("patch", "recovered"), ("ablate", "lost")):
        r = causal_pair(AB, b, 1, c, streams(a, 1, c), random_crosscoder(), table(), n_random=5, way=way)
        s = control_sets(r, way).groupby("control").share
        assert (s.size() == 5).all()
        for k, m in s.mean().items():
            assert np.isclose(r.set_index("patch")[share][k], m)
        assert not folded(r).patch.str.contains(r"\d").any()
        assert {"matched", "random", "unique-B"} < set(folded(r).patch)


def test_an_empty_set_is_a_row_with_no_latents():
    c, a, b, cc, t = chats(3), toy(seed=0), toy(seed=1), random_crosscoder(), table(unique=0)
    h_A = streams(a, 1, c)
    r, l = (causal_pair(AB, b, 1, c, h_A, cc, t, n_random=3, way=w, n_single=5) for w in ("patch", "ablate"))
    for n in ("unique-B", "random 1", "matched 3", "random"):
        v, w = r.set_index("patch"), l.set_index("patch")
        assert v.latents[n] == 0 and v.kl[n] == v.kl["none"] and v.recovered[n] == 0
        assert w.kl[n] == w.kl["none"] and v.moved[n] == 0
    assert all(x["p"] == 1 and x["difference"] == 0 for x in r.attrs["against"])
    assert single_effects(r, 48).kl_recovered.isna().all()
    assert "no latent is unique to B" in causal_words(folded(r), pd.DataFrame(r.attrs["against"]), "patch")


def test_the_same_twice():
    c, a, b = chats(3), toy(seed=0), toy(seed=1)
    one, two = (causal_pair(AB, b, 1, c, streams(a, 1, c), random_crosscoder(), table(), seed=3)
                for _ in range(2))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert one.attrs == two.attrs


# ---- sets, answers, intervals


def test_control_sets_are_alive_not_unique_and_of_the_same_size():
    t = table(unique=4, shared=10)
    s = latent_sets(t, n_random=5, energy=np.arange(48.)[::-1])
    for k in ("random", "matched"):
        for r in range(1, 6):
            x = s[f"{k} {r}"]
            assert x.sum() == 4 and not x[:4].any() and not x[14:].any()
        assert len({tuple(s[f"{k} {r}"].tolist()) for r in range(1, 6)}) > 1
    few = latent_sets(table(unique=20, shared=5), energy=np.ones(48))
    assert few["random 1"].sum() == few["matched 1"].sum() == 5          # no more than there are
    assert latent_sets(t.sample(frac=1, random_state=0))["unique-B"].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert "matched 1" not in latent_sets(t) and "unique-A" not in s


def test_sets_of_the_other_side_and_by_point():
    t = table()
    t.loc[[10, 11], "verdict"] = "unique-A"
    assert latent_sets(t)["unique-A"].nonzero().flatten().tolist() == [10, 11]
    # the same set is not shown twice
    assert "unique-B by point" not in latent_sets(t.assign(verdict_point=t.verdict))
    t["verdict_point"] = t.verdict.where(t.latent != 20, "unique-B")
    assert latent_sets(t)["unique-B by point"].nonzero().flatten().tolist() == [0, 1, 2, 3, 20]


def test_matched_sets_have_the_energy_of_the_unique_one():
    n = 400
    t = table(unique=5, shared=n - 5, n=n)
    e = np.exp(np.random.default_rng(0).normal(0, 3, n))
    unique = e[:5].sum()
    s = latent_sets(t, 50, energy=e, near=5)
    total = lambda k: np.array([e[s[f"{k} {r+1}"].numpy()].sum() for r in range(50)])
    assert np.abs(np.log(total("matched")/unique)).max() < .5 < np.abs(np.log(total("random")/unique)).mean()


def test_energy_is_the_squared_length_of_what_a_latent_adds():
    cc, k = random_crosscoder(), np.arange(12) > 0
    h = [(torch.randn(12, D)*3, torch.randn(12, D)*3) for _ in range(3)]
    steps, _ = latent_steps(cc)
    codes = [chat_codes(cc, a, b, k) for a, b in h]
    want = [sum(float(shift(f, 11, steps, torch.arange(48) == j).square().sum()) for f in codes) for j in range(48)]
    assert np.allclose(energies(codes, steps), want, rtol=1e-4)
    assert by_energy(table(), np.array([1., 5, 3, 2] + [9]*44), 3) == [1, 2, 3]


def test_answers_are_found_and_predicted_from_the_token_before():
    at, place = answer_positions([1, 9, 7, 5, 30, 31, 6, 9, 7, 5, 32], [0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1], [7, 5])
    assert at.tolist() == [4, 5, 10] and place.tolist() == [0, 1, 0]
    c = chats(20)
    # the last answer token itself is not read
    assert len(c) == 16 and all(len(x["at"]) <= 12 and x["at"][-1] == len(x["ids"]) for x in c)
    docs = random_docs().set_index("doc")
    assert all(not docs.keep[x["doc"]][x["at"][0] - 1] and docs.kind[x["doc"]] == "chat" for x in c)


def test_a_corpus_without_chats_compares_all_kept_tokens():
    docs = random_docs().assign(kind="prose")
    c = choose_chats(docs, None, (0, 20), 50, 12)
    assert len(c) == 20
    for x in c:
        assert x["at"].tolist() == np.flatnonzero(docs.keep[x["doc"]])[1:13].tolist()
        assert x["place"].tolist() == list(range(len(x["at"])))
    with pytest.raises(UserError, match="hold 1 documents of some length"):
        choose_chats(docs, None, (0, 1), 5, 12)


def test_chats_come_from_the_span_asked_and_too_few_are_refused():
    assert all(10 <= x["doc"] < 20 for x in choose_chats(random_docs(), [7, 5], (10, 20), 50, 12))
    with pytest.raises(UserError, match="documents 0 to 1 hold 1 chats"):
        choose_chats(random_docs(), [7, 5], (0, 2), 5, 12)
    with pytest.raises(UserError, match="hold 0 chats"):
        choose_chats(random_docs(), [60, 61, 62], (0, 20), 5, 12)


def test_a_template_that_cannot_tell_answers_is_refused():
    class T:
        def apply_chat_template(self, m, **k):
            return m[0]["content"]
    with pytest.raises(UserError, match="no opening of an answer"):
        causal.answer_marker(T())
    T.chat_template = None
    with pytest.raises(UserError, match="bring no chat template"):
        causal.answer_marker(T())


def test_bootstrap_is_over_documents():
    r = np.random.default_rng(0)
    k = r.uniform(.2, .8, 40)
    rows = [dict(doc=d, place=p, patch=n, kl=v)
            for d in range(40) for p in range(9) for n, v in (("none", 1.), ("some", k[d]))]
    kl = pd.DataFrame(rows)
    one, many = recovered(kl, seed=1), recovered(pd.concat([kl]*5), seed=1)
    s = one.set_index("patch").loc["some"]
    assert np.isclose(s.recovered, 1 - k.mean()) and np.isclose(s.hi - s.lo, 2*1.96*k.std()/40**.5, rtol=.2)
    assert np.allclose(one.hi - one.lo, many.hi - many.lo)   # more tokens of the same documents add no certainty


def test_first_ten_tokens_and_the_rest_have_their_own_shares():
    patched = [.2]*9 + [.4] + [.7]*20
    rows = [dict(doc=d, place=p, patch=n, kl=1. if n == "none" else patched[p])
            for d in range(8) for p in range(30 if d else 10) for n in ("none", "some")]
    s = recovered(pd.DataFrame(rows)).set_index("patch").loc["some"]   # document 0 has ten tokens only
    assert np.isclose(s.first10, .78) and np.isclose(s.rest, .3) and np.isclose(s.kl_rest, .7)
    assert s.rest < s.recovered < s.first10 and np.isclose(s.rest_lo, .3) and np.isclose(s.rest_hi, .3)
    short = recovered(pd.DataFrame([r for r in rows if r["place"] < 10])).set_index("patch").loc["some"]
    assert np.isnan(short.rest) and np.isnan(short.rest_lo) and np.isclose(short.first10, .78)


def test_rank_p_value_and_difference():
    def kl(unique, controls):
        left = {"none": 1., "unique-B": 1 - unique}
        left |= {f"matched {i+1}": 1 - c for i, c in enumerate(controls)}
        return pd.DataFrame([dict(doc=d, place=0, patch=n, kl=v) for d in range(6) for n, v in left.items()])

    c = np.linspace(0, .38, 39)
    assert against(kl(.5, c)).p[0] == 1/40 and np.isclose(against(kl(.295, c)).p[0], 10/40)
    assert against(kl(-1, c)).p[0] == 1
    a = against(kl(.5, c)).iloc[0]
    # documents agree: what is left is the choice of sets
    assert np.isclose(a.difference, .31) and a.most == c.max() and a.lo < .31 < a.hi
    assert np.isclose(a.hi - a.lo, 2*1.96*c.std()/39**.5, rtol=.2)
    assert against(kl(.2, [.2]*9)).p[0] == 1 and len(against(kl(.2, []))) == 0   # ties count against the unique set


def test_single_effects_join_the_latents_table(tmp_path):
    save_latents(table(n=5, unique=2, shared=3), "A-B", "scaling", tmp_path)
    r = pd.DataFrame(dict(patch=["unique-B", "latent 1", "latent 3"], recovered=[.5, .1, .2],
                          lo=[.4, 0., .1], hi=[.6, .2, .3]))
    save_latents(single_effects(r, 5), "A-B", "causal", tmp_path)
    t = latents("A-B", tmp_path)
    assert len(t) == 5 and t.kl_recovered.notna().tolist() == [False, True, False, True, False]
    assert t.kl_recovered_hi[3] == .3


def test_a_table_of_another_crosscoder_is_refused():
    c, a, b = chats(2), toy(seed=0), toy(seed=1)
    with pytest.raises(UserError, match="30 rows and its crosscoder 48 latents"):
        causal_pair(AB, b, 1, c, streams(a, 1, c), random_crosscoder(), table(n=30, shared=10))
