"""The files of a project by which DVC learns what params.yaml says."""
