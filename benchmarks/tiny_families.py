"""One tiny random model for every family and head that a shipped recipe knows.

Two layers each, and one where another row has the same blocks twice.
"""

from typing import Any

import torch
import transformers
from tiny_sentences import HIDDEN, NORMALIZE, Module, dense, layer_norm, pooling
from torch import nn

from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.core.types import DType
from prox24_deploy.model.experts import experts_apart

VOCABULARY = 96
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
# Far from the tiny default of 0.02, so that every layer matters for the outputs that are compared.
_SPREAD = {"initializer_range": 0.2}
_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
    **_IDS,
    **_SPREAD,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": 8}
_SLIDING = _GROUPED | {"sliding_window": 6}
_MOE = {"num_experts_per_tok": 2, "output_router_logits": False}
_MIXTRAL = _GROUPED | _MOE | {"num_local_experts": 4}
# A block with one MLP, and one with experts.
_QWEN3_MOE = (
    _GROUPED | _MOE | {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
)
_ALTERNATING = ["sliding_attention", "full_attention"]
_GPT2 = {"n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, **_IDS, **_SPREAD}
_OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 80,
    "init_std": 0.2,
    **_IDS,
}
_DISTILBERT = {
    "dim": 32,
    "hidden_dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 80,
    **_IDS,
    **_SPREAD,
}
_MODERNBERT = _COMMON | {
    "layer_types": _ALTERNATING,
    "local_attention": 8,
    "cls_token_id": 0,
    "sep_token_id": 2,
}

_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    **_SPREAD,
}
_SWIN = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": 32,
    "patch_size": 4,
    **_SPREAD,
}
_RESNET = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [2, 2],
    "layer_type": "bottleneck",
}
_CONVNEXT = {
    "num_stages": 2,
    "hidden_sizes": [16, 32],
    "depths": [2, 2],
    "patch_size": 4,
    "image_size": 32,
    **_SPREAD,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, **_IDS}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 80,
    "init_std": 0.2,
    **_IDS,
}
_WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 80,
    "decoder_start_token_id": 3,
    "begin_suppress_tokens": None,
    "init_std": 0.2,
    **_IDS,
}
_PAIRED_T5 = _T5 | {"decoder_start_token_id": 1}

_ONE = {"num_hidden_layers": 1}

# Class of transformers and options of its configuration.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "llama, sentences": ("LlamaModel", _GROUPED | _ONE),
    "mistral": ("MistralForCausalLM", _SLIDING | _ONE),
    "mistral, sentences": ("MistralModel", _SLIDING | _ONE),
    "qwen2": ("Qwen2ForCausalLM", _COMMON | _ONE | {"num_key_value_heads": 2}),
    "qwen2, sentences": ("Qwen2Model", _COMMON | _ONE | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED | _ONE),
    "mixtral": ("MixtralForCausalLM", _MIXTRAL | _ONE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _QWEN3_MOE),
    "gemma": ("GemmaForCausalLM", _GROUPED | _ONE),
    "gemma2": ("Gemma2ForCausalLM", _SLIDING),
    "gemma3_text": ("Gemma3ForCausalLM", _SLIDING | {"layer_types": _ALTERNATING}),
    "gemma3_text, sentences": (
        "Gemma3TextModel",
        _SLIDING | {"layer_types": _ALTERNATING},
    ),
    "phi": ("PhiForCausalLM", _COMMON | _ONE),
    "phi3": ("Phi3ForCausalLM", _COMMON | _ONE),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "opt": ("OPTForCausalLM", _OPT | _ONE),
    "bert": ("BertModel", _COMMON),
    "qwen3, sentences": ("Qwen3Model", _GROUPED | _ONE),
    "bert, text classes": ("BertForSequenceClassification", _COMMON | _ONE),
    "bert, token classes": ("BertForTokenClassification", _COMMON | _ONE),
    "roberta": ("RobertaModel", _COMMON),
    "roberta, text classes": ("RobertaForSequenceClassification", _COMMON | _ONE),
    "xlm-roberta, token classes": ("XLMRobertaForTokenClassification", _COMMON | _ONE),
    "distilbert": ("DistilBertModel", _DISTILBERT),
    "distilbert, text classes": (
        "DistilBertForSequenceClassification",
        _DISTILBERT | {"n_layers": 1},
    ),
    "mpnet": ("MPNetModel", _COMMON),
    "mpnet, text classes": ("MPNetForSequenceClassification", _COMMON | _ONE),
    "modernbert": ("ModernBertModel", _MODERNBERT),
    "modernbert, text classes": ("ModernBertForSequenceClassification", _MODERNBERT),
    "t5, encoder": ("T5EncoderModel", _T5),
    "t5, gated encoder": (
        "T5EncoderModel",
        _T5 | {"feed_forward_proj": "gated-gelu", "num_layers": 1},
    ),
    "t5": ("T5ForConditionalGeneration", _PAIRED_T5),
    "t5, gated": (
        "T5ForConditionalGeneration",
        _PAIRED_T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", _BART),
    "whisper": ("WhisperForConditionalGeneration", _WHISPER),
    "clip, text tower": ("CLIPTextModelWithProjection", _COMMON | {"projection_dim": 16}),
    "clip, image tower": ("CLIPVisionModelWithProjection", _VIT | {"projection_dim": 16}),
    "vit": ("ViTModel", _VIT),
    "vit, classes": ("ViTForImageClassification", _VIT | _ONE),
    "deit, classes": ("DeiTForImageClassification", _VIT | _ONE),
    "swin, classes": ("SwinForImageClassification", _SWIN),
    "resnet, classes": ("ResNetForImageClassification", _RESNET),
    "convnext, classes": ("ConvNextForImageClassification", _CONVNEXT),
    "convnextv2, classes": ("ConvNextV2ForImageClassification", _CONVNEXT),
}
# Rows that are directories of sentence-transformers, with the modules behind the Transformer.
MODULES: dict[str, tuple[Module, ...]] = {
    "bert": (
        pooling("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"),
        dense(6 * HIDDEN, 24),
        layer_norm(24),
        dense(24, 16, bias=False, activation="Identity", residual=True),
        NORMALIZE,
    ),
    "qwen3, sentences": (pooling("lasttoken"), NORMALIZE),
}
# What the image processors of these models would make.
PIXELS = {"channels": 3, "height": 32, "width": 32}
# What the encoder of the model of speech reads and gives.
FEATURES = {"mels": 8, "frames": 24, "source": 12}

# Rows that cannot be exported in one dtype, and how they are refused.
REFUSED_DTYPES: dict[tuple[str, DType], str] = {
    ("resnet, classes", "bfloat16"): "export with --dtype float16 or float32.",
}

# Families that cannot be exported today, and how they are refused.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "t5, without a head": (
        "T5Model",
        _T5,
        "Recipe t5 does not support T5Model: only T5EncoderModel and T5ForConditionalGeneration "
        "are exported, the rest would be lost.",
    ),
    "whisper, without a head": (
        "WhisperModel",
        _WHISPER,
        "Recipe whisper does not support WhisperModel: only WhisperForConditionalGeneration is "
        "exported, and any other head would be lost.",
    ),
}


def tiny_model(row: str, **options: Any) -> nn.Module:
    """The model of one row, the same in every process; float32, evaluation mode.

    `options` of its configuration win over those of the row.
    """
    torch.manual_seed(0)
    name, known = FAMILIES[row] if row in FAMILIES else REFUSED[row][:2]
    made = getattr(transformers, name)
    recipe = shipped_recipes().get(row)
    # As a model directory is opened, where each expert is a module of its own.
    with experts_apart(parse_recipe(recipe, row).experts if recipe else None):
        model: nn.Module = made(made.config_class(**(known | options)))
    return model.eval()
