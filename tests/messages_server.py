"A server on this machine that speaks the Messages protocol: requests, batches, and the faults of both."
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmdiff.core import digest

KEY = "sk-test-4711-not-a-key"
MODEL = "claude-opus-5-5"
GOOD = dict(label="AI self-description", description="Text in which a model speaks of itself.",
            patterns=["as an AI", "no feelings"], confidence="high", confidence_reason="All say so.")


def message(payload, stop="end_turn", model="claude-test-20990101"):
    "An answer of the Messages API."
    text = payload if isinstance(payload, str) else json.dumps(payload)
    content = [dict(type="thinking", thinking="", signature="x"), dict(type="text", text=text)]
    return dict(id="msg_1", type="message", role="assistant", model=model, stop_reason=stop, stop_sequence=None,
                content=content, usage=dict(input_tokens=10, output_tokens=5))


def error(kind, text="no"):
    return dict(type="error", error=dict(type=kind, message=text))


def user_text(body):
    "What the user message of a request says."
    return body["messages"][0]["content"]


def well_behaved(n, body):
    "Status, headers and JSON for request number n: a category, or a description of its own for each latent."
    if "<latent>" in user_text(body):
        return 200, {}, message(dict(category="G.30", reason="it speaks of itself"))
    own = f"Text {digest(body['messages'])} in which a model speaks of itself."
    return 200, {}, message({**GOOD, "description": own})


class Batches:
    "The batch half of the server: what was handed in, and what is to become of it."
    def __init__(self):
        self.all = {}
        self.polls = 2        # looks until a batch has ended
        self.events = []      # faults to have first: ("create", 429), ("poll", "drop"), ("results", "cut")
        self.kinds = lambda n, body: "succeeded"
        self.never = False    # does no batch ever end?

    def show(self, s, b):
        n, ended = len(b["requests"]), b["left"] <= 0
        counts = dict(canceled=0, errored=0, expired=0, processing=0 if ended else n, succeeded=n if ended else 0)
        results = f"http://127.0.0.1:{s.server_port}/v1/messages/batches/{b['id']}/results"
        return dict(id=b["id"], type="message_batch", processing_status="ended" if ended else "in_progress",
                    request_counts=counts, created_at="2099-01-01T00:00:00Z", expires_at="2099-01-02T00:00:00Z",
                    results_url=results if ended else None)

    def create(self, s, body):
        b = dict(id=f"msgbatch_{len(self.all)}", requests=body["requests"], left=self.polls)
        self.all[b["id"]] = b
        return self.show(s, b)

    def result(self, s, i, request):
        kind = self.kinds(i, request["params"])
        if kind == "succeeded":
            return dict(type=kind, message=s.answer(i, request["params"])[2])
        if kind in ("expired", "canceled"):
            return dict(type=kind)
        return dict(type="errored", error=error(kind))

    def results(self, s, b):
        "All results as lines, in another order than asked."
        lines = []
        for i, r in enumerate(b["requests"]):
            lines.append(json.dumps(dict(custom_id=r["custom_id"], result=self.result(s, i, r))))
        return "\n".join(reversed(lines)) + "\n"


class Handler(BaseHTTPRequestHandler):
    def reply(self, status, headers, text, cut=None):
        raw = text.encode()
        self.send_response(status)
        sent = {"content-type": "application/json", "content-length": str(len(raw)), **headers}
        for k, v in sent.items():
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(raw[:cut])

    def drop(self):
        self.close_connection = True

    def note(self, body):
        "Log a request; how many messages were asked before it."
        s = self.server
        with s.lock:
            n = sum(r["path"] == "/v1/messages" for r in s.log)
            s.log.append(dict(path=self.path, headers=dict(self.headers), body=body))
        return n

    def fault(self, what):
        "The next planned fault of this kind, if it is next."
        events = self.server.batches.events
        if not events or events[0][0] != what: return None
        return events.pop(0)[1]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        n = self.note(body)
        if self.path == "/v1/messages":
            status, headers, reply = self.server.answer(n, body)
            return self.drop() if status == "drop" else self.reply(status, headers, json.dumps(reply))
        fault = self.fault("create")
        if isinstance(fault, int):
            return self.reply(fault, {"retry-after": "0"}, json.dumps(error("busy")))
        made = self.server.batches.create(self.server, body)
        if fault == "lost receipt":
            return self.drop()
        self.reply(200, {}, json.dumps(made))

    def do_GET(self):
        self.note({})
        batches = self.server.batches
        if self.path.startswith("/v1/messages/batches?"):
            return self.reply_list()
        name = self.path.split("/")[4]
        if name not in batches.all:
            return self.reply(404, {}, json.dumps(error("not_found_error")))
        if self.path.endswith("/results"):
            return self.reply_results(batches.all[name])
        self.reply_poll(batches.all[name])

    def reply_list(self):
        batches = self.server.batches
        shown = [batches.show(self.server, b) for b in reversed(batches.all.values())]
        self.reply(200, {}, json.dumps(dict(data=shown, has_more=False, first_id=None, last_id=None)))

    def reply_results(self, b):
        "All results; a fault cuts them in the middle, `short` says so in the header."
        text = self.server.batches.results(self.server, b)
        half, fault = len(text)//2, self.fault("results")
        if fault: self.drop()
        short = {"content-length": str(half)} if fault == "short" else {}
        self.reply(200, {"content-type": "application/binary", **short}, text, cut=half if fault else None)

    def reply_poll(self, b):
        fault = self.fault("poll")
        if fault == "drop":
            return self.drop()
        if isinstance(fault, int):
            return self.reply(fault, {"retry-after-ms": "1"}, json.dumps(error("busy")))
        if not self.server.batches.never: b["left"] -= 1
        self.reply(200, {}, json.dumps(self.server.batches.show(self.server, b)))

    def log_message(self, *a): pass


@pytest.fixture
def server(monkeypatch):
    """A Messages server: `server.answer(n, body)` decides, `server.log` keeps what came, `server.batches` has the
    batches; `batches.events` are faults to have first."""
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.lock, s.log, s.answer, s.batches = threading.Lock(), [], well_behaved, Batches()
    threading.Thread(target=s.serve_forever, daemon=True).start()
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", f"http://127.0.0.1:{s.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("anthropic._base_client.INITIAL_RETRY_DELAY", 0.001)
    yield s
    s.shutdown()
    s.server_close()


def paths(server, what):
    "How many requests went to this path."
    return sum(r["path"] == what for r in server.log)
