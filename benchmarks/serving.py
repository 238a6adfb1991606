"""What the server costs beside its engine, what reuse is worth, and whether it bears a crowd.

    python benchmarks/serving.py overhead|reuse|load [--minutes 10] [--clients 64] [--collection NAME]

The server is a process of its own, `fusionroute serve`; this one asks. `overhead` takes turns with an engine in this
process on the same prompts; ratios are medians over rounds. The last line is one JSON document; the exit code of `load`
is 1 if a request failed or anything was left behind. Never a test: a busy machine makes `overhead` and `reuse` lie.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psutil

from fusionroute.serving.scheduler import REST_SECONDS

NOUNS = "cow farm train garden baker pencil book road river shop letter table clock bridge market horse"


@contextlib.contextmanager
def serving(collection: str | None, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own: its address, and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fusionroute", "serve", "--port", str(port), "--no-access-log", *options]
    command += [] if collection is None else ["--collection", collection]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            until = time.monotonic() + 120
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health/ready").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit("the server does not start")
                time.sleep(0.2)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)
            log.seek(0)
            for line in log.read().decode(errors="replace").splitlines():
                if "ERROR" in line:
                    print(line)


def question(generator: random.Random, words: int = 20) -> str:
    """A question that nobody has asked before."""
    return (
        " ".join(generator.choices(NOUNS.split(), k=words)) + f" {generator.randrange(10**6)}? Tell a story about it."
    )


# ------------------------------------------------------------------------------------------------------- overhead


async def streams(url: str, prompts: list[str], tokens: int) -> tuple[float, float]:
    """Tokens per second of so many streams at once: of all together, and of the slowest."""
    started = time.perf_counter()
    found = await asyncio.gather(*(stream(url, prompt, tokens) for prompt in prompts))
    together = sum(count for count, _ in found) / (time.perf_counter() - started)
    return together, min(count / seconds for count, seconds in found)


async def stream(url: str, prompt: str, tokens: int) -> tuple[int, float]:
    count, started = 0, time.perf_counter()
    async for chunk in frames(url, body(prompt, max_tokens=tokens, temperature=0, ignore_eos=True)):
        for choice in chunk["choices"]:
            count += len(choice.get("fusionroute", {}).get("tokens", []))
    return count, time.perf_counter() - started


def body(prompt: str, **settings: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "stream": True, **settings}


async def frames(url: str, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, read with next to no work of our own: asking shares two cores with what is measured."""
    host, _, port = url.removeprefix("http://").partition(":")
    content = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**20)
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"the server answers {status.decode().strip()}")
        async for line in reader:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
            elif line.startswith(b"data: [DONE]"):
                return
        raise SystemExit("the stream has no end")
    finally:
        writer.close()


def overhead(collection: str | None, rounds: int, tokens: int, crowds: list[int]) -> dict[str, Any]:
    """Tokens per second of so many clients to the engine's at that batch, and of the slowest client to a row's."""
    from fusionroute import Request, encode_chat
    from fusionroute.serving.server import make_service
    from fusionroute.serving.settings import Limits

    service = make_service(collection, Limits())
    engine, tokenizer = service.scheduler.engine, service.asking.tokenizer
    generator, found = random.Random(0), {}
    with serving(collection) as (url, _):
        for clients in crowds:
            ratios, slowest, speeds = [], [], []
            for number in range(rounds + 1):
                prompts = [question(generator) for _ in range(clients)]
                rows = [
                    Request(encode_chat(tokenizer, [{"role": "user", "content": p}]), tokens, ignore_end=True)
                    for p in prompts
                ]
                sides = {}
                for side in ("engine", "server")[:: 1 if number % 2 else -1]:
                    if side == "engine":
                        started = time.perf_counter()
                        count = sum(len(answer.tokens) for answer in engine.generate(rows))
                        sides[side] = count / (time.perf_counter() - started)
                    else:
                        sides[side], slow = asyncio.run(streams(url, prompts, tokens))
                if number:  # the first warms up
                    ratios.append(sides["server"] / sides["engine"])
                    slowest.append(slow / (sides["engine"] / clients))
                    speeds.append(sides["server"])
            found[clients] = {
                "ratio": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
                "slowest_client": statistics.median(slowest),
                "tokens_per_second": statistics.median(speeds),
            }
            print(f"{clients} clients: {found[clients]}", flush=True)
    return {"rounds": rounds, "tokens": tokens, "clients": found}


# ---------------------------------------------------------------------------------------------------------- reuse


async def first_token(url: str, messages: list[dict[str, str]]) -> tuple[float, str]:
    """Seconds to the first token, and the whole answer."""
    asked = {"messages": messages, "stream": True, "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    started, first, text = time.perf_counter(), 0.0, ""
    async for chunk in frames(url, asked):
        delta = chunk["choices"][0]["delta"]
        if chunk["choices"][0].get("fusionroute", {}).get("tokens") and not first:
            first = time.perf_counter() - started
        text += delta.get("content") or ""
    return first, text


def reuse(collection: str | None, rounds: int) -> dict[str, Any]:
    """Time to the first token of a conversation's second turn, to that of a new prompt as long."""
    generator, ratios, times = random.Random(1), [], []
    with serving(collection) as (url, _):
        for _ in range(rounds):
            messages = [{"role": "user", "content": question(generator, 950)}]
            fresh, text = asyncio.run(first_token(url, messages))
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
            again, _ = asyncio.run(first_token(url, messages))
            ratios.append(again / fresh)
            times.append((fresh, again))
            print(f"first turn {fresh:.2f} s, second {again:.2f} s", flush=True)
        used = httpx.get(f"{url}/metrics").text
    tokens = next(line for line in used.splitlines() if line.startswith("fusionroute_prompt_tokens_total"))
    return {
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "seconds": statistics.median(t[0] for t in times),
        "prompt_tokens": float(tokens.split()[-1]) / rounds / 2,
    }


# ----------------------------------------------------------------------------------------------------------- load


async def client_life(url: str, number: int, until: float, outcomes: Counter) -> None:
    generator = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        while time.monotonic() < until:
            kind = generator.choices(["stream", "whole", "leave", "malformed"], [5, 2, 2, 1])[0]
            try:
                outcomes[kind + " " + await once(client, generator, kind)] += 1
            except Exception as error:
                outcomes[f"{kind} FAILED {type(error).__name__}: {error}"] += 1
            await asyncio.sleep(generator.random() * 0.2)


async def once(client: httpx.AsyncClient, generator: random.Random, kind: str) -> str:
    """One request of a kind; returns how it ended."""
    settings: dict[str, Any] = {"max_tokens": generator.randint(1, 60), "seed": generator.randrange(10**6)}
    settings["temperature"] = generator.choice([0, 0.7, 1.2])
    if generator.random() < 0.3:
        settings["stop"] = [generator.choice(["the", ".", "\n", "zzzz"])]
    asked = body(question(generator, generator.randint(1, 80)), **settings)
    if kind == "malformed":
        content = generator.choice(
            [b"{", b"[]", b'{"messages": 3}', b'{"messages": []}', json.dumps({**asked, "n": -1}).encode()]
        )
        reply = await client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        return "refused" if reply.status_code == 400 else f"FAILED {reply.status_code}"
    if kind == "whole":
        reply = await client.post("/v1/chat/completions", json={**asked, "stream": False})
        if reply.status_code == 429:
            return "429"
        return "ended" if reply.status_code == 200 and reply.json()["choices"][0]["finish_reason"] else "FAILED"
    async with client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        if reply.status_code == 429:
            return "429"
        if reply.status_code != 200:
            return f"FAILED {reply.status_code}"
        lines, leave = [], generator.randint(1, 10) if kind == "leave" else None
        async for line in reply.aiter_lines():
            if line:
                lines.append(line)
            if leave is not None and len(lines) >= leave:
                return "left"
    ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[:-1]]
    return "ended" if lines[-1] == "data: [DONE]" and ends[-1] in ("stop", "length") else "FAILED broken stream"


def figures(url: str) -> dict[str, float]:
    lines = [line.split() for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines if "{" not in name}


async def crowd(url: str, clients: int, seconds: float, outcomes: Counter) -> None:
    until = time.monotonic() + seconds
    await asyncio.gather(*(client_life(url, number, until, outcomes) for number in range(clients)))


def load(collection: str | None, minutes: float, clients: int) -> dict[str, Any]:
    """A crowd of clients; what came of it, and what it left behind."""
    with serving(collection, "--waiting", "32", "--kv-gigabytes", "0.5") as (url, process):
        asyncio.run(crowd(url, clients, 60 * minutes * 0.4, Counter()))  # to its usual size: kept prefixes fill up
        kept = settle(url)["fusionroute_kv_kept_bytes"]
        before, outcomes = process.memory_info().rss, Counter()
        started = time.monotonic()
        asyncio.run(crowd(url, clients, 60 * minutes, outcomes))
        seconds = time.monotonic() - started
        held = settle(url)
        after = process.memory_info().rss
    failed = sum(count for name, count in outcomes.items() if "FAILED" in name)
    for name, count in sorted(outcomes.items()):
        print(f"{count:7d}  {name}")
    return {
        "minutes": seconds / 60,
        "clients": clients,
        "outcomes": dict(outcomes),
        "failed": failed,
        "rows_left": sum(held[f"fusionroute_rows_{state}"] for state in ("running", "waiting", "open")),
        "kv_bytes_left": held["fusionroute_kv_bytes"],
        "kv_bytes_kept": [kept, held["fusionroute_kv_kept_bytes"]],
        "memory_ratio": after / before,
        "memory_megabytes": [before / 1e6, after / 1e6],
    }


def settle(url: str) -> dict[str, float]:
    """Wait until nothing has run for a while; the figures then."""
    for _ in range(100):
        held = figures(url)
        if held["fusionroute_rows_running"] + held["fusionroute_rows_waiting"] == 0:
            break
        time.sleep(0.1)
    time.sleep(REST_SECONDS + 1)
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "reuse", "load"])
    parser.add_argument("--collection")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, nargs="+", help="of `overhead` 1 2 16, of `load` 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    before = os.getloadavg()[0]
    if given.what == "overhead":
        found = overhead(given.collection, given.rounds, given.tokens, given.clients or [1, 2, 16])
    elif given.what == "reuse":
        found = reuse(given.collection, given.rounds)
    else:
        found = load(given.collection, given.minutes, (given.clients or [64])[0])
    print(json.dumps({"what": given.what, "load_before": before, **found}))
    if given.what == "load" and (found["failed"] or found["rows_left"] or found["kv_bytes_left"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
