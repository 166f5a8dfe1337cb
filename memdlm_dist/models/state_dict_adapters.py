"""State-dict adapters: Hugging Face tensor names and `config.json` of the backbones.

The adapters translate tensor names in both directions. They also compare `config.json` with the backbone's sizes, since
tensor shapes do not reveal a wrong RoPE base or norm epsilon.
"""

import json
import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from memdlm_dist.compat.torchtitan import ReplicatedExpertsAdapter
from memdlm_dist.models import row_slices
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.models.row_slices import RowSlice

# Maximum size in bytes of one file of an export, as is usual for checkpoints on the Hugging Face hub.
FILE_BYTES = 5 * 10**9

# LLaDA-8B's names -> our names; {} is the layer. ff_proj is the gate projection, ff_out the down projection.
_LLADA_NAMES = {
    "model.transformer.wte": "tok_embeddings",
    "model.transformer.blocks.{}.attn_norm": "layers.{}.attention_norm",
    "model.transformer.blocks.{}.q_proj": "layers.{}.attention.wq",
    "model.transformer.blocks.{}.k_proj": "layers.{}.attention.wk",
    "model.transformer.blocks.{}.v_proj": "layers.{}.attention.wv",
    "model.transformer.blocks.{}.attn_out": "layers.{}.attention.wo",
    "model.transformer.blocks.{}.ff_norm": "layers.{}.ffn_norm",
    "model.transformer.blocks.{}.ff_proj": "layers.{}.feed_forward.w1",
    "model.transformer.blocks.{}.up_proj": "layers.{}.feed_forward.w3",
    "model.transformer.blocks.{}.ff_out": "layers.{}.feed_forward.w2",
    "model.transformer.ln_f": "norm",
    "model.transformer.ff_out": "output",
}
_FROM_LLADA = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _LLADA_NAMES.items()}
_TO_LLADA = {ours: theirs for theirs, ours in _FROM_LLADA.items()}

# LLaDA2's names -> our names; the second {} is the expert. Queries, keys and values are slices of one projection there.
_LLADA2_NAMES = {
    "model.word_embeddings.weight": "tok_embeddings.weight",
    "model.layers.{}.attention.dense.weight": "layers.{}.attention.wo.weight",
    "model.layers.{}.attention.query_layernorm.weight": "layers.{}.attention.q_norm.weight",
    "model.layers.{}.attention.key_layernorm.weight": "layers.{}.attention.k_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.feed_forward.w1.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.feed_forward.w3.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.feed_forward.w2.weight",
    "model.layers.{}.mlp.experts.{}.gate_proj.weight": "layers.{}.moe.experts.w1",
    "model.layers.{}.mlp.experts.{}.up_proj.weight": "layers.{}.moe.experts.w3",
    "model.layers.{}.mlp.experts.{}.down_proj.weight": "layers.{}.moe.experts.w2",
    "model.layers.{}.mlp.gate.weight": "layers.{}.moe.router.gate.weight",
    "model.layers.{}.mlp.gate.expert_bias": "layers.{}.moe.expert_bias",
    "model.layers.{}.mlp.shared_experts.gate_proj.weight": "layers.{}.shared_experts.w1.weight",
    "model.layers.{}.mlp.shared_experts.up_proj.weight": "layers.{}.shared_experts.w3.weight",
    "model.layers.{}.mlp.shared_experts.down_proj.weight": "layers.{}.shared_experts.w2.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.ffn_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_LLADA2_FUSED = "model.layers.{}.attention.query_key_value.weight"

# Suffix of tensors that stay in float32: training changes them by less than bfloat16 resolves.
_FLOAT32 = "expert_bias"

# config.json keys that do not affect the forward pass.
_IGNORED_KEYS = ("architectures", "model_type", "max_sequence_length", "max_position_embeddings")
# config.json keys that depend on the context length.
_CONTEXT_KEYS = ("rope_theta", "max_sequence_length", "max_position_embeddings")


class BackboneStateDictAdapter(StateDictAdapter):
    """torchtitan's state-dict adapter, extended by the backbone's list of tensors and its `config.json`.

    Args:
        model_args: sizes of the backbone.
        hf_assets_path: folder of the tokenizer, and of the initial weights if no other folder is given. Files of an
            export do not follow the index in this folder; see `fqn_to_index_mapping`.
    """

    model_cls: ClassVar[type[LLaDA]]

    def __init__(self, model_args: Any, hf_assets_path: str | None = None):
        super().__init__(model_args, None)
        self.args, self.assets = model_args, hf_assets_path

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the backbone's config.json as a dict."""

    def expected(self) -> dict[str, Tensor]:
        """Return all tensors of the backbone's files by Hugging Face name, on the meta device."""
        with torch.device("meta"):
            return row_slices.joined(self.to_hf(dict(self.model_cls(self.args).state_dict())))

    def differences(self, config_json: str) -> list[str]:
        """List the differences between a config.json and the backbone, one phrase per key.

        Keys that are absent or null in `config_json` are not compared.

        Raises:
            ValueError: if `config_json` is not a JSON object.
        """
        found = json.loads(config_json)
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
        # A run with a longer context may start from weights for the native one.
        native = {**self.config(), "rope_theta": self.args.rope_theta}
        return [
            f"{key} is {found[key]!r} there and {native[key]!r} here"
            for key, expected in self.config().items()
            if key not in _IGNORED_KEYS and found.get(key) is not None and found[key] not in (expected, native[key])
        ]

    def extended(self, config_json: str) -> str:
        """Set the RoPE base and context length of a native config.json to those of this run's context."""
        if self.args.rope_scaling == 1:
            return config_json
        changed = {key: value for key, value in self.config().items() if key in _CONTEXT_KEYS}
        return json.dumps({**json.loads(config_json), **changed}, indent=2) + "\n"


class LLaDAStateDictAdapter(BackboneStateDictAdapter):
    """State-dict adapter for LLaDA-8B: only names differ, tensors (sharded or not) stay the same."""

    model_cls = LLaDA

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Rename a state dict's entries to Hugging Face names; raises KeyError for unknown names."""
        return {_translate(name, _TO_LLADA): tensor for name, tensor in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Rename a state dict's entries from Hugging Face names; raises KeyError for unknown names."""
        return {_translate(name, _FROM_LLADA): tensor for name, tensor in hf_state_dict.items()}

    def config(self) -> dict[str, Any]:
        """Return LLaDA-8B's config.json with this backbone's sizes."""
        args: LLaDAArgs = self.args
        heads = args.n_kv_heads or args.n_heads
        return {
            "architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama", "activation_type": "silu",
            "d_model": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": heads,
            "mlp_hidden_size": args.hidden_dim, "vocab_size": args.vocab_size, "embedding_size": args.vocab_size,
            "layer_norm_type": "rms", "rms_norm_eps": args.norm_eps, "rope": True, "rope_theta": args.rotary_base,
            "include_bias": False, "include_qkv_bias": False, "weight_tying": False, "scale_logits": False,
            "input_emb_norm": False, "attention_layer_norm": False, "alibi": False, "block_group_size": 1,
            "max_sequence_length": args.max_seq_len,
        }  # fmt: skip


class LLaDAMoEStateDictAdapter(BackboneStateDictAdapter, ReplicatedExpertsAdapter):
    """State-dict adapter for LLaDA-MoE, which uses the tensor names of Qwen3's MoE models.

    torchtitan's adapter leaves each expert's matrix on the rank that holds it, so each rank reads and writes its own.
    """

    model_cls = LLaDAMixture

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Split the experts' tensors into one matrix per expert, under Hugging Face names."""
        return ReplicatedExpertsAdapter.to_hf(self, state_dict)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Stack the experts' matrices into one tensor per linear, under our names."""
        return ReplicatedExpertsAdapter.from_hf(self, hf_state_dict)

    def config(self) -> dict[str, Any]:
        """Return LLaDA-MoE's config.json with this backbone's sizes."""
        args: LLaDAMoEArgs = self.args
        return {
            "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "hidden_size": args.dim,
            "num_hidden_layers": args.n_layers, "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads or args.n_heads, "num_experts": args.n_experts,
            "num_experts_per_tok": args.experts_per_token, "expert_intermediate_size": args.hidden_dim,
            "vocab_size": args.vocab_size, "rms_norm_eps": args.norm_eps, "rope_theta": args.rotary_base,
            "hidden_act": "silu", "qk_layernorm": args.qk_norm, "norm_topk_prob": False, "attention_bias": False,
            "tie_word_embeddings": False, "moe_router_score_function": "softmax", "routed_scaling_factor": 1,
            "partial_rotary_factor": 1, "rope_scaling": None, "clip_qkv": None, "shared_expert_intermediate_size": None,
            "moe_router_enable_expert_bias": False, "moe_layer_freq": [1] * args.n_layers,
            "max_position_embeddings": args.max_seq_len,
        }  # fmt: skip


class LLaDA2StateDictAdapter(LLaDAMoEStateDictAdapter):
    """State-dict adapter for LLaDA2: the projections of queries, keys and values are slices of one tensor there."""

    def __init__(self, model_args: Any, hf_assets_path: str | None = None):
        super().__init__(model_args, hf_assets_path)
        self.from_hf_map = _LLADA2_NAMES | {
            RowSlice(_LLADA2_FUSED, *rows).name: f"layers.{{}}.attention.{weight}.weight"
            for weight, rows in self._fused_rows().items()
        }

    def _fused_rows(self) -> dict[str, tuple[int, int]]:
        """Return the rows of the fused projection that belong to each of our linears."""
        args: LLaDA2Args = self.args
        ends = args.query_dim, args.query_dim + args.kv_dim, args.query_dim + 2 * args.kv_dim
        return {"wq": (0, ends[0]), "wk": (ends[0], ends[1]), "wv": (ends[1], ends[2])}

    def config(self) -> dict[str, Any]:
        """Return LLaDA2's config.json with this backbone's sizes."""
        args: LLaDA2Args = self.args
        return {
            "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "hidden_size": args.dim,
            "intermediate_size": args.dense_hidden_dim, "moe_intermediate_size": args.hidden_dim,
            "num_hidden_layers": args.n_layers, "first_k_dense_replace": args.n_dense_layers,
            "num_attention_heads": args.n_heads, "num_key_value_heads": args.n_kv_heads or args.n_heads,
            "head_dim": args.head_dim, "num_experts": args.n_experts, "num_experts_per_tok": args.experts_per_token,
            "num_shared_experts": args.shared_hidden_dim // args.hidden_dim, "n_group": args.expert_groups,
            "topk_group": args.groups_per_token, "routed_scaling_factor": args.score_scale,
            "norm_topk_prob": args.normalizes_scores, "score_function": args.router_score,
            "moe_router_enable_expert_bias": args.has_expert_bias, "vocab_size": args.vocab_size,
            "rms_norm_eps": args.norm_eps, "rope_theta": args.rotary_base, "rope_scaling": None,
            "partial_rotary_factor": args.partial_rotary_factor, "rotary_dim": args.rotary_dim, "hidden_act": "silu",
            "use_qk_norm": args.qk_norm, "use_bias": False, "use_qkv_bias": False, "tie_word_embeddings": False,
            "max_position_embeddings": args.max_seq_len,
        }  # fmt: skip


def in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Cast a state dict, except for tensors that stay in float32.

    Args:
        state: tensors by our names or Hugging Face's.
        dtype: None to keep each tensor's dtype.
    """
    return {name: tensor.to(stored_dtype(name, dtype or tensor.dtype)) for name, tensor in state.items()}


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor in weights of `dtype`."""
    return torch.float32 if name.endswith(_FLOAT32) else dtype


def _translate(name: str, names: Mapping[str, str]) -> str:
    """Translate a tensor name by a table with {} for the layer; raises KeyError for unknown names."""
    layer = re.search(r"\d+", name)
    if layer is None:
        return names[name]
    return names[name.replace(layer[0], "{}", 1)].format(layer[0])


def fqn_to_index_mapping(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, limit: int = FILE_BYTES
) -> dict[str, int]:
    """Assign the tensors of an export to files, in order: return the file number of each tensor, from 1.

    A file holds at most `limit` bytes, or one tensor that is larger.

    Args:
        tensors: tensors by name; only their shapes and dtypes are read.
        dtype: dtype of the export; None for the tensors' dtypes.
        limit: maximum size of a file in bytes.
    """
    index, filled, mapping = 1, 0, {}
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * stored_dtype(name, dtype or tensor.dtype).itemsize
        if filled and filled + size > limit:
            index, filled = index + 1, 0
        filled += size
        mapping[name] = index
    return mapping
