"""diffusers: the U-Net that it publishes (`google/ddpm-cifar10-32` and others, Ho et al. 2020) is `UNet` with other names.

`from_diffusers` and `to_diffusers` translate the names; `load_diffusers` fills a `UNet` from a file.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.models import UNet

State = dict[str, Tensor]

# Names here → names in diffusers, by prefix and then by layer.
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
# What older files, which diffusers still reads, call the layers of the attention.
_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _theirs(name: str) -> list[str]:
    """Names in diffusers of the tensors whose stack (along dimension 0) is `name` here."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return [name.replace(".qkv.", f".to_{letter}.") for letter in "qkv"] if ".qkv." in name else [name]


def from_diffusers(state: State, unet: UNet) -> State:
    """A `UNet2DModel`'s tensors under the names of `unet`, ready for its `load_state_dict`.

    Args:
        state: diffusers' state dict, of its old names or its present ones.
        unet: the network that gives names and shapes; unchanged.

    Raises:
        ValueError: names the tensors that are missing, left over, or of another shape.
    """
    for old, new in _OLD.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    left, found, faults = set(state), State(), []
    for name, mine in unet.state_dict().items():
        theirs = _theirs(name)
        for n, part in zip(theirs, mine.chunk(len(theirs)), strict=True):
            if n not in state:
                faults.append(f"no {n}")
            elif state[n].shape != part.shape:
                faults.append(f"{n} is {tuple(state[n].shape)} for {tuple(part.shape)}")
        left -= set(theirs)
        if not faults:
            found[name] = torch.cat([state[n] for n in theirs])
    faults += [f"no place for {n}" for n in sorted(left)]
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ConfigError(
            f"these weights do not fit this U-Net, give it their configuration: {'; '.join(faults[:4])}{more}"
        )
    return found


def to_diffusers(unet: UNet) -> State:
    """The tensors of `unet` under the names of a `UNet2DModel` of the same configuration."""
    state = State()
    for name, tensor in unet.state_dict().items():
        theirs = _theirs(name)
        # Copies, because safetensors refuses views of one storage.
        state |= {n: part.clone() for n, part in zip(theirs, tensor.chunk(len(theirs)), strict=True)}
    return state


def load_diffusers(path: str | Path, unet: UNet) -> UNet:
    """Fill `unet` with published weights, and return it: a file of `conf/model` may name this function by `_target_`.

    Args:
        path: a `.safetensors` file, or the folder that diffusers' `save_pretrained` wrote.
        unet: e.g. that of `conf/model/unet_cifar10.yaml` for `google/ddpm-cifar10-32`.

    Raises:
        ValueError: no such file, a damaged one, or weights that do not fit.
    """
    file = Path(path)
    if file.is_dir():
        file /= "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        raise ConfigError(f"no weights at {file}: give a .safetensors file, or the folder that save_pretrained wrote")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a whole .safetensors file: fetch it again ({error})") from error
    unet.load_state_dict(from_diffusers(state, unet))
    return unet
