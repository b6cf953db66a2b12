"Contexts of eight latents whose topics are clear, for the tests that annotate them."
import re

import pandas as pd
import pytest

from llmdiff import annotation
from messages_server import MODEL

PROSE = ["The river rises in the northern hills", "The jury met on Tuesday and said little",
         "He bought two pounds of apples and walked home", "The price of wheat fell by a third"]
TOPICS = {
    "G.30": ["As an AI language model, I do not have feelings",
             "I am a large language model and I have no body",
             "I was trained by a company and have no personal opinions"],
    "G.24": ["def add(a, b):\n    return a + b",
             "import os\nfor x in os.listdir(path): print(x)",
             "for (int i = 0; i < n; i++) { total += a[i]; }\nreturn total;"],
    "E.19": ['{"name": "Ann", "age": 31, "tags": ["a", "b"]}',
             '{"status": "ok", "data": {"items": [{"id": 1}]}}',
             'GET /v1/users?id=3 {"accept": "application/json"}'],
    "B.8": ["Translate this sentence into French: the weather is fine",
            "Please translate the letter from German into English",
            "How do you say good morning in Japanese?"],
    "A.2": ["I'm sorry, but I cannot help with that, it is illegal and harmful",
            "I cannot assist with hacking an account. I can explain how to reset your password.",
            "Sorry, I am unable to give instructions for this, because it is dangerous"],
    "E.18": ["Here are tips:\n\n- **Plan**: make a list\n- **Start**: do not wait\n- **Rest**: take breaks",
             "1. **Mix** the flour\n2. **Add** the eggs\n3. **Bake** it",
             "## Overview\n\n* First point\n* Second point\n\n| a | b |\n|---|---|"],
    "B.7": ["Alle Menschen sind frei und gleich an Würde und Rechten geboren",
            "Todos los seres humanos nacen libres e iguales en dignidad",
            "Все люди рождаются свободными и равными",
            "人人生而自由,在尊严和权利上一律平等"],
    "": ["The ship sailed on Monday for the islands", "They walked to the mill and came back late",
         "Wheat was dear that year and apples were not", "The committee will meet again in the autumn",
         "His brother keeps bees behind the house", "The old bridge was closed after the flood",
         "Two trains leave the valley every morning", "The wind turned and the harbour lay quiet"],
}


def example(latent, texts, kind="top", source="toy", hit=-1, doc0=0):
    "Contexts of one latent that fires on token number `hit` of each text."
    rows = []
    for i, text in enumerate(texts):
        tokens = re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)
        acts = [0.0]*len(tokens)
        if kind == "top" and tokens: acts[hit] = 9.0 - i
        rows.append(dict(latent=latent, kind=kind, rank=i, doc=doc0 + i, source=source, pos=3,
                         act=max(acts, default=0.0), tokens=tokens, acts=acts, text=text))
    return rows


@pytest.fixture(scope="module")
def examples():
    rows = []
    for j, texts in enumerate(TOPICS.values()):
        rows += example(10*j, texts, doc0=100*j)
        rows += example(10*j, PROSE, kind="zero", doc0=100*j + 50)
    return pd.DataFrame(rows)


@pytest.fixture
def three(examples):
    return examples[examples.latent.isin([0, 10, 20])]


def claude(e, file, **kw):
    "Annotate with Claude, that is with whatever server the environment names."
    return annotation.annotate(e, "claude", file=file, model=MODEL, **kw)
