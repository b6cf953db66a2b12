"The preset gemma-2-9b on random Gemma-2 models of tiny width, and on local files in the schemas of the hub."
import pandas as pd
import pytest
import torch
import transformers

from llmdiff.caching import harvest, HarvestOptions
from llmdiff.core import latents, load_preset, UserError
from llmdiff.corpus import build_corpus, corpus_manifest, save_corpus
from llmdiff.engine.texts import documents
from llmdiff.models import check_models, load_tokenizer
from llmdiff.scaling import scale_pair
from llmdiff.training import PairOptions, train_pair
from llmdiff.verdicts import judge_pair

PAIR = ["pt", "it"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    "Two Gemma-2 of width 32 with the tiny family's tokenizer; B is A with some noise on its weights."
    d, tok = tmp_path_factory.mktemp("gemma2"), load_tokenizer({"pt": "data/tiny/pt"})
    config = transformers.Gemma2Config(
        vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=32)
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config)
    for name in PAIR:
        model.save_pretrained(d/name)
        tok.save_pretrained(d/name)
        with torch.no_grad():
            for p in model.parameters(): p.add_(0.02*torch.randn_like(p))
    return {name: str(d/name) for name in PAIR}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "The shipped texts under the column names of FineWeb and LMSYS-Chat-1M."
    d = tmp_path_factory.mktemp("hub")
    prose = [dict(text=r["text"], id=r["id"], url="", language="en") for r in documents("brown", limit=40)]
    chats = [dict(conversation_id=r["id"], model="vicuna-13b", conversation=r["messages"], language="English")
             for r in documents("chitchat", limit=120)]
    pd.DataFrame(prose).to_parquet(d/"fineweb.parquet")
    pd.DataFrame(chats).to_parquet(d/"lmsys.parquet")
    return {f"hub:fineweb@{d}/fineweb.parquet": .5, f"hub:lmsys-chat@{d}/lmsys.parquet": .5}


def test_the_chain_runs_on_gemma2(family, sources, tmp_path):
    preset, run = load_preset("gemma-2-9b"), str(tmp_path)
    info = check_models(family, 2)
    assert set(info.arch) == {"Gemma2ForCausalLM"}

    tok = load_tokenizer(family)
    docs = build_corpus(sources, 6000, 64, tok)
    assert set(docs.kind) == {"prose", "chat"} and set(docs.source) == set(preset["sources"])
    about = save_corpus(docs, run, tok, sources, 64, 0)
    store = harvest(family, docs, 2, tmp_path/"store", HarvestOptions("float32"), corpus=about, say=lambda s: None)
    assert store.n_tokens == corpus_manifest(run)["n_kept"] and store.d_model == 32

    folder = tmp_path/"crosscoder"/"pt-it"
    options = PairOptions(n_latents=64, k=8, batch=256, train_tokens=20_000, lr=1e-3)
    _, log, results = train_pair(store, PAIR, folder, options)
    assert min(results["fve"]) > .3 and log.loss.iloc[-1] < log.loss.iloc[0]
    t, n = scale_pair(run, PAIR, n_boot=20)
    assert len(t) == 64 and n == store.n_tokens
    t, n = judge_pair(run, PAIR)
    assert len(t) == 64 and n == store.n_tokens and t.verdict.notna().all()
    assert latents("pt-it", run).latent.tolist() == list(range(64))


def test_a_layer_that_gemma2_does_not_have(family):
    with pytest.raises(UserError, match="layers 0 to 3"): check_models(family, load_preset("gemma-2-9b")["layer"])
