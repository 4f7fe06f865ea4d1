"""The databases of a project, which belong to MLflow and Prefect."""
