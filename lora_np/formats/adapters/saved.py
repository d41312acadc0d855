"""What `save_adapter` wrote into a file of tensors, with PEFT's names or with loralib's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from ...adapter import Adapter, LoRAConfig
from ..files.safetensors_file import TensorFile
from ..models.base import Base
from .fused_qkv import put_together, stored_apart
from .header import KEY, check_about, read_about
from .peft_tensors import Slot, read_params


def read_saved(
    file: TensorFile, model: Base, slots: Callable[[Base, LoRAConfig, Collection[str]], Mapping[str, Slot]]
) -> tuple[Adapter, Adapter]:
    """The adapter that was saved, and as it is stored: where GPT-2's q, k, v were separate, with one c_attn.

    slots: the tensors that hold given parameters, by their keys. A ValueError names what is damaged or does not fit.
    """
    where = f"{file.path}: metadata"
    about = read_about(file.metadata[KEY], where)
    lora_config, names = check_about(about, model, file.dtypes.values(), where)
    stored_config, stored_names = stored_apart(model.config, lora_config, names, where)
    try:
        places = slots(model, stored_config, stored_names)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    file.check_names({key: slot.shape for key, slot in places.items()})
    stored = Adapter(stored_config, read_params(file, model, places))
    params = put_together(model.config, stored.params, names, str(file.path))
    return Adapter(lora_config, params), stored
