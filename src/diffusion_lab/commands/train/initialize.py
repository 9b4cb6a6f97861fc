"""`init=`: initialize the network with the weights of another run, or of another project."""

from pathlib import Path

from torch import nn

from diffusion_lab import checkpoint
from diffusion_lab.errors import ConfigError
from diffusion_lab.interop.diffusers import load_diffusers


def initialize(network: nn.Module, path: str) -> str:
    """Load weights into `network`: averaged ones if the file has any. A label embedding of another size keeps its new weights.

    Args:
        network: the network to train.
        path: a checkpoint of this project, a run folder, latest, a file of src/export.py, or diffusers' `.safetensors`.

    Returns:
        The name of the file and the weights, for printing.

    Raises:
        ConfigError: weights of other names or shapes, except those of the label embedding.
    """
    if path.endswith(".safetensors") and Path(path).is_file() and checkpoint.metadata(Path(path)) is None:
        load_diffusers(path, network)  # type: ignore[arg-type]
        return path
    file = checkpoint.find(path)
    name, state = checkpoint.select(checkpoint.read(file), "ema")
    fresh = network.state_dict()
    differ = [
        key
        for key in {**fresh, **state}
        if key not in fresh or key not in state or fresh[key].shape != state[key].shape
    ]
    unfit = [key for key in differ if "label" not in key]
    if unfit:
        raise ConfigError(
            f"init={path}: {len(unfit)} weights do not fit this network, e.g. {unfit[0]}: choose the same model="
        )
    network.load_state_dict({**fresh, **{key: v for key, v in state.items() if key in fresh and key not in differ}})
    return f"{file} ({name}" + (f", without {', '.join(differ)})" if differ else ")")
