"""What a configuration cannot be: refused before anything is built, with the key and the remedy in one line."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from job.config import MODES, Config, DecodingConfig, checked_directory, checked_name, default_of, get, keys
from job.errors import UserError
from job.files import is_url
from job.row_kinds import Counts

# At a latent timestep t the noisy latent is alpha(t) z + sigma(t) noise. Above this t hardly anything of z is left.
LARGEST_EPSILON_T = 0.98
FP8_MULTIPLE = 16  # of a matrix' widths: what GPUs' products of 8-bit floats take
# What a run compares with its checkpoint besides keys of the configuration (job.runtime.resume).
COMPARED_BESIDES = ("data", "global_batch_size")


def validate(config: Config) -> list[str]:
    """Refuse impossible values, keys without effect and impossible combinations.

    Returns warnings. Raises UserError naming the key and the remedy.
    """
    # One key at a time first: the combinations below compare values that are possible by themselves.
    for dotted, f in keys().items():
        value = get(config, dotted)
        refuse_value(dotted, value, f.metadata)
        refuse_unread(config, dotted, value, f)
    refuse_missing_data(config)
    refuse_empty_ranges(config)
    refuse_evaluation_of_one(config)
    refuse_partly_masked_padding(config)
    refuse_draws_that_differ(config)
    refuse_fp8_of_another_kind(config)
    refuse_mode_weights(config)
    refuse_sequential_schedule(config)
    refuse_two_batch_sizes(config)
    refuse_endless_warmup(config)
    refuse_unknown_allowances(config)
    refuse_draws_without_temperature(config.decoding)
    checked_name(config.logging.run_name)
    checked_directory(config.logging.save_dir)
    return [*degenerate_epsilon(config), *untrained_passes(config, config.decoding)]


def refuse_value(dotted: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Refuse a value outside its key's choices or bounds."""
    if value is None:
        return
    if metadata["choices"] and value not in metadata["choices"]:
        raise UserError(f"{dotted}={value}: choose one of {', '.join(map(str, metadata['choices']))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{dotted}={value}: give a finite number")
    low, above, high = metadata["low"], metadata["above"], metadata["high"]
    if low is not None and value < low:
        raise UserError(f"{dotted}={value}: give a value of at least {low}")
    if above is not None and value <= above:
        raise UserError(f"{dotted}={value}: give a value of more than {above}")
    if high is not None and value > high:
        raise UserError(f"{dotted}={value}: give a value of at most {high}")


def refuse_unread(config: Config, dotted: str, value: Any, f: dataclasses.Field[Any]) -> None:
    """Refuse a key that was changed while nothing reads it: whoever set it believes that it does something."""
    if f.metadata["read_if"] is None or value == default_of(f):
        return
    other, wanted = f.metadata["read_if"]
    if not isinstance(wanted, tuple):
        wanted = (wanted,)
    there = get(config, other)
    if there not in wanted:
        # The configuration file may have set it, and not the command line, from which it can be left out.
        default = "null" if default_of(f) is None else default_of(f)
        raise UserError(
            f"{dotted}={value} has no effect while {other}={there}; "
            f"leave it out ({dotted}={default}) or set {other}={' or '.join(map(str, wanted))}"
        )


def refuse_missing_data(config: Config) -> None:
    """Refuse shards without a directory, and a URL of them without one to copy them to."""
    if config.data.source == "shards" and config.data.dir is None:
        raise UserError(
            "data.dir is not set: give a directory written by `python -m job.prepare` (data.dir=DIR), "
            "or data=synthetic for a run without data"
        )
    remote = config.data.source == "shards" and is_url(config.data.dir or "")
    if remote and config.data.cache_dir is None:
        raise UserError(
            f"data.dir={config.data.dir} is copied to each node; set data.cache_dir to a directory there that has room"
        )
    if config.data.cache_dir is not None and not remote:
        raise UserError("data.cache_dir has no effect: data.dir is not the URL of a store (s3://...); leave it out")


def refuse_empty_ranges(config: Config) -> None:
    """Refuse ranges whose ends are in the wrong order."""
    model, loss = config.model, config.loss
    if loss.latent_t_mode == "random" and loss.cycle_latent_t_min >= loss.cycle_latent_t_max:
        raise UserError(
            f"loss.cycle_latent_t_min={loss.cycle_latent_t_min} is not below "
            f"loss.cycle_latent_t_max={loss.cycle_latent_t_max}"
        )
    if model.latent_beta_min > model.latent_beta_max:
        raise UserError(
            f"model.latent_beta_min={model.latent_beta_min} is above model.latent_beta_max={model.latent_beta_max}"
        )


def refuse_evaluation_of_one(config: Config) -> None:
    """Refuse an evaluation of a single sample: its gains compare a sample with another one."""
    if config.logging.num_eval_batches * config.training.eval_batch_size < 2:
        raise UserError(
            "training.eval_batch_size=1 with logging.num_eval_batches=1 evaluates a single sample; "
            "set one of them to at least 2"
        )


def refuse_partly_masked_padding(config: Config) -> None:
    """Refuse LGDLM's cross-entropy over padding where only a part of the text is masked: padding never is."""
    if config.loss.ce_over_padding and config.loss.text_t_mode == "random":
        raise UserError(
            "loss.ce_over_padding=true counts fully masked texts; set loss.text_t_mode=full, or leave it out"
        )


def refuse_draws_that_differ(config: Config) -> None:
    """Refuse drawn pseudo-tokens in a deterministic run: GPUs have no running sum that repeats its last digits."""
    if config.training.deterministic and config.loss.cycle_latent_sampling == "categorical":
        raise UserError(
            "training.deterministic=true cannot repeat draws on a GPU; set loss.cycle_latent_sampling=argmax, "
            "or leave it out"
        )


def refuse_fp8_of_another_kind(config: Config) -> None:
    """Refuse 8-bit products beside what does not go with them."""
    if not config.training.fp8:
        return
    if config.training.compile_model:
        raise UserError("training.fp8=true does not go with training.compile_model=true; leave one of them out")
    hidden_size, of_heads = config.model.hidden_size, config.model.n_heads * config.model.head_dim
    for name, width in (("model.hidden_size", hidden_size), ("model.n_heads * model.head_dim", of_heads)):
        if width % FP8_MULTIPLE:
            raise UserError(
                f"training.fp8=true: {name}={width}; give a multiple of {FP8_MULTIPLE}, or leave training.fp8 out"
            )


def refuse_mode_weights(config: Config) -> None:
    """Refuse weights of loss=random that are no chances of its modes."""
    weights = config.training.mode_weights
    possible = len(weights) == len(MODES) and min(weights) >= 0 and sum(weights) > 0
    if config.loss.loss_type == "random" and not possible:
        raise UserError(
            f"training.mode_weights={list(weights)}: give {len(MODES)} weights for {', '.join(MODES)}, "
            "none negative, one above 0"
        )


def refuse_sequential_schedule(config: Config) -> None:
    """Refuse a schedule of loss=sequential that is empty or has parts that cannot be trained."""
    if config.loss.loss_type != "sequential":
        return
    if not config.training.sequential_schedule:
        raise UserError(
            "training.sequential_schedule is empty: give it, "
            "for instance [{type: l2t, steps: 1000}, {type: t2l, steps: 1000}]"
        )
    for part in config.training.sequential_schedule:
        if part.type not in MODES or part.steps < 1:
            raise UserError(
                f"training.sequential_schedule: {{type: {part.type}, steps: {part.steps}}} "
                f"needs a type of {', '.join(MODES)} and steps of at least 1"
            )


def refuse_two_batch_sizes(config: Config) -> None:
    """Refuse both ways at once of setting the samples of an optimizer step."""
    if config.training.global_batch_size is not None and config.training.gradient_accumulation_steps != 1:
        raise UserError(
            "training.gradient_accumulation_steps follows from training.global_batch_size; set one of the two"
        )


def refuse_endless_warmup(config: Config) -> None:
    """Refuse a warm-up that was set to be longer than the run: the learning rate would never reach optimizer.lr.

    The default's is let pass, so that a run of ten steps, which tries an installation, needs no further key.
    """
    training = config.training
    default = default_of(keys()["training.warmup_steps"])
    if training.warmup_steps > training.num_train_steps and training.warmup_steps != default:
        raise UserError(
            f"training.warmup_steps={training.warmup_steps} is longer than the run of "
            f"training.num_train_steps={training.num_train_steps}: the learning rate would never reach optimizer.lr; "
            "lower it"
        )


def refuse_unknown_allowances(config: Config) -> None:
    """Refuse names in training.allow_changed that nothing is compared by: the change would be refused all the same."""
    names = [*keys(), *COMPARED_BESIDES]
    for allowed in config.training.allow_changed:
        if allowed not in names:
            of_another_section = [name for name in names if name.split(".")[-1] == allowed.split(".")[-1]]
            near = of_another_section or difflib.get_close_matches(allowed, names, n=1, cutoff=0.6)
            meant = f"did you mean {near[0]}?" if near else "give names of keys, such as training.num_train_steps"
            raise UserError(f"training.allow_changed: {allowed} is no configuration key; {meant}")


def check_decoding(config: Config, decoding: DecodingConfig) -> list[str]:
    """Refuse values of decoding.* that cannot be; returns warnings, for a model trained by `config`."""
    for declared in dataclasses.fields(decoding):
        refuse_value(f"decoding.{declared.name}", getattr(decoding, declared.name), declared.metadata)
    refuse_draws_without_temperature(decoding)
    return untrained_passes(config, decoding)


def refuse_draws_without_temperature(decoding: DecodingConfig) -> None:
    """Refuse what only means something when tokens are drawn: at temperature 0 every candidate is the same text."""
    if decoding.temperature == 0 and decoding.candidates > 1:
        raise UserError(
            f"decoding.candidates={decoding.candidates}: without a temperature all of them are the same text; "
            "set decoding.temperature as well, for instance to 0.7"
        )
    if decoding.temperature == 0 and decoding.top_p < 1:
        raise UserError(
            f"decoding.top_p={decoding.top_p}: without a temperature nothing is drawn; set decoding.temperature as well"
        )


def untrained_passes(config: Config, decoding: DecodingConfig) -> list[str]:
    """Warnings where decoding makes passes over inputs that training never showed: they make results worse."""
    loss = config.loss
    trains_on_noise = loss.loss_type in ("unconditional", "random", "sequential")
    partly_masked = loss.text_t_mode == "random" and loss.text_full_share < 1
    warnings = []
    over_a_text = [f"decoding.steps={decoding.steps}"] if decoding.steps > 1 else []
    over_a_text += [f"decoding.corrections={decoding.corrections}"] if decoding.corrections else []
    if over_a_text and not (trains_on_noise or partly_masked):
        warnings.append(
            f"{' and '.join(over_a_text)}: this model decodes partly masked texts then, but trained on fully masked "
            "ones alone, so the texts may well be worse; loss.text_t_mode=random trains it for that; "
            "see docs: tutorials/decoding-well"
        )
    if decoding.latent_steps > 1 and not (trains_on_noise or loss.latent_t_mode == "random"):
        warnings.append(
            f"decoding.latent_steps={decoding.latent_steps}: this model encodes from partly noisy latents then, but "
            "trained on t=1 alone, so the latents may well be worse; loss.latent_t_mode=random trains it for that"
        )
    return warnings


def largest_latent_t(config: Config) -> float:
    """Largest latent timestep that T2L can draw."""
    return config.loss.cycle_latent_t_max if config.loss.latent_t_mode == "random" else 1.0


def degenerate_epsilon(config: Config) -> list[str]:
    """Refuse epsilon prediction from pure noise, or warn where loss.allow_degenerate_epsilon insists on it.

    The head is asked for the noise. Where the noisy latent is nothing but noise, copying it to the output is perfect:
    the loss goes to zero, the text is never read, and the latent cannot be computed from the prediction.
    """
    predicts_latents = config.loss.loss_type not in ("l2t", "unconditional")
    from_noise = largest_latent_t(config) > LARGEST_EPSILON_T
    if config.model.latent_parameterization != "epsilon" or not predicts_latents or not from_noise:
        return []
    problem = (
        f"model.latent_parameterization=epsilon with latent timesteps above {LARGEST_EPSILON_T} is degenerate: "
        "the noisy latent is the noise itself, copying the input solves the task and the text is ignored; "
        "use model.latent_parameterization=v_param or x0, "
        f"or loss.latent_t_mode=random with loss.cycle_latent_t_max at most {LARGEST_EPSILON_T}"
    )
    if not config.loss.allow_degenerate_epsilon:
        raise UserError(
            f"{problem} (loss.allow_degenerate_epsilon=true runs it all the same); see docs: explanation/objective"
        )
    return [problem]


def refuse_idle_rows(config: Config, rows: Counts) -> None:
    """Refuse data with rows that lack a half where no term would train on them, and keys about rows that are not there.

    `rows` are the training rows of each kind.
    """
    loss, (_, texts, latents) = config.loss, rows
    leave_out = "or leave such rows out with data.unpaired_per_batch=0"
    if not texts and not latents and config.data.unpaired_per_batch is not None:
        raise UserError(
            f"data.unpaired_per_batch={config.data.unpaired_per_batch} has no effect: every row of the data has a text "
            "and a latent; leave it out"
        )
    if loss.cycle_text_on == "unpaired" and not texts:
        raise UserError(
            "loss.cycle_text_on=unpaired: the data has no texts without latents; leave it out, or prepare data that "
            "has some (--encode-fraction, --unpaired)"
        )
    if config.data.unpaired_per_batch == 0:
        return
    if (texts or latents) and loss.loss_type != "cycle_vae":
        raise UserError(
            f"the data has {texts} texts without latents and {latents} latents without texts, which only "
            f"loss.loss_type=cycle_vae trains on; set it, {leave_out}; see docs: tutorials/scarce-pairs"
        )
    if texts and (loss.cycle_text_weight == 0 or loss.cycle_text_on == "paired"):
        raise UserError(
            f"the data has {texts} texts without latents, which only cycle_text trains on: set loss.cycle_text_weight "
            f"above 0 and loss.cycle_text_on=all or unpaired, {leave_out}; see docs: tutorials/scarce-pairs"
        )
    if latents and loss.cycle_latent_weight == 0:
        raise UserError(
            f"the data has {latents} latents without texts, which only cycle_latent trains on: set "
            f"loss.cycle_latent_weight above 0, {leave_out}; see docs: tutorials/scarce-pairs"
        )
    if (texts or latents) and loss.ce_over_padding:
        raise UserError(f"loss.ce_over_padding=true knows paired rows only; leave it out, {leave_out}")
