"""A trained model as a directory that needs neither run nor data, and that directory on the Hugging Face hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from job.config import to_dict
from job.data.description import to_values, write_model_files
from job.data.optional import import_optional
from job.errors import UserError
from job.files import file_entry, whole_directory, write_json, write_text, write_whole
from job.model.weights import WEIGHTS_FILE, serialize
from job.model_card import CARD_FILE, FIGURES_KEY, held_out_figures, model_card
from job.trained import CONFIG_FILE, RECORD_KEY, WEIGHTS_KEY, Trained


def write_export(trained: Trained, out: Path) -> None:
    """Write a directory that `job.trained.load_trained` reads; it appears whole or not at all.

    UserError where `out` exists.
    """
    # The configuration may leave these to the data, which an export does not have.
    model = replace(trained.config.model, vocab_size=trained.vocab_size, latent_dim=trained.latent_dim)
    values = {
        "step": trained.step,
        "averaged": trained.averaged,
        "mask_token_id": trained.description.mask_token_id,
        "config": to_dict(replace(trained.config, model=model)),
        FIGURES_KEY: held_out_figures(trained),
    }
    description = json.dumps(to_values(trained.description))
    content = serialize(trained.weights, step=str(trained.step), **{RECORD_KEY: description})
    with whole_directory(out) as partial:
        write_whole(partial / WEIGHTS_FILE, lambda file: file.write(content))
        values[WEIGHTS_KEY] = file_entry(partial / WEIGHTS_FILE)
        write_model_files(partial, trained.description, trained.directories)
        write_text(partial / CARD_FILE, model_card(trained, out.name))
        write_json(partial / CONFIG_FILE, values, indent=2)


def refuse_repository(name: str) -> None:
    """UserError for a name that no repository of the hub can have."""
    checks = import_optional("huggingface_hub.utils", "huggingface_hub")
    try:
        checks.validate_repo_id(name)
    except checks.HFValidationError as error:
        raise UserError(f"--push-to {name}: {str(error).splitlines()[0]}") from error


def push(directory: Path, repository: str, private: bool, dry_run: bool) -> str:
    """Upload an exported directory to the hub, into a repository that is made if need be; returns what was sent.

    With `dry_run` nothing is sent, and nobody is asked. UserError for what the hub refuses.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if not dry_run:
        api = import_optional("huggingface_hub", "huggingface_hub").HfApi()
        try:
            api.create_repo(repository, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=directory)
        except Exception as error:  # the library's own kinds, and those of its transport
            raise UserError(f"--push-to {repository}: {str(error).splitlines()[0]}") from error
    listed = [f"  {path.stat().st_size:>12,}  {path.relative_to(directory)}" for path in files]
    return "\n".join([f"{repository}: {'would be sent' if dry_run else 'sent'}", *listed])
