"""hydra/sweeper=optuna: sample the values of a sweep with Optuna (Akiba et al. 2019) and prune trials.

The published plugin hydra-optuna-sweeper requires optuna < 3; this one supports current versions. Hydra imports every module of
the package `hydra_plugins` at startup, so Optuna is imported only when a study starts.
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

TRIAL_ENV = "DIFFUSION_LAB_TRIAL"  # environment variable of a job: the number of its trial

_in_memory: dict[str, "optuna.Study"] = {}  # studies without storage, by name: jobs in this process report to them


@dataclass
class OptunaConf:
    """Options hydra.sweeper.KEY=VALUE. The search space is given by sweep overrides: lr_scheduler.warmup=range(0,400,100),
    'optimizer.lr=tag(log,interval(1e-4,1e-2))', schedule=linear,cosine."""

    _target_: str = "hydra_plugins.diffusion_lab_optuna.OptunaSweeper"
    trials: int = 20
    parallel: int = 1  # trials per call of the launcher
    sampler: str = "tpe"  # tpe, random
    pruner: str = "median"  # median, hyperband, none
    seed: int = 0  # of the sampler
    storage: str | None = None  # journal file, shared by processes and continued after an interruption; null: memory
    study: str = "diffusion-lab"
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaConf, provider="diffusion-lab")


class OptunaSweeper(Sweeper):
    """Run a study: ask Optuna for trials, launch their jobs, report the outcomes.

    A job returns a `cli.sweeps.Outcome`, whose `value` is minimized; pruned and failed jobs are reported as such.
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
        overrides = OverridesParser.create().parse_overrides(arguments)
        named = {override.key_or_group for override in overrides}
        params = OverridesParser.create().parse_overrides(
            [f"{key}={value}" for key, value in self.options.params.items() if key not in named]
        )
        fixed = [str(o.input_line) for o in [*overrides, *params] if not o.is_sweep_override()]
        space = {o.get_key_element(): _distribution(o) for o in [*overrides, *params] if o.is_sweep_override()}
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
                except ValueError as error:  # the choices differ from those of the stored study
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
    """Return a function (value, step) → whether to prune this job's trial.

    None outside such a sweep, and if the study is in the memory of another process.
    """
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
    """Create or load the study.

    Raises:
        ConfigError: an unknown sampler or pruner.
    """
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
    stored = [] if storage is None else [s for s in storage.get_all_studies() if s.study_name == options.study]
    trials = sum(len(storage.get_all_trials(s._study_id, deepcopy=False)) for s in stored) if storage else 0
    return optuna.create_study(
        storage=storage,
        sampler=samplers[options.sampler](seed=options.seed + trials),  # a continued study must not repeat its draws
        pruner=pruners[options.pruner](),
        study_name=options.study,
        direction="minimize",
        load_if_exists=True,
    )


def _distribution(override: Override) -> "optuna.distributions.BaseDistribution":
    """Return the distribution of a sweep a,b, choice(a,b), range(a,b,step) or interval(a,b); the tag `log` is log-uniform."""
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
