"""Conversion of weights between diffusers' `UNet2DModel` and `UNet`.

The U-Net of diffusers (`google/ddpm-cifar10-32` and others, Ho et al. 2020) is `UNet` with other parameter names.
`from_diffusers` and `to_diffusers` translate the names; `load_diffusers` loads a file into a `UNet`.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.io import require_file
from diffusion_lab.models import UNet

State = dict[str, Tensor]

# Names in `UNet` → names in diffusers, by prefix and then by layer.
_RULES = [
    (r"^down\.(\d+)\.units\.(\d+)\.residual", r"down_blocks.\1.resnets.\2"),
    (r"^down\.(\d+)\.units\.(\d+)\.attention", r"down_blocks.\1.attentions.\2"),
    (r"^down\.(\d+)\.resample", r"down_blocks.\1.downsamplers.0.conv"),
    (r"^middle\.(\d+)\.residual", r"mid_block.resnets.\1"),
    (r"^middle\.(\d+)\.attention", r"mid_block.attentions.\1"),
    (r"^up\.(\d+)\.units\.(\d+)\.residual", r"up_blocks.\1.resnets.\2"),
    (r"^up\.(\d+)\.units\.(\d+)\.attention", r"up_blocks.\1.attentions.\2"),
    (r"^up\.(\d+)\.resample", r"up_blocks.\1.upsamplers.0.conv"),
    (r"^embedding\.linear(\d)", r"time_embedding.linear_\1"),
    (r"^embedding\.label", "class_embedding"),
    (r"^input", "conv_in"),
    (r"^norm", "conv_norm_out"),
    (r"^output", "conv_out"),
    (r"(resnets\.\d+)\.first", r"\1.conv1"),
    (r"(resnets\.\d+)\.last", r"\1.conv2"),
    (r"(resnets\.\d+)\.condition", r"\1.time_emb_proj"),
    (r"(resnets\.\d+)\.skip", r"\1.conv_shortcut"),
    (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"(attentions\.\d+)\.last", r"\1.to_out.0"),
]
# Names of the attention layers in older files, which diffusers still reads → present names.
_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _diffusers_names(name: str) -> list[str]:
    """Return the names in diffusers of the tensors whose concatenation along dimension 0 is `name` in `UNet`."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return [name.replace(".qkv.", f".to_{letter}.") for letter in "qkv"] if ".qkv." in name else [name]


def from_diffusers(state: State, unet: UNet) -> State:
    """Return the tensors of a `UNet2DModel` under the names of `unet`, for `unet.load_state_dict`.

    Args:
        state: state dict of diffusers, with old or present names.
        unet: defines the names and shapes; not modified.

    Raises:
        ConfigError: a tensor that is missing, unused or of another shape; the message names them.
    """
    for old, new in _OLD.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    unused, converted, mismatches = set(state), State(), []
    for name, tensor in unet.state_dict().items():
        names = _diffusers_names(name)
        for n, part in zip(names, tensor.chunk(len(names)), strict=True):
            if n not in state:
                mismatches.append(f"no {n}")
            elif state[n].shape != part.shape:
                mismatches.append(f"{n} is {tuple(state[n].shape)} for {tuple(part.shape)}")
        unused -= set(names)
        if not mismatches:
            converted[name] = torch.cat([state[n] for n in names])
    mismatches += [f"unused {n}" for n in sorted(unused)]
    if mismatches:
        more = f"; and {len(mismatches) - 4} more" if len(mismatches) > 4 else ""
        raise ConfigError(
            f"these weights do not fit this U-Net: {'; '.join(mismatches[:4])}{more}: "
            "build it with the configuration of the weights"
        )
    return converted


def to_diffusers(unet: UNet) -> State:
    """Return the tensors of `unet` under the names of a `UNet2DModel` of the same configuration."""
    state = State()
    for name, tensor in unet.state_dict().items():
        names = _diffusers_names(name)
        # Copies, because safetensors refuses views of one storage.
        state |= {n: part.clone() for n, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return state


def load_diffusers(path: str | Path, unet: UNet) -> UNet:
    """Load published weights into `unet` and return it. Usable as `_target_` in a file of `conf/model`.

    Args:
        path: a `.safetensors` file, or a folder written by diffusers' `save_pretrained`.
        unet: a network of the weights' configuration, e.g. of `conf/model/unet_cifar10.yaml` for `google/ddpm-cifar10-32`.

    Raises:
        ConfigError: the file is missing or damaged, or the weights do not fit.
    """
    file = Path(path)
    if file.is_dir():
        file /= "diffusion_pytorch_model.safetensors"
    if not file.exists():
        raise ConfigError(f"no weights at {file}: write a .safetensors file, or a folder written by save_pretrained")
    try:
        require_file(file)
        state = load_file(file)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} is not a complete .safetensors file: download it again ({error})") from error
    unet.load_state_dict(from_diffusers(state, unet))
    return unet
