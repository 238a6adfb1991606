"""GGUF to safetensors: the same function, the same text, and files that cannot be converted."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from fusionroute import sources, weights
from fusionroute.errors import FusionRouteError
from weight_files import VOCAB, tiny_model, write_gguf

pytestmark = pytest.mark.usefixtures("home")


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


def test_without_gguf_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FusionRouteError, match=r"pip install 'fusionroute\[gguf\]'"):
        sources.resolve(str(path))
