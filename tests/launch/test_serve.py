"""`ringctx serve` on two ranks: the openai client asks it, ten clients at once, and how it ends."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai

from ringctx.config import load
from ringctx.core.ring import Ring
from ringctx.huggingface.weights import checkpoint
from ringctx.runtime.engine import Engine
from tests.launch.test_generate import TINY, environment, pid_of

MODEL = "endless"
TOKEN = "a token for these tests"
LIMITS = ["--set", "server.body_bytes=20000", "--set", "server.max_tokens=100000", "--set", "server.documents=3"]
DOCUMENT = "And God said, Let there be a firmament in the midst of the waters. " * 4
NUM_CLIENTS, NUM_TOKENS = 10, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a cache of its own, and a model with no token that ends the text."""
    folder: Path = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        shutil.copytree(checkpoint("random-tiny"), folder / MODEL)
    (folder / MODEL / "generation_config.json").write_text(json.dumps({"eos_token_id": 9999}))
    return folder


@dataclass
class Running:
    """A server: the launcher's process, its address, and what it says."""

    process: subprocess.Popen[str]
    url: str
    said: list[str]

    def client(self, token: str = TOKEN) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=120)

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(timeout=60)


@contextmanager
def serving(place: Path) -> Iterator[Running]:
    command = [sys.executable, "-m", "ringctx", "serve", TINY, "--ranks", "2", "--port", "0", *LIMITS]
    command += ["--set", f"model.path={place / MODEL}"]
    surroundings = environment(place) | {"RINGCTX_TOKEN": TOKEN}
    with subprocess.Popen(command, env=surroundings, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said, url = [], None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"Serving .* on (http://\S+)", line):
                url = found[1]
                break
        assert url, "".join(said)
        listening = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        listening.start()
        try:
            yield Running(process, url, said)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            listening.join(timeout=10)


@pytest.fixture(scope="module")
def server(place) -> Iterator[Running]:
    with serving(place) as running:
        yield running


@pytest.fixture(scope="module")
def alone(place) -> Engine:
    """The same model on one rank, in this process: what every answer must be."""
    return Engine.load(load(TINY, [f"model.path={place / MODEL}"]), Ring.alone())


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def answer_of(alone: Engine, tokens: list[int], num_tokens: int = NUM_TOKENS) -> str:
    generation = replace(alone.config.generation, max_new_tokens=num_tokens)
    return alone.answer(alone.read([], room=len(tokens) + num_tokens), tokens, generation=generation).answer


def text_of(stream: Any) -> str:
    return "".join(piece.choices[0].delta.content or "" for piece in stream if piece.choices)


def test_openais_client_completes_and_streams(server, alone):
    client, messages = server.client(), ask("Who made it?")
    want = answer_of(alone, alone.prompts.chat(messages))
    assert [model.id for model in client.models.list()] == [MODEL]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=NUM_TOKENS)
    assert whole.choices[0].message.content == want
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", NUM_TOKENS)
    assert text_of(client.chat.completions.create(model=MODEL, messages=messages, max_tokens=NUM_TOKENS, stream=True)) == want
    done = client.completions.create(model=MODEL, prompt="In the", max_tokens=NUM_TOKENS)
    assert done.choices[0].text == answer_of(alone, alone.tokenizer("In the").input_ids)
    drawn = [client.completions.create(model=MODEL, prompt="In", temperature=1.5, seed=n // 2).choices[0].text for n in range(4)]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


def test_openais_client_asks_a_document_that_was_read_once(server, alone):
    client = server.client()
    document = client.post("/documents", body={"text": DOCUMENT}, cast_to=dict)
    for question in ("Who?", "What?", "Who?"):
        done = client.chat.completions.create(
            model=MODEL, messages=ask(question), max_tokens=NUM_TOKENS, extra_body={"document": document["id"]}
        )
        assert done.choices[0].message.content == answer_of(alone, alone.prompts.whole(DOCUMENT, question))
        assert done.usage.prompt_tokens_details.cached_tokens == document["tokens"] > len(DOCUMENT)
    assert client.delete(f"/documents/{document['id']}", cast_to=dict)["deleted"]
    with pytest.raises(openai.NotFoundError, match="There is no document"):
        client.chat.completions.create(model=MODEL, messages=ask("Who?"), extra_body={"document": document["id"]})


def test_a_client_that_leaves_ends_its_answer_on_the_ring(server):
    client = server.client()
    stream = client.chat.completions.create(model=MODEL, messages=ask("?"), max_tokens=100_000, temperature=1.0, stream=True)
    next(iter(stream))
    stream.close()
    began = time.monotonic()
    client.completions.create(model=MODEL, prompt="In", max_tokens=1)
    assert time.monotonic() - began < 10


@dataclass
class Crowd:
    """Clients that ask at once until the time is over. wrong: answers that are not what they should be."""

    server: Running
    wanted: dict[str, str]
    document: str
    ends: float
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def client(self, number: int) -> None:
        """Asks its own question in each way in turn, with a mistake between."""
        client, question = self.server.client(), f"Question {number}?"
        whole = {"model": MODEL, "messages": ask(question), "max_tokens": NUM_TOKENS}
        ways = {
            "chat": lambda: client.chat.completions.create(**whole).choices[0].message.content,
            "stream": lambda: text_of(client.chat.completions.create(**whole, stream=True)),
            "document": lambda: client.chat.completions.create(**whole, extra_body={"document": self.document}).choices[0].message.content,
        }
        for turn in itertools.count(number):
            if time.monotonic() > self.ends:
                return
            name = list(ways)[turn % len(ways)]
            began = time.monotonic()
            try:
                got = ways[name]()
            except Exception as error:  # a lost answer is a finding, not the end of the crowd
                got = repr(error)
            self.seconds.append(time.monotonic() - began)
            self.done[name] += 1
            if got != self.wanted[f"{'document ' * (name == 'document')}{question}"]:
                self.wrong.append(f"{question} {name}: {got!r}")
            self.mistake(turn)

    def mistake(self, turn: int) -> None:
        """A request that is refused while others go on."""
        body, token, status = [(b"{", TOKEN, 400), (b"x" * 30_000, TOKEN, 413), (b"{}", "wrong", 401), (b'{"n": 2}', TOKEN, 400)][turn % 4]
        got = post(f"{self.server.url}/v1/chat/completions", body, token)
        self.done[str(status)] += 1
        if got != status:
            self.wrong.append(f"{status} expected: {got}")

    def run(self) -> None:
        clients = [threading.Thread(target=self.client, args=(n,)) for n in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()


def post(url: str, body: bytes, token: str) -> int:
    request = urllib.request.Request(url, body, {"Authorization": f"Bearer {token}", "Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("seconds", [5, pytest.param(120, marks=pytest.mark.slow)])
def test_of_ten_clients_at_once_no_answer_is_lost_or_mixed_up(server, alone, seconds):
    questions = [f"Question {n}?" for n in range(NUM_CLIENTS)]
    wanted = {question: answer_of(alone, alone.prompts.chat(ask(question))) for question in questions}
    wanted |= {f"document {question}": answer_of(alone, alone.prompts.whole(DOCUMENT, question)) for question in questions}
    assert len(set(wanted.values())) > NUM_CLIENTS  # a mix-up would show
    client = server.client()
    document = client.post("/documents", body={"text": DOCUMENT}, cast_to=dict)["id"]
    crowd = Crowd(server, wanted, document, time.monotonic() + seconds)
    crowd.run()
    client.delete(f"/documents/{document}", cast_to=dict)
    crowd.seconds.sort()
    num = len(crowd.seconds)
    print(f"{dict(crowd.done)} in {seconds} s; an answer took {crowd.seconds[num // 2]:.2f} s (median), {crowd.seconds[-1]:.2f} s (most)")
    assert not crowd.wrong
    assert all(crowd.done[name] for name in ("chat", "stream", "document", "400", "413", "401"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_ranks_with_exit_code_0_also_in_mid_answer(place, how):
    with serving(place) as running:
        stream = running.client().chat.completions.create(model=MODEL, messages=ask("?"), max_tokens=100_000, temperature=1.0, stream=True)
        next(iter(stream))
        assert running.stop(how) == 0, "".join(running.said)
        stream.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
def test_a_lost_rank_is_one_sentence_and_exit_code_3(place):
    with serving(place) as running:
        os.kill(pid_of(running.process.pid, 1), signal.SIGKILL)
        assert running.process.wait(timeout=60) == 3
    assert "Rank 1 was killed by SIGKILL" in running.said[-1]


def test_a_port_that_is_taken_is_said_with_exit_code_2(server, place):
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "ringctx", "serve", TINY, "--port", port]
    done = subprocess.run(command, env=environment(place), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and f"Cannot serve on 127.0.0.1:{port}: Address already in use" in done.stderr
