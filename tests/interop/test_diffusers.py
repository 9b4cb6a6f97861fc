"""Weights to and from diffusers' UNet2DModel: equal outputs, files, refusals; the adapter for external networks."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusion_lab.interop.diffusers import from_diffusers, load_diffusers, to_diffusers
from diffusion_lab.models import External, UNet

diffusers = pytest.importorskip("diffusers")


PUBLISHED = {  # config.json of google/ddpm-cifar10-32, without the width
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "act_fn": "silu",
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}


def pair(width=32, seed=0, changed=None, **options):
    """Return diffusers' U-Net of the published configuration, updated by `changed`, and ours."""
    torch.manual_seed(seed)
    widths = (width, 2 * width, 2 * width, 2 * width)
    theirs = diffusers.UNet2DModel(**PUBLISHED | {"block_out_channels": widths} | (changed or {})).eval()
    return theirs, UNet(channels=3, image_size=[32, 32], width=width, dropout=0.1, **options).eval()


@torch.no_grad()
def difference(theirs, ours, dtype=torch.float32, times=(0, 1, 250, 999)):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    worst = 0.0
    for time in times:
        expected = theirs(x, torch.tensor([time, 999 - time])).sample
        worst = max(
            worst, (ours(x, torch.tensor([time, 999 - time], dtype=torch.float32)) - expected).abs().max().item()
        )
    return worst


def test_published_network_equals_unet():
    theirs, ours = pair(width=128)
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours))
    assert difference(theirs, ours, times=[0, 500]) < 1e-5


def test_outputs_agree_in_float64():
    theirs, ours = pair()
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours))
    assert difference(theirs.double(), ours.double(), torch.float64) < 1e-12


def test_outputs_agree_with_scale_shift_heads_and_labels():
    changed = {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": 8, "num_class_embeds": 5}
    changed["attn_norm_num_groups"] = 32  # otherwise diffusers omits the normalization of the middle attention
    theirs, ours = pair(changed=changed, conditioning="scale_shift", head_channels=8, num_classes=4)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours))
    x, c, label = torch.randn(2, 3, 32, 32), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, c, label), External(theirs, "class_labels")(x, c, label), rtol=1e-5, atol=1e-5
        )


def test_export_loads_into_diffusers_and_back():
    theirs, ours = pair(zero_init=False)
    theirs.load_state_dict(to_diffusers(ours))
    assert difference(theirs, ours) < 1e-5
    again = from_diffusers(to_diffusers(ours), ours)
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_files_of_both_kinds_load(tmp_path):
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "hub")
    assert difference(theirs, ours) > 1e-2
    assert load_diffusers(tmp_path / "hub", ours) is ours
    assert difference(theirs, ours) < 1e-5
    save_file(to_diffusers(ours), tmp_path / "ours.safetensors")
    _, other = pair(seed=1)
    load_diffusers(tmp_path / "ours.safetensors", other)
    assert difference(theirs, other) < 1e-5


def test_old_names_of_published_files_are_translated():
    theirs, ours = pair()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = theirs.state_dict()
    for new, old in names.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    assert any(".proj_attn." in name for name in state)
    ours.load_state_dict(from_diffusers(state, ours))
    assert difference(theirs, ours) < 1e-5


def test_mismatches_are_named_in_one_line(tmp_path):
    theirs, ours = pair()
    state = theirs.state_dict()
    state["extra.weight"] = state.pop("conv_in.weight")
    state["conv_out.bias"] = torch.zeros(6)
    with pytest.raises(
        ValueError, match=r"no conv_in\.weight.*conv_out\.bias is \(6,\) for \(3,\).*extra\.weight"
    ) as error:
        from_diffusers(state, ours)
    assert "\n" not in str(error.value)
    state = theirs.state_dict() | {"mid_block.attentions.0.to_k.weight": torch.zeros(64, 7)}
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0\.to_k\.weight is \(64, 7\) for \(64, 64\)"):
        from_diffusers(state, ours)
    _, narrow = pair(multipliers=[1, 2])
    with pytest.raises(ValueError, match=r"and \d+ more"):
        from_diffusers(theirs.state_dict(), narrow)
    with pytest.raises(ValueError, match="save_pretrained"):
        load_diffusers(tmp_path, ours)
    (tmp_path / "broken.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="download it again"):
        load_diffusers(tmp_path / "broken.safetensors", ours)


def test_external_adapts_results_and_refuses_others():
    class Plain(nn.Module):
        def forward(self, x, c):
            return x * c[:, None, None, None]

    class Odd(nn.Module):
        def forward(self, x, c):
            return [x]

    x, c = torch.ones(2, 1, 4, 4), torch.tensor([1.0, 2.0])
    assert torch.equal(External(Plain())(x, c)[:, 0, 0, 0], c)
    with pytest.raises(ValueError, match="label"):
        External(Plain())(x, c, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="wrap it"):
        External(Odd())(x, c)
