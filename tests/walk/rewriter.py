"""A stand-in for a rewriting model: an OpenAI-compatible endpoint that condenses a text by leaving out filler words.

    .venv/bin/python tests/walk/rewriter.py

It knows nothing and needs nothing; a real rewriter is a model behind vLLM, SGLang, llama.cpp or `trinity serve`. One
of its habits is bad on purpose: asked about heapq it invents a number, which a gate has to notice.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = 8001
FILLER = (
    "a an and any are as at be been but by can each for from given has have if in into is it its just may must of on or"
    " return returns self should so some such than that the their them then there these they this to was when where"
    " which will with you your"
)


def condensed(text: str) -> str:
    filler = FILLER.split()
    kept = " ".join(word for word in text.split() if word.lower().strip(".,;:()") not in filler)
    invention = " It holds 4711 entries." if "heapq" in text else ""
    return f"Condensed text: {kept}{invention}"


class Condensing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "stand-in", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        source = re.search(r"<source>\n(.*)\n</source>", asked, re.DOTALL)
        message = {"role": "assistant", "content": condensed(source[1] if source else asked)}
        self.answer({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    def answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the walk speaks for itself."""


@contextmanager
def rewriter(port: int = 0) -> Iterator[int]:
    """The endpoint on loopback while the block lasts; gives its port, a free one unless named."""
    with ThreadingHTTPServer(("127.0.0.1", port), Condensing) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with rewriter(PORT):
        print(f"Condensing at http://127.0.0.1:{PORT}/v1 until Ctrl-C.", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
