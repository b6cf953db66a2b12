"Tiny models with random weights, a corpus of random tokens, and stores made of them: what the tests of stores share."
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers import models as tm

from llmdiff.caching import harvest, HarvestOptions
from llmdiff.engine import progress, store

VOCAB = 64
OPTIONS = HarvestOptions(dtype="float32", shard_tokens=100, batch_tokens=64)


def toy(arch="Llama", d=32, n_layers=4, seed=0):
    "A real architecture of tiny width."
    torch.manual_seed(seed)
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(arch, arch) + "Config")
    sizes = dict(vocab_size=VOCAB, hidden_size=d, intermediate_size=64, num_hidden_layers=n_layers, sliding_window=8)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    return getattr(transformers, f"{arch}ForCausalLM")(config(**sizes, **heads)).eval()


def save_toy(folder, edit=None, words=VOCAB, **kw):
    "Save a toy model, changed by `edit`, with a tokenizer of so many words."
    vocab = {f"w{i}": i for i in range(words)}
    tok = Tokenizer(tm.WordLevel(vocab, unk_token="w0"))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="w1")
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = toy(**kw)
    if edit:
        with torch.no_grad(): edit(model)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def hidden_states(folder, ids, layer):
    "What transformers itself gives after a layer, [tokens, d]."
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(np.asarray(ids).astype(int))[None]
    with torch.no_grad(): out = model(input_ids=ids, output_hidden_states=True)
    return out.hidden_states[layer + 1][0]


def quiet(line): pass


def toy_harvest(models, docs, folder, layer=1, corpus=None, say=quiet, **changed):
    "A harvest with the options of these tests, some of them changed."
    return harvest(models, docs, layer, folder, replace(OPTIONS, **changed), corpus=corpus, say=say)


def files(folder): return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}


def flip(file, at=-1):
    "Damage one byte of a file."
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def patch_writes(monkeypatch, write):
    "Parts and shards are written by `write` instead, which is given the real function first."
    real = store.write_tensors
    for module in (store, progress): monkeypatch.setattr(module, "write_tensors", partial(write, real))


# ---- fixtures; a test file takes those that it needs: `docs = harvests.docs`

@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDIFF_CACHE", str(tmp_path/"cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    d = tmp_path_factory.mktemp("family")
    return {n: save_toy(d/n, seed=i) for i, n in enumerate(("A", "B", "C"))}


@pytest.fixture(scope="session")
def docs():
    "Thirty documents; positions 0 and 2 of each are not kept."
    r = np.random.default_rng(0)
    ids = [r.integers(0, VOCAB, r.integers(4, 30)).astype(np.int32) for _ in range(30)]
    keep = [~np.isin(np.arange(len(x)), (0, 2)) for x in ids]
    return pd.DataFrame(dict(doc=range(30), ids=ids, keep=keep))


@pytest.fixture(scope="session")
def whole(family, docs, tmp_path_factory):
    "A store that nothing happened to; tests copy it before they harm it."
    d = tmp_path_factory.mktemp("whole")/"store"
    toy_harvest(family, docs, d)
    return d


@pytest.fixture(scope="session")
def whole8(family, docs, tmp_path_factory):
    "The same in int8."
    d = tmp_path_factory.mktemp("whole8")/"store"
    toy_harvest(family, docs, d, store_dtype="int8")
    return d


@pytest.fixture
def folder(tmp_path): return tmp_path/"store"


@pytest.fixture
def make(family, docs, folder):
    "A harvest of the family into `folder`; arguments change models, docs, layer or options."
    return partial(toy_harvest, models=family, docs=docs, folder=folder)
