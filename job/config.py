"""The configuration: every key with its type, default, meaning and limits, and where a run keeps its things.

Key names are those of the LGDLM research code where it has one. `job.config_checks.validate` refuses what cannot work,
among it keys that nothing reads: a key carries the condition under which it is read (`read_if`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from job.errors import UserError
from job.files import file_name, is_url

LOSS_TYPES = ("cycle_vae", "l2t", "t2l", "unconditional", "random", "sequential")
LARGEST_SEED = 2**64 - 1  # that PyTorch takes
MODES = ("unconditional", "l2t", "t2l")  # what one step of `random` and `sequential` can be; the order of mode_weights

# Conditions for `read_if`: the key that decides, and its value or values with which the other key is read.
SHARDS = ("data.source", "shards")
SYNTHETIC = ("data.source", "synthetic")
FROM_BETAS = ("model.latent_beta_schedule", ("linear", "sigmoid"))
FAST = ("model.implementation", "fast")
CYCLE = ("loss.loss_type", "cycle_vae")
PREDICTS_LATENTS = ("loss.loss_type", ("cycle_vae", "t2l", "random", "sequential"))
RANDOM_TIMES = ("loss.latent_t_mode", "random")
DECODES_TEXTS = ("loss.loss_type", ("cycle_vae", "l2t", "random", "sequential"))
RANDOM_MASKS = ("loss.text_t_mode", "random")
RANDOM_MODES = ("loss.loss_type", "random")
SEQUENTIAL_MODES = ("loss.loss_type", "sequential")
SHARDED = ("training.strategy", "fsdp")
MONITORED = ("monitoring.enabled", True)


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    read_if: tuple[str, Any] | None = None,
) -> Any:
    """A configuration key: its default, its meaning, and what it may be.

    A value lies in `choices` where there are any, and low <= value, above < value, value <= high. `read_if` names the
    dotted key, and its value or values, without which nothing reads this one.
    """
    metadata = {"help": help, "choices": choices, "low": low, "above": above, "high": high, "read_if": read_if}
    if isinstance(default, list):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """data.*: what the model is trained on."""

    source: str = key(
        "shards",
        "where samples come from: prepared shards, or random ones that need no data",
        choices=("shards", "synthetic"),
    )
    dir: str | None = key(
        None, "directory of prepared shards (dataset.json inside), or the URL of one (s3://...)", read_if=SHARDS
    )
    cache_dir: str | None = key(
        None, "directory on each node into which data of a URL (data.dir=s3://...) is copied, once", read_if=SHARDS
    )
    num_workers: int = key(0, "loader processes per rank; 0 loads in the training process", low=0)
    standardize_latents: bool = key(True, "subtract the latents' stored mean and divide by their standard deviation")
    unpaired_per_batch: float | None = key(
        None,
        "share of a batch's rows that have no latent or no text, of data that has such rows; null: the data's own "
        "share, 0: none",
        low=0,
        high=1,
        read_if=SHARDS,
    )
    length_bucketing: bool = key(False, "batch samples of similar length (same samples per epoch, another order)")
    pad_to_max: bool = key(False, "pad every batch to model.max_seq_len instead of its own longest row")
    verify_hashes: bool = key(False, "check the SHA-256 of every shard before the first step", read_if=SHARDS)
    synthetic_samples: int = key(512, "number of random training samples", above=0, read_if=SYNTHETIC)
    synthetic_vocab_size: int = key(256, "vocabulary of the random samples", low=8, read_if=SYNTHETIC)
    synthetic_latent_dim: int = key(16, "latent dimension of the random samples", above=0, read_if=SYNTHETIC)


@dataclass
class ModelConfig:
    """model.*: shape of the network, and the noise on its latents."""

    hidden_size: int = key(512, "width of both streams", above=0)
    n_blocks: int = key(8, "number of MMDiT blocks", above=0)
    n_heads: int = key(8, "attention heads", above=0)
    head_dim: int = key(64, "width of one attention head", above=0)
    cond_dim: int = key(512, "width of the timestep conditioning", above=0)
    max_seq_len: int = key(128, "longest text in tokens; longer rows are refused", above=0)
    dropout: float = key(0.0, "dropout in the feed-forwards and the latent head", low=0, high=0.9)
    num_residual_streams: int = key(2, "residual streams (1: plain residuals; more: hyper-connections)", above=0)
    qk_rmsnorm: bool = key(True, "RMS norm of queries and keys")
    latent_dim: int | None = key(None, "latent dimension; null takes the data's", above=0)
    vocab_size: int | None = key(None, "vocabulary; null takes the data's, rounded up to vocab_multiple", above=0)
    vocab_multiple: int = key(64, "round a vocabulary taken from the data up to a multiple of this", above=0)
    cluster_size: int = key(0, "LGDLM's cluster vocabulary; only 0 is supported", choices=(0,))
    time_scale: float = key(
        1000.0,
        "timesteps in [0, 1] are multiplied by this before the sinusoidal embedding (LGDLM: 1)",
        above=0,
    )
    latent_timesteps: int = key(1000, "length of the latent noise schedule", low=2)
    latent_beta_schedule: str = key("cosine", "latent noise schedule", choices=("linear", "cosine", "sigmoid"))
    latent_beta_min: float = key(1e-4, "first beta", above=0, high=1, read_if=FROM_BETAS)
    latent_beta_max: float = key(0.02, "last beta", above=0, high=1, read_if=FROM_BETAS)
    latent_parameterization: str = key("v_param", "what the latent head predicts", choices=("epsilon", "x0", "v_param"))
    interpolate_schedule: bool = key(True, "read the schedule between its entries (LGDLM reads entry floor(t * 999))")
    implementation: str = key(
        "fast",
        "fast, or plain: the stock blocks and whole logits, the same losses",
        choices=("fast", "plain"),
    )
    t_eps: float = key(1e-4, "text keeps at least this fraction unmasked at t=1 in unconditional mode", low=0, high=0.5)


@dataclass
class LossConfig:
    """loss.*: the objective."""

    loss_type: str = key("cycle_vae", "the objective", choices=LOSS_TYPES)
    latent_loss_weight: float = key(0.1, "weight of the T2L latent loss", low=0)
    cycle_text_weight: float = key(0.1, "weight of the T2L2T cross-entropy", low=0, read_if=CYCLE)
    cycle_text_warmup_steps: int = key(0, "steps before cycle_text sets in", low=0, read_if=CYCLE)
    cycle_text_ramp_steps: int = key(0, "steps over which cycle_text grows to its weight", low=0, read_if=CYCLE)
    cycle_text_on: str = key(
        "all",
        "texts of cycle_text: all, paired (with a latent of their own) or unpaired ones",
        choices=("all", "paired", "unpaired"),
        read_if=CYCLE,
    )
    cycle_latent_weight: float = key(0.1, "weight of the L2T2L latent loss", low=0, read_if=CYCLE)
    cycle_latent_warmup_steps: int = key(0, "steps before cycle_latent sets in", low=0, read_if=CYCLE)
    cycle_latent_ramp_steps: int = key(0, "steps over which cycle_latent grows to its weight", low=0, read_if=CYCLE)
    text_t_mode: str = key(
        "full",
        "text of L2T: full (all of it masked) or random (a share of it, drawn for every row)",
        choices=("full", "random"),
        read_if=DECODES_TEXTS,
    )
    text_full_share: float = key(0.3, "share of rows fully masked all the same", low=0, high=1, read_if=RANDOM_MASKS)
    text_weighting: str = key(
        "mean",
        "cross-entropy of partly masked text: mean over its masked tokens, or elbo (1 / share masked)",
        choices=("mean", "elbo"),
        read_if=RANDOM_MASKS,
    )
    cycle_latent_sampling: str = key(
        "argmax",
        "how pseudo-tokens are taken from the L2T logits",
        choices=("argmax", "categorical"),
        read_if=CYCLE,
    )
    latent_t_mode: str = key(
        "full",
        "latent timestep of T2L: full (t = 1) or random in [cycle_latent_t_min, cycle_latent_t_max]",
        choices=("full", "random"),
        read_if=PREDICTS_LATENTS,
    )
    cycle_latent_t_min: float = key(0.0, "smallest random latent timestep", low=0, high=1, read_if=RANDOM_TIMES)
    cycle_latent_t_max: float = key(0.98, "largest random latent timestep", low=0, high=1, read_if=RANDOM_TIMES)
    cycle_stop_grad_latent: bool = key(True, "no gradient from cycle_text into the predicted latent", read_if=CYCLE)
    allow_degenerate_epsilon: bool = key(
        False,
        "allow epsilon prediction at t > 0.98, where the latent cannot be recovered from it",
    )
    ce_over_padding: bool = key(False, "cross-entropy over padding too, as LGDLM does")
    normalize_latent_loss: bool = key(False, "MSE between unit vectors, as LGDLM does: trains the direction only")


@dataclass
class ModeSteps:
    """One part of training.sequential_schedule: so many steps of one mode."""

    type: str = MISSING
    steps: int = MISSING


@dataclass
class TrainingConfig:
    """training.*: how long, on what, and when to give up."""

    seed: int = key(42, "seed of initialization, sample order, noise and dropout", low=0, high=LARGEST_SEED)
    device: str = key("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = key(
        "auto",
        "auto: bf16 autocast on GPUs that have it, else fp32 (with TF32 products on GPUs); weights are always fp32",
        choices=("auto", "bf16", "fp32"),
    )
    train_batch_size: int = key(8, "samples per rank and forward pass", above=0)
    gradient_accumulation_steps: int = key(1, "forward passes per optimizer step", above=0)
    global_batch_size: int | None = key(
        None,
        "samples per optimizer step over all ranks; sets gradient_accumulation_steps by itself, "
        "so that a run can change its number of ranks",
        above=0,
    )
    eval_batch_size: int = key(64, "samples per rank and evaluation pass", above=0)
    num_train_steps: int = key(10000, "optimizer steps of the whole run", above=0)
    lr_schedule: str = key("cosine", "learning rate after warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = key(100, "steps of linear learning-rate warm-up", low=0)
    ema_decay: float = key(0.0, "decay of the moving average of the weights; 0 keeps none", low=0, high=0.999999)
    strategy: str = key(
        "ddp",
        "between ranks: ddp (each holds the whole model) or fsdp (weights, gradients and moments in shards, "
        "for models that do not fit; evaluation still holds one copy of the weights)",
        choices=("ddp", "fsdp"),
    )
    shard_size: int | None = key(
        None,
        "neighbouring ranks that hold one copy of the model in shards between them, such as the GPUs of a node; "
        "null: all ranks",
        above=0,
        read_if=SHARDED,
    )
    fp8: bool = key(
        False,
        "compute the products of texts with blocks' weights in 8-bit floats, in training: less exact, for GPUs of "
        "compute capability 8.9 or newer",
        read_if=FAST,
    )
    compile_model: bool = key(
        False, "torch.compile the blocks, in place of the kernels that GPUs have for them", read_if=FAST
    )
    cuda_graphs: bool = key(True, "on a GPU, record the kernels of the blocks once and replay them", read_if=FAST)
    deterministic: bool = key(
        False,
        "the same bits from the same command on GPUs of one kind with the same versions and ranks, somewhat slower; "
        "without it their atomic sums differ in the last digits from run to run, while CPUs repeat every bit anyway",
    )
    activation_checkpointing: bool = key(
        False,
        "keep no activations inside blocks, compute them again in backward",
        read_if=FAST,
    )
    init_from: str | None = key(
        None,
        "weights to start from: a run, a checkpoint, an exported model, or a weight file of `python -m job.convert`",
    )
    resume: str = key("auto", "auto: the run directory's newest valid checkpoint; never; or a checkpoint directory")
    allow_changed: list[str] = key([], "keys that may differ from the checkpoint's configuration on resume")
    max_minutes: float | None = key(None, "stop, resumable, after this many minutes", above=0)
    max_nonfinite_steps: int = key(10, "give up after this many skipped steps in a row", above=0)
    sick_rank_timeout_seconds: float = key(300.0, "a rank that answers nothing for this long ends the run", above=0)
    mode_weights: list[float] = key(
        [1.0, 1.0, 1.0], "chance of a step being unconditional, l2t, t2l", read_if=RANDOM_MODES
    )
    sequential_schedule: list[ModeSteps] = key([], "modes with their steps, repeated", read_if=SEQUENTIAL_MODES)


@dataclass
class OptimizerConfig:
    """optimizer.*: AdamW's settings."""

    name: str = key("adamw", "the optimizer", choices=("adamw",))
    lr: float = key(3e-4, "peak learning rate", above=0)
    weight_decay: float = key(0.01, "decay of matrices (never of norms, biases and embeddings)", low=0)
    beta1: float = key(0.9, "decay of the first moment", low=0, high=0.9999)
    beta2: float = key(0.95, "decay of the second moment", low=0, high=0.99999)
    eps: float = key(1e-8, "added to the root of the second moment", above=0)
    grad_clip_norm: float = key(1.0, "largest gradient norm; 0 does not clip", low=0)
    use_fused: bool = key(True, "fused AdamW where the device has it")


@dataclass
class DecodingConfig:
    """decoding.*: how texts and latents are made where the run shows or scores them, and later by default."""

    steps: int = key(1, "passes over a text; each keeps the surest tokens", above=0)
    latent_steps: int = key(1, "passes over a latent that is predicted from a text", above=0)
    temperature: float = key(0.0, "0 takes the likeliest tokens, 1 draws them by their probabilities", low=0)
    top_p: float = key(1.0, "draw among the likeliest tokens that have this probability together", above=0, high=1)
    remasking: float = key(0.0, "share of the tokens so far that a pass masks again (ReMDM)", low=0, high=1)
    candidates: int = key(1, "texts decoded of a latent; kept is the one whose own latent is nearest to it", above=0)
    corrections: int = key(0, "rounds of decoding anew the tokens that keep a text from its latent", low=0)


@dataclass
class LoggingConfig:
    """logging.*: where a run lives, and how often it writes, evaluates and saves."""

    run_name: str = key("mmdit-cycle-vae", "name of the run; its directory is save_dir/run_name")  # see checked_name
    save_dir: str = key("runs", "parent of run directories")
    log_freq: int = key(50, "steps between lines of training_log.jsonl", above=0)
    eval_freq: int = key(1000, "steps between evaluations; 0: only at the end", low=0)
    num_eval_batches: int = key(4, "evaluation batches of eval_batch_size from the validation split", above=0)
    num_samples: int = key(8, "round trips in samples.txt and in each line of samples.jsonl", low=0)
    sample_freq: int | None = key(None, "steps between round trips in samples.jsonl; null: eval_freq; 0: none", low=0)
    num_generated: int = key(256, "texts of each evaluation that are decoded as decoding.* says, and scored", low=0)
    save_freq: int = key(1000, "steps between checkpoints; 0: only at the end and when stopped", low=0)
    save_minutes: float | None = key(None, "minutes between checkpoints, besides save_freq", above=0)
    keep_last: int = key(2, "newest checkpoints kept", above=0)
    keep_every: int = key(0, "also keep checkpoints whose step is a multiple of this; 0: none", low=0)
    wandb: bool = key(False, "numbers and samples for Weights & Biases, too (pip install wandb)")
    mlflow: bool = key(False, "numbers and samples for MLflow, too (pip install mlflow)")


@dataclass
class MonitoringConfig:
    """monitoring.*: what a run tells Prometheus and TensorBoard."""

    enabled: bool = key(True, "answer Prometheus over HTTP, on every rank")
    host: str | None = key(None, "address to listen on; null: all, IPv4 and IPv6", read_if=MONITORED)
    port: int | None = key(
        None,
        "port of a node's first rank, the others count up from it; null: free ones",
        low=1,
        high=65535,
        read_if=MONITORED,
    )
    targets_dir: str | None = key(
        None,
        "where the file with the job's endpoints is put, for Prometheus' file discovery; null: save_dir/.targets",
        read_if=MONITORED,
    )
    pushgateway: str | None = key(
        None,
        "host:port of a Pushgateway, for jobs too short to be scraped",
        read_if=MONITORED,
    )
    tensorboard: bool = key(False, "write the same numbers for TensorBoard into tensorboard/ of the run directory")
    stalled_after_seconds: float = key(
        60.0,
        "a rank without progress for this long, and for 20 times its usual step, is reported as stalled",
        above=0,
    )
    peak_tflops: float | None = key(
        None,
        "what one device can do, for the model FLOPs utilization; null: known for common GPUs, measured elsewhere",
        above=0,
    )


@dataclass
class Config:
    """The whole configuration, a section an attribute."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)


# Keys that may change when a run goes on from a checkpoint: they say where, how long and how it is watched, not what
# is trained. train_batch_size is here because only the global batch counts, which is compared by itself.
FREE_ON_RESUME = {
    "data.cache_dir",
    "data.dir",
    "data.num_workers",
    "data.verify_hashes",
    "training.device",
    "training.train_batch_size",
    "training.gradient_accumulation_steps",
    "training.global_batch_size",
    "training.eval_batch_size",
    "training.strategy",
    "training.shard_size",
    "training.compile_model",
    "training.cuda_graphs",
    "training.deterministic",
    "training.activation_checkpointing",
    "model.implementation",
    "training.init_from",
    "training.resume",
    "training.allow_changed",
    "training.max_minutes",
    "training.max_nonfinite_steps",
    "training.sick_rank_timeout_seconds",
    "optimizer.use_fused",
    *(f"decoding.{f.name}" for f in dataclasses.fields(DecodingConfig)),
    *(f"logging.{f.name}" for f in dataclasses.fields(LoggingConfig)),
    *(f"monitoring.{f.name}" for f in dataclasses.fields(MonitoringConfig)),
}


def checked_name(run_name: Any) -> str:
    """logging.run_name, as a path below logging.save_dir. UserError for one that leads elsewhere.

    Hydra makes the run directory before anything of ours runs, so configs/base.yaml asks for this where it names it.
    """
    parts = str(run_name).split("/")
    if not str(run_name).strip() or any(part in ("", ".", "..") for part in parts):
        raise UserError(
            f"logging.run_name={run_name}: give a name, such as first or sweep/first; "
            "the directory above it is logging.save_dir"
        )
    return str(run_name)


def checked_directory(save_dir: Any) -> str:
    """logging.save_dir. UserError for what is no directory of a file system; asked for as `checked_name` is."""
    if not str(save_dir).strip():
        raise UserError("logging.save_dir is empty: give the directory above the run's, such as runs")
    if is_url(str(save_dir)):
        raise UserError(
            f"logging.save_dir={save_dir}: runs are written to a directory, not to a store; give a directory, "
            "and copy finished runs"
        )
    return str(save_dir)


ConfigStore.instance().store(name="schema", node=Config)
# For configs/base.yaml: directories of a sweep, and of a run.
OmegaConf.register_new_resolver("file_name", file_name, replace=True)
OmegaConf.register_new_resolver("checked_name", checked_name, replace=True)
OmegaConf.register_new_resolver("checked_directory", checked_directory, replace=True)


def config_dir() -> Path:
    """Directory of the Hydra configurations: inside the installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "configs"


def targets_dir(config: Config) -> Path:
    """Where a run announces its metrics' addresses to Prometheus."""
    return Path(config.monitoring.targets_dir or Path(config.logging.save_dir, ".targets")).absolute()


def keys() -> dict[str, dataclasses.Field[Any]]:
    """Every configuration key by its dotted name."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for section in dataclasses.fields(Config):
        for f in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            found[f"{section.name}.{f.name}"] = f
    return found


def default_of(f: dataclasses.Field[Any]) -> Any:
    """Default of a key."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def get(config: Config, dotted: str) -> Any:
    """Value of a dotted key, `get(config, "loss.loss_type")`."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def from_dict(values: dict[str, Any]) -> Config:
    """Configuration from nested plain values, such as a run's config.yaml. UserError for a key that is not known."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))  # type: ignore[return-value]
    except Exception as error:
        raise UserError(f"configuration: {str(error).splitlines()[0]}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values."""
    return dataclasses.asdict(config)
