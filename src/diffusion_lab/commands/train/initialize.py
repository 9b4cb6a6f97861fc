"""`init=`: begin from the weights of another run, or of another project."""

from pathlib import Path

from torch import nn

from diffusion_lab import checkpoint
from diffusion_lab.errors import ConfigError
from diffusion_lab.interop.diffusers import load_diffusers


def initialize(network: nn.Module, path: str) -> str:
    """Load weights into `network`, averaged ones where there are any; a label embedding of another size keeps its values.

    Args:
        network: the network to train.
        path: a checkpoint of this project, a run folder, latest, a file of src/export.py, or diffusers' `.safetensors`.

    Returns:
        What was loaded, for the screen.

    Raises:
        ConfigError: weights that do not fit, except those of the label embedding.
    """
    if path.endswith(".safetensors") and Path(path).is_file() and checkpoint.metadata(Path(path)) is None:
        load_diffusers(path, network)  # type: ignore[arg-type]
        return path
    file = checkpoint.find(path)
    name, state = checkpoint.select(checkpoint.read(file), "ema")
    own = network.state_dict()
    differ = [
        key for key in {**own, **state} if key not in own or key not in state or own[key].shape != state[key].shape
    ]
    unfit = [key for key in differ if "label" not in key]
    if unfit:
        raise ConfigError(
            f"init={path}: {len(unfit)} weights do not fit this network, e.g. {unfit[0]}: choose the same model="
        )
    network.load_state_dict({**own, **{key: value for key, value in state.items() if key in own and key not in differ}})
    return f"{file} ({name}" + (f", without {', '.join(differ)})" if differ else ")")
