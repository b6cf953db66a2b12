"Steering: pushes in residual units, planted directions, greedy answers, nothing to steer with, escaped texts."
import numpy as np
import pytest
import torch

from llmdiff.caching import residual, tap
from llmdiff.causal import before_head, by_energy, causal_pair, logits, streams
from llmdiff.closer.steering import (
    pushes, steer_pair, steer_texts, steered_answers, steered_side_by_side, steering_in_words)
from llmdiff.corpus import render_chat, tokenise
from llmdiff.crosscoder import Crosscoder, set_normalisation
from llmdiff.models import end_id, layers_of, load_model, load_tokenizer
from toy_chats import chats, D, one_thread, planted, random_crosscoder, table, toy  # noqa: F401

AB = ["A", "B"]


def test_pushes_are_in_residual_units():
    cc = random_crosscoder()
    most = np.arange(48.)
    info, push = pushes(cc, [7, 9], most, [0, .5, 2])
    assert info.a.tolist() == [.5, 2]*4 and info.latent.tolist() == [7]*4 + [9]*4
    assert info.direction.tolist() == ["latent"]*2 + ["random"]*2 + ["latent"]*2 + ["random"]*2
    assert torch.allclose(push[1], 2*7*cc.W_dec[7, 1].detach()/cc.scale[1].float(), rtol=1e-5)
    assert torch.allclose(push.norm(dim=1), torch.tensor(info.norm.to_numpy(), dtype=torch.float32), rtol=1e-4)
    same = [torch.allclose(push[i].norm(), push[i + 2].norm(), rtol=1e-4) for i in (0, 1, 4, 5)]
    assert all(same) and not torch.allclose(push[0], push[2])
    x = torch.zeros(1, 2, D)
    f = torch.zeros(1, 48)
    f[0, 7] = 7.                          # what the crosscoder itself adds to B for f = 7
    adds = cc.denormalise(torch.einsum("nj,jmd->nmd", f, cc.W_dec)) - cc.denormalise(x)
    assert torch.allclose(push[1]/2, adds.detach()[0, 1].float(), atol=1e-4)


def test_steering_A_by_the_planted_direction_makes_it_B():
    a, b, cc, v = planted()
    c = chats()
    h_A, h_B = streams(a, 1, c), streams(b, 1, c)
    info, push = pushes(cc, [0], np.full(48, 2.), [0, 1])   # the latent is active at 2 everywhere
    assert torch.allclose(push[0], v, atol=1e-4)
    t = steer_pair(AB, [a, b], 1, c, [h_A, h_B], info, push).set_index(["steered", "direction"])
    patched = causal_pair(AB, b, 1, c, h_A, cc, table(unique=1), n_random=1).set_index("patch")
    full = patched.recovered["h_B at kept tokens"]
    assert np.isclose(t.recovered["A", "latent"], full, atol=1e-3) and t.recovered["A", "random"] < .5*full
    assert t.lo["A", "latent"] > 0
    assert np.isnan(t.recovered["B", "latent"]) and (t.kl > .01).all() and (t.kl_lo <= t.kl).all()
    assert (t.kl <= t.kl_hi).all()
    assert "pushes along unique latents, 1 bring A nearer" in steering_in_words(t.reset_index())


def test_without_a_unique_latent_there_is_nothing_to_steer_with():
    c, a, b, cc = chats(3), toy(seed=0), toy(seed=1), random_crosscoder()
    info, push = pushes(cc, by_energy(table(unique=0), np.ones(48), 2), np.ones(48), [0, 1])
    s = steer_pair(AB, [a, b], 1, c, [streams(a, 1, c), streams(b, 1, c)], info, push)
    assert len(s) == 0 and {"kl", "recovered", "steered", "pair"} <= set(s)
    assert "nothing to steer" in steering_in_words(s)
    t = steer_texts(AB, [a, b], None, 1, ["x"], info, push)
    assert len(t) == 0 and "<table" in steered_side_by_side(t).to_html()


@pytest.fixture(scope="module")
def shipped():
    return load_model("data/tiny/pt", "float32"), load_tokenizer({"pt": "data/tiny/pt"})


def test_steered_generation_is_greedy_and_pushes_what_patching_pushes(shipped):
    model, tok = shipped
    d, n, layer = model.config.hidden_size, 6, 2
    text, spans = render_chat([dict(role="user", content="How are you today?")], tok)
    ids, keep, _ = tokenise(text, spans, tok)
    ids = torch.tensor(ids.tolist())
    push = torch.stack([torch.zeros(d), 8*torch.randn(d)])
    hooks = len(layers_of(model)[layer]._forward_hooks)
    got = steered_answers(model, tok, layer, "How are you today?", push, n)
    net, layers = tap(model)
    for p, text in zip(push, got):   # by hand: one token at a time, no cache, nnsight
        x, on = ids, torch.from_numpy(keep)
        for _ in range(n):
            h = residual(net, layers[layer], x[None], torch.ones(1, len(x), dtype=int)) + on[:, None]*p
            new = logits(model, before_head(net, layers, layer, x, h)[0, -1:]).argmax(-1)
            if new == end_id(tok):
                break
            x, on = torch.cat([x, new]), torch.cat([on, torch.ones(1, dtype=bool)])
        assert tok.decode(x[len(ids):], skip_special_tokens=True).strip() == text
    assert got[0] != got[1] and len(layers_of(model)[layer]._forward_hooks) == hooks
    assert steered_answers(model, tok, layer, "How are you today?", push, n) == got


def test_texts_stand_side_by_side_and_are_escaped(shipped):
    model, tok = shipped
    cc = Crosscoder(model.config.hidden_size, 20, 4, ["A", "B"])
    set_normalisation(cc, torch.zeros(2, model.config.hidden_size), torch.tensor([20., 80.]))
    info, push = pushes(cc, [3], np.full(20, 5.), [0, 1, 2])
    t = steer_texts(AB, [model, model], tok, 2, ["Hello <b>you</b>"], info, push, 4)
    assert t.a.tolist() == [0, 1, 2] and (t.A == t.B).all()
    page = steered_side_by_side(t.assign(A="<script>alert(1)</script>")).to_html()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>you" not in page and "unsteered" in page
