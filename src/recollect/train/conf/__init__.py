"""The settings of `recollect train`: one folder per group, one YAML file per option (a package, for Hydra to find)."""
