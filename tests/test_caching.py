"""The activation store: right numbers, killed runs, broken files, changed inputs, order of batches."""
import itertools, json, shutil, signal, subprocess, sys, threading, time
from collections import namedtuple
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch, transformers
from tokenizers import Tokenizer, models as tm

from llmdiff import caching
from llmdiff.caching import Store, batches, bench_harvest, bench_reader, buckets, disk_width, harvest, join, meter, norm_table, pack, packed, pad, residual, stream, tap, values
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

@pytest.fixture(scope="session")
def whole8(family, docs, tmp_path_factory):
    "The same in int8."
    d = tmp_path_factory.mktemp("whole8")/"store"
    harvest(family, docs, 1, d, dtype="float32", shard_tokens=100, batch_tokens=64, say=lambda s: None, store_dtype="int8")
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

def interrupted(args, monkeypatch, kill_at):
    "A harvest that ends after `kill_at` files are written."
    real, left = caching.write_tensors, iter(range(kill_at))
    def write(*a):
        if next(left, None) is None: raise KeyboardInterrupt
        return real(*a)
    with monkeypatch.context() as m:
        m.setattr(caching, "write_tensors", write)
        with pytest.raises(KeyboardInterrupt): harvest(**args)

@pytest.mark.parametrize("kill_at", [0, 1, 4, 7, 13])
def test_an_interruption_anywhere_leaves_nothing_wrong(args, whole, monkeypatch, kill_at):
    interrupted(args, monkeypatch, kill_at)
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


# ---- killed at any moment, and several processes

FORKS = """
import json, os, random, signal, sys, time, traceback, pandas as pd, torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from llmdiff import caching
a = json.load(open(sys.argv[1])); docs = pd.read_json(a["docs"]); r = random.Random(a["seed"])
def start(folder, **kw):
    if pid := os.fork(): return pid
    try: caching.harvest(a["models"], docs, 1, folder, dtype="float32", shard_tokens=100, batch_tokens=64, say=lambda s: None, **kw); os._exit(0)
    except BaseException: traceback.print_exc(); os._exit(1)
def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
t = time.monotonic(); assert end(start(a["folder"] + "_undisturbed")) == 0; took = time.monotonic() - t
world, killed = a["world"], 0
for n in range(a["kills"]):
    pids = [start(a["folder"], **dict(part=(i, world)) if world > 1 else {}) for i in range(world)]
    time.sleep(r.random()*took*.5/world); victim = pids[n % world]
    os.kill(victim, signal.SIGKILL); codes = [end(p) for p in pids]; killed += codes.count(-signal.SIGKILL)
    assert set(codes) <= {0, -signal.SIGKILL}, codes
codes = [end(p) for p in [start(a["folder"], **dict(part=(i, world)) if world > 1 else {}) for i in range(world)]]
assert set(codes) == {0}, codes
print(killed)
"""

@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(docs, family, whole, tmp_path, world):
    docs.to_json(tmp_path/"docs.json")
    (tmp_path/"a.json").write_text(json.dumps(dict(models=family, docs=str(tmp_path/"docs.json"), folder=str(tmp_path/"store"), kills=6, seed=world, world=world)))
    r = subprocess.run([sys.executable, "-c", FORKS, tmp_path/"a.json"], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert int(r.stdout) >= 1, "no run was killed before its end"
    if world > 1: join(tmp_path/"store")
    assert files(tmp_path/"store") == files(whole) == files(tmp_path/"store_undisturbed")

@pytest.mark.parametrize("world,dtype", [(2, "bfloat16"), (3, "bfloat16"), (2, "int8")])
def test_several_processes_leave_the_bytes_of_one(args, whole, whole8, world, dtype):
    for r in reversed(range(world)):
        assert harvest(**args, part=(r, world), store_dtype=dtype) is None
        with pytest.raises(UserError, match="lacks shards 0, " if r else "half built"): join(args["folder"]) if r else Store(args["folder"])
    join(args["folder"]); one = whole8 if dtype == "int8" else whole
    assert files(args["folder"]) == files(one) and Store(args["folder"]).hash == Store(one).hash
    assert join(args["folder"]).n_tokens == Store(whole).n_tokens                                 # again: nothing to do
    harvest(**args, part=(0, world), store_dtype=dtype); assert files(args["folder"]) == files(one)

def test_another_number_of_processes_continues(args, whole, monkeypatch):
    real = caching.load_model; loaded = []
    monkeypatch.setattr(caching, "load_model", lambda *a: loaded.append(a[0]) or real(*a))
    harvest(**args, part=(1, 3)); harvest(**args, part=(2, 3)); n = len(loaded)
    harvest(**args, part=(1, 2))                                                                  # of its shards 1, 3, 5, only 3 is missing
    assert len(loaded) == n + 3
    harvest(**args)
    assert files(args["folder"]) == files(whole)

def test_processes_that_were_asked_for_different_things(args, family):
    harvest(**args, part=(0, 2))
    with pytest.raises(UserError, match="layer 1, and 2 is asked.*rebuild=True"): harvest(**{**args, "layer": 2}, part=(1, 2))
    harvest(**{**args, "layer": 2}, part=(1, 2), rebuild=True)
    with pytest.raises(UserError, match="asked for different things.*layer"): join(args["folder"])
    with pytest.raises(UserError, match="below 2"): harvest(**args, part=(2, 2))

def test_a_rebuild_by_several_processes(args, whole, docs):
    harvest(**{**args, "docs": docs[:29], "shard_tokens": 50})                                    # other shards in the folder, and more of them
    with pytest.raises(UserError, match="rebuild=True"): harvest(**args, part=(1, 2))
    for r in (1, 0): harvest(**args, part=(r, 2), rebuild=True)
    join(args["folder"]); assert files(args["folder"]) == files(whole)

def test_a_bad_shard_is_rebuilt_by_its_process(args, whole):
    shutil.copytree(whole, args["folder"])
    f = args["folder"]/"shard_00002.safetensors"; raw = bytearray(f.read_bytes()); raw[-1] ^= 1; f.write_bytes(raw)
    said = []
    for r in (0, 1): harvest(**{**args, "say": said.append}, part=(r, 2))
    assert "shard_00002" in said[0] and len(said) == 4
    join(args["folder"]); assert files(args["folder"]) == files(whole)


# ---- int8

def test_int8_keeps_models_and_difference(whole, whole8):
    a, b = (torch.cat([r["acts"] for r in Store(d).rows()]) for d in (whole, whole8))
    off = lambda x, y: (x - y).norm()/(y - y.mean(0)).norm()
    assert a.shape == b.shape and b.dtype == torch.float32
    for m in range(3): assert off(b[:, m], a[:, m]) < .02
    assert off(b[:, 2] - b[:, 0], a[:, 2] - a[:, 0]) < .02
    s = Store(whole8); x = b.double()
    assert np.allclose(s.mean, x.mean(0), atol=1e-12) and np.allclose(s.var, x.var(0, correction=0).sum(1), rtol=1e-12)      # of what reading gives
    assert torch.equal(torch.cat([r["acts"] for r in s.rows(["C", "A"])]), b[:, [2, 0]])
    assert ["int8" in repr(Store(d)) for d in (whole, whole8)] == [False, True]
    assert len(norm_table(s)) == len(norm_table(Store(whole)))

def test_int8_with_large_dimensions_and_with_none_that_varies():
    g = torch.Generator().manual_seed(0); x = torch.randn(500, 40, generator=g); x[:, :3] = 1000 + 60*x[:, :3]; x[:, 5] = 7.; x[:, 6] = 0.
    y = values(packed(pack(x), []), 0, 500)[:, 0]
    assert (y - x)[:, 7:].norm()/x[:, 7:].norm() < .02 and (y - x)[:, :3].abs().max() < 4
    assert torch.allclose(y[:, 5:7], x[:, 5:7], atol=1e-5)
    assert torch.equal(values(packed(pack(x[:1]), []), 0, 1)[:, 0], x[:1]) and values(packed(pack(x[:0]), []), 0, 0).shape == (0, 1, 40)

def test_int8_takes_half_the_disk_and_says_so_before(args, whole, whole8, docs, monkeypatch):
    acts = lambda d: sum(t.numel()*t.element_size() for i in range(len(Store(d).manifest["shards"])) for k, t in Store(d).shard(i).items() if k in ("acts", "scale"))
    assert acts(whole8)/acts(whole) == pytest.approx((32 + 4)/64)
    assert disk_width(2, 3584, "int8", torch.bfloat16)/disk_width(2, 3584, "bfloat16", torch.bfloat16) < .51
    no_loading(monkeypatch)
    n = Store(whole).n_tokens; monkeypatch.setattr(shutil, "disk_usage", lambda p: namedtuple("u", "total used free")(10**9, 0, n*disk_width(3, 32, "bfloat16", torch.bfloat16)))
    with pytest.raises(UserError, match="needs .* GB is free"): harvest(**args)
    with pytest.raises(pytest.fail.Exception, match="loaded a model"): harvest(**{**args, "dtype": "bfloat16"}, store_dtype="int8")       # enough for int8

def test_the_disk_never_holds_more_than_was_said(args, whole8, monkeypatch):
    "Measured at every write, for parts and shards together."
    real, most = caching.write_tensors, []
    def write(*a):
        e = real(*a); most.append(sum(f.stat().st_size for f in args["folder"].rglob("*.safetensors"))); return e
    monkeypatch.setattr(caching, "write_tensors", write)
    for kind in ("bfloat16", "int8"):
        most.clear(); s = harvest(**{**args, "folder": args["folder"]}, store_dtype=kind, rebuild=True)
        rows = [x["rows"] for x in s.manifest["shards"]]
        head = 3000*len(rows)*4                                                                   # headers, moments and norms, which matter in a toy alone
        assert max(most) <= disk_width(3, 32, kind, torch.float32)*(s.n_tokens + max(rows)) + head

@pytest.mark.parametrize("kill_at", [0, 1, 7, 9, 13])
def test_int8_interrupted_and_continued(args, whole8, monkeypatch, kill_at):
    interrupted(dict(args, store_dtype="int8"), monkeypatch, kill_at)
    harvest(**args, store_dtype="int8")
    assert files(args["folder"]) == files(whole8)

def test_formats_are_told_apart(args, whole, whole8):
    shutil.copytree(whole8, args["folder"])
    with pytest.raises(UserError, match="store_dtype int8, and bfloat16 is asked"): harvest(**args)
    with pytest.raises(UserError, match="store_dtype 'fp8' is unknown: bfloat16 or int8"): harvest(**args, store_dtype="fp8")
    f = args["folder"]/"manifest.json"; m = json.loads(f.read_text()); assert m["format"] == 2 and json.loads((whole/"manifest.json").read_text())["format"] == 1
    f.write_text(json.dumps({**m, "format": 3}))
    with pytest.raises(UserError, match="format 3, this version reads 1, 2"): Store(args["folder"])


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

@pytest.mark.parametrize("size,start,held", [(32, 0, False), (32, 13, True), (5, 100, False), (700, 1, False)])
def test_batches_are_those_of_the_plain_reading(whole, size, start, held):
    "No thread, no buffer: every pool read whole, its rows permuted, one row after the other."
    s = Store(whole); kw = dict(docs=s.split()[0] if held else None, block=8, pool=64)
    def rows():
        for blocks, key in caching.plan_pools(s, kw["docs"], 3, 8, 64):
            x = torch.cat([s.shard(i)["acts"][a:b, [2, 1]] for i, a, b in blocks]).float()
            yield from x[torch.from_numpy(np.random.default_rng(key).permutation(len(x)))]
    want = torch.stack(list(itertools.islice(rows(), start*size, 2100//size*size)))
    assert torch.equal(torch.cat(list(batches(s, ["C", "B"], size, 2100, 3, start=start, **kw))), want)

def test_int8_batches_are_the_rows_in_the_same_order(whole, whole8):
    a, b = every(Store(whole)), every(Store(whole8))
    assert all(x.dtype == torch.float32 and (x - y).norm() < .03*x.norm() for x, y in zip(a, b, strict=True))
    rows = {tuple(r.tolist()) for x in Store(whole8).rows(["A", "C"]) for r in x["acts"].flatten(1)}
    assert {tuple(r.tolist()) for x in b for r in x.flatten(1)} <= rows

def test_one_pool_is_read_ahead_and_no_more(whole, monkeypatch):
    real, read = caching.read_blocks, []
    monkeypatch.setattr(caching, "read_blocks", lambda *a: read.append(threading.current_thread()) or real(*a))
    it = batches(Store(whole), ["A", "C"], 32, 1000, 0, block=8, pool=64); next(it); time.sleep(.2)
    assert len(read) == 2 and threading.main_thread() not in read
    it.close()
    assert not any(t.is_alive() for t in read)
    list(batches(Store(whole), ["A", "C"], 32, 64, 0, block=8, pool=64)); assert len(read) <= 5   # 64 rows are in two pools or three: none is read for nothing

def test_an_error_of_the_thread_is_the_callers(whole, monkeypatch):
    real, n = caching.read_blocks, []
    def read(*a):
        n.append(threading.current_thread())
        if len(n) == 3: raise OSError("disk gone")
        return real(*a)
    monkeypatch.setattr(caching, "read_blocks", read)
    got = []
    with pytest.raises(OSError, match="disk gone"):
        for x in batches(Store(whole), ["A", "C"], 32, 1000, 0, block=8, pool=64): got.append(x.clone())
    monkeypatch.setattr(caching, "read_blocks", real)
    assert len(got) >= 2 and all(torch.equal(x, y) for x, y in zip(got, every(Store(whole)))) and not any(t.is_alive() for t in n)

@pytest.mark.parametrize("bits,fine", [(0x7f80, False), (0xff80, False), (0x7fc0, False), (0xffff, False), (0x7f7f, True), (0xff7f, True), (0x8000, True), (0x0001, True)])
def test_nan_and_inf_are_known_by_their_bits(bits, fine):
    "Both signs; the largest finite numbers, minus zero and the smallest number are none."
    x = torch.randn(7, 3, 5).bfloat16(); x.view(torch.int16)[3, 2, 1] = int(np.uint16(bits).astype(np.int16)); out = torch.empty(7, 2, 5, dtype=torch.bfloat16)
    assert x[3, 2, 1].isfinite() == fine == bool(caching.copy_rows(dict(acts=x), 0, 7, [2, 0], out))
    assert caching.copy_rows(dict(acts=x), 0, 7, [0, 1], out) and torch.equal(out, x[:, :2])

@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_nan_on_disk_names_shard_and_row(whole, whole8, tmp_path, kind):
    d = shutil.copytree(whole8 if kind == "int8" else whole, tmp_path/"s"); f = d/"shard_00001.safetensors"
    t = {k: v.clone() for k, v in caching.read_tensors(f).items()}
    t["acts" if kind == "bfloat16" else "scale"][7, 2] = torch.nan
    caching.write_tensors(f, t)
    s = Store(d); where = "shard_00001.safetensors, row 7: the activations hold NaN"
    with pytest.raises(UserError, match=where): list(s.rows())
    with pytest.raises(UserError, match=where): every(s)
    list(s.rows(["A", "B"]))                                                                       # the other models are well

def test_progress_goes_to_the_drivers_file(args, monkeypatch, tmp_path):
    f = tmp_path/"note"; monkeypatch.setenv("LLMDIFF_PROGRESS", str(f)); lines = []
    clock = itertools.count(step=10); monkeypatch.setattr(caching.time, "monotonic", lambda: next(clock))
    real = caching.write_tensors
    def write(*a):
        if f.exists(): lines.append(f.read_text())
        return real(*a)
    monkeypatch.setattr(caching, "write_tensors", write); harvest(**args)
    assert len(lines) > 5 and all("tokens/s" in x and x.endswith("left") for x in lines) and not f.exists()
    done = [int(x.split()[1].replace(",", "")) for x in lines]; assert done == sorted(done)

def test_meter_is_silent_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("LLMDIFF_PROGRESS", raising=False)
    tick = meter(10, "x"); tick(5); tick(5)
    assert capsys.readouterr() == ("", "")


def test_bench_reader_measures_all_three(whole, whole8, capsys):
    for d in (whole, whole8):
        r = bench_reader(Store(d), batch=64, n_tokens=64, repeats=1)
        assert min(r.values()) > 0 and r["ratio"] == r["reader"]/r["loader"]
    x = caching.TokenRows(Store(whole), [0, 2]); want = torch.cat([r["acts"] for r in Store(whole).rows(["A", "C"])])
    assert len(x) == len(want) and all(torch.equal(x[i], want[i]) for i in range(0, len(x), 7))

def test_benchmark_reads_the_same_and_leaves_the_model_as_it_was(docs, capsys):
    m = toy()
    r = bench_harvest(m, docs, 1, 64, repeats=1)
    assert len(layers_of(m)) == 4 and r["ratio"] > 0 and "ratio" in capsys.readouterr().out
