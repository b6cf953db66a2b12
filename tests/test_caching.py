"""The activation store: right numbers, killed runs, broken files, changed inputs, order of batches."""
import json, shutil, signal, subprocess, sys
from collections import namedtuple
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch, transformers
from tokenizers import Tokenizer, models as tm

from llmdiff import caching
from llmdiff.caching import Store, batches, bench_harvest, buckets, harvest, norm_table, pad, residual, stream, tap
from llmdiff.core import UserError
from llmdiff.models import layers_of

VOCAB = 64

@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDIFF_CACHE", str(tmp_path/"cache")); torch.set_num_threads(1)

def toy(arch="Llama", d=32, n_layers=4, seed=0):
    torch.manual_seed(seed)
    cfg = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(arch, arch) + "Config")(
        vocab_size=VOCAB, hidden_size=d, intermediate_size=64, num_hidden_layers=n_layers, num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=8)
    return getattr(transformers, f"{arch}ForCausalLM")(cfg).eval()

def save_toy(folder, edit=None, words=VOCAB, **kw):
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tm.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0")), eos_token="w1")
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = toy(**kw)
    if edit:
        with torch.no_grad(): edit(model)
    model.save_pretrained(folder); tok.save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope="session")
def family(tmp_path_factory):
    d = tmp_path_factory.mktemp("family")
    return {n: save_toy(d/n, seed=i) for i, n in enumerate(("A", "B", "C"))}

@pytest.fixture(scope="session")
def docs():
    r = np.random.default_rng(0)
    ids = [r.integers(0, VOCAB, r.integers(4, 30)).astype(np.int32) for _ in range(30)]
    return pd.DataFrame(dict(doc=range(30), ids=ids, keep=[np.array([i not in (0, 2) for i in range(len(x))]) for x in ids]))

@pytest.fixture
def args(family, docs, tmp_path):
    return dict(models=family, docs=docs, layer=1, folder=tmp_path/"store", dtype="float32", shard_tokens=100, batch_tokens=64, say=lambda s: None)

def files(folder): return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}

@pytest.fixture(scope="session")
def whole(family, docs, tmp_path_factory):
    "A store that nothing happened to; tests copy it before they harm it."
    d = tmp_path_factory.mktemp("whole")/"store"
    harvest(family, docs, 1, d, dtype="float32", shard_tokens=100, batch_tokens=64, say=lambda s: None)
    return d


# ---- the numbers

@pytest.mark.parametrize("arch", ["Llama", "Gemma2", "Gemma3"])
@pytest.mark.parametrize("layer", [0, 2])
def test_residual_is_the_hidden_state_and_layers_above_do_not_run(arch, layer):
    m, ran = toy(arch), []
    ids, mask = pad([list(range(20)), list(range(30, 41))])
    with torch.no_grad(): want = m(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer+1]
    for i, l in enumerate(layers_of(m)): l.mlp.register_forward_hook(lambda *a, i=i: ran.append(i))
    m.lm_head.register_forward_hook(lambda *a: ran.append("head"))
    net, layers = tap(m)
    got = residual(net, layers[layer], ids, mask)
    assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-6)
    assert ran == list(range(layer+1))

def test_a_model_that_was_read_can_be_freed(docs):
    import weakref
    def read():
        m = toy(); caching.read_part(tap(m), 1, docs[:2], 64); return weakref.ref(m)
    w = read(); caching.release()
    assert w() is None

def test_a_layer_that_returns_a_tuple():
    h = torch.ones(2, 3, 4)
    assert stream((h, None)) is h and stream(h) is h

def test_store_holds_each_models_activations_of_each_kept_token(whole, family, docs):
    s = Store(whole)
    assert s.models == ["A", "B", "C"] and s.n_docs == 30 and s.d_model == 32 and s.n_tokens == sum(k.sum() for k in docs.keep)
    rows = list(s.rows())
    acts, tok, pos, doc = (torch.cat([r[k] for r in rows]) for k in ("acts", "token", "pos", "doc"))
    assert len(rows) > 2 and acts.shape == (s.n_tokens, 3, 32) and acts.dtype == torch.float32
    assert doc.tolist() == [d for d, k in zip(docs.doc, docs.keep) for _ in range(k.sum())]
    assert tok.tolist() == [int(t) for i, k in zip(docs.ids, docs.keep) for t in i[k]]
    assert pos.tolist() == [int(p) for k in docs.keep for p in np.flatnonzero(k)]
    for j, n in enumerate(s.models):
        m = transformers.AutoModelForCausalLM.from_pretrained(family[n]).eval()
        for d in (0, 17):
            ids = torch.tensor(docs.ids[d].astype(int))[None]
            with torch.no_grad(): h = m(input_ids=ids, output_hidden_states=True).hidden_states[2][0, docs.keep[d]]
            assert torch.allclose(acts[doc == d][:, j], h, atol=.02*h.abs().max())       # bf16 on disk

def test_mean_and_variance_are_those_of_the_stored_values(whole):
    s = Store(whole); x = torch.cat([r["acts"] for r in s.rows()]).double()
    assert np.allclose(s.mean, x.mean(0), atol=1e-12) and s.mean.dtype == np.float64
    assert np.allclose(s.var, x.var(0, correction=0).sum(1), rtol=1e-12) and s.var.shape == (3,)

def test_a_pair_is_its_two_models_in_the_order_asked(whole):
    s = Store(whole); a, b = next(iter(s.rows()))["acts"], next(iter(s.rows(["C", "A"])))["acts"]
    assert torch.equal(a[:, [2, 0]], b)
    with pytest.raises(UserError, match="no model 'D'.*A, B, C"): list(s.rows(["A", "D"]))

def test_norms_of_tokens_left_out(whole, family, docs):
    t = norm_table(Store(whole)).set_index(["model", "tokens"])
    m = transformers.AutoModelForCausalLM.from_pretrained(family["B"]).eval()
    with torch.no_grad(): first = [m(input_ids=torch.tensor(i.astype(int))[None], output_hidden_states=True).hidden_states[2][0, 0].norm().item() for i in docs.ids]
    assert np.isclose(t.loc[("B", "position 0"), "50%"], np.median(first), rtol=1e-4)
    assert t["count"].groupby("tokens").first().to_dict() == {"kept": Store(whole).n_tokens, "position 0": 30, "special or template": 30}

def test_buckets_hold_every_document_once_within_the_budget():
    n = np.random.default_rng(0).integers(0, 50, 200)
    b = buckets(n, 120)
    assert sorted(np.concatenate(b).tolist()) == np.flatnonzero(n).tolist()
    assert all(len(x)*n[x].max() <= 120 for x in b)


# ---- killed runs and broken files

KILL = """
import os, signal, sys, json, pandas as pd, torch
torch.set_num_threads(1)
from llmdiff import caching
real, left = caching.write_tensors, [int(sys.argv[2])]
def write(file, tensors):
    if left[0] == 0:
        open(str(file) + ".half", "wb").write(b"half")           # what a cut leaves: a file under another name
        open(file.parent/f".{file.stem}.tmp1.safetensors", "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(file, tensors)
caching.write_tensors = write
a = json.load(open(sys.argv[1]))
caching.harvest(a["models"], pd.read_parquet(a["docs"]), 1, a["folder"], dtype="float32", shard_tokens=100, batch_tokens=64)
"""

def test_a_run_killed_by_the_system_continues_and_ends_with_the_same_bytes(args, docs, family, whole, tmp_path):
    docs.to_parquet(tmp_path/"docs.parquet")
    (tmp_path/"a.json").write_text(json.dumps(dict(models=family, docs=str(tmp_path/"docs.parquet"), folder=str(args["folder"]))))
    n = len(Store(whole).manifest["shards"])
    r = subprocess.run([sys.executable, "-c", KILL, tmp_path/"a.json", str(n + 2)], capture_output=True, text=True)
    assert r.returncode == -signal.SIGKILL, r.stderr
    with pytest.raises(UserError, match="half built.*continues"): Store(args["folder"])
    read = []
    def say(s): read.append(s.split(":")[0])
    harvest(**{**args, "say": say})
    assert read == ["B", "C"]                                     # A was whole and is not read again
    assert files(args["folder"]) == files(whole)                  # manifest, shards, and no debris

@pytest.mark.parametrize("kill_at", [0, 1, 4, 7, 13])
def test_an_interruption_anywhere_leaves_nothing_wrong(args, whole, monkeypatch, kill_at):
    real, count = caching.write_tensors, [0]
    def write(*a):
        count[0] += 1
        if count[0] > kill_at: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(caching, "write_tensors", write)
    with pytest.raises(KeyboardInterrupt): harvest(**args)
    monkeypatch.setattr(caching, "write_tensors", real)
    harvest(**args)
    assert files(args["folder"]) == files(whole)

def test_a_bad_part_is_named_and_read_again(args, whole, monkeypatch):
    real = caching.join_parts
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(caching, "join_parts", stop)
    with pytest.raises(KeyboardInterrupt): harvest(**args)
    monkeypatch.setattr(caching, "join_parts", real)
    f = args["folder"]/"parts"/"B_00001.safetensors"; raw = bytearray(f.read_bytes()); raw[-3] ^= 255; f.write_bytes(raw)
    (args["folder"]/"parts"/"C_00000.safetensors").write_bytes(b"short")
    said = []; harvest(**{**args, "say": said.append})
    assert said[0].startswith("part B 1 ") and said[1].startswith("part C 0 ") and len(said) == 4
    assert files(args["folder"]) == files(whole)

@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_bad_shard_is_named_and_rebuilt_alone(args, whole, harm):
    shutil.copytree(whole, args["folder"])
    f = args["folder"]/"shard_00002.safetensors"
    if harm == "flip": raw = bytearray(f.read_bytes()); raw[-1] ^= 1; f.write_bytes(raw)
    if harm == "cut": f.write_bytes(f.read_bytes()[:1000])
    if harm == "remove": f.unlink()
    if harm != "flip":
        with pytest.raises(UserError, match="shard_00002.safetensors is missing or cut short"): Store(args["folder"])
    said = []; harvest(**{**args, "say": said.append})
    assert "shard_00002" in said[0] and all("in 1 shard," in s for s in said[1:])
    assert files(args["folder"]) == files(whole)

def test_a_whole_store_is_not_read_again(args, whole, monkeypatch):
    shutil.copytree(whole, args["folder"])
    monkeypatch.setattr(caching, "load_model", lambda *a: pytest.fail("loaded a model"))
    harvest(**args)


# ---- changed inputs

def test_a_changed_model_is_refused_or_rebuilt_when_told(args, whole, family, tmp_path):
    shutil.copytree(whole, args["folder"])
    s, new = Store(args["folder"]), {**family, "B": save_toy(tmp_path/"newB", seed=9)}
    s.check(models=family, layer=1); s.check(models={"C": family["C"]})
    s.check(models={**family, "B": str(shutil.copytree(family["B"], tmp_path/"copy"))})          # the same weights elsewhere
    with pytest.raises(UserError, match="other weights of B"): s.check(models=new)
    with pytest.raises(UserError, match="other weights of B.*rebuild=True"): harvest(**{**args, "models": new})
    assert files(args["folder"]) == files(whole)                                                   # refused: nothing lost
    said = []; t = harvest(**{**args, "models": new, "rebuild": True, "say": said.append})
    assert "other weights of B" in said[0]
    t.check(models=new)
    assert not torch.equal(next(t.rows(["B"]))["acts"], next(Store(whole).rows(["B"]))["acts"]) and torch.equal(next(t.rows(["C"]))["acts"], next(Store(whole).rows(["C"]))["acts"])

@pytest.mark.parametrize("change,says", [(dict(layer=2), "layer 1, and 2 is asked"), (dict(docs=20), "another corpus"), (dict(models=2), "the models A, B, C, and A, B are asked"),
                                         (dict(shard_tokens=50), "shard_tokens 100, and 50"), (dict(dtype="bfloat16"), "dtype float32, and bfloat16")])
def test_other_inputs_are_named(args, whole, docs, family, change, says):
    shutil.copytree(whole, args["folder"])
    if "docs" in change: change = dict(docs=docs[:change["docs"]])
    if "models" in change: change = dict(models={n: family[n] for n in list(family)[:2]})
    with pytest.raises(UserError, match=says): harvest(**{**args, **change})
    assert files(args["folder"]) == files(whole)

def test_check_compares_the_corpus(args):
    s = harvest(**args, corpus=dict(hash="h1", tokenizer="t", ctx=128))
    s.check(corpus_hash="h1")
    with pytest.raises(UserError, match="another corpus"): s.check(corpus_hash="h2")
    assert s.manifest["ctx"] == 128 and s.manifest["tokenizer"] == "t"

def test_an_unreadable_manifest_is_refused(args, whole):
    shutil.copytree(whole, args["folder"]); (args["folder"]/"manifest.json").write_text('{"format": 1, "na')
    with pytest.raises(UserError, match="format unreadable"): harvest(**args)
    harvest(**{**args, "rebuild": True})
    assert files(args["folder"]) == files(whole)

def test_a_store_that_is_not_there_names_the_step(tmp_path):
    with pytest.raises(UserError, match="run notebook 03_caching first"): Store(tmp_path)


# ---- bad input, before anything is loaded

def no_loading(monkeypatch): monkeypatch.setattr(caching, "load_model", lambda *a: pytest.fail("loaded a model"))

def test_bad_layer_corpus_width_tokenizer(args, family, docs, tmp_path, monkeypatch):
    no_loading(monkeypatch)
    with pytest.raises(UserError, match="layer 4 is out of range"): harvest(**{**args, "layer": 4})
    with pytest.raises(UserError, match="corpus is empty"): harvest(**{**args, "docs": docs[:0]})
    with pytest.raises(UserError, match="not one token to keep"): harvest(**{**args, "docs": docs.assign(keep=[k & False for k in docs.keep])})
    with pytest.raises(UserError, match="differ in width"): harvest(**{**args, "models": {"A": family["A"], "W": save_toy(tmp_path/"wide", d=48)}})
    with pytest.raises(UserError, match="different tokenizers"): harvest(**{**args, "models": {"A": family["A"], "T": save_toy(tmp_path/"tok", words=65)}})
    with pytest.raises(UserError, match="does not exist"): harvest(**{**args, "models": {"A": family["A"], "N": str(tmp_path/"nothing")}})
    assert not args["folder"].exists()

def test_a_full_disk_is_found_before_anything_runs(args, monkeypatch):
    no_loading(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: namedtuple("u", "total used free")(10**6, 10**6, 10_000))
    with pytest.raises(UserError, match="the activation store needs .* GB is free"): harvest(**args)

@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_name_model_shard_and_document(args, family, docs, tmp_path, bad):
    word = int(docs.ids[21][-1]); first = next(d for d in range(30) if word in docs.ids[d])
    def edit(m): m.model.embed_tokens.weight[word] = bad
    with pytest.raises(UserError, match=f"model X, shard [0-9]+, document {first}:"): harvest(**{**args, "models": {"A": family["A"], "X": save_toy(tmp_path/"x", edit)}, "batch_tokens": 1})


# ---- batches

def every(s, **kw): return list(batches(s, ["A", "C"], 32, 1000, 0, **{**dict(block=8, pool=64), **kw}))

def test_batches_are_deterministic_and_continue(whole):
    s = Store(whole); a, b = every(s), every(Store(whole))
    assert len(a) == 1000//32 and all(x.shape == (32, 2, 32) and x.dtype == torch.float32 for x in a)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[0], next(batches(s, ["A", "C"], 32, 1000, 1, block=8, pool=64)))
    for start in (1, 7, 20, 30): assert all(torch.equal(x, y) for x, y in zip(a[start:], every(s, start=start), strict=True))
    assert every(s, start=31) == []

def test_every_row_once_an_epoch_and_far_from_its_neighbours(whole):
    s = Store(whole); n = s.n_tokens
    key = {tuple(r.tolist()): i for i, r in enumerate(torch.cat([r["acts"] for r in s.rows(["A", "C"])]).flatten(1))}
    def order(epochs): return [key[tuple(r.tolist())] for x in batches(s, ["A", "C"], 1, epochs*n, 0, block=8, pool=64) for r in x.flatten(1)]
    two = order(2)
    assert sorted(two[:n]) == sorted(two[n:]) == list(range(n)) and two[:n] != two[n:]
    assert np.mean(np.abs(np.diff(two[:n])) < 3) < .2

def test_held_documents_are_never_trained_on(whole):
    s = Store(whole); train, held = s.split(.2)
    assert train == (0, 24) and held == (24, 30)
    rows = {tuple(r.tolist()) for x in s.rows(["A", "C"], docs=held) for r in x["acts"].flatten(1)}
    seen = {tuple(r.tolist()) for x in every(s, docs=train) for r in x.flatten(1)}
    assert rows and not rows & seen
    assert sum(len(x["doc"]) for d in (train, held) for x in s.rows(docs=d)) == s.n_tokens
    with pytest.raises(UserError, match="no token in documents"): every(s, docs=(30, 40))

def test_batches_larger_than_the_store_are_filled_from_several_epochs(whole):
    s = Store(whole); x = next(batches(s, ["A", "B"], 3*s.n_tokens, 3*s.n_tokens, 0))
    assert torch.allclose(x.sum(0), 3*torch.cat([r["acts"] for r in s.rows(["A", "B"])]).sum(0), atol=1e-2)


def test_benchmark_reads_the_same_and_leaves_the_model_as_it_was(docs, capsys):
    m = toy()
    r = bench_harvest(m, docs, 1, 64, repeats=1)
    assert len(layers_of(m)) == 4 and r["ratio"] > 0 and "ratio" in capsys.readouterr().out
