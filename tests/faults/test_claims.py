"""Two of each command in one second never share an output."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from faults.runs import COMMANDS, TRAIN, partials, prepare_folder, run

# Name → the arguments in which the two differ.
PAIRS = {
    "sample": (("n=4", "seed=1"), ("n=9", "seed=2")),
    "evaluate": (("seed=1",), ("seed=2",)),
    "fit": (("seed=1",), ("seed=2",)),
    "export": (("weights=ema",), ("weights=raw",)),
}


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.integration if name == "sample" else pytest.mark.faults) for name in PAIRS],
)
def test_one_of_two_commands_is_refused(command, trained, tmp_path):
    name, arguments, _ = COMMANDS[command]
    folder, ckpt = tmp_path / "work", trained.folder / "run"
    prepare_folder(command, folder, ckpt)
    common = [argument.replace("{ckpt}", str(ckpt)) for argument in arguments]
    calls = [[*common, *own] for own in PAIRS[command]]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda call: run(name, call, folder, printed=f"{calls.index(call)}"), calls))
    assert sorted(outcome.code for outcome in outcomes) == [0, 2], [outcome.printed for outcome in outcomes]
    (refused,) = (outcome for outcome in outcomes if outcome.code == 2)
    assert "Traceback" not in refused.printed
    assert any(
        text in refused.printed for text in ("just created by another run", "is not empty", "exists", "just written")
    )
    assert partials(folder) == []
    if command == "sample":
        config = yaml.safe_load((folder / "out" / "config.yaml").read_text())
        images = sorted((folder / "out" / "images").iterdir())
        assert (len(images), config["seed"]) in ((4, 1), (9, 2))


@pytest.mark.faults
def test_one_of_two_trainings_is_refused(tmp_path):
    folder = tmp_path / "work"
    calls = [[*TRAIN, f"seed={seed}", "hydra.run.dir=run"] for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda call: run("train", call, folder, printed=str(calls.index(call))), calls))
    assert sorted(outcome.code for outcome in outcomes) == [0, 2], [outcome.printed for outcome in outcomes]
