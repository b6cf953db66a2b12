"Caching: the store holds what the models compute at the layer, and bad input is refused before a model is loaded."
import shutil
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch

import harvests
from harvests import hidden_states, save_toy, toy
from llmdiff import caching
from llmdiff.caching import buckets, norm_table, pad, read_part, release, residual, stream, tap
from llmdiff.core import UserError
from llmdiff.engine.progress import disk_width
from llmdiff.engine.store import Store
from llmdiff.models import layers_of

one_thread = harvests.one_thread
docs = harvests.docs
family = harvests.family
folder = harvests.folder
make = harvests.make
whole = harvests.whole


# ---- the numbers

def note_runs(model):
    "A list that each layer, and the head, adds itself to when it runs."
    ran = []
    for i, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_hook(lambda *a, i=i: ran.append(i))
    model.lm_head.register_forward_hook(lambda *a: ran.append("head"))
    return ran


@pytest.mark.parametrize("arch", ["Llama", "Gemma2", "Gemma3"])
@pytest.mark.parametrize("layer", [0, 2])
def test_residual_is_the_hidden_state_and_layers_above_do_not_run(arch, layer):
    m = toy(arch)
    ids, mask = pad([list(range(20)), list(range(30, 41))])
    with torch.no_grad(): out = m(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    want = out.hidden_states[layer + 1]
    ran = note_runs(m)
    net, layers = tap(m)
    got = residual(net, layers[layer], ids, mask)
    assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-6)
    assert ran == list(range(layer + 1))


def test_a_layer_that_returns_a_tuple():
    h = torch.ones(2, 3, 4)
    assert stream((h, None)) is h and stream(h) is h


def test_a_model_that_was_read_can_be_freed(docs):
    def read():
        m = toy()
        read_part(tap(m), 1, docs[:2], 64)
        return weakref.ref(m)

    w = read()
    release()
    assert w() is None


def test_store_holds_each_models_activations_of_each_kept_token(whole, family, docs):
    s = Store(whole)
    rows = list(s.rows())
    acts, doc = (torch.cat([r[k] for r in rows]) for k in ("acts", "doc"))
    for j, n in enumerate(s.models):
        for d in (0, 17):
            h = hidden_states(family[n], docs.ids[d], 1)[docs.keep[d]]
            assert torch.allclose(acts[doc == d][:, j], h, atol=.02*h.abs().max())       # bf16 on disk


def test_norms_of_tokens_left_out(whole, family, docs):
    t = norm_table(Store(whole)).set_index(["model", "tokens"])
    first = [hidden_states(family["B"], ids, 1)[0].norm().item() for ids in docs.ids]
    assert np.isclose(t.loc[("B", "position 0"), "50%"], np.median(first), rtol=1e-4)
    counts = t["count"].groupby("tokens").first().to_dict()
    assert counts == {"kept": Store(whole).n_tokens, "position 0": 30, "special or template": 30}


def test_buckets_hold_every_document_once_within_the_budget():
    n = np.random.default_rng(0).integers(0, 50, 200)
    b = buckets(n, 120)
    assert sorted(np.concatenate(b).tolist()) == np.flatnonzero(n).tolist()
    assert all(len(x)*n[x].max() <= 120 for x in b)


# ---- bad input, before anything is loaded

@pytest.fixture
def no_loading(monkeypatch): monkeypatch.setattr(caching, "load_model", lambda *a: pytest.fail("loaded a model"))


def free(monkeypatch, n_bytes):
    "A disk with so much room."
    usage = namedtuple("usage", "total used free")(10**9, 0, n_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage)


def test_bad_layer_corpus_width_tokenizer(make, folder, family, docs, tmp_path, no_loading):
    A = family["A"]
    nothing = docs.assign(keep=[k & False for k in docs.keep])
    wide, words = save_toy(tmp_path/"wide", d=48), save_toy(tmp_path/"tok", words=65)
    with pytest.raises(UserError, match="layer 4 is out of range"): make(layer=4)
    with pytest.raises(UserError, match="corpus is empty"): make(docs=docs[:0])
    with pytest.raises(UserError, match="not one token to keep"): make(docs=nothing)
    with pytest.raises(UserError, match="differ in width"): make(models={"A": A, "W": wide})
    with pytest.raises(UserError, match="different tokenizers"): make(models={"A": A, "T": words})
    with pytest.raises(UserError, match="does not exist"): make(models={"A": A, "N": str(tmp_path/"nothing")})
    assert not folder.exists()


def test_a_full_disk_is_found_before_anything_runs(make, monkeypatch, no_loading):
    free(monkeypatch, 10_000)
    with pytest.raises(UserError, match="the activation store needs .* GB is free"): make()


def test_int8_needs_half_the_disk(make, whole, monkeypatch, no_loading):
    free(monkeypatch, Store(whole).n_tokens*disk_width(3, 32, "bfloat16", torch.bfloat16))
    with pytest.raises(UserError, match="needs .* GB is free"): make()
    with pytest.raises(pytest.fail.Exception, match="loaded a model"): make(dtype="bfloat16", store_dtype="int8")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_name_model_shard_and_document(make, family, docs, tmp_path, bad):
    word = int(docs.ids[21][-1])
    first = next(d for d in range(30) if word in docs.ids[d])

    def edit(m): m.model.embed_tokens.weight[word] = bad

    models = {"A": family["A"], "X": save_toy(tmp_path/"x", edit)}
    says = f"model X, shard [0-9]+, document {first}:"
    with pytest.raises(UserError, match=says): make(models=models, batch_tokens=1)
