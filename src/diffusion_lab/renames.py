"""Old names of keys and options, and names of other libraries, with the present ones. Imports nothing."""

GROUPS = {"times": "time_sampler", "rate": "lr_scheduler"}
KEYS = {
    "given": "condition_data",
    "trainer.val_every": "validation.every",
    "trainer.val_draws": "validation.draws",
    "trainer.compile": "compile",
    "data.seed": "seed",
    "data.accumulate": "trainer.accumulate_grad_batches",
    "condition.num_classes": "data.num_classes",
    "sampler.last_bound": "sampler.max_final_noise",
    "learned_variance": "variance=learned",
    "model.learned_variance": "variance=learned",
}
OPTIONS = {("model", "own"): "custom", ("schedule", "own"): "custom"}
VALUES = {("weights", "live"): "raw"}

# Names in other libraries. docs/from_diffusers.md contains the complete table.
FOREIGN_OPTIONS = {
    ("objective", "epsilon"): "pred_noise",
    ("objective", "v_prediction"): "pred_v",
    ("objective", "sample"): "pred_x0",
    ("objective", "flow_prediction"): "pred_flow",
    ("schedule", "squaredcos_cap_v2"): "cosine",
    ("sampler", "dpmsolver++"): "dpm_solver_pp",
    ("sampler", "dpm"): "dpm_solver_pp",
    ("sampler", "pndm"): "dpm_solver_pp",
    ("optimizer", "rmsprop"): "custom optimizer._target_=torch.optim.RMSprop",
}
FOREIGN_KEYS = {
    "prediction_type": "objective=",
    "beta_schedule": "schedule=",
    "num_train_timesteps": "schedule.steps=",
    "timesteps": "schedule.steps=",
    "beta_start": "schedule.beta_start=",
    "beta_end": "schedule.beta_end=",
    "rescale_betas_zero_snr": "schedule.zero_terminal_snr=",
    "timestep_spacing": "sampler.grid=",
    "num_inference_steps": "sampler.steps=",
    "sampling_timesteps": "sampler.steps=",
    "ddim_sampling_eta": "sampler.eta=",
    "solver_order": "sampler.order=",
    "clip_sample": "clip=static, or clip=none",
    "thresholding": "clip=dynamic",
    "variance_type": "variance=",
    "guidance_scale": "guidance=cfg guidance.scale=",
    "snr_gamma": "weighting=min_snr weighting.gamma=",
    "min_snr_gamma": "weighting=min_snr weighting.gamma=",
    "learning_rate": "optimizer.lr=",
    "train_batch_size": "data.batch_size=",
    "train_lr": "optimizer.lr=",
    "ema_decay": "callbacks.ema.decay=",
    "max_train_steps": "trainer.max_steps=",
    "mixed_precision": "trainer.precision=",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches=",
    "resolution": "data.image_size=",
}


def renamed(key: str, value: str = "") -> str | None:
    """Return the replacement of `key` (without + or ~) or of KEY=VALUE; None if it was not renamed."""
    group, _, rest = key.partition(".")
    if key in KEYS:
        return KEYS[key] + ("" if "=" in KEYS[key] else f"={value}")
    if group in GROUPS:
        return f"{GROUPS[group]}{'.' if rest else ''}{rest}={value}"
    if (key, value) in OPTIONS:
        return f"{key}={OPTIONS[key, value]}"
    if (key, value) in VALUES:
        return f"{key}={VALUES[key, value]}"
    return None
