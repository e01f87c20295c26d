"""Keys of a config.json that change nothing of what a model computes, by the reason why.

A key that is neither a field of its model's config class nor listed here is refused by name: it may change the model.
"""

from __future__ import annotations

__all__ = ["HARMLESS", "OF_DEEPSEEK_V2", "OF_HUNYUAN", "OF_QWEN3_MOE"]


def _keys(table: dict[str, str]) -> dict[str, str]:
    """reason -> keys, turned around."""
    return {key: reason for reason, keys in table.items() for key in keys.split()}


HARMLESS = _keys(
    {
        "says which file this is, and who wrote it": (
            "model_type transformers_version _name_or_path name_or_path _commit_hash transformers.js_config is_llama_config "
            "unsloth_fixed unsloth_version"
        ),
        "names code that runs only where a user allows remote code": "auto_map custom_pipelines",
        "read by quantkit.formats": "quantization_config",
        "says which kernels an engine takes for the same product": (
            "attn_implementation _attn_implementation _attn_implementation_autoset _experts_implementation "
            "experts_implementation"
        ),
        "token ids: which tokens begin, end and fill up a text": (
            "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id"
        ),
        "acts in training alone": (
            "attention_dropout hidden_dropout initializer_range router_aux_loss_coef router_jitter_noise "
            "gradient_checkpointing use_bfloat16"
        ),
        "says what is returned beside the logits, or how": (
            "output_attentions output_hidden_states output_router_logits output_scores return_dict use_return_dict "
            "return_dict_in_generate torchscript tie_last_hidden_states use_cache"
        ),
        "a setting of generation, which older configs repeat": (
            "max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups "
            "diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty "
            "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
            "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
            "forced_bos_token_id forced_eos_token_id encoder_repetition_penalty num_assistant_tokens "
            "num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind"
        ),
        "of a classifier, whose tensors would be refused": (
            "id2label label2id num_labels problem_type finetuning_task task_specific_params classifier_dropout"
        ),
        "of the tokenizer": "tokenizer_class prefix",
        "of models with an encoder": "tie_encoder_decoder is_decoder tf_legacy_loss",
        "cuts a product into parts with the same result": "chunk_size_feed_forward",
    }
)
OF_DEEPSEEK_V2 = _keys(
    {
        "acts in training alone": "aux_loss_alpha seq_aux",
        "how many devices share the experts": "ep_size",
        "written by transformers with a meaning of its own": "head_dim",
    }
)
OF_QWEN3_MOE = _keys({"means nothing without use_sliding_window": "max_window_layers"})
OF_HUNYUAN = _keys(
    {
        "token ids: which tokens begin, end and fill up a text": "eod_token_id pad_id",
        "the tokenizer's size": "org_vocab_size",
        "means nothing without use_mla": "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim",
        "means nothing without group_limited_greedy": "n_group topk_group",
        "means nothing where no token is dropped": "capacity_factor moe_random_routing_dropped_token",
        "means nothing without position_embedding_xdrope": "xdrope_section",
        "means nothing without add_classification_head": "class_num pool_type dense_list",
        "of an image tower, whose tensors would be refused": (
            "anyres_pooling_size anyres_vit_max_image_size anyres_vit_two_views im_start_id im_end_id im_newline_id "
            "image_token_id video_start_id video_end_id text_start_id text_end_id mask_init_id num_media_embeds "
            "skip_cls_token vit_add_patchemb_bias vit_input_resolution vit_mapping_type vit_norm_type vit_patch vit_path "
            "vit_remove_prenorm vit_token vit_type vit_used_rms_norm"
        ),
    }
)
