"Documents of random tokens with activations in memory, and the cards of one latent: for the tests of contexts."
import numpy as np
import pandas as pd
import torch

from llmdiff.codes import encode_tile
from llmdiff.crosscoder import Crosscoder
from llmdiff.examples import ContextOptions, top_contexts

AB = ["A", "B"]
BOS = 1
D = 20   # latents


class Tok:
    "Token i is a word; 0 and 1 are special."
    words = ["<turn>", "<s>", *(f"w{i}" for i in range(2, 40))]

    def decode(self, ids, **_):
        return "".join(" " + self.words[i] for i in ids)

    def convert_ids_to_tokens(self, i):
        return self.words[i]


class World:
    "Random documents and activations, a random crosscoder; `rows` yields kept tokens only, in shards."
    def __init__(self, n_docs=60, seed=0, d=8, levels=None, shards=3, names=AB):
        r = np.random.default_rng(seed)
        ids, keep = [], []
        for _ in range(n_docs):
            n = int(r.integers(6, 30))
            w = r.integers(2, 40, n)
            w[0] = BOS
            turn = r.random(n) < 0.1
            w[turn & (np.arange(n) > 0)] = 0
            ids.append(w.astype(np.int32))
            keep.append((np.arange(n) > 0) & (w > 1))
        self.docs = pd.DataFrame({"doc": np.arange(n_docs), "source": r.choice(["x", "y"], n_docs),
                                  "ids": ids, "keep": keep, "text": [f"document {i}" for i in range(n_docs)]})
        self.docs = self.docs[[k.any() for k in keep]]
        self.names = names
        self.cc = Crosscoder(d, D, 3, names, seed=seed)
        self.cc.theta.fill_(0.9)

        of_docs = zip(self.docs.doc, self.docs.ids, self.docs.keep)
        parts = [(np.full(k.sum(), i), np.flatnonzero(k), w[k]) for i, w, k in of_docs]
        self.doc, self.pos, self.token = (np.concatenate(c) for c in zip(*parts))
        self.x = torch.randn(len(self.doc), len(names), d, generator=torch.Generator().manual_seed(seed))
        if levels:
            self.x = self.x.sign()                                  # many equal activations
        ends = np.flatnonzero(np.diff(self.doc)) + 1
        self.cuts = [0, *(ends[len(ends)*i//shards] for i in range(1, shards)), len(self.doc)]

    def rows(self, pair=None, docs=None):
        for a, b in zip(self.cuts, self.cuts[1:]):
            if docs:
                a, b = a + np.searchsorted(self.doc[a:b], docs)
            if b > a:
                yield {"acts": self.x[a:b], "token": self.token[a:b], "pos": self.pos[a:b], "doc": self.doc[a:b]}

    def dense(self):
        "Codes [tokens, D]."
        row, lat, val = encode_tile(self.cc, {"acts": self.x})[1]
        f = torch.zeros(len(self.x), D)
        f[row, lat] = val
        return f.numpy()

    def run(self, latents, **kw):
        "Their examples table; keywords of `ContextOptions`."
        return top_contexts(self, self.cc, self.names, self.docs, Tok(), latents, ContextOptions(**kw))

    def one_text(self):
        "Different documents by number, the same tokens."
        for c in ("ids", "keep"):
            self.docs[c] = [self.docs[c].iloc[0]]*len(self.docs)
        kept = np.flatnonzero(self.docs.keep.iloc[0])
        n, k = len(kept), len(self.docs)
        self.doc = np.repeat(self.docs.doc.to_numpy(), n)
        self.pos = self.token = np.tile(kept, k)
        self.x = torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(0)).repeat(k, 1, 1)
        self.cuts = [0, n*k]


def row(**kw):
    "A row of a latents table."
    r = {"latent": 3, "verdict": "unique-B", "reason": "A does not hold B's direction", "norm_A": .2, "norm_B": 1.,
         "delta_norm": .9, "cos": .1, "count": 4, "freq": .07, "n_docs": 4}
    ratios = {f"nu_{t}_{P}{s}": .1 for t in ("eps", "r") for P in "AB" for s in ("", "_lo", "_hi")}
    return pd.Series(r | ratios | kw)
