"""The templates of the model card, the report page and the page of rejected pictures."""
