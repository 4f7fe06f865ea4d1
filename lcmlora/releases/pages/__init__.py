"""The pages of a release for people: the model card and the report page, with its pictures and plots."""
