"""The verbs that are stages of dvc.yaml: they turn files into files."""
