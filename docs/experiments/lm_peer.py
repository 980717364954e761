"""The same model by `transformers`, with the same dequantised parameters: logits to compare with. Needs PyTorch.

pip install torch transformers
"""

from __future__ import annotations

import numpy as np

NAMES = {  # ours, which are those of the file: theirs
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def peer(facts, arrays, dtype="float32"):
    """A LlamaForCausalLM from a file's facts and arrays."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def fact(name):
        return facts[f"llama.{name}"]

    embedding = arrays["token_embd.weight"]  # (V, d)
    heads = {"attn_q": fact("attention.head_count"), "attn_k": fact("attention.head_count_kv")}
    config = LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=arrays["blk.0.ffn_gate.weight"].shape[0],
        num_hidden_layers=fact("block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        rms_norm_eps=fact("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_theta": fact("rope.freq_base"), "rope_type": "default"},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": arrays["output_norm.weight"]}
    for i in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            W = arrays[f"blk.{i}.{ours}.weight"]
            state[f"model.layers.{i}.{theirs}.weight"] = halves(W, heads[ours]) if ours in heads else W
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    tensors = {name: torch.tensor(array, dtype=model.dtype) for name, array in state.items()}
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model


def halves(W, heads):
    """Rows of a matrix in their order: the file has the two numbers that are turned together side by side, they have
    one in the first half of a head and one in the second.
    """  # fmt: skip
    return W.reshape(heads, -1, 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)


def peer_logits(model, tokens):
    """(T, V) of tokens (T,)."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)[None])).logits[0].numpy()
