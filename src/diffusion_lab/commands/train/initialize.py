"""Initialize the network with the weights of another run or project (`init=`)."""

from pathlib import Path

from torch import nn

from diffusion_lab import checkpoint
from diffusion_lab.errors import ConfigError, printable
from diffusion_lab.interop.diffusers import load_diffusers


def initialize(network: nn.Module, path: str) -> str:
    """Load weights into `network`, averaged ones if available. A label embedding with another shape is not loaded.

    Args:
        network: the network to initialize.
        path: a checkpoint of this project, a run folder, "latest", a file written by src/export.py, or a `.safetensors` file of
            diffusers.

    Returns:
        A description of the file and the weights, for printing.

    Raises:
        ConfigError: if names or shapes of weights other than the label embedding differ.
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
            f"init={path}: {len(unfit)} weights do not fit this network, e.g. {unfit[0]}: write model= as in that run"
        )
    network.load_state_dict({**fresh, **{key: v for key, v in state.items() if key in fresh and key not in differ}})
    return printable(f"{file} ({name}" + (f", without {', '.join(differ)})" if differ else ")"))
