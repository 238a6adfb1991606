"""A tiny model's weight files: safetensors and GGUF as others write them."""

import hashlib
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

HEADS, KV_HEADS, VOCAB = 4, 2, 64
SHA = "ab" * 32


def tiny_model(*, tied: bool = True) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=128, tie_word_embeddings=tied,
    )  # fmt: skip
    # Not `.to(bfloat16)`, which would round the rotary frequencies too: a loaded model has them in float32.
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


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
