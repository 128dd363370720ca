"""Model families of transformers, under every wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from paramstate import AdamW, AmbiguousNameError, base_model, base_models, canonical_names, select

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


class Family(NamedTuple):
    """A model, how its configuration is made, and where its base models are."""

    model: str
    config: Callable[[], Any]
    bases: tuple[str, ...]
    lora: str | tuple[str, ...] = "all-linear"


def config(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(bos_token_id=0, eos_token_id=1, pad_token_id=2, **options)


WIDTH = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**WIDTH, "vocab_size": 32, "max_position_embeddings": 16}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
VISION = {**WIDTH, "image_size": 8, "patch_size": 4}
GPT = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
SEQ2SEQ = {
    "vocab_size": 32, "d_model": 16, "max_position_embeddings": 16, "decoder_start_token_id": 0,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16,
}  # fmt: skip
T5 = config("T5", vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
TWO_TOWERS = {"text_config": {**TEXT, "bos_token_id": 0, "eos_token_id": 1}, "vision_config": VISION}
ROTARY = {"rope_type": "default", "rope_theta": 1e4}


def llava() -> Any:
    text, vision = transformers.LlamaConfig(**GROUPED), transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)


def vision_encoder_decoder() -> Any:
    text = transformers.GPT2Config(**GPT, bos_token_id=0, eos_token_id=1, add_cross_attention=True)
    make = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs
    return make(transformers.ViTConfig(**VISION), text)


FAMILIES = [
    Family("GPT2LMHeadModel", config("GPT2", **GPT), ("transformer",)),
    Family("GPT2Model", config("GPT2", **GPT), ("",)),
    Family(
        "GPTNeoForCausalLM",
        config("GPTNeo", vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]),
        ("transformer",),
    ),
    Family("GPTNeoXForCausalLM", config("GPTNeoX", **TEXT), ("gpt_neox",)),
    Family("GPTJForCausalLM", config("GPTJ", **GPT, rotary_dim=4), ("transformer",)),
    Family("LlamaForCausalLM", config("Llama", **GROUPED), ("model",)),
    Family("LlamaForSequenceClassification", config("Llama", **GROUPED), ("model",)),
    Family("MistralForCausalLM", config("Mistral", **GROUPED), ("model",)),
    Family("Qwen2ForCausalLM", config("Qwen2", **GROUPED), ("model",)),
    Family("Qwen3ForCausalLM", config("Qwen3", **GROUPED), ("model",)),
    Family("GemmaForCausalLM", config("Gemma", **GROUPED), ("model",)),
    Family("Gemma2ForCausalLM", config("Gemma2", **GROUPED), ("model",)),
    Family("PhiForCausalLM", config("Phi", **TEXT), ("model",)),
    Family("Phi3ForCausalLM", config("Phi3", **GROUPED), ("model",)),
    Family("FalconForCausalLM", config("Falcon", **TEXT), ("transformer",)),
    Family("BloomForCausalLM", config("Bloom", vocab_size=32, hidden_size=16, n_layer=2, n_head=2), ("transformer",)),
    Family("OPTForCausalLM", config("OPT", **TEXT, ffn_dim=16, word_embed_proj_dim=16), ("model",)),
    Family("MixtralForCausalLM", config("Mixtral", **GROUPED, num_local_experts=2), ("model",)),
    Family("MambaForCausalLM", config("Mamba", vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2),
           ("backbone",), ("in_proj",)),
    Family("BertForMaskedLM", config("Bert", **TEXT), ("bert",)),
    Family("RobertaForSequenceClassification", config("Roberta", **TEXT), ("roberta",)),
    Family("DistilBertForMaskedLM", config("DistilBert", vocab_size=32, dim=16, hidden_dim=16, n_layers=1, n_heads=2),
           ("distilbert",)),
    Family("AlbertForMaskedLM", config("Albert", **TEXT, embedding_size=8), ("albert",)),
    Family("DebertaV2ForMaskedLM", config("DebertaV2", **TEXT), ("deberta",)),
    Family("ElectraForTokenClassification", config("Electra", **TEXT, embedding_size=8), ("electra",)),
    Family("T5ForConditionalGeneration", T5, ("encoder", "decoder")),
    Family("T5ForSequenceClassification", T5, ("transformer",)),
    Family("T5EncoderModel", T5, ("",)),
    Family("T5Model", T5, ("",)),
    Family("BartForConditionalGeneration", config("Bart", **SEQ2SEQ), ("model",)),
    Family("BartModel", config("Bart", **SEQ2SEQ), ("",)),
    Family("MBartForConditionalGeneration", config("MBart", **SEQ2SEQ), ("model",)),
    Family("MarianMTModel", config("Marian", **SEQ2SEQ), ("model",)),
    Family("WhisperForConditionalGeneration", config("Whisper", **SEQ2SEQ, num_mel_bins=8), ("model",)),
    Family(
        "Wav2Vec2ForCTC",
        config("Wav2Vec2", **WIDTH, vocab_size=32, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,),
               num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=2),
        ("wav2vec2",),
    ),
    Family("CLIPModel", config("CLIP", **TWO_TOWERS, projection_dim=8), ("text_model", "vision_model")),
    Family("CLIPTextModelWithProjection", config("CLIPText", **TEXT), ("text_model",)),
    Family("CLIPForImageClassification", config("CLIP", **TWO_TOWERS), ("vision_model",)),
    Family("SiglipModel", config("Siglip", **TWO_TOWERS), ("text_model", "vision_model")),
    Family("SiglipForImageClassification", config("Siglip", **TWO_TOWERS), ("vision_model",)),
    Family("ViTForImageClassification", config("ViT", **VISION), ("vit",)),
    Family("Dinov2ForImageClassification", config("Dinov2", **VISION), ("dinov2",)),
    Family(
        "SwinForImageClassification",
        config("Swin", image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2),
        ("swin",),
    ),
    Family("LlavaForConditionalGeneration", llava, ("model.vision_tower", "model.language_model")),
    Family(
        "Gemma3ForConditionalGeneration",
        config("Gemma3", text_config=GROUPED, vision_config=VISION),
        ("model.vision_tower", "model.language_model"),
    ),
    Family(
        "Qwen2VLForConditionalGeneration",
        config("Qwen2VL", text_config={**GROUPED, "rope_parameters": {**ROTARY, "mrope_section": [1, 1, 2]}},
               vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}),
        ("model.visual", "model.language_model"),
    ),
    Family(
        "Blip2ForConditionalGeneration",
        config("Blip2", vision_config=VISION, qformer_config={**TEXT, "encoder_hidden_size": 16},
               text_config={**TEXT, "model_type": "opt", "ffn_dim": 16, "word_embed_proj_dim": 16}),
        ("vision_model", "qformer", "language_model.model"),
    ),
    Family("GitForCausalLM", config("Git", **TEXT, vision_config=VISION), ("git",)),
    Family("VisionEncoderDecoderModel", vision_encoder_decoder, ("encoder", "decoder.transformer")),
]  # fmt: skip


@cache
def bare(family: Family) -> nn.Module:
    """The model as transformers builds it from its configuration, on tiny random weights."""
    torch.manual_seed(0)
    return getattr(transformers, family.model)(family.config())


@cache
def with_lora(family: Family) -> nn.Module:
    """PEFT changes the model in place: a copy is wrapped."""
    lora = peft.LoraConfig(r=2, target_modules=family.lora if isinstance(family.lora, str) else list(family.lora))
    return peft.get_peft_model(copy.deepcopy(bare(family)), lora)


WRAPPINGS: dict[str, Callable[[Family], nn.Module]] = {
    "bare": bare,
    "compile": lambda family: torch.compile(bare(family)),
    "DataParallel": lambda family: nn.DataParallel(bare(family)),
    "DDP": lambda family: nn.parallel.DistributedDataParallel(bare(family)),
    "LoRA": with_lora,
    "LoRA+compile": lambda family: torch.compile(with_lora(family)),
}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one process."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("world") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    bare.cache_clear()
    with_lora.cache_clear()


families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model)
wrappings = pytest.mark.parametrize("wrapping", WRAPPINGS)


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def below(path: str, names: list[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in names)


@families
@wrappings
def test_canonical_names_are_those_of_the_bare_model(family: Family, wrapping: str) -> None:
    """A wrapped model's canonical names are the bare model's, tied names and order included; adapters come extra."""
    model = bare(family)
    wrapped = canonical_names(WRAPPINGS[wrapping](family))
    adapters = [name for name in wrapped if is_adapter(name)]
    expected = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert [name for name in wrapped if not is_adapter(name)] == expected
    assert bool(adapters) == wrapping.startswith("LoRA")
    assert all(below(name.split(".lora_")[0], expected) for name in adapters)


@families
@wrappings
def test_the_base_models_are_the_same_modules_in_every_wrapper(family: Family, wrapping: str) -> None:
    """base_models finds a family's backbones under the same canonical names in every wrapper."""
    model = bare(family)
    wrapped = WRAPPINGS[wrapping](family)
    found = base_models(wrapped)
    assert tuple(found) == family.bases
    for name, module in found.items():
        assert type(module) is type(model.get_submodule(name))
        if not wrapping.startswith("LoRA"):
            assert module is model.get_submodule(name)
        assert any(module is part for part in wrapped.modules())


@families
@wrappings
def test_base_model_is_the_only_one_or_an_error_that_lists_them(family: Family, wrapping: str) -> None:
    """base_model returns the one backbone of a model, and raises with the list where there are several."""
    wrapped = WRAPPINGS[wrapping](family)
    if len(family.bases) == 1:
        assert base_model(wrapped) is base_models(wrapped)[family.bases[0]]
        return
    with pytest.raises(AmbiguousNameError) as raised:
        base_model(wrapped)
    assert f"{family.model} has several base models" in str(raised.value)
    assert all(f"{name!r} (" in str(raised.value) for name in family.bases)


@families
def test_base_and_rest_are_groups_at_rates_of_their_own(family: Family) -> None:
    """The backbones and the rest of any family train as two groups, made by selections."""
    model = bare(family)
    backbone = {param for module in base_models(model).values() for param in module.parameters()}
    base = select(model, *backbone)
    head = [{"params": ~base, "lr": 1e-3}] if len(backbone) < len(list(model.parameters())) else []
    opt = AdamW([{"params": base, "lr": 1e-5}, *head])
    assert {*opt.ids} == {*canonical_names(model)}
    assert {*opt.param_groups[0]["params"]} == backbone
    assert len(opt.param_groups) == 1 + len(head)


def test_peft_around_llama_does_not_hide_its_base_model() -> None:
    """Inside PEFT, where transformers' own attribute finds the model with its head, base_model finds LlamaModel."""
    family = next(family for family in FAMILIES if family.model == "LlamaForCausalLM")
    wrapped = with_lora(family)
    assert type(getattr(wrapped, wrapped.base_model_prefix)).__name__ == "LlamaForCausalLM"
    assert type(base_model(wrapped)).__name__ == "LlamaModel"
    assert base_model(nn.parallel.DistributedDataParallel(wrapped)) is base_model(wrapped)


def test_modules_that_peft_trains_in_full_keep_their_names() -> None:
    """A head that PEFT keeps and copies for training has its own name; the copy comes extra."""
    family = next(family for family in FAMILIES if family.model == "RobertaForSequenceClassification")
    model = bare(family)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], trainable_token_indices=[0, 1])
    wrapped = peft.get_peft_model(copy.deepcopy(model), lora)
    names = canonical_names(wrapped)
    assert {*names} >= {name for name, _ in model.named_parameters()}
    assert "classifier.modules_to_save.default.dense.weight" in names
    assert type(base_model(wrapped)).__name__ == "RobertaModel"


def test_a_base_model_that_was_compiled_in_place_is_found() -> None:
    """A backbone that is compiled inside its model is found as the module that was compiled."""
    family = next(family for family in FAMILIES if family.model == "LlamaForCausalLM")
    model = copy.deepcopy(bare(family))
    inner = model.model
    model.model = torch.compile(model.model)
    assert base_models(model) == {"model": inner}
    assert [*canonical_names(model)] == [*canonical_names(bare(family))]


def test_a_model_of_ones_own_has_the_base_of_what_it_holds() -> None:
    """In a module of one's own base_model finds the Hugging Face model inside; without one it is the module itself."""
    families_by_name = {family.model: family for family in FAMILIES}
    backbone = bare(families_by_name["ViTForImageClassification"])
    own = nn.ModuleDict({"encoder": backbone, "head": nn.Linear(2, 2)})
    assert base_models(own) == {"encoder.vit": backbone.vit}
    pair = nn.ModuleDict({"image": backbone, "text": bare(families_by_name["BartModel"])})
    assert [*base_models(pair)] == ["image.vit", "text"]
    plain = nn.Sequential(nn.Linear(2, 2))
    assert base_models(nn.DataParallel(plain)) == {"": plain}


def test_a_users_subclass_of_a_base_model_is_one() -> None:
    """A subclass of a family's base model is the base model itself, although encoder and decoder are models."""
    family = next(family for family in FAMILIES if family.model == "BartModel")

    class Mine(transformers.BartModel):
        pass

    mine = Mine(family.config())
    assert base_model(mine) is mine


def test_towers_that_are_plain_modules_are_found_by_their_configuration() -> None:
    """Towers that are plain modules, as transformers 4 builds CLIP's, are base models by their configurations."""
    family = next(family for family in FAMILIES if family.model == "CLIPModel")

    class Tower(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.layer = nn.Linear(2, 2)
            self.layer.config = config

    class TwoTowers(transformers.CLIPPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.towers = nn.ModuleDict({"text": Tower(config.text_config), "image": Tower(config.vision_config)})
            self.projection = nn.Linear(2, 2)

    model = TwoTowers(family.config())
    assert base_models(nn.DataParallel(model)) == {"towers.text": model.towers.text, "towers.image": model.towers.image}
