"Small random models of many architectures, documents with answers, crosscoders: for the causal check and steering."
import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from llmdiff.causal import choose_chats
from llmdiff.crosscoder import Crosscoder, set_normalisation
from llmdiff.models import layers_of

VOCAB, D = 64, 32
WIDE = dict(vocab_size=VOCAB, hidden_size=D, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
            initializer_range=.2)
NARROW = dict(vocab_size=VOCAB, n_layer=4, n_head=2, initializer_range=.2)
OWN = dict(GPT2=dict(NARROW, n_embd=D, n_positions=64), GPTJ=dict(NARROW, n_embd=D, rotary_dim=4),
           Bloom=dict(NARROW, hidden_size=D), GPTNeoX=WIDE, Phi=WIDE,
           Cohere=dict(WIDE, pad_token_id=0, bos_token_id=1, eos_token_id=2), Granite=dict(WIDE, logits_scaling=2.))
# the last two return tuples from their layers
ARCHS = ["Llama", "Gemma2", "Gemma3", "Qwen2", "GPT2", "GPTNeoX", "Phi", "Cohere", "Granite", "GPTJ", "Bloom"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def toy(arch="Llama", seed=0, **kw):
    torch.manual_seed(seed)
    args = OWN.get(arch) or dict(WIDE, num_key_value_heads=1, head_dim=16, sliding_window=8)
    cfg = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(arch, arch) + "Config")(**args, **kw)
    cls = getattr(transformers, f"{arch}ForCausalLM", None) or getattr(transformers, f"{arch}LMHeadModel")
    return cls(cfg).eval()


def replaced(model, layer, h, ids):
    "Patching by hand: all layers run, a hook puts h in place of one's output."
    def put(module, args, out):
        return (h.clone(), *out[1:]) if isinstance(out, tuple) else h.clone()

    handle = layers_of(model)[layer].register_forward_hook(put)
    with torch.no_grad():
        out = model(input_ids=torch.as_tensor(np.asarray(ids))[None].expand(len(h), -1), use_cache=False).logits
    handle.remove()
    return out


def random_crosscoder(n_latents=48, seed=0):
    cc = Crosscoder(D, n_latents, 6, ["A", "B"], seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in cc.parameters():
            p += .1*torch.randn(p.shape, generator=g)
    set_normalisation(cc, torch.randn(2, D, generator=g), torch.tensor([20., 80.]))
    cc.theta.fill_(.3)
    return cc


def random_docs(n=20, seed=0, marker=(7, 5)):
    "Documents of a question, the marker, an answer and token 6."
    r, rows = np.random.default_rng(seed), []
    for i in range(n):
        q, a = r.integers(10, VOCAB, r.integers(2, 6)), r.integers(10, VOCAB, r.integers(6, 20))
        ids = np.r_[1, q, marker, a, 6]
        keep = np.r_[False, np.ones(len(q), bool), False, False, np.ones(len(a), bool), False]
        rows.append(dict(doc=i, kind="prose" if i % 5 == 0 else "chat", ids=ids, keep=keep))
    return pd.DataFrame(rows)


def table(unique=4, shared=30, n=48):
    dead = n - unique - shared
    verdict = ["unique-B"]*unique + ["shared"]*shared + ["dead"]*dead
    return pd.DataFrame(dict(latent=range(n), verdict=verdict, alive=[True]*(unique + shared) + [False]*dead))


def chats(n=6):
    return choose_chats(random_docs(), [7, 5], (0, 20), n, 12)


def planted():
    "Models A and B, a crosscoder, a direction: B is A plus the direction after layer 1, which latent 0 holds."
    a, b = toy(seed=0, mlp_bias=True), toy(seed=0, mlp_bias=True)
    v = torch.randn(D)*3
    with torch.no_grad():
        b.model.layers[1].mlp.down_proj.bias += v
    cc = Crosscoder(D, 48, 6, ["A", "B"])
    set_normalisation(cc, torch.randn(2, D), torch.tensor([20., 80.]))
    cc.theta.fill_(.5)
    with torch.no_grad():
        cc.W_enc.zero_()
        cc.b_enc.fill_(-1)
        cc.b_enc[0] = 2.
        cc.W_dec[0, 0] = 0
        cc.W_dec[0, 1] = v*cc.scale[1].float()/2
    return a, b, cc, v
