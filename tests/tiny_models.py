"""Random models of the real classes, a few thousand parameters each, as folders that `from_pretrained` loads."""

from pathlib import Path

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def save_causal_lm(folder: Path, family: str, tokenizer) -> Path:
    """A causal LM of a family (Llama, Mistral, Qwen2, Qwen3 ...) with a tokenizer and a chat template."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def save_speech_encoder(folder: Path, family: str, norm: str, dim: int = 16) -> Path:
    """WavLM, Wav2Vec2 or Hubert with its feature extractor; `norm` as published: layer (large) or group (base)."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        # oneDNN 3.12 computes groups of 8 channels, which no published model has, wrongly in bfloat16 on AVX10.
        num_conv_pos_embedding_groups=16,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
    )
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
    # As published: wav2vec2-base has no mask of its own, WavLM-large has.
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer", do_normalize=True)
    extractor.save_pretrained(folder)
    return folder


def save_whisper(folder: Path) -> Path:
    """Whisper with a window of 2 s."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=100,
        vocab_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=2).save_pretrained(folder)
    return folder


def save_clip(folder: Path, dim: int = 12) -> Path:
    """CLIP, both halves."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**tower, "image_size": 224, "patch_size": 32},
        projection_dim=dim,
    )
    config.vision_config.projection_dim = dim
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def save_bert(folder: Path, text: str) -> Path:
    """BERT, with a tokenizer whose pieces are the letters of a text."""
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = sorted(set("".join(text.lower().split())))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}).save_pretrained(folder)
    return folder


def save_blip2(folder: Path, **sizes: int) -> Path:
    """The Q-Former of a BLIP-2 checkpoint; `sizes` as of `QFormerCore`."""
    import json

    from safetensors.torch import save_file

    from msenc.models.connector import QFormerCore

    folder.mkdir()
    save_file(QFormerCore(**sizes, dropout=0.0).state_dict(), folder / "model.safetensors")
    config = {"qformer_config": {"num_attention_heads": sizes["num_heads"]}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def build_conversation(
    folder: Path, streams=("audio", "video"), freeze=False, lora=LORA, seed=0, connector="qformer", **options
):
    """A ConversationModel for `random_dialogues` whose every part matters: values far from zero, LoRA's included."""
    import torch
    from random_dialogues import DIMS, NUM_QUERIES

    from msenc.models.connector import Mlp, QFormer
    from msenc.models.conversation import ConversationModel
    from msenc.models.llm import load_llm

    llm = load_llm(str(folder), freeze, lora, **options)
    width = llm.get_input_embeddings().weight.shape[1]
    torch.manual_seed(seed)
    connectors = {}
    for name in streams:
        q = NUM_QUERIES[name]
        if connector == "mlp":
            connectors[name] = Mlp(DIMS[name], width, num_queries=q, hidden_dim=8)
        else:
            small = {"num_layers": 1, "hidden_dim": 8, "num_heads": 2, "encoder_dim": 8, "dropout": 0.0}
            connectors[name] = QFormer(DIMS[name], width, num_queries=q, **small)
    for name, parameter in sorted(llm.named_parameters()):
        if parameter.dim() > 1:  # norms stay 1
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.3)
    return ConversationModel(llm, connectors)
