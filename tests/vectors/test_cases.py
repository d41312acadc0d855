"""What a case says of an architecture; what the cases are is held by the digest of the committed vectors."""

from dataclasses import dataclass

import pytest

from lora_np.model import Config
from lora_np.vectors.cases import _fields
from lora_np.vectors.derivatives import architectures
from lora_np.vectors.references import _config


@dataclass(frozen=True)
class Later(Config):
    """With a field that it gained."""

    gained: int = 0


every = pytest.mark.parametrize("config", architectures().values(), ids=architectures())


@every
def test_a_field_that_config_gains_is_said_only_where_it_is_not_at_its_default(config):
    assert _fields(Later(**vars(config))) == _fields(config)
    assert _fields(Later(**vars(config), gained=3)) == {**_fields(config), "gained": 3}


@every
def test_a_case_says_all_that_makes_its_architecture(config):
    assert _config(_fields(config)) == config


def test_what_readers_take_for_granted_is_said_always():
    said = _fields(Config(vocab_size=7, n_positions=8, n_layer=1, n_head=2, d_model=4, d_ff=6, n_kv_head=2))
    assert said == {
        "vocab_size": 7, "n_positions": 8, "n_layer": 1, "n_head": 2, "d_model": 4, "d_ff": 6, "n_kv_head": 2,
        "norm": "layer", "norm_first": True, "positions": "learned", "activation": "gelu_tanh", "causal": True,
        "tie_head": True, "head": "lm", "eps": 1e-5, "rope_theta": 10000.0, "n_types": 0, "position_offset": 0,
        "bias": True,
    }  # fmt: skip
