"""hydra/launcher=pytorchjob and `cyclevae k8s`: one PyTorchJob per run, whose pods begin with attempt.py."""
