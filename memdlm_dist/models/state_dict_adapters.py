"""How the backbones' weights are named and described on Hugging Face.

torchtitan's state-dict adapters translate names in both directions; what `config.json` says is compared with a
backbone's sizes, since a wrong rotary base or norm epsilon does not show in the tensors' shapes.
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
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.llada_moe import LLaDAMoE, LLaDAMoEArgs

# Bytes of one file of an export, of the kind of size that the hub's own checkpoints have.
FILE_BYTES = 5 * 10**9

# LLaDA-8B's name -> ours; {} is the layer. Its gate projection is ff_proj, its down projection ff_out.
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

# Keys of config.json with which the backbone computes nothing.
_FREE = ("architectures", "model_type", "max_sequence_length", "max_position_embeddings")
# And those that follow from the length of the context.
_OF_CONTEXT = ("rope_theta", "max_sequence_length", "max_position_embeddings")


class BackboneStateDictAdapter(StateDictAdapter):
    """torchtitan's adapter, which also knows all of its backbone's tensors and what config.json says of it.

    Args:
        model_args: sizes of the backbone.
        hf_assets_path: folder of the tokenizer, and of the weights that a run starts from if no other is named. The
            files of an export follow from the tensors' sizes (`file_of_each`).
    """

    model_cls: ClassVar[type[LLaDA]]

    def __init__(self, model_args: Any, hf_assets_path: str | None = None):
        super().__init__(model_args, None)
        self.args, self.assets = model_args, hf_assets_path

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What config.json says of the backbone."""

    def expected(self) -> dict[str, Tensor]:
        """Every tensor under its name on Hugging Face, without contents."""
        with torch.device("meta"):
            return self.to_hf(dict(self.model_cls(self.args).state_dict()))

    def differences(self, config_json: str) -> list[str]:
        """What a config.json says otherwise than the backbone is; keys that it lacks or leaves null are not compared.

        Raises:
            ValueError: if it is not a JSON object.
        """
        theirs = json.loads(config_json)
        if not isinstance(theirs, dict):
            raise ValueError("it is not a JSON object")
        # A longer context starts from weights of the backbone's own one.
        own = {**self.config(), "rope_theta": self.args.rope_theta}
        return [
            f"{key} is {theirs[key]!r} there and {own[key]!r} here"
            for key, ours in self.config().items()
            if key not in _FREE and theirs.get(key) is not None and theirs[key] not in (ours, own[key])
        ]

    def extended(self, config_json: str) -> str:
        """A config.json of the backbone's own context as it is to be for this run's, if that is longer."""
        if self.args.rope_scaling == 1:
            return config_json
        ours = {key: value for key, value in self.config().items() if key in _OF_CONTEXT}
        return json.dumps({**json.loads(config_json), **ours}, indent=2) + "\n"


class LLaDAStateDictAdapter(BackboneStateDictAdapter):
    """LLaDA-8B's names. Tensors are the same on both sides, sharded or not."""

    model_cls = LLaDA

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {_translated(name, _TO_LLADA): tensor for name, tensor in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {_translated(name, _FROM_LLADA): tensor for name, tensor in hf_state_dict.items()}

    def config(self) -> dict[str, Any]:
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
    """LLaDA-MoE's names, which are those of Qwen3's mixtures of experts.

    torchtitan's adapter keeps an expert's matrix on the rank that has it, so that each rank reads and writes its own.
    """

    model_cls = LLaDAMoE

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return ReplicatedExpertsAdapter.to_hf(self, state_dict)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return ReplicatedExpertsAdapter.from_hf(self, hf_state_dict)

    def config(self) -> dict[str, Any]:
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


def _translated(name: str, names: Mapping[str, str]) -> str:
    """Raises KeyError for a name that is not the backbone's."""
    layer = re.search(r"\d+", name)
    if layer is None:
        return names[name]
    return names[name.replace(layer[0], "{}", 1)].format(layer[0])


def file_of_each(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, limit: int = FILE_BYTES
) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes to, in order, none larger than `limit` bytes if it can be.

    Args:
        dtype: that they are written in; their own if None.
    """
    number, filled, numbers = 1, 0, {}
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        filled += size
        numbers[name] = number
    return numbers
