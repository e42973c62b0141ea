from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from job.config import Config, config_dir, default_of, from_dict, keys, to_dict
from job.config_checks import validate
from job.errors import UserError

PRIMARY = ["demo", "mmdit_cycle_vae", "mmdit_cycle_vae_cluster", "mmdit_stable"]


def composed(name: str, *overrides: str) -> Config:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return OmegaConf.to_object(compose(name, list(overrides)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", PRIMARY)
@pytest.mark.parametrize("extra", [[], ["compat=lgdlm"]])
def test_every_configuration_is_valid(name: str, extra: list[str]) -> None:
    assert validate(composed(name, "data.dir=somewhere", *extra)) == []


@pytest.mark.parametrize("name", PRIMARY)
@pytest.mark.parametrize("loss", ["cycle_vae", "l2t", "t2l", "unconditional", "random", "sequential"])
def test_every_objective_can_be_chosen(name: str, loss: str) -> None:
    config = composed(name, "data.dir=somewhere", f"loss={loss}")
    validate(config)
    assert config.loss.loss_type == loss


def test_lgdlm_compatibility_wins_over_the_configuration_it_is_added_to() -> None:
    config = composed("demo", "compat=lgdlm")
    assert (config.model.n_heads, config.model.head_dim, config.model.qk_rmsnorm, config.model.time_scale) == (
        8,
        64,
        False,
        1.0,
    )
    assert config.loss.ce_over_padding
    assert config.loss.normalize_latent_loss
    assert not config.model.interpolate_schedule


def test_defaults_of_the_main_configuration() -> None:
    loss = composed("mmdit_cycle_vae").loss
    assert (loss.latent_t_mode, loss.cycle_stop_grad_latent) == ("full", True)
    assert (loss.cycle_text_weight, loss.cycle_latent_weight, loss.latent_loss_weight) == (0.1, 0.1, 0.1)
    assert composed("mmdit_cycle_vae").model.latent_parameterization == "v_param"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.train_batch_size=0"], ["training.train_batch_size=0", "more than 0"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan", "finite"]),
        (["loss.latent_t_mode=half"], ["loss.latent_t_mode=half", "full, random"]),
        (
            ["loss=l2t", "loss.cycle_text_weight=0.3"],
            ["loss.cycle_text_weight=0.3", "no effect", "loss.loss_type=cycle_vae"],
        ),
        (["loss.cycle_latent_t_max=0.5"], ["loss.cycle_latent_t_max=0.5", "loss.latent_t_mode=random"]),
        (
            ["loss.latent_t_mode=random", "loss.cycle_latent_t_min=0.99"],
            ["cycle_latent_t_min=0.99", "cycle_latent_t_max=0.98"],
        ),
        (["model.latent_parameterization=epsilon"], ["epsilon", "degenerate", "v_param", "allow_degenerate_epsilon"]),
        (
            ["model.latent_beta_min=0.1", "model.latent_beta_schedule=linear"],
            ["latent_beta_min=0.1", "latent_beta_max=0.02"],
        ),
        (
            ["loss=random", "training.mode_weights=[1,1]"],
            ["training.mode_weights=[1.0, 1.0]", "unconditional, l2t, t2l"],
        ),
        (["loss=sequential", "training.sequential_schedule=[]"], ["training.sequential_schedule", "empty"]),
        (["loss=sequential", "training.sequential_schedule=[{type: both, steps: 3}]"], ["type: both", "l2t"]),
        (
            ["training.global_batch_size=64", "training.gradient_accumulation_steps=2"],
            ["gradient_accumulation_steps", "global_batch_size"],
        ),
        (["training.warmup_steps=50", "training.num_train_steps=20"], ["training.warmup_steps=50", "longer", "=20"]),
        (["training.allow_changed=[training.lr]"], ["training.allow_changed", "training.lr", "optimizer.lr"]),
        ([f"training.seed={2**64}"], [f"training.seed={2**64}", "at most"]),
        (
            ["training.eval_batch_size=1", "logging.num_eval_batches=1"],
            ["training.eval_batch_size=1", "logging.num_eval_batches=1", "a single sample", "at least 2"],
        ),
        (["training.shard_size=8"], ["training.shard_size=8", "training.strategy=fsdp"]),
        (
            ["training.deterministic=true", "loss.cycle_latent_sampling=categorical"],
            ["training.deterministic=true", "cycle_latent_sampling=argmax"],
        ),
        (["training.fp8=true", "training.compile_model=true"], ["training.fp8=true", "training.compile_model=true"]),
        (["training.fp8=true", "model.n_heads=3", "model.head_dim=8"], ["training.fp8=true", "=24", "multiple of 16"]),
        (["data.dir=null"], ["data.dir", "job.prepare", "data=synthetic"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_key_and_the_remedy(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        validate(composed("mmdit_cycle_vae", "data.dir=somewhere", *overrides))
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("name", ["", " ", ".", "../x", "a/../../x", "/x", "a//b"])
def test_a_run_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"logging\.run_name="):
        validate(composed("mmdit_cycle_vae", "data.dir=somewhere", f"logging.run_name='{name}'"))


def test_a_run_name_may_have_a_directory_and_the_default_warmup_any_run() -> None:
    validate(composed("mmdit_cycle_vae", "data.dir=d", "logging.run_name=sweep/a", "training.num_train_steps=10"))
    validate(composed("mmdit_cycle_vae", "data.dir=d", f"training.seed={2**64 - 1}", "training.allow_changed=[data]"))


def test_degenerate_epsilon_can_be_insisted_on_with_a_warning() -> None:
    config = composed(
        "mmdit_cycle_vae", "data.dir=d", "model.latent_parameterization=epsilon", "loss.allow_degenerate_epsilon=true"
    )
    assert len(validate(config)) == 1
    assert (
        validate(
            composed(
                "mmdit_cycle_vae", "data.dir=d", "model.latent_parameterization=epsilon", "loss.latent_t_mode=random"
            )
        )
        == []
    )


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["decoding.steps=4"], "loss.text_t_mode=random"),
        (["decoding.corrections=2"], "loss.text_t_mode=random"),
        (["decoding.steps=4", "loss.text_t_mode=random"], None),
        (["decoding.steps=4", "loss.text_t_mode=random", "loss.text_full_share=1"], "loss.text_t_mode=random"),
        (["decoding.latent_steps=4"], "loss.latent_t_mode=random"),
        (["decoding.latent_steps=4", "loss.latent_t_mode=random"], None),
        (["decoding.steps=4", "decoding.latent_steps=4", "loss=random"], None),
    ],
)
def test_passes_that_were_not_trained_are_warned_of(overrides: list[str], named: str | None) -> None:
    warnings = validate(composed("mmdit_cycle_vae", "data.dir=d", *overrides))
    assert [named in warning for warning in warnings if named] == ([True] if named else [])
    assert len(warnings) == (named is not None)


@pytest.mark.parametrize("override", ["decoding.candidates=4", "decoding.top_p=0.9"])
def test_draws_need_a_temperature(override: str) -> None:
    with pytest.raises(UserError, match=f"{override}.*decoding.temperature"):
        validate(composed("mmdit_cycle_vae", "data.dir=d", override))
    validate(composed("mmdit_cycle_vae", "data.dir=d", override, "decoding.temperature=0.7"))


def test_a_configuration_survives_its_own_yaml() -> None:
    config = composed("mmdit_stable", "data.dir=somewhere", "loss=sequential")
    assert from_dict(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(to_dict(config))))) == config  # type: ignore[arg-type]


def test_every_key_has_a_meaning_and_a_default_that_its_own_rules_allow() -> None:
    for name, field in keys().items():
        assert field.metadata["help"], name
        default = default_of(field)
        assert default is None or not field.metadata["choices"] or default in field.metadata["choices"], name
