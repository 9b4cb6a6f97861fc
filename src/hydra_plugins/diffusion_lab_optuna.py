"""hydra/sweeper=optuna: the values of a sweep chosen by Optuna (Akiba et al. 2019), bad trials ended early.

Hydra's published plugin holds Optuna below 3, which the current SQLAlchemy breaks; this is the same idea on the current one.
Hydra looks for plugins in packages of this name and imports this file at every start: Optuna is imported when a study begins.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.errors import ConfigError

if TYPE_CHECKING:
    import optuna

TRIAL_ENV = "DIFFUSION_LAB_TRIAL"  # in a job: the number of its trial

_in_memory: dict[str, "optuna.Study"] = {}  # what jobs in this process report to where there is no file


@dataclass
class OptunaConf:
    """hydra.sweeper.KEY=VALUE; what is searched stands in the sweep's keys: lr_scheduler.warmup=range(0,400,100),
    'optimizer.lr=tag(log,interval(1e-4,1e-2))', schedule=linear,cosine."""

    _target_: str = "hydra_plugins.diffusion_lab_optuna.OptunaSweeper"
    trials: int = 20
    parallel: int = 1  # trials given to the launcher at a time
    sampler: str = "tpe"  # tpe, random
    pruner: str = "median"  # median, hyperband, none: what ends a trial whose figure is behind
    seed: int = 0  # of the sampler
    storage: str | None = (
        None  # a file, which further processes share and an interrupted study goes on from; null: memory
    )
    study: str = "diffusion-lab"
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaConf, provider="diffusion-lab")


class OptunaSweeper(Sweeper):
    """Asks Optuna for values, launches them, tells it what came out.

    A job returns a cli.sweeps.Outcome: its `value` is minimised, "pruned" and failed ones count as such.
    """

    def __init__(self, **options: Any) -> None:
        self.options = OptunaConf(**options)
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        assert self.launcher is not None
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        given = OverridesParser.create().parse_overrides(arguments)
        named = {override.key_or_group for override in given}
        params = OverridesParser.create().parse_overrides(
            [f"{key}={value}" for key, value in self.options.params.items() if key not in named]
        )
        fixed = [str(o.input_line) for o in [*given, *params] if not o.is_sweep_override()]
        space = {o.get_key_element(): _distribution(o) for o in [*given, *params] if o.is_sweep_override()}
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        study = _study(self.options)
        _in_memory[self.options.study] = study
        try:
            returns = []
            while (done := sum(t.state.is_finished() for t in study.trials)) < self.options.trials:
                try:
                    trials = [study.ask(space) for _ in range(min(self.options.parallel, self.options.trials - done))]
                except ValueError as error:  # the values of a choice are others than when the study began
                    raise ConfigError(f"{error}: write another hydra.sweeper.study=") from error
                jobs = [
                    [*fixed, *(f"{k}={v}" for k, v in t.params.items()), f"+hydra.job.env_set.{TRIAL_ENV}='{t.number}'"]
                    for t in trials
                ]
                self.validate_batch_is_legal(jobs)
                for trial, result in zip(trials, self.launcher.launch(jobs, initial_job_idx=done), strict=True):
                    outcome = result.return_value
                    if outcome["status"] == "pruned":
                        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    elif outcome["status"] == "done" and outcome["value"] is not None:
                        study.tell(trial, outcome["value"])
                    else:
                        study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    returns.append(result)
        finally:
            _in_memory.pop(self.options.study)
        return returns


def reporter() -> Callable[[float, int], bool] | None:
    """In a job of such a sweep: (value, step) → whether the trial should end. None elsewhere, and where the study lies in the
    memory of another process."""
    from hydra.core.hydra_config import HydraConfig

    if TRIAL_ENV not in os.environ or not HydraConfig.initialized():
        return None
    node = OmegaConf.to_container(HydraConfig.get().sweeper, resolve=True)
    assert isinstance(node, dict)
    options = OptunaConf(**node)  # type: ignore[misc]
    study = _in_memory.get(options.study) if options.storage is None else _study(options)
    if study is None:
        return None
    import optuna

    trial = optuna.Trial(study, study.trials[int(os.environ[TRIAL_ENV])]._trial_id)

    def report(value: float, step: int) -> bool:
        trial.report(value, step)
        return trial.should_prune()

    return report


def _study(options: OptunaConf) -> "optuna.Study":
    """The study, begun or continued. Raises ValueError: an unknown sampler or pruner."""
    import optuna

    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    pruners = {
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "none": optuna.pruners.NopPruner,
    }
    for kind, known in (("sampler", samplers), ("pruner", pruners)):
        if getattr(options, kind) not in known:
            raise ConfigError(f"hydra.sweeper.{kind}={getattr(options, kind)} is unknown: write {', '.join(known)}")
    storage = None
    if options.storage:
        Path(options.storage).parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(options.storage))
    held = [] if storage is None else [s for s in storage.get_all_studies() if s.study_name == options.study]
    begun = sum(len(storage.get_all_trials(s._study_id, deepcopy=False)) for s in held) if storage else 0
    return optuna.create_study(
        storage=storage,
        sampler=samplers[options.sampler](seed=options.seed + begun),  # one that goes on must not draw the same again
        pruner=pruners[options.pruner](),
        study_name=options.study,
        direction="minimize",
        load_if_exists=True,
    )


def _distribution(override: Override) -> "optuna.distributions.BaseDistribution":
    """What Optuna draws from for a sweep a,b, choice(a,b), range(a,b,step) or interval(a,b), which a tag makes log-uniform."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=log)
        return FloatDistribution(value.start, value.end, log=log)
    assert isinstance(value, ChoiceSweep | RangeSweep)
    return CategoricalDistribution(list(override.sweep_string_iterator()))
