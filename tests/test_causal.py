"""The causal check: the patch equation, the machinery on three architectures, sets, intervals, a planted answer."""
import numpy as np, pandas as pd, pytest, torch, transformers
from llmdiff import causal
from llmdiff.caching import residual, tap
from llmdiff.causal import answer_positions, before_head, causal_pair, choose_chats, latent_sets, latent_steps, logits, patch_kl, recovered, shift, streams, variants
from llmdiff.core import UserError
from llmdiff.crosscoder import Crosscoder, set_normalisation

VOCAB, D = 64, 32

@pytest.fixture(autouse=True)
def one_thread(): torch.set_num_threads(1); torch.manual_seed(0)

def toy(arch="Llama", seed=0, **kw):
    torch.manual_seed(seed)
    cfg = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(arch, arch) + "Config")(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=.2, sliding_window=8, **kw)
    return getattr(transformers, f"{arch}ForCausalLM")(cfg).eval()

def random_crosscoder(n_latents=48, seed=0):
    cc = Crosscoder(D, n_latents, 6, ["A", "B"], seed=seed); g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in cc.parameters(): p += .1*torch.randn(p.shape, generator=g)
    set_normalisation(cc, torch.randn(2, D, generator=g), torch.tensor([20., 80.])); cc.theta.fill_(.3)
    return cc

def random_docs(n=20, seed=0, marker=(7, 5)): # question, marker, answer, 6
    r, rows = np.random.default_rng(seed), []
    for i in range(n):
        q, a = r.integers(10, VOCAB, r.integers(2, 6)), r.integers(10, VOCAB, r.integers(6, 20))
        ids = np.r_[1, q, marker, a, 6]
        keep = np.r_[False, np.ones(len(q), bool), False, False, np.ones(len(a), bool), False]
        rows.append(dict(doc=i, kind="prose" if i % 5 == 0 else "chat", ids=ids, keep=keep))
    return pd.DataFrame(rows)

def table(unique=4, shared=30, n=48):
    return pd.DataFrame(dict(latent=range(n), verdict=["unique-B"]*unique + ["shared"]*shared + ["dead"]*(n - unique - shared), alive=[True]*(unique + shared) + [False]*(n - unique - shared)))

def chats(n=6): return choose_chats(random_docs(), [7, 5], (0, 20), n, 12)


# ---- the equation

def test_latents_and_constant_are_the_difference_of_reconstructions_in_residual_units():
    cc = random_crosscoder(); x = torch.randn(30, 2, D)*torch.tensor([1., 2.])[:, None]
    codes, (steps, const) = cc.encode(cc.normalise(x)), latent_steps(cc)
    hat = cc.denormalise(cc.decode(*codes, 30)).detach()
    assert torch.allclose(shift(codes, 30, steps, torch.ones(48, dtype=bool)) + const, hat[:, 1] - hat[:, 0], atol=1e-4)
    f = cc.dense_codes(cc.normalise(x)); some = torch.arange(48) % 3 == 0
    by_hand = (f*some) @ (cc.W_dec[:, 1]/cc.scale[1].float() - cc.W_dec[:, 0]/cc.scale[0].float()).detach()
    assert torch.allclose(shift(codes, 30, steps, some), by_hand, atol=1e-4)
    wrong = (f*some) @ (cc.W_dec[:, 1] - cc.W_dec[:, 0]).detach()/cc.scale[1].float()          # subtracting first is another thing
    assert (wrong - by_hand).abs().max() > .1

def test_a_perfect_crosscoder_turns_A_into_B_at_kept_tokens():
    cc, k = random_crosscoder(), np.arange(10) > 0
    h_A = torch.randn(10, D)*3; v = variants(h_A, torch.randn(10, D)*3, k, cc, latent_sets(table()))
    codes = cc.encode(cc.normalise(torch.stack([h_A[1:], v["h_B everywhere"][1:]], 1))); hat = cc.denormalise(cc.decode(*codes, 9)).detach()
    assert torch.allclose(v["all latents and constant"][1:] - h_A[1:], hat[:, 1] - hat[:, 0], atol=1e-4)
    for n, s in v.items(): assert n == "h_B everywhere" or torch.equal(s[0], h_A[0])


# ---- the machinery

@pytest.mark.parametrize("arch", ["Llama", "Gemma2", "Gemma3"])
def test_patching_agrees_with_a_hook_on_the_whole_model(arch):
    a, b = toy(arch, 0), toy(arch, 1); ids = torch.randint(0, VOCAB, (14,)); ran = []
    net, layers = tap(b); h = residual(*(lambda t: (t[0], t[1][2]))(tap(a)), ids[None], torch.ones(1, 14, dtype=int))
    with torch.no_grad():
        handle = b.model.layers[2].register_forward_hook(lambda m, x, out: h.clone()); want = b(input_ids=ids[None]).logits[0]; handle.remove()
        plain = b(input_ids=ids[None]).logits[0]
    for i, l in enumerate(b.model.layers): l.mlp.register_forward_hook(lambda *x, i=i: ran.append(i))
    got = logits(b, before_head(net, layers, 2, ids, h)[0])
    assert ran == [3]                                            # layers below the patch do not run
    assert torch.allclose(got, want, atol=1e-4) and (plain - want).abs().max() > .1
    assert torch.allclose(logits(b, before_head(net, layers, 2, ids, None)[0]), plain, atol=1e-4)

@pytest.mark.parametrize("arch", ["Llama", "Gemma2", "Gemma3"])
def test_full_replacement_recovers_everything_and_no_patch_nothing(arch):
    c, a, b = chats(), toy(arch, 0), toy(arch, 1)
    r = causal_pair(["A", "B"], b, 1, c, streams(a, 1, c), random_crosscoder(), table()).set_index("patch")
    assert abs(r.recovered["h_B everywhere"] - 1) < 1e-4 and r.kl["h_B everywhere"] < 1e-5 and r.recovered["none"] == 0 and r.kl["none"] > .01
    assert r.latents.dropna().to_dict() == {"none": 0, "constant": 0, "unique-B": 4, "random 1": 4, "random 2": 4, "random 3": 4, "shared": 30, "all latents": 48, "all latents and constant": 48}
    assert (r.lo <= r.recovered + 1e-12).all() and (r.recovered <= r.hi + 1e-12).all() and (r.kl >= 0).all()
    assert (r.docs == 6).all() and (r.tokens == sum(len(x["at"]) for x in c)).all()

def test_kl_is_the_definition():
    c, a, b = chats(2), toy(seed=0), toy(seed=1)
    h = streams(a, 1, c)[0]
    kl = patch_kl(b, tap(b), 1, c[0], {"none": h, "zero": torch.zeros_like(h)}, rows=5)
    with torch.no_grad():
        p = b(input_ids=torch.tensor(c[0]["ids"])[None]).logits[0].softmax(-1)
        handle = b.model.layers[1].register_forward_hook(lambda m, x, out: h[None].clone()); q = b(input_ids=torch.tensor(c[0]["ids"])[None]).logits[0].softmax(-1); handle.remove()
    want = [float((p[t-1]*(p[t-1]/q[t-1]).log()).sum()) for t in c[0]["at"]]
    assert np.allclose(kl[kl.patch == "none"].kl, want, atol=1e-4) and len(kl) == 2*len(c[0]["at"])

def test_a_planted_latent_is_the_whole_effect():
    "B is A plus one direction after the layer. The latent that holds it recovers what can be recovered; any other recovers nothing."
    a, b = toy(seed=0, mlp_bias=True), toy(seed=0, mlp_bias=True); v = torch.randn(D)*3
    with torch.no_grad(): b.model.layers[1].mlp.down_proj.bias += v
    cc = Crosscoder(D, 48, 6, ["A", "B"]); set_normalisation(cc, torch.randn(2, D), torch.tensor([20., 80.])); cc.theta.fill_(.5)
    with torch.no_grad():
        cc.W_enc.zero_(); cc.b_enc.fill_(-1); cc.b_enc[0] = 2.
        cc.W_dec[0, 0] = 0; cc.W_dec[0, 1] = v*cc.scale[1].float()/2
    c = chats()
    r = causal_pair(["A", "B"], b, 1, c, streams(a, 1, c), cc, table(unique=1)).set_index("patch")
    assert r.kl["none"] > .05 and r.recovered["unique-B"] > .3
    assert np.isclose(r.recovered["unique-B"], r.recovered["h_B at kept tokens"], atol=1e-3) and np.isclose(r.recovered["unique-B"], r.recovered["all latents"], atol=1e-6)
    assert all(abs(r.recovered[f"random {i}"]) < 1e-6 for i in (1, 2, 3))
    above, d, lo, hi = causal.advantage(causal_pair(["A", "B"], b, 1, c, streams(a, 1, c), cc, table(unique=1)))
    assert above == 3 and np.isclose(d, r.recovered["unique-B"], atol=1e-6) and lo > 0

def test_equal_models_have_nothing_to_recover():
    c, a = chats(2), toy()
    with pytest.raises(UserError, match="A and B predict the same"): causal_pair(["A", "B"], a, 1, c, streams(a, 1, c), random_crosscoder(), table())

def test_an_empty_set_is_a_row_with_no_latents():
    c, a, b = chats(3), toy(seed=0), toy(seed=1)
    r = causal_pair(["A", "B"], b, 1, c, streams(a, 1, c), random_crosscoder(), table(unique=0)).set_index("patch")
    for n in ("unique-B", "random 1", "random 3"): assert r.latents[n] == 0 and r.kl[n] == r.kl["none"] and r.recovered[n] == 0

def test_the_same_twice():
    c, a, b = chats(3), toy(seed=0), toy(seed=1)
    one, two = (causal_pair(["A", "B"], b, 1, c, streams(a, 1, c), random_crosscoder(), table(), seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


# ---- sets, answers, intervals

def test_random_sets_are_alive_not_unique_and_of_the_same_size():
    t = table(unique=4, shared=10); s = latent_sets(t, n_random=5)
    for r in range(1, 6):
        x = s[f"random {r}"]
        assert x.sum() == 4 and not x[:4].any() and not x[14:].any()
    assert len({tuple(s[f"random {r}"].tolist()) for r in range(1, 6)}) > 1
    assert latent_sets(table(unique=20, shared=5))["random 1"].sum() == 5          # no more than there are
    assert latent_sets(t.sample(frac=1, random_state=0))["unique-B"].nonzero().flatten().tolist() == [0, 1, 2, 3]

def test_answers_are_found_and_predicted_from_the_token_before():
    at, place = answer_positions([1, 9, 7, 5, 30, 31, 6, 9, 7, 5, 32], [0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1], [7, 5])
    assert at.tolist() == [4, 5, 10] and place.tolist() == [0, 1, 0]
    c = chats(20)
    assert len(c) == 16 and all(len(x["at"]) <= 12 and x["at"][-1] == len(x["ids"]) for x in c)      # the last answer token itself is not read
    docs = random_docs().set_index("doc")
    assert all(not docs.keep[x["doc"]][x["at"][0] - 1] and docs.kind[x["doc"]] == "chat" for x in c)

def test_chats_come_from_the_span_asked_and_too_few_are_refused():
    assert all(10 <= x["doc"] < 20 for x in choose_chats(random_docs(), [7, 5], (10, 20), 50, 12))
    with pytest.raises(UserError, match="documents 0 to 1 hold 1 chats"): choose_chats(random_docs(), [7, 5], (0, 2), 5, 12)
    with pytest.raises(UserError, match="hold 0 chats"): choose_chats(random_docs(), [60, 61, 62], (0, 20), 5, 12)

def test_a_template_without_an_opening_is_refused():
    class T:
        def apply_chat_template(self, m, **k): return m[0]["content"]
    with pytest.raises(UserError, match="no opening of an answer"): causal.answer_marker(T())

def test_bootstrap_is_over_documents():
    r = np.random.default_rng(0); k = r.uniform(.2, .8, 40)
    kl = pd.DataFrame([dict(doc=d, place=p, patch=n, kl=v) for d in range(40) for p in range(9) for n, v in (("none", 1.), ("some", k[d]))])
    one, many = recovered(kl, seed=1), recovered(pd.concat([kl]*5), seed=1)
    s = one.set_index("patch").loc["some"]
    assert np.isclose(s.recovered, 1 - k.mean()) and np.isclose(s.hi - s.lo, 2*1.96*k.std()/40**.5, rtol=.2)
    assert np.allclose(one.hi - one.lo, many.hi - many.lo)                                             # more tokens of the same documents add no certainty

def test_a_table_of_another_crosscoder_is_refused():
    c, a, b = chats(2), toy(seed=0), toy(seed=1)
    with pytest.raises(UserError, match="30 rows and its crosscoder 48 latents"): causal_pair(["A", "B"], b, 1, c, streams(a, 1, c), random_crosscoder(), table(n=30, shared=10))
