"""Keys of LGDLM's configurations that mean nothing here, and what to use instead. It needs no torch."""

from __future__ import annotations

CONVERT = "convert the directories once with `python -m job.convert data TOKEN_DIR LATENT_DIR OUT` and set data.dir=OUT"
PREPARED = "set data.dir to a directory written by `python -m job.prepare` or `python -m job.convert data`"
CHOSEN_WITH_DATA = "the tokenizer is chosen when preparing the data (`python -m job.prepare --tokenizer PATH`)"
MASKED_DIFFUSION = "text diffusion is masked diffusion (mdlm)"

LGDLM_KEYS = {
    "data.token_dir": CONVERT,
    "data.latent_dir": CONVERT,
    "data.data_dir": PREPARED,
    "data.max_samples": "choose the samples when preparing the data (`python -m job.prepare --max-samples N`)",
    "training.num_epochs": "the length of a run is training.num_train_steps",
    "training.world_size": "the number of processes comes from torchrun or SLURM",
    "loss.text_loss_weight": "the text loss has weight 1; scale the others",
    "loss.reduction": "the text loss is a mean over tokens",
    "loss.loss_scale": "not needed: weights are float32",
    "logging.log_dir": "logging.save_dir",
    "logging.log_every": "logging.log_freq",
    "logging.save_every": "logging.save_freq",
    "logging.wandb_project": "metrics go to training_log.jsonl and Prometheus",
    "tokenizer.path": CHOSEN_WITH_DATA,
    "tokenizer": CHOSEN_WITH_DATA,
    "model.type": "there is one model",
    "model.diffusion_process": MASKED_DIFFUSION,
    "model.p_uniform": MASKED_DIFFUSION,
}
