"""What the architectures have in common: config fields that mean the same everywhere, and a usual decoder's spec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from quantkit.model.keys import HARMLESS
from quantkit.model.spec import GQA, HEAD, MLP, Attention, Layer, Linear, Llama3, ModelSpec, MoE, Role, Rope, Yarn

__all__ = ["KIND", "DecoderConfig", "Llama3Scaling", "Scaling", "YarnScaling", "decoder", "gqa", "mlp", "rope"]


KIND = AliasChoices("rope_type", "type")  # its newer and its older name


class Scaling(BaseModel):
    """How positions are stretched. A key that is not written here is refused: it would change the frequencies."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Llama3Scaling(Scaling):
    rope_type: Literal["llama3"] = Field(validation_alias=KIND)
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}")
        return self

    def spec(self) -> Llama3:
        context = self.original_max_position_embeddings
        return Llama3(self.factor, self.low_freq_factor, self.high_freq_factor, context)


class YarnScaling(Scaling):
    """Both mscale or neither, as all released models have it: implementations differ about one alone."""

    rope_type: Literal["yarn"] = Field(validation_alias=KIND)
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float = Field(gt=0)
    mscale_all_dim: float = Field(gt=0)

    def spec(self) -> Yarn:
        context = self.original_max_position_embeddings
        return Yarn(self.factor, context, self.beta_fast, self.beta_slow, self.mscale, self.mscale_all_dim)


def _one_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE as `rope_theta` and `rope_scaling` (None: plain); transformers 5 writes all of it as `rope_parameters`."""
    config = dict(config)
    together = config.pop("rope_parameters", None)
    if together is not None:
        if not isinstance(together, dict):
            raise ValueError(f"rope_parameters is {together!r}, not fields")
        theta = together.get("rope_theta", config.get("rope_theta"))
        if config.get("rope_scaling") or config.get("rope_theta", theta) != theta:
            raise ValueError("rope_parameters is given beside another rope_scaling or rope_theta")
        config["rope_scaling"] = {key: value for key, value in together.items() if key != "rope_theta"}
        config |= {} if theta is None else {"rope_theta": theta}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict):
        if "rope_type" in scaling and scaling.get("type") == scaling["rope_type"]:
            scaling = {key: value for key, value in scaling.items() if key != "type"}
        config["rope_scaling"] = None if scaling in ({"rope_type": "default"}, {"type": "default"}) else scaling
    return config


class DecoderConfig(BaseModel):
    """The fields of a config.json that change the mathematics. A value outside what is written is refused, not guessed.

    So is one of another type (OUT's config.json repeats it, and engines would not read it), and a key that is neither a
    field nor known to be harmless. A field that may be missing means then what it means to transformers' class.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
    classes: ClassVar[tuple[str, ...]]  # what `architectures` may name: engines choose their code by it
    harmless: ClassVar[Mapping[str, str]] = {}  # of this model, beside HARMLESS
    architectures: list[str] | None = None
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0, le=1000)
    vocab_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(default=10000.0, gt=1)
    rope_scaling: Scaling | None = None
    max_position_embeddings: int | None = Field(default=None, gt=0)
    torch_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None  # its newer name
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    pretraining_tp: Literal[1] = 1
    # Switches of relatives of these models, which would change what a layer computes.
    qkv_bias: Literal[False] = False
    sliding_window: None = None
    attn_logit_softcapping: None = None
    final_logit_softcapping: None = None
    clip_qkv: None = None
    layer_types: list[Literal["full_attention"]] | None = None
    partial_rotary_factor: float | None = Field(default=None, ge=1, le=1)
    rope_interleaved: Literal[False] = False
    is_encoder_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    cross_attention_hidden_size: None = None
    pruned_heads: dict[str, list[int]] = Field(default_factory=dict, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _rope_and_harmless(cls, config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {k: value for k, value in _one_spelling(config).items() if k not in HARMLESS and k not in cls.harmless}

    @classmethod
    def unknown(cls, keys: Iterable[str]) -> list[str]:
        """Those of a config.json's keys that are neither used nor known to be harmless."""
        expected = {"rope_parameters", *cls.model_fields, *HARMLESS, *cls.harmless}
        return [key for key in keys if key not in expected]

    @field_validator("architectures")
    @classmethod
    def _its_own_class(cls, names: list[str] | None) -> list[str] | None:
        if names and (other := [name for name in names if name not in cls.classes]):
            raise ValueError(f"{other[0]!r} is another model's class than {' or '.join(cls.classes)}")
        return names

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_size < 4 or self.head_size % 2:
            raise ValueError(f"head_dim is {self.head_size}, and must be even and at least 4")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self


def rope(c: DecoderConfig) -> Rope:
    """Over whole heads, with the config's scaling."""
    scaling = c.rope_scaling
    return Rope(c.head_size, c.rope_theta, scaling.spec() if isinstance(scaling, Llama3Scaling | YarnScaling) else None)


def gqa(c: DecoderConfig, index: int, norms: tuple[str, str] | None = None, norm_first: bool = False) -> GQA:
    """q_proj, k_proj, v_proj, o_proj of layer `index`. norms: what its query's and its key's norm are called."""
    prefix = f"model.layers.{index}.self_attn"
    q_size, kv_size = c.num_attention_heads * c.head_size, c.num_key_value_heads * c.head_size

    def linear(name: str, out: int, inputs: int) -> Linear:
        return Linear(f"{prefix}.{name}", out, inputs, Role.ATTENTION)

    return GQA(
        q=linear("q_proj", q_size, c.hidden_size),
        k=linear("k_proj", kv_size, c.hidden_size),
        v=linear("v_proj", kv_size, c.hidden_size),
        o=linear("o_proj", c.hidden_size, q_size),
        q_norm=f"{prefix}.{norms[0]}.weight" if norms else None,
        k_norm=f"{prefix}.{norms[1]}.weight" if norms else None,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_size,
        kv_from=index,
        norm_first=norm_first,
    )


def mlp(
    prefix: str, hidden: int, size: int, role: Role, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> MLP:
    """names: of gate, up and down."""
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return MLP(Linear(gate, size, hidden, role), Linear(up, size, hidden, role), Linear(down, hidden, size, role))


def decoder(
    architecture: str,
    c: DecoderConfig,
    rope: Rope,
    attention: Callable[[int], Attention],
    block: Callable[[int], MoE | MLP],
) -> ModelSpec:
    """A model with the usual names around its attention and MLPs, which are given by layer."""
    return ModelSpec(
        architecture=architecture,
        hidden=c.hidden_size,
        vocab=c.vocab_size,
        eps=c.rms_norm_eps,
        rope=rope,
        layers=tuple(
            Layer(
                index=i,
                eps=c.rms_norm_eps,
                input_norm=f"model.layers.{i}.input_layernorm.weight",
                post_attention_norm=f"model.layers.{i}.post_attention_layernorm.weight",
                attention=attention(i),
                mlp=block(i),
            )
            for i in range(c.num_hidden_layers)
        ),
        embedding="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        head=None if c.tie_word_embeddings else HEAD,
        positions=c.max_position_embeddings,
    )
